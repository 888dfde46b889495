"""Blocks under one loop give what unrolled blocks give, and are compiled once for all."""

import contextlib
import dataclasses
import functools
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERIMENTS, GOLDEN, relative
from transformers import CLIPConfig, SiglipConfig, ViTConfig

import jaxtta
from jaxtta import adapters, continual, models, optim, parallel
from jaxtta.cli.options import ModelOptions

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
TEXT = SIZES | {"vocab_size": 64, "max_position_embeddings": 12}
VISION = SIZES | {"image_size": 16, "patch_size": 8}
LENGTHS = ((5, 7), (6, 9), (12, 5), (8, 8))  # of the prompts: 4 classes, 2 templates


def make(kind, layers=3, **options):
    """A small model of a kind, and a task for it."""
    deep = {"num_hidden_layers": layers}
    ids = np.random.default_rng(0).integers(1, 62, (4, 2, 12))
    if kind == "supervised":
        return models.classifier_from_config(ViTConfig(**VISION, **deep), **options), None
    config, of = CLIPConfig, models.from_config
    if kind == "siglip":
        config, of = SiglipConfig, models.siglip_from_config
    else:
        ids[:, :, :2] = 62, 7  # shared
        for prompt, length in zip(ids.reshape(8, 12), np.ravel(LENGTHS), strict=True):
            prompt[length - 1 :] = 63
    # The text tower has a block more, so that no loop is taken for another.
    text = TEXT | {"num_hidden_layers": layers + 1, "eos_token_id": 63}
    made = of(config(vision_config=VISION | deep, text_config=text), **options)
    return made, models.task_from_token_ids(ids)


@pytest.fixture(scope="module", params=["clip", "siglip", "supervised"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def params(kind):
    """Parameters none of which is 0 or 1, so that every one of them counts."""
    drawn = jax.jit(make(kind)[0].init)(jax.random.key(0))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.float32(0.1 * random.normal(size=x.shape)), drawn)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).random((3, 8, 16, 16, 3), np.float32)


def adapter_of(method, model, task):
    """An adapter by its name."""
    if method != "mgtta":
        return getattr(adapters, method)(model, task)
    ones = jnp.ones(model.feature_shape)
    clean = models.FeatureStatistics(jnp.array(9.0), 0 * ones, ones)
    phi = optim.init_meta_gradient_generator(jax.random.key(0))
    optimizer = optim.meta_gradient_generator(phi, 1e-3)
    return adapters.mgtta(model, task, optimizer=optimizer, statistics=clean)


@functools.cache
def pair_of_adapters(method, kind):
    """The same adapter of unrolled and of scanned blocks."""
    if method == "mgtta" and kind == "siglip":
        pytest.skip("SigLIP has no layer features")
    return [adapter_of(method, *make(kind, scan=scan)) for scan in (False, True)]


def close(ours, reference, tolerance=1e-5):
    """Every leaf to a tolerance relative to the norm of all."""
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    leaves = [*zip(*map(jax.tree.leaves, (ours, reference)), strict=True)]
    norm = np.sqrt(sum(np.square(b).sum() for _, b in leaves))
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * norm)


