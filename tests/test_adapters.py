"""The laws that every adapter keeps, and BATCLIP's golden numbers."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import changes, golden, images_of, size_of
from flax.traverse_util import flatten_dict

import jaxtta
from jaxtta import adapters, losses, models, optim, tree

BATCH = 24


@pytest.fixture(scope="module")
def task():
    return models.task_from_token_ids(golden("clip_forward")["token_ids"])


@pytest.fixture(scope="module")
def images(tiny):
    return images_of(tiny[0], golden("batclip_adamw")["images"]).astype(np.float32)


METHODS = ("zero_shot", "tent", "batclip", "mgtta")
CASES = [
    (tower, method)
    for tower in ("vit", "resnet", "siglip", "supervised", "nnx")
    for method in METHODS
    if method != "mgtta" or tower not in ("resnet", "siglip")  # have no layer features
]


def make(method, model, task):
    """An adapter by its name, with settings that suit a tiny model."""
    if method != "mgtta":
        return getattr(adapters, method)(model, task)
    shape = model.feature_shape
    clean = models.FeatureStatistics(jnp.array(9.0), jnp.zeros(shape), 8 * jnp.ones(shape))
    phi = optim.init_meta_gradient_generator(jax.random.key(0))
    optimizer = optim.meta_gradient_generator(phi, 1e-3)
    return adapters.mgtta(model, task, optimizer=optimizer, statistics=clean)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def tower(case, towers):
    """The model with its parameters."""
    return towers[case[0]][:2]


@pytest.fixture(scope="module")
def adapter(case, towers):
    model, _, task = towers[case[0]]
    return make(case[1], model, task)


@pytest.fixture(scope="module")
def jitted(adapter):
    return jax.jit(adapter.step)


@pytest.fixture(scope="module")
def donating(adapter):
    """A step that is traced once at most, and takes its state."""
    yield jax.jit(chex.assert_max_traces(adapter.step, n=1), donate_argnums=1)
    chex.clear_trace_counter()


def test_no_step_adds_up_by_index(adapter, tower, jitted, images):
    """Accelerators run scatters one element after another; a step's gathers have inverses."""
    params = tower[1]
    step = jitted.trace(params, adapter.init(params), batch_of(images[0]))
    assert "scatter" not in str(step.jaxpr)


def batch_of(images, mask=None, index=None):
    mask = np.ones(len(images), bool) if mask is None else mask
    index = np.arange(len(images)) if index is None else index
    return jaxtta.Batch(images, mask, index)


def same(a, b):
    """Bit for bit."""
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def change(before, after):
    """All updates of a step as one vector."""
    leaves = jax.tree.map(lambda a, b: (np.asarray(b) - np.asarray(a)).ravel(), before, after)
    return np.concatenate([np.zeros(1), *jax.tree.leaves(leaves)])


def close_changes(a, b, tolerance=1e-3):
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("batclip_adamw", optax.adamw(1e-3, weight_decay=1e-2)),
        ("batclip_adam_l2", adapters.adam_with_l2(5e-4)),
    ],
)
def test_batclip_equals_the_published_runs(tiny, agrees, name, optimizer):
    model, params = tiny
    reference = golden(name)
    adapter = adapters.batclip(
        model, models.task_from_token_ids(reference["token_ids"]), optimizer=optimizer
    )
    state = adapter.init(params)
    step = jax.jit(adapter.step, donate_argnums=1)
    for t, images in enumerate(images_of(model, reference["images"])):
        state, prediction = step(params, state, images)
        agrees("batclip", "logits", prediction.logits, reference["logits"][t], 2e-4)
        for term in ("entropy", "image_text", "separation", "loss"):
            value, expected = prediction.metrics[term], reference[term][t]
            most = 1e-5 * max(1, abs(float(expected)))
            agrees("batclip", term.replace("image_text", "alignment"), value, expected, most)
        assert not prediction.metrics["skipped"]
    ours, theirs = changes(params, state.adapted, reference)
    agrees("batclip", "update of four steps", ours, theirs, norm=1e-3)


