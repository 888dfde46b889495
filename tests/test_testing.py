"""The laws for methods of one's own hold for those of the package, and find what breaks them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxtta
from jaxtta.adapters import Adapter
from jaxtta.testing import check_adapter

LOUD = {"optimizer": optax.sgd(0.05, momentum=0.9)}


@pytest.fixture
def given(towers):
    model, params, task = towers["vit"]
    side = model.image_size
    images = np.random.default_rng(0).integers(0, 256, (6, side, side, 3), np.uint8)
    return model, params, task, images


@pytest.mark.parametrize("name", ["zero_shot", "tent", "guarded"])
def test_the_packages_methods_keep_the_laws(given, name):
    model, params, task, images = given
    zero_shot = jaxtta.adapters.zero_shot(model, task)
    tent = jaxtta.adapters.tent(model, task, **LOUD)
    made = {"zero_shot": zero_shot, "tent": tent, "guarded": jaxtta.guarded(tent, zero_shot)}
    check_adapter(made[name], params, images)


def test_a_mean_over_the_padding_is_found(given):
    model, params, task, images = given

    def objective(params, context, batch):
        logits = model(params, context, batch).logits
        return jaxtta.losses.entropy(logits).mean(), (logits, {})

    adapter = jaxtta.adapters.online(
        objective,
        context=lambda params: model.init_context(params, task),
        trainable=jaxtta.tree.normalisation_parameters("image"),
        **LOUD,
    )
    with pytest.raises(
        AssertionError, match=r"padding changes the update: does each mean .*batch.mask"
    ):
        check_adapter(adapter, params, images)


def counting(step):
    """A method without parameters; its logits are the images' means, its state a number."""
    init = lambda params, key=None: {"seen": jnp.zeros(())}  # noqa: E731
    return Adapter(init, step)


def logits_of(batch):
    return jnp.where(batch.mask[:, None], jnp.asarray(batch.images).mean((1, 2)), 0)


def with_state(change, logits=lambda batch: logits_of(batch)):
    def step(params, state, batch):
        return change(state, batch), jaxtta.Prediction(logits(batch), {})

    return counting(step)


BROKEN = {
    "logits have shape": lambda: with_state(lambda s, b: s, lambda b: logits_of(b)[0]),
    "not finite": lambda: with_state(lambda s, b: s, lambda b: logits_of(b) / 0),
    "changes the predictions: does": lambda: with_state(
        lambda s, b: s, lambda b: logits_of(b) + jnp.asarray(b.images).mean()
    ),
    "a fully masked batch": lambda: with_state(
        lambda s, b: {"seen": s["seen"] + jnp.where(b.mask.any(), 0.0, 1.0)}
    ),
    "the order of a batch's images changes the update": lambda: with_state(
        lambda s, b: {
            "seen": s["seen"] + jnp.where(b.mask.any(), jnp.asarray(b.images)[0, 0, 0, 0], 0)
        }
    ),
    "an image that is not a number": lambda: with_state(
        lambda s, b: {"seen": s["seen"] + (logits_of(b)).sum()}
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_each_law_is_found_broken(given, message):
    with pytest.raises(AssertionError, match=message):
        check_adapter(BROKEN[message](), {"w": jnp.ones(2)}, given[3])


def test_state_that_the_second_time_differs_is_found(given):
    calls = []

    def init(params, key=None):
        calls.append(None)
        return {"seen": jnp.zeros(()) + (len(calls) > 1)}

    step = with_state(lambda s, b: s).step
    with pytest.raises(AssertionError, match="the second time"):
        check_adapter(Adapter(init, step), {"w": jnp.ones(2)}, given[3])


def test_a_few_images_are_too_few(given):
    with pytest.raises(AssertionError, match="3 images, expected at least four"):
        check_adapter(with_state(lambda s, b: s), {}, jax.device_get(given[3][:3]))
