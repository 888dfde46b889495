"""A guarded adapter: what it serves, what it takes back, and what never changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import NNXClassifier, golden
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import jaxtta
from jaxtta import adapters, evaluate
from jaxtta.adapters.guard import (
    DECISIONS,
    REASONS,
    Canary,
    Policy,
    guarded,
    image_statistics,
    mixture,
    review,
    stream_axes,
)

SIDE = CLASSES = 6
PARAMS = {"weight": np.ones(1, np.float32)}


class Plain:
    """Its logits can be read from an image: the frozen model's red, the adapted model's green."""

    image_size, mixes_batch, feature_shape = SIDE, False, None

    def init_context(self, params, task):
        return ()

    def __call__(self, params, context, batch):
        return jaxtta.Outputs(batch.images[:, 0, :, 0], batch.images[:, 0, :, 1])


class Count(adapters.base.NamedTuple):
    """A state that counts its updates."""

    adapted: dict
    context: tuple = ()


def counting():
    """Answers with an image's second logits, and counts the batches that it has learnt from."""

    def init(params, key=None):
        return Count({"count": jnp.zeros(())})

    def step(params, state, batch):
        batch = jaxtta.models.as_batch(batch)
        logits = jnp.where(state.adapted["count"] > 0, batch.images[..., 1], batch.images[..., 0])
        count = state.adapted["count"] + batch.mask.any()
        return Count({"count": count}), adapters.Prediction(logits[:, 0], {})

    return adapters.Adapter(init, step)


MODEL = Plain()
GUARD = guarded(counting(), adapters.zero_shot(MODEL, None))
STEP = jax.jit(GUARD.step)


def images_of(frozen, adapted, level=0.0):
    """Images that the models answer with given logits; the third colour is the environment's."""
    images = np.zeros((len(frozen), SIDE, SIDE, 3), np.float32)
    images[:, 0, :, 0], images[:, 0, :, 1], images[..., 2] = frozen, adapted, level
    return images


def varied(batches=1, size=24, seed=0):
    """Logits (batches, size, classes) of sure answers in all classes."""
    rng = np.random.default_rng(seed)
    labels = rng.permuted(np.tile(np.arange(size) % CLASSES, (batches, 1)), axis=1)
    return (4 * np.eye(CLASSES)[labels] + 0.1 * rng.normal(size=(batches, size, CLASSES))).astype(
        np.float32
    )


def run(batches, state=None, step=STEP):
    """States and predictions of a stream."""
    state = GUARD.init(PARAMS) if state is None else state
    out = []
    for images in batches:
        state, prediction = step(PARAMS, state, images)
        out.append(prediction)
    return state, out


def words(predictions):
    """What was decided for each batch, and why."""
    each = [(int(p.metrics["decision"]), int(p.metrics["reason"])) for p in predictions]
    return [(DECISIONS[what], REASONS[why]) for what, why in each]


def equal(one, two):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@given(st.integers(0, 10**6), st.floats(0.1, 100))
def test_no_image_loses_more_than_the_share(seed, scale):
    rng = np.random.default_rng(seed)
    frozen, adapted = scale * rng.normal(size=(2, 24, CLASSES))
    _, out = run([images_of(frozen, adapted)] * 2)
    served, first = (jax.nn.softmax(x) for x in (out[-1].logits, out[-1].answers.reference))
    share = out[-1].metrics["share"]
    assert 0 <= share <= 1
    np.testing.assert_allclose(served.sum(-1), 1, rtol=1e-5)
    assert (served - (1 - share) * first).min() > -1e-5


@given(st.floats(-2, 6), st.integers(0, 10**6))
def test_the_temperature_undoes_a_scale(log_scale, seed):
    logits = np.random.default_rng(seed).normal(size=(16, CLASSES)).astype(np.float32)
    target = jaxtta.losses.entropy(logits).mean()
    found = mixture.log_temperature(logits * np.exp(log_scale), target, np.ones(16, bool))
    assert abs(float(found) - log_scale) < 0.05


def test_moments_are_those_of_all_images():
    rng = np.random.default_rng(0)
    each, mask = rng.normal(size=(3, 8, 5)), rng.random((3, 8)) < 0.7
    now = image_statistics.empty()
    for values, valid in zip(each, mask, strict=True):
        now = image_statistics.observe(now, values, valid, 24.0)
    np.testing.assert_allclose(now.mean, each[mask].mean(0), atol=1e-5)
    np.testing.assert_allclose(now.squares / now.count, each[mask].var(0), rtol=1e-4)


def test_a_masked_batch_leaves_the_state_bit_for_bit():
    state, _ = run([images_of(*varied(2))])
    images = images_of(*varied(2, seed=1))
    images[3] = np.nan
    empty = jaxtta.Batch(images, np.zeros(24, bool), np.arange(24))
    assert equal(STEP(PARAMS, state, empty)[0], state)


def test_padding_changes_nothing():
    state, _ = run([images_of(*varied(2))])
    images, mask = images_of(*varied(2, seed=1)), np.arange(24) < 20
    one, p = STEP(PARAMS, state, jaxtta.Batch(images, mask, np.arange(24)))
    images[20:] = np.nan
    two, q = STEP(PARAMS, state, jaxtta.Batch(images, mask, np.arange(24)))
    assert equal(one, two)
    assert equal(p.logits[:20], q.logits[:20])


