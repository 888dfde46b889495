"""The laws that every adapter keeps, and BATCLIP's golden numbers."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import changes, golden, images_of, relative
from flax.traverse_util import flatten_dict

import jaxtta
from jaxtta import adapters, models, optim, tree

BATCH = 24


@pytest.fixture(scope="module")
def task():
    return models.task_from_token_ids(golden("clip_forward")["token_ids"])


@pytest.fixture(scope="module")
def images(tiny):
    return images_of(tiny[0], golden("batclip_adamw")["images"]).astype(np.float32)


def mgtta(model, task):
    clean = models.FeatureStatistics(jnp.array(9.0), jnp.zeros((3, 32)), 8 * jnp.ones((3, 32)))
    phi = optim.init_meta_gradient_generator(jax.random.key(0))
    return adapters.mgtta(model, task, clean, optim.meta_gradient_generator(phi, 1e-3))


MAKE = {name: getattr(adapters, name) for name in ("zero_shot", "tent", "batclip")}


@pytest.fixture(scope="module", params=[*MAKE, "mgtta"])
def adapter(request, tiny, task):
    return (MAKE | {"mgtta": mgtta})[request.param](tiny[0], task)


@pytest.fixture(scope="module")
def jitted(adapter):
    return jax.jit(adapter.step)


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
        ("batclip_adam_l2", adapters.adam_l2(5e-4)),
    ],
)
def test_batclip_equals_the_published_runs(tiny, name, optimizer):
    model, params = tiny
    reference = golden(name)
    adapter = adapters.batclip(model, models.task_from_token_ids(reference["token_ids"]), optimizer)
    state = adapter.init(params)
    step = jax.jit(adapter.step, donate_argnums=1)
    for t, images in enumerate(images_of(model, reference["images"])):
        state, prediction = step(params, state, images)
        assert np.abs(prediction.logits - reference["logits"][t]).max() < 2e-4
        for term in ("entropy", "image_text", "separation", "loss"):
            value = float(prediction.metrics[term])
            assert value == pytest.approx(float(reference[term][t]), rel=1e-5, abs=1e-5)
        assert not prediction.metrics["skipped"]
    ours, theirs = changes(params, state.adapted, reference)
    assert relative(ours, theirs) <= 1e-3


def test_published_number_of_adapted_parameters():
    from transformers import CLIPConfig

    model = models.from_config(CLIPConfig(vision_config={"patch_size": 16}))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    adapted, _ = tree.partition(shapes, tree.normalisation_parameters("both"))
    assert tree.count(adapted) == 65_536
    assert tree.count(shapes) == 149_620_737


@pytest.mark.parametrize("name", adapters.BATCLIP_PRESETS)
def test_presets_run(tiny, task, images, name):
    model, params = tiny
    for make, presets in (
        (adapters.batclip, adapters.BATCLIP_PRESETS),
        (adapters.tent, adapters.TENT_PRESETS),
    ):
        adapter = make(model, task, presets[name].optimizer())
        state = adapter.init(params)
        moved, _ = jax.jit(adapter.step)(params, state, images[0])
        assert np.any(change(state.adapted, moved.adapted))


def test_tent_moves_only_the_image_tower_and_lowers_entropy(tiny, task, images):
    model, params = tiny
    adapter = adapters.tent(model, task, optax.sgd(1e-2))
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
    text = models.unit(jax.jit(model.encode_text)(params, task.token_ids[:, 0]))
    image = models.unit(jax.jit(model.encode_image)(params, model.normalize(images[0])))
    expected = np.exp(params["logit_scale"]) * image @ text.T
    np.testing.assert_allclose(prediction.logits, expected, atol=1e-4)


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_a_permuted_batch_gives_permuted_predictions_and_the_same_update(
    tiny, adapter, jitted, images, seed
):
    params = tiny[1]
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
    tiny, adapter, jitted, images, valid, filling, seed
):
    """Whatever stands in the padding, wherever it stands."""
    params = tiny[1]
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


def test_a_fully_masked_batch_leaves_the_state_bit_identical(tiny, adapter, jitted, images):
    params = tiny[1]
    state, _ = jitted(params, adapter.init(params), images[0])  # with moments that are not zero
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
    adapter = adapters.batclip(model, task, optax.sgd(jnp.inf))
    state = adapter.init(params)
    after, prediction = jax.jit(adapter.step)(params, state, images[0])
    same(state, after)
    assert prediction.metrics["skipped"]
    assert np.isfinite(prediction.metrics["loss"])


def test_init_twice_works_after_a_donated_step(tiny, adapter, images):
    params = tiny[1]
    step = jax.jit(adapter.step, donate_argnums=1)
    first, _ = step(params, adapter.init(params), images[0])
    second, _ = step(params, adapter.init(params), images[0])
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
    assert tree.count(beside) < 3 * tree.count(state.adapted)


def test_a_stream_compiles_once(tiny, adapter, images):
    params = tiny[1]
    step = jax.jit(chex.assert_max_traces(adapter.step, n=1))
    state = adapter.init(params)
    for t, mask in enumerate([BATCH, BATCH, 7, 0]):
        state, _ = step(params, state, batch_of(images[t], np.arange(BATCH) < mask))
    chex.clear_trace_counter()


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


def test_a_bare_array_is_a_full_batch_numbered_from_the_counter(tiny, adapter, jitted, images):
    bare = jaxtta.objectives.as_batch(images[0], jnp.asarray(7))
    same(bare, batch_of(images[0], index=np.arange(7, 7 + BATCH)))
    state, prediction = jitted(tiny[1], adapter.init(tiny[1]), images[0])
    assert int(state.seen) == BATCH
    _, expected = jitted(tiny[1], adapter.init(tiny[1]), batch_of(images[0]))
    np.testing.assert_allclose(prediction.logits, expected.logits, atol=2e-4)


def test_a_batch_of_one_runs(tiny, adapter, jitted, images):
    params = tiny[1]
    state, prediction = jitted(params, adapter.init(params), images[0][:1])
    assert np.isfinite(prediction.logits).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("field", ["mask", "index"])
def test_a_mask_or_index_of_another_length_is_refused(tiny, adapter, images, field):
    params = tiny[1]
    batch = batch_of(images[0])._replace(**{field: np.ones(3, bool)})
    with pytest.raises(ValueError, match=rf"{field} has shape \(3,\) for 24 images"):
        adapter.step(params, adapter.init(params), batch)


def test_one_device_or_eight_give_the_same(tiny, adapter, jitted, images):
    """The batch split over eight devices in the global view, parameters and state on all."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    params = tiny[1]
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


def test_streams_map_over_states(tiny, adapter, jitted, images):
    """vmap over independent streams: one set of weights, a state each."""
    params = tiny[1]
    states = jax.tree.map(lambda *x: jnp.stack(x), *[adapter.init(params)] * 3)
    mapped = jax.jit(jax.vmap(adapter.step, in_axes=(None, 0, 0)))
    moved, predictions = mapped(params, states, images[:3])
    for i in range(3):
        alone, expected = jitted(params, adapter.init(params), images[i])
        np.testing.assert_allclose(predictions.logits[i], expected.logits, atol=2e-4)
        one = jax.tree.map(lambda x, i=i: x[i], moved.adapted)
        start = adapter.init(params).adapted
        close_changes(change(start, one), change(start, alone.adapted))


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
    adapter = adapters.batclip(model, task, optimizer)
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
        jaxtta.objectives.batclip(model),
        lambda params: model.prompts(task),
        lambda path: "nothing" in path,
        optax.sgd(1.0),
    )
    with pytest.raises(ValueError, match="no parameter is chosen"):
        adapter.init(params)