def test_published_number_of_adapted_parameters():
    from transformers import CLIPConfig

    model = models.from_config(CLIPConfig(vision_config={"patch_size": 16}))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    adapted, _ = tree.partition(shapes, tree.normalisation_parameters("both"))
    assert size_of(adapted) == 65_536
    assert size_of(shapes) == 149_620_737


@pytest.mark.parametrize("name", adapters.BATCLIP_PRESETS)
def test_presets_run(tiny, task, images, name):
    model, params = tiny
    for method, presets in (
        (adapters.batclip, adapters.BATCLIP_PRESETS),
        (adapters.tent, adapters.TENT_PRESETS),
    ):
        adapter = method(model, task, optimizer=presets[name].optimizer())
        state = adapter.init(params)
        moved, _ = jax.jit(adapter.step)(params, state, images[0])
        assert np.any(change(state.adapted, moved.adapted))


def test_tent_moves_only_the_image_tower_and_lowers_entropy(tiny, task, images):
    model, params = tiny
    adapter = adapters.tent(model, task, optimizer=optax.sgd(1e-2))
    state, step = adapter.init(params), jax.jit(adapter.step)
    assert set(state.adapted) == {"vision_model"}
    first = None
    for _ in range(5):
        state, prediction = step(params, state, images[0])
        first = prediction.metrics["entropy"] if first is None else first
    assert prediction.metrics["entropy"] < first


def test_zero_shot_is_the_model_itself(tiny, task, images):
    model, params = tiny
    adapter = adapters.zero_shot(model, task)
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[0])
    text = models.l2_normalize(jax.jit(model.encode_text)(params, task.token_ids[:, 0]))
    image = models.l2_normalize(jax.jit(model.encode_image)(params, model.normalize(images[0])))
    expected = np.exp(params["logit_scale"]) * image @ text.T
    np.testing.assert_allclose(prediction.logits, expected, atol=1e-4)


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_a_permuted_batch_gives_permuted_predictions_and_the_same_update(
    tower, adapter, jitted, images, seed
):
    params = tower[1]
    state = adapter.init(params)
    order = np.random.default_rng(seed).permutation(BATCH)
    moved, straight = jitted(params, state, batch_of(images[0]))
    moved2, permuted = jitted(params, state, batch_of(images[0][order], index=order))
    np.testing.assert_allclose(permuted.logits, straight.logits[order], atol=2e-4)
    close_changes(change(state.adapted, moved2.adapted), change(state.adapted, moved.adapted))


@hypothesis.given(
    valid=st.sampled_from([1, 7]),  # each a compilation
    filling=st.sampled_from([0.5, 1e6, np.nan]),
    seed=st.integers(0, 2**32 - 1),
)
def test_padding_changes_no_prediction_and_no_update(
    tower, adapter, jitted, images, valid, filling, seed
):
    """Whatever stands in the padding, wherever it stands."""
    params = tower[1]
    state = adapter.init(params)
    place = np.sort(np.random.default_rng(seed).permutation(BATCH)[:valid])
    mask = np.isin(np.arange(BATCH), place)
    padded = np.full_like(images[0], filling)
    padded[place] = images[0][:valid]
    moved, masked = jitted(params, state, batch_of(padded, mask, np.arange(BATCH)))
    alone, expected = jitted(params, state, batch_of(images[0][:valid]))
    np.testing.assert_allclose(masked.logits[place], expected.logits, atol=2e-4)
    close_changes(change(state.adapted, moved.adapted), change(state.adapted, alone.adapted))
    assert int(moved.seen) == int(alone.seen) == valid
    for name in expected.metrics:
        np.testing.assert_allclose(
            masked.metrics[name], expected.metrics[name], rtol=1e-3, atol=1e-4
        )


def test_a_fully_masked_batch_leaves_the_state_bit_identical(tower, adapter, jitted, images):
    params = tower[1]
    state, _ = jitted(params, adapter.init(params), batch_of(images[0]))  # with some moments
    after, prediction = jitted(params, state, batch_of(images[1], np.zeros(BATCH, bool)))
    same(state, after)
    assert not prediction.metrics.get("skipped", False)