def test_answers_that_are_not_finite_are_the_frozen_models():
    frozen, adapted = varied(2)
    state, _ = run([images_of(frozen, frozen)])
    broken = adapted.copy()
    broken[5] = np.inf
    _, p = STEP(PARAMS, state, images_of(frozen, broken))
    np.testing.assert_allclose(p.logits[5], jax.nn.log_softmax(frozen[5]), rtol=1e-5)
    assert np.isfinite(p.logits).all()


def test_a_collapse_is_taken_back_and_stops_at_last_until_the_environment_changes():
    frozen = varied(40)
    one_class = np.tile(4 * np.eye(CLASSES, dtype=np.float32)[0], (24, 1))
    state, out = run([images_of(x, one_class) for x in frozen])
    told = words(out)
    assert told[0] == ("adapt", "calm")
    assert [w for w in told if w[0] == "roll_back"] == 2 * [("roll_back", "narrowing")]
    assert ("stop", "strikes") in told
    assert told[-1] == ("stopped", "stopped_before")
    assert out[-1].metrics["share"] == 0
    assert equal(out[-1].logits.argmax(-1), frozen[-1].argmax(-1))
    assert float(state.inner.adapted["count"]) == 0
    rng = np.random.default_rng(0)
    other = [images_of(x, x, rng.uniform(0.8, 1, (24, 1, 1))) for x in frozen[:4]]
    state, out = run(other, state)
    assert ("forget", "environment_changed") in words(out)
    assert words(out)[-1] == ("adapt", "calm")
    assert float(state.inner.adapted["count"]) > 0


def test_a_model_whose_answers_are_not_finite_is_taken_back_and_not_kept():
    inner = counting()

    def step(params, state, batch):
        after, given = inner.step(params, state, batch)
        broken = state.adapted["count"] >= 2
        return after, given._replace(logits=jnp.where(broken, jnp.nan, given.logits))

    breaking = adapters.Adapter(inner.init, step)
    guard = jax.jit(guarded(breaking, adapters.zero_shot(MODEL, None)).step)
    frozen = varied(8)
    state, out = run([images_of(x, x) for x in frozen], step=guard)
    once = [*2 * [("adapt", "calm")], ("roll_back", "not_finite")]
    assert words(out) == [*once, *once, *once[:2]]
    assert float(state.inner.adapted["count"]) == 2
    for x, p in zip(frozen, out, strict=True):
        assert equal(p.logits.argmax(-1), x.argmax(-1))
    _, out = run([images_of(frozen[0], frozen[0])], state, guard)
    assert words(out) == [("stop", "strikes")]
    nan = images_of(frozen[0], frozen[0]) * np.nan  # the images' fault, not the model's
    _, out = run([nan], state, guard)
    assert words(out) == [("skip", "few_images")]


def test_the_first_failure_goes_back_to_a_snapshot_and_the_second_to_the_source():
    policy = Policy(environment=1e9)
    step = jax.jit(guarded(counting(), adapters.zero_shot(MODEL, None), policy).step)
    frozen = varied(48)
    one_class = np.tile(4 * np.eye(CLASSES, dtype=np.float32)[0], (24, 1))
    state, _ = run([images_of(x, x) for x in frozen[:20]], step=step)
    assert [*state.snapshots.adapted["count"]] == [8, 16]
    counts = []
    for x in frozen[20:40]:
        state, p = step(PARAMS, state, images_of(x, one_class))
        if words([p])[0][0] == "roll_back":
            counts.append(float(state.inner.adapted["count"]))
    assert counts == [8, 0]


def test_few_images_and_few_classes_are_not_learnt_from():
    few = np.arange(24) < 3
    images = images_of(*varied(2))
    state, p = STEP(PARAMS, GUARD.init(PARAMS), jaxtta.Batch(images, few, np.arange(24)))
    assert words([p]) == [("skip", "few_images")]
    assert float(state.inner.adapted["count"]) == 0
    one_class = np.tile(8 * np.eye(CLASSES, dtype=np.float32)[2], (24, 1))
    _, out = run([images_of(one_class, one_class)])
    assert words(out) == [("skip", "few_classes")]
    assert out[0].metrics["share"] == 0


def test_labels_decide_against_all_other_signals():
    frozen = varied(6)
    one_class = np.tile(4 * np.eye(CLASSES, dtype=np.float32)[0], (24, 1))
    calm, narrow = images_of(frozen[0], frozen[0]), images_of(frozen[0], one_class)
    start, _ = run([calm])
    right, wrong = np.ones(30, bool), np.zeros(30, bool)
    _, out = run([calm, calm], review(start, wrong, right))
    assert words(out) == [("stop", "labels"), ("stopped", "stopped_before")]
    _, out = run([narrow, narrow], review(start, right, wrong))
    assert words(out) == 2 * [("adapt", "calm")]
    assert out[-1].metrics["share"] == 1
    _, out = run([calm], review(start, right, right))
    assert words(out) == [("adapt", "calm")]