@pytest.mark.parametrize(("all_tokens", "remat"), [(True, False), (False, True)])
def test_features_and_gradients_are_those_of_unrolled_blocks(
    kind, params, images, all_tokens, remat
):
    def features_and_gradients(model):
        def loss(params):
            arguments = {"params": params["vision_model"]}, model.normalize(images[0])
            out = model.vision.apply(*arguments, all_tokens=all_tokens)
            return sum(jnp.sin(x).sum() for x in jax.tree.leaves(out)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    unrolled, scanned = make(kind)[0], make(kind, scan=True, remat=remat)[0]
    close(features_and_gradients(scanned), features_and_gradients(unrolled))


@pytest.mark.parametrize("remat", [False, True])
def test_texts_and_gradients_are_those_of_unrolled_blocks(kind, params, remat):
    if kind == "supervised":
        pytest.skip("has no text tower")

    def texts_and_gradients(model, task):
        def loss(params):
            embeddings = model.class_embeddings(params, model.prompts(task))
            return jnp.sin(9 * embeddings).sum(), embeddings

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    scanned = texts_and_gradients(*make(kind, scan=True, remat=remat))
    close(scanned, texts_and_gradients(*make(kind)))


@pytest.mark.parametrize("method", ["tent", "batclip", "mgtta"])
def test_steps_adapt_as_with_unrolled_blocks(kind, params, images, method):
    ends = []
    for adapter in pair_of_adapters(method, kind):
        state, step = adapter.init(params), jax.jit(adapter.step)
        start = state.adapted
        for batch in images[:2]:
            state, prediction = step(params, state, batch)
        ends.append((jax.tree.map(jnp.subtract, state.adapted, start), prediction.logits))
    assert relative(ends[1][1], ends[0][1]) < 1e-5
    close(ends[1][0], ends[0][0], 1e-4)  # the change alone, a thousandth of the parameters


def test_scanned_blocks_adapt_a_batch_that_lies_on_several_devices(params, images, kind):
    """Also where each device has a part of the prompts."""
    if kind == "supervised":
        pytest.skip("has no text tower")
    mesh, ends = parallel.mesh(1, 8), []
    for adapter in pair_of_adapters("batclip", kind):
        whole = parallel.replicate((params, adapter.init(params)), mesh)
        batch = jax.device_put(images[0], parallel.batch_sharding(mesh))
        with jax.set_mesh(mesh) if ends else contextlib.nullcontext():
            state, prediction = jax.jit(adapter.step)(*whole, batch)
        change = jax.tree.map(jnp.subtract, state.adapted, whole[1].adapted)
        ends.append((change, prediction.logits))
    assert relative(ends[1][1], ends[0][1]) < 1e-5
    close(ends[1][0], ends[0][0], 1e-4)


@pytest.mark.parametrize("method", ["zero_shot", "tent", "batclip", "mgtta"])
def test_no_operation_is_added(kind, params, images, method, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS.parent / "benchmarks")
    from jax_steps import count_flops

    counts = []
    for adapter in pair_of_adapters(method, kind):
        traced = jax.jit(adapter.step).trace(params, adapter.init(params), images[0])
        counts.append(count_flops(traced.jaxpr.jaxpr))
    sys.modules.pop("jax_steps"), sys.modules.pop("cases")
    assert counts[0] == counts[1]


def test_blocks_are_compiled_once_whatever_their_number(images):
    def products(layers):
        model, task = make("clip", layers, scan=True)
        adapter = adapters.batclip(model, task)
        drawn = jax.eval_shape(model.init, jax.random.key(0))
        step = jax.jit(adapter.step).lower(drawn, jax.eval_shape(adapter.init, drawn), images[0])
        return step.as_text().count("dot_general")

    assert products(4) == products(7) > 0


@pytest.mark.parametrize("read", ["pooled", "layer_features"])
def test_no_stack_of_hidden_states_is_kept_that_nobody_reads(images, read):
    """Nor computed: two blocks of 8 images of 5 tokens (the class token and 4 patches)."""
    model, _ = make("supervised", scan=True)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def compiled(*fields):
        def features(params, images):
            out = model.image_features(params, model.normalize(images))
            return [getattr(out, field) for field in fields]

        return jax.jit(features).lower(params, images[0]).compile().as_text()

    assert "f32[2,16,32]" in compiled(read)  # the stacked kernels
    assert "f32[2,8,5,16]" in compiled(read, "hidden_states")
    assert "f32[2,8,5,16]" not in compiled(read)


def test_initial_parameters_do_not_depend_on_it(kind):
    drawn = [make(kind, scan=scan)[0].init(jax.random.key(3)) for scan in (False, True)]
    jax.tree.map(np.testing.assert_array_equal, *drawn)


@pytest.mark.parametrize("layers", [1, 2])
def test_shallow_towers_run(images, layers):
    model, task = make("clip", layers, scan=True)
    adapter = adapters.batclip(model, task)
    drawn = jax.jit(model.init)(jax.random.key(0))
    _, prediction = jax.jit(adapter.step)(drawn, adapter.init(drawn), images[0])
    assert prediction.logits.shape == (8, 4)


def test_a_state_goes_on_with_the_other_kind_of_blocks(kind, params, images, tmp_path):
    unrolled, scanned = pair_of_adapters("tent", kind)
    state, _ = jax.jit(unrolled.step)(params, unrolled.init(params), images[0])
    jaxtta.save_state(tmp_path / "state", state)
    loaded = jaxtta.load_state(tmp_path / "state", like=scanned.init(params))
    moved = [
        jax.jit(adapter.step)(params, x, images[1])[0].adapted
        for adapter, x in ((scanned, loaded), (unrolled, state))
    ]
    close(*moved)


def test_streams_map_over_states(params, images, kind):
    scanned = pair_of_adapters("batclip" if kind == "clip" else "tent", kind)[1]
    step, state = jax.jit(scanned.step), scanned.init(params)
    states = jax.tree.map(lambda x: jnp.stack([x] * 3), state)
    moved, predictions = jax.jit(jax.vmap(scanned.step, (None, 0, 0)))(params, states, images)
    for i, batch in enumerate(images):
        alone, expected = step(params, state, batch)
        np.testing.assert_allclose(predictions.logits[i], expected.logits, atol=1e-5)
        close(jax.tree.map(lambda x, i=i: x[i], moved.adapted), alone.adapted)


def test_a_batch_is_split_over_eight_devices(kind, params, images):
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    scanned = pair_of_adapters("tent", kind)[1]
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    assert mesh.size == 8
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["batch"], []))
    step, state = jax.jit(scanned.step), scanned.init(params)
    alone, expected = step(params, state, images[0])
    everywhere = jax.device_put((params, state), whole)
    moved, prediction = step(*everywhere, jax.device_put(images[0], split))
    np.testing.assert_allclose(prediction.logits, expected.logits, atol=1e-5)
    close(moved.adapted, alone.adapted)