def test_a_step_that_is_not_finite_is_skipped_and_says_so(tiny, task, images):
    model, params = tiny
    adapter = adapters.batclip(model, task)
    step = jax.jit(adapter.step)
    state, _ = step(params, adapter.init(params), images[0])
    spoilt = images[1].copy()
    spoilt[3, 0, 0, 0] = np.nan
    after, prediction = step(params, state, spoilt)
    same(state, after)
    assert prediction.metrics["skipped"]
    assert np.isnan(prediction.logits[3]).all()
    assert np.isfinite(np.delete(prediction.logits, 3, axis=0)).all()


def test_an_optimizer_state_that_overflows_is_skipped(tiny):
    """A finite gradient whose square is not would stop Adam for good."""
    adapter = adapters.online(
        lambda params, context, batch: (1e25 * params["w"].sum(), (batch.images, {})),
        lambda params: (),
        lambda path: True,
        optax.adam(1e-3),
    )
    params = {"w": jnp.ones(3)}
    state = adapter.init(params)
    after, prediction = jax.jit(adapter.step)(params, state, np.zeros((2, 4, 4, 3)))
    same(state, after)
    assert prediction.metrics["skipped"]


def test_an_update_that_is_not_finite_is_skipped(tiny, task, images):
    model, params = tiny
    adapter = adapters.batclip(model, task, optimizer=optax.sgd(jnp.inf))
    state = adapter.init(params)
    after, prediction = jax.jit(adapter.step)(params, state, images[0])
    same(state, after)
    assert prediction.metrics["skipped"]
    assert np.isfinite(prediction.metrics["loss"])


def test_init_twice_works_after_a_donated_step(tower, adapter, donating, images):
    params = tower[1]
    first, _ = donating(params, adapter.init(params), batch_of(images[0]))
    second, _ = donating(params, adapter.init(params), batch_of(images[0]))
    same(first, second)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_only_adapted_leaves_are_carried(tiny, task):
    """No leaf of the frozen tree outside `adapted` is copied, stored or shared."""
    model, params = tiny
    state = adapters.batclip(model, task).init(params)
    trainable = tree.normalisation_parameters("both")
    assert all(trainable("/".join(path)) for path in flatten_dict(state.adapted))
    shapes = jax.tree.map(jnp.shape, tree.partition(params, trainable)[0])
    assert jax.tree.map(jnp.shape, state.adapted) == shapes
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert not pointers & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
    beside = (state.optimizer, state.context)
    assert size_of(beside) < 3 * size_of(state.adapted)


def test_a_stream_compiles_once(tower, adapter, donating, images):
    params = tower[1]
    state = adapter.init(params)
    for t, mask in enumerate([BATCH, BATCH, 7, 0]):
        state, _ = donating(params, state, batch_of(images[t], np.arange(BATCH) < mask))


def test_a_new_task_of_the_same_shape_does_not_recompile(tiny, task, images):
    model, params = tiny
    adapter = adapters.batclip(model, task)
    step = jax.jit(chex.assert_max_traces(adapter.step, n=1))
    state = adapter.init(params)
    _, before = step(params, state, images[0])
    other = models.task_from_token_ids(task.token_ids[::-1])
    state = state._replace(context=jax.tree.map(jnp.asarray, model.prompts(other)))
    _, after = step(params, state, images[0])
    np.testing.assert_allclose(after.logits, before.logits[:, ::-1], atol=2e-4)
    chex.clear_trace_counter()


@pytest.mark.parametrize("method", METHODS)
def test_a_bare_array_is_a_full_batch_numbered_from_the_counter(towers, images, method):
    bare = jaxtta.models.as_batch(images[0], jnp.asarray(7))
    same(bare, batch_of(images[0], index=np.arange(7, 7 + BATCH)))
    model, params, task = towers["nnx"]
    adapter = make(method, model, task)
    step = jax.jit(adapter.step)
    state, prediction = step(params, adapter.init(params), images[0])
    assert int(state.seen) == BATCH
    _, expected = step(params, adapter.init(params), batch_of(images[0]))
    np.testing.assert_allclose(prediction.logits, expected.logits, atol=2e-4)