def test_a_canary_stops_for_good():
    labels = np.arange(24) % CLASSES
    logits = 4 * np.eye(CLASSES, dtype=np.float32)[labels]
    canary = Canary(images_of(logits, np.roll(logits, 1, -1)), labels)
    guard = guarded(counting(), adapters.zero_shot(MODEL, None), canary=canary)
    frozen = varied(8)
    step = jax.jit(guard.step)
    state, out = run([images_of(x, x) for x in frozen], guard.init(PARAMS), step)
    assert ("stop", "labels") in words(out)
    rng = np.random.default_rng(0)
    other = [images_of(x, x, rng.uniform(0.8, 1, (24, 1, 1))) for x in frozen]
    _, out = run(other, state, step)
    assert {w for w, _ in words(out)} == {"stopped"}


@pytest.fixture(scope="module")
def learner():
    """A real adapter of a small model."""
    model = NNXClassifier()
    inner = adapters.tent(model, None, optimizer=optax.sgd(0.5, momentum=0.9))
    adapter = guarded(inner, adapters.zero_shot(model, None))
    return model.params, adapter, jax.jit(adapter.step)


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 16, 32, 32, 3), np.uint8)


def test_streams_side_by_side_share_the_context(learner):
    params, adapter, step = learner
    alone = adapter.init(params)
    axes = stream_axes(alone)
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.vmap(lambda key: adapter.init(params, key), out_axes=axes)(keys)
    assert equal(together.context, alone.context)
    both = jax.jit(jax.vmap(adapter.step, in_axes=(None, axes, 0), out_axes=(axes, 0)))
    states = [alone, alone]
    for images in IMAGES.reshape(3, 2, *IMAGES.shape[1:]):
        together, prediction = both(params, together, images)
        for n in range(2):
            states[n], single = step(params, states[n], images[n])
            np.testing.assert_allclose(prediction.logits[n], single.logits, atol=1e-4)
            assert prediction.metrics["decision"][n] == single.metrics["decision"]


@pytest.mark.slow
def test_a_batch_over_devices_gives_the_same(learner):
    params, adapter, step = learner
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    one = two = adapter.init(params)
    for images in IMAGES[:3]:
        one, p = step(params, one, images)
        two, q = step(params, two, jax.device_put(images, split))
        np.testing.assert_allclose(p.logits, q.logits, atol=1e-4)


def test_a_donated_state_is_saved_and_goes_on(learner, tmp_path):
    params, adapter, step = learner
    donating = jax.jit(adapter.step, donate_argnums=1)
    state = adapter.init(params)
    for images in IMAGES[:3]:
        state, _ = donating(params, state, images)
    jaxtta.save_state(tmp_path / "guard.safetensors", state)
    loaded = jaxtta.load_state(tmp_path / "guard.safetensors", adapter.init(params))
    assert equal(loaded, state)
    assert equal(step(params, loaded, IMAGES[3])[0], step(params, state, IMAGES[3])[0])


SLOW = pytest.param("tnt:views=2,steps=0", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["tda:size=2", SLOW])
def test_guards_methods_without_training(tiny, name):
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("clip_forward")["token_ids"])
    spec = evaluate.parse_adapter(f"guarded:{name}")
    assert spec.guard and spec.text == f"guarded:{name}"
    sizes = np.full((16, 2), 24) if spec.needs_originals else None
    batch = jaxtta.Batch(IMAGES[0], np.ones(16, bool), np.arange(16), sizes)
    adapter = evaluate.make_adapter(spec, model, task)
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), batch)
    assert np.isfinite(prediction.logits).all()
    if sizes is not None:
        small = model.preprocess([Image.fromarray(x[:24, :24]) for x in IMAGES[0]])
        frozen = model(params, model.init_context(params, task), jaxtta.models.as_batch(small))
        np.testing.assert_allclose(prediction.answers.reference, frozen.logits, atol=0.2)


def test_what_is_wrong_is_said():
    frozen = adapters.zero_shot(MODEL, None)
    with pytest.raises(TypeError, match="reference is another adapter, expected zero_shot"):
        guarded(frozen, counting())
    with pytest.raises(TypeError, match="adapter is a int, expected an adapter"):
        guarded(3, frozen)
    with pytest.raises(TypeError, match="policy is a dict, expected a Policy"):
        guarded(frozen, frozen, {})
    with pytest.raises(ValueError, match="share is 2, expected 0 to 1"):
        Policy(share=2)
    with pytest.raises(ValueError, match="strikes is 0, expected a whole number, at least 1"):
        Policy(strikes=0)
    for name, value in (("alpha", 2), ("canary_every", 0), ("share", "x"), ("narrowing", np.nan)):
        with pytest.raises(ValueError, match=rf"^{name} is .*, expected "):
            Policy(**{name: value})
    with pytest.raises(ValueError, match=r"unknown adapter '', expected .* settings as in"):
        evaluate.parse_adapter("guarded:")
    with pytest.raises(ValueError, match="guarded:guarded:tent: is guarded twice"):
        evaluate.parse_adapter("guarded:guarded:tent")
