"""A guarded adapter: what it serves, what it takes back, and what never changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtta
from jaxtta import adapters, evaluate
from jaxtta.adapters.guard import DECISIONS, guarded, stream_axes

IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 32, 32, 3), np.uint8)


def equal(one, two):
    return all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    )


@pytest.fixture(scope="module")
def case(towers):
    model, params, task = towers["nnx"]
    inner = adapters.tent(model, task, optimizer=optax.sgd(0.5))
    adapter = guarded(inner, adapters.zero_shot(model, task))
    return params, adapter, jax.jit(adapter.step)


def test_serves_a_mixture_of_both_answers(case):
    params, adapter, step = case
    state = adapter.init(params)
    for images in IMAGES:
        state, prediction = step(params, state, images)
    share = prediction.metrics["share"]
    assert 0 < share <= 0.5
    served = jax.nn.softmax(prediction.logits)
    frozen = jax.nn.softmax(prediction.answers.reference)
    np.testing.assert_allclose(served.sum(-1), 1, rtol=1e-5)
    assert (served - (1 - share) * frozen).min() >= -1e-6
    assert DECISIONS[prediction.metrics["decision"]] == "adapt"


def test_a_masked_batch_leaves_the_state_bit_for_bit(case):
    params, adapter, step = case
    state, _ = step(params, adapter.init(params), IMAGES[0])
    empty = jaxtta.Batch(IMAGES[1], np.zeros(8, bool), np.arange(8))
    assert equal(step(params, state, empty)[0], state)


def test_images_that_are_not_finite_teach_nothing(case):
    params, adapter, step = case
    images = (IMAGES[0] / 255).astype(np.float32)
    state, _ = step(params, adapter.init(params), images)
    broken = images.copy()
    broken[2] = np.nan
    masked = jaxtta.Batch(images, np.arange(8) != 2, np.arange(8, 16))
    one, prediction = step(params, state, broken)
    two, _ = step(params, state, masked)
    assert equal(one.inner.adapted, two.inner.adapted)
    assert np.isfinite(prediction.logits[np.arange(8) != 2]).all()


def test_streams_side_by_side_share_the_context(case):
    params, adapter, step = case
    alone = adapter.init(params)
    axes = stream_axes(alone)
    keys = jax.random.split(jax.random.key(0), 2)
    together = jax.vmap(lambda key: adapter.init(params, key), out_axes=axes)(keys)
    assert jax.tree.map(jnp.shape, together.context) == jax.tree.map(jnp.shape, alone.context)
    both = jax.jit(jax.vmap(adapter.step, in_axes=(None, axes, 0), out_axes=(axes, 0)))
    states = [alone, alone]
    for images in IMAGES.reshape(4, 2, 8, 32, 32, 3):
        together, prediction = both(params, together, images)
        for n in range(2):
            states[n], single = step(params, states[n], images[n])
            np.testing.assert_allclose(prediction.logits[n], single.logits, atol=1e-4)


def test_a_donated_state_holds_no_array_twice(case):
    params, adapter, _ = case
    step = jax.jit(adapter.step, donate_argnums=1)
    state = adapter.init(params)
    for images in IMAGES[:3]:
        state, _ = step(params, state, images)
    assert int(state.seen) == 24


@pytest.mark.parametrize("name", ["tda", "rotta", "tnt:views=2,steps=1", "lame"])
def test_guards_any_adapter(towers, name):
    model, params, task = towers["vit"]
    spec = evaluate.parse_adapter(f"guarded:{name}")
    adapter = evaluate.make_adapter(spec, model, task)
    sizes = np.full((8, 2), 32) if spec.needs_originals else None
    batch = jaxtta.Batch(IMAGES[0], np.ones(8, bool), np.arange(8), sizes)
    step = jax.jit(adapter.step, donate_argnums=1)
    _, prediction = step(params, adapter.init(params), batch)
    assert np.isfinite(prediction.logits).all()
    assert not equal(prediction.logits, prediction.answers.reference)