def test_a_batch_of_one_runs(tower, adapter, jitted, images):
    params = tower[1]
    state, prediction = jitted(params, adapter.init(params), batch_of(images[0][:1]))
    assert np.isfinite(prediction.logits).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("field", ["mask", "index"])
def test_a_mask_or_index_of_another_length_is_refused(tower, adapter, images, field):
    params = tower[1]
    batch = batch_of(images[0])._replace(**{field: np.ones(3, bool)})
    with pytest.raises(ValueError, match=rf"{field} has shape \(3,\) for 24 images"):
        adapter.step(params, adapter.init(params), batch)


def test_one_device_or_eight_give_the_same(tower, adapter, jitted, images):
    """The batch split over eight devices in the global view, parameters and state on all."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    params = tower[1]
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    assert mesh.size == 8
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["batch"], []))
    state = adapter.init(params)
    moved, expected = jitted(params, state, batch_of(images[0]))
    spread = jax.device_put(batch_of(images[0]), split)
    everywhere = jax.device_put((params, state), whole)
    moved8, prediction = jitted(*everywhere, spread)
    np.testing.assert_allclose(prediction.logits, expected.logits, atol=2e-4)
    close_changes(change(state.adapted, moved8.adapted), change(state.adapted, moved.adapted))


def test_streams_map_over_states(tower, adapter, jitted, images):
    """vmap over independent streams: one set of weights, one context, a state each."""
    params = tower[1]
    state = adapter.init(params)
    axes = adapters.State(0, 0, None, 0)
    stacked = jax.tree.map(lambda x: jnp.stack([x] * 3), state[:2] + state[3:4])
    states = adapters.State(*stacked[:2], state.context, stacked[2], state.fingerprint)
    mapped = jax.jit(
        jax.vmap(adapter.step, in_axes=(None, axes, 0), out_axes=(axes, 0)),
    )
    moved, predictions = mapped(params, states, images[:3])
    same(moved.context, state.context)
    for i in range(3):
        alone, expected = jitted(params, adapter.init(params), batch_of(images[i]))
        np.testing.assert_allclose(predictions.logits[i], expected.logits, atol=2e-4)
        one = jax.tree.map(lambda x, i=i: x[i], moved.adapted)
        start = adapter.init(params).adapted
        close_changes(change(start, one), change(start, alone.adapted))


def test_a_saved_state_goes_on_bit_for_bit(tower, adapter, jitted, images, tmp_path):
    params = tower[1]
    state, _ = jitted(params, adapter.init(params), batch_of(images[0]))
    jaxtta.save_state(tmp_path / "state.safetensors", state)
    loaded = jaxtta.load_state(tmp_path / "state.safetensors", like=adapter.init(params))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    same(loaded, state)
    batch = batch_of(images[1])
    same(jitted(params, loaded, batch), jitted(params, state, batch))


def test_a_state_of_another_model_or_method_is_refused(tower, adapter, towers, case, tmp_path):
    path = tmp_path / "state.safetensors"
    params = tower[1]
    jaxtta.save_state(path, adapter.init(params))
    other = jax.tree.map(lambda x: x, params)
    leaves, structure = jax.tree.flatten(other)
    leaves[-1] = leaves[-1] + 1
    with pytest.raises(ValueError, match=r"state.safetensors: .* another model"):
        jaxtta.load_state(path, like=adapter.init(jax.tree.unflatten(structure, leaves)))
    model, _, task = towers[case[0]]
    method = "zero_shot" if case[1] == "tent" else "tent"
    with pytest.raises(ValueError, match=r"state.safetensors: .* another method"):
        jaxtta.load_state(path, like=make(method, model, task).init(params))


def test_bfloat16_parameters_are_adapted_in_float32(images, task):
    from conftest import GOLDEN

    model, params = models.load(
        GOLDEN / "tiny-clip", dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16
    )
    adapter = adapters.batclip(model, task)
    state, step = adapter.init(params), jax.jit(adapter.step)
    after, prediction = step(params, state, images[0])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.adapted)} == {"float32"}
    assert prediction.logits.dtype == jnp.float32
    # steps of 5e-4 on scales near 1 are below bfloat16's resolution
    assert 1e-4 < np.abs(change(state.adapted, after.adapted)).max() < 1e-3


def test_hyperparameters_change_without_recompiling(tiny, task, images):
    model, params = tiny
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
    adapter = adapters.batclip(model, task, optimizer=optimizer)
    step = jax.jit(chex.assert_max_traces(adapter.step, n=1))
    moves = []
    for rate in (1e-3, 1e-2):
        state = adapter.init(params)
        state.optimizer.hyperparams["learning_rate"] = jnp.asarray(rate)
        after, _ = step(params, state, images[0])
        moves.append(np.linalg.norm(change(state.adapted, after.adapted)))
    assert moves[1] > 5 * moves[0]
    chex.clear_trace_counter()


def test_trainable_that_chooses_nothing_is_refused(tiny, task):
    model, params = tiny
    adapter = adapters.online(
        jaxtta.adapters.batclip_objective(model),
        lambda params: model.prompts(task),
        lambda path: "nothing" in path,
        optax.sgd(1.0),
    )
    with pytest.raises(ValueError, match="no parameter is chosen"):
        adapter.init(params)


def test_a_method_says_what_a_model_lacks(towers):
    """In one sentence, and before anything is computed."""
    clip, _, task = towers["vit"]
    for method in (adapters.zero_shot, adapters.tent, adapters.batclip, adapters.tnt):
        with pytest.raises(ValueError, match="task"):
            method(clip, None)
    supervised, supervised_params, _ = towers["supervised"]
    with pytest.raises(ValueError, match="task"):
        adapters.tent(supervised, task).init(supervised_params)
    with pytest.raises(ValueError, match="logit"):
        adapters.tnt(supervised, None)
    with pytest.raises(ValueError, match="no text tower"):
        jaxtta.zero_shot_task(supervised, ["cat", "dog"])
    resnet, _, _ = towers["resnet"]
    statistics = models.FeatureStatistics(jnp.array(9.0), jnp.zeros((3, 32)), jnp.ones((3, 32)))
    for name in ("resnet", "siglip"):
        model, _, task = towers[name]
        with pytest.raises(ValueError, match="layer features"):
            adapters.mgtta(model, task, optimizer=optax.sgd(1.0), statistics=statistics)
    with pytest.raises(ValueError, match="batch_norm"):
        adapters.tnt(resnet.with_batch_norm_statistics("batch"), task)

    class Plain:
        mixes_batch, feature_shape, image_size = False, None, 32

        def init_context(self, params, task):
            return ()

        def __call__(self, params, context, batch):
            features = batch.images.mean((1, 2)) * params["norm"]["scale"]
            return jaxtta.Outputs(features, features)

    params, images = {"norm": {"scale": jnp.ones(3)}}, jnp.ones((2, 32, 32, 3))
    adapter = adapters.batclip(Plain(), None)
    with pytest.raises(ValueError, match="class embeddings"):
        adapter.step(params, adapter.init(params), images)


@pytest.mark.parametrize("size", [24, 29])
def test_an_own_objective_need_not_think_of_padding(towers, images, size):
    """CONTRIBUTING's method on a ResNet whose batch norms take the batch's statistics."""
    model, params, task = towers["resnet"]
    model = model.with_batch_norm_statistics("batch")

    def objective(params, context, batch):
        logits = model(params, context, batch).logits
        loss = losses.masked_mean(losses.entropy(logits / 2.0), batch.mask)
        return loss, (logits, {})

    adapter = adapters.online(
        objective,
        lambda params: model.init_context(params, task),
        tree.normalisation_parameters("image"),
        optax.sgd(1e-3),
    )
    step = jax.jit(adapter.step)
    few = images[0][:4]
    alone, expected = step(params, adapter.init(params), few)
    padded, prediction = step(params, adapter.init(params), jaxtta.Batch.padded(few, size))
    np.testing.assert_allclose(prediction.logits[:4], expected.logits, atol=2e-4)
    start = adapter.init(params).adapted
    close_changes(change(start, padded.adapted), change(start, alone.adapted))


def test_tnt_on_a_resnet(towers, images):
    model, params, task = towers["resnet"]
    adapter = adapters.tnt(model, task, config=adapters.TNTConfig(views=4, select_fraction=0.5))
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[0][:2])
    np.testing.assert_allclose(np.exp(prediction.logits).sum(-1), 1, atol=1e-4)


def test_batches_are_padded():
    few = np.full((3, 4, 4, 3), 7, np.uint8)
    batch = jaxtta.Batch.padded(few, 5, start=10)
    assert batch.images.shape == (5, 4, 4, 3)
    assert batch.images.dtype == np.uint8
    np.testing.assert_array_equal(batch.images[:3], few)
    assert not batch.images[3:].any()
    assert batch.mask.tolist() == [True] * 3 + [False] * 2
    assert batch.index.tolist() == [10, 11, 12, 13, 14]
    with pytest.raises(ValueError, match="at most 2"):
        jaxtta.Batch.padded(few, 2)


def test_fingerprints_tell_parameters_apart():
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "b": jnp.arange(3)}
    own = tree.fingerprint(params)
    assert own == jax.jit(tree.fingerprint)(params)
    swapped = params["a"].at[0].set(params["a"][1]).at[1].set(params["a"][0])
    for other in (-params["a"], swapped, params["a"].at[3, 2].add(1e-6), params["a"][::-1]):
        assert tree.fingerprint(params | {"a": other}) != own
    odd = {"key": jax.random.key(0), "c": jnp.ones(2, jnp.complex64), "d": jnp.ones(2, bool)}
    assert tree.fingerprint(odd) != tree.fingerprint(odd | {"key": jax.random.key(1)})


def test_states_of_any_shape_are_saved(tmp_path):
    """Typed keys, bfloat16, many states in one file: bit for bit, and no other model's."""

    def state(fingerprint):
        adapted = {"w": jnp.asarray([1.5, -0.0], jnp.bfloat16)}
        optimizer = optax.add_noise(0.1, 0.5, jax.random.key(3)).init(adapted)
        seen = jnp.zeros((), jnp.int32)
        return [adapters.State(adapted, optimizer, (), seen, jnp.uint32(fingerprint))] * 2

    jaxtta.save_state(tmp_path / "s", state(7))
    loaded = jaxtta.load_state(tmp_path / "s", like=state(7))
    data = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    same(jax.tree.map(data, loaded), jax.tree.map(data, state(7)))
    with pytest.raises(ValueError, match="another model"):
        jaxtta.load_state(tmp_path / "s", like=state(8))


def test_keys_with_slashes_are_one_key():
    params = {"mlp/~/norm": {"scale": jnp.ones(2)}, "w": jnp.zeros(1)}
    chosen, others = tree.partition(params, lambda path: path == "mlp/~/norm/scale")
    assert set(chosen) == {"mlp/~/norm"}
    merged = tree.merge(params, jax.tree.map(lambda x: x + 1, chosen))
    assert set(merged) == set(params)
    assert merged["mlp/~/norm"]["scale"].tolist() == [2.0, 2.0]
    assert set(tree.merge(others, chosen)) == set(params)


def test_statistics_of_a_users_model(towers, images):
    model, params, _ = towers["nnx"]
    found = models.feature_statistics(model, params, [images[0]])
    assert found.mean.shape == model.feature_shape


def test_a_datasets_classes_in_another_order_are_refused():
    from types import SimpleNamespace

    from jaxtta.evaluate import task_for

    names = [f"class {number}" for number in range(10)]
    model = SimpleNamespace(class_names=tuple(names))
    assert task_for(model, names, ["{}"]) is None
    names[3], names[4] = names[4], names[3]
    with pytest.raises(ValueError, match="class 3"):
        task_for(model, names, ["{}"])
