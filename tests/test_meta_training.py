"""Meta-training differentiates what it says it does, and makes losses smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtta import optim
from jaxtta.optim import begin_epoch, init_meta_training, meta_step

RATE = 0.05
TARGETS = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)


def loss_of(adapted, target):
    """A quartic: its gradient depends on where one stands."""
    return ((adapted["a"] - target[:2]) ** 4).sum() + ((adapted["b"] - target[2:]) ** 2).sum()


@pytest.fixture
def phi():
    return optim.init_meta_gradient_generator(jax.random.key(0), 4)


ADAPTED = {"a": jnp.zeros(2), "b": jnp.ones(2)}


def by_hand(phi, adapted, targets, optimizer, truncation):
    """One epoch written out: plain differentiation through the updates."""
    generator = lambda phi: optim.meta_gradient_generator(phi, RATE)  # noqa: E731
    gradients = jax.grad(loss_of)(adapted, targets[0])
    memory, state, found = None, optimizer.init(phi), []
    for first in range(1, len(targets), truncation):
        window = targets[first : first + truncation]

        def total(phi, adapted=adapted, gradients=gradients, memory=memory, window=window):
            memory = generator(phi).init(adapted) if memory is None else memory
            losses = []
            for target in window:
                updates, memory = generator(phi).update(gradients, memory)
                adapted = optax.apply_updates(adapted, updates)
                losses.append(loss_of(adapted, target))
                gradients = jax.grad(loss_of)(jax.lax.stop_gradient(adapted), target)
            return sum(losses), (adapted, gradients, memory, losses)

        meta, (adapted, gradients, memory, losses) = jax.grad(total, has_aux=True)(phi)
        found += losses
        updates, state = optimizer.update(meta, state)
        phi = optax.apply_updates(phi, updates)
    updates, _ = generator(phi).update(gradients, memory)
    return phi, optax.apply_updates(adapted, updates), found


@pytest.mark.parametrize("truncation", [1, 2, 4])
def test_equal_to_plain_differentiation(phi, truncation):
    optimizer = optax.adam(1e-2)
    state = init_meta_training(phi, ADAPTED, optimizer)
    begin = jax.jit(begin_epoch(loss_of, RATE))
    step = jax.jit(meta_step(loss_of, optimizer, RATE))
    state, first = begin(state, TARGETS[0])
    losses = []
    for start in range(1, len(TARGETS), truncation):
        state, found = step(state, TARGETS[start : start + truncation])
        losses += found.tolist()
    expected_phi, adapted, expected = by_hand(phi, ADAPTED, TARGETS, optimizer, truncation)
    np.testing.assert_allclose(first, loss_of(ADAPTED, TARGETS[0]), rtol=1e-5)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for name in phi:
        np.testing.assert_allclose(state.phi[name], expected_phi[name], atol=1e-4)
    # the next epoch begins with the update that was pending, and with memories anew
    state, loss = begin(state, TARGETS[0])
    np.testing.assert_allclose(loss, loss_of(adapted, TARGETS[0]), rtol=1e-3)
    assert state.memory_is_initial


def test_the_generator_is_recomputed_in_the_backward_pass(phi):
    """Each update's inner steps are, so that K of them cost the memory of their states alone."""
    optimizer = optax.adam(1e-2)
    state = init_meta_training(phi, ADAPTED, optimizer)
    program = jax.make_jaxpr(meta_step(loss_of, optimizer, RATE))(state, TARGETS[:4])
    assert "checkpoint" in str(program) or "remat" in str(program)


def test_training_makes_the_losses_smaller(phi):
    """A target that stays, seen through noise: a steady hand is learnt."""
    noise = np.random.default_rng(1).normal(size=(60, 20, 4)).astype(np.float32)
    optimizer = optax.adam(1e-2)
    state = init_meta_training(phi, ADAPTED, optimizer)
    begin = jax.jit(begin_epoch(loss_of, RATE))
    step = jax.jit(meta_step(loss_of, optimizer, RATE))

    def steady(phi):
        """Loss on new noise after twenty updates from the start."""
        generator, adapted = optim.meta_gradient_generator(phi, RATE), ADAPTED
        memory = generator.init(adapted)
        for target in 1 + np.random.default_rng(2).normal(size=(20, 4)):
            updates, memory = generator.update(jax.grad(loss_of)(adapted, target), memory)
            adapted = optax.apply_updates(adapted, updates)
        return loss_of(adapted, jnp.ones(4))

    for epoch in noise:
        state, _ = begin(state._replace(adapted=ADAPTED, pending=jnp.asarray(False)), 1 + epoch[0])
        for start in range(1, 20):
            state, _ = step(state, 1 + epoch[start : start + 1])
    assert steady(state.phi) < 0.5 * steady(phi)