def test_inputs_of_kernels_are_recorded(images):
    model, scanned = (make("clip", scan=scan)[0] for scan in (False, True))
    drawn = jax.jit(model.init)(jax.random.key(0))
    recorded = [
        jax.jit(functools.partial(continual.kernel_inputs, m))(drawn, images[0])
        for m in (scanned, model)
    ]
    assert len(recorded[0]) == 2 * 3 + 1
    close(*recorded)


def test_a_missing_block_is_named(images):
    model, _ = make("clip", scan=True)
    drawn = jax.jit(model.init)(jax.random.key(0))
    del drawn["vision_model"]["encoder"]["layers"]["1"]
    with pytest.raises(flax.errors.ScopeParamNotFoundError, match=r"encoder/layers/1"):
        model.encode_image(drawn, images[0])


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip", "openclip-vit", "openclip-resnet"])
def test_checkpoints_are_loaded_with_it(name):
    plain, scanned = (models.load(GOLDEN / name, scan=scan)[0] for scan in (False, True))
    assert scanned.text.arch == plain.text.arch._replace(scan=True)
    if name == "openclip-resnet":  # whose image tower has blocks of different shapes
        assert scanned.vision == plain.vision
    else:
        assert scanned.vision.arch == plain.vision.arch._replace(scan=True)
    assert models.model_settings(scanned) == models.model_settings(plain)


def test_the_command_line_has_it():
    model, _ = ModelOptions(str(GOLDEN / "tiny-clip"), scan_blocks=True).load()
    assert dataclasses.asdict(ModelOptions())["scan_blocks"] is False
    assert model.vision.arch.scan
