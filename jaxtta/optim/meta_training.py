"""Training the meta gradient generator: by what its updates do to the next batches' losses.

    state = init_meta_training(phi, adapted, optimizer)
    state, loss = begin_epoch(loss_of, 1e-4)(state, first)        # no gradient for phi yet
    state, losses = meta_step(loss_of, optimizer, 1e-4)(state, batches)

`loss_of(adapted, batch)` is any loss of the adapted parameters: no labels, no model in here. What
the generator sees of a gradient is constant, so a batch costs one forward and one backward pass of
the model, however many updates are differentiated through.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtta.optim.meta_gradient import Phi, meta_gradient_generator

Array = jax.Array
Loss = Callable[[Any, Any], Array]


class MetaState(NamedTuple):
    """Where meta-training stands.

    Attributes:
        phi: the generator's weights.
        optimizer: state of the optimiser that trains them.
        adapted: the model's parameters that the generator updates.
        gradients: those of the last batch, whose update is still to be made.
        memory: the generator's state before that update.
        pending: () bool, whether there is such an update; false before the first batch.
        fresh: () bool, whether the memory is still what `phi` says it begins as.
    """

    phi: Phi
    optimizer: Any
    adapted: Any
    gradients: Any
    memory: Any
    pending: Array
    fresh: Array


def init_meta_training(
    phi: Phi, adapted: Any, optimizer: optax.GradientTransformation
) -> MetaState:
    """Begin.

    Args:
        phi: weights to start from.
        adapted: the model's parameters that are adapted; they go on from epoch to epoch.
        optimizer: trains `phi`.

    Returns:
        The state.
    """
    phi = jax.tree.map(jnp.asarray, phi)
    adapted = jax.tree.map(jnp.asarray, adapted)
    zeros = jax.tree.map(jnp.zeros_like, adapted)
    memory = meta_gradient_generator(phi, 1.0).init(adapted)
    no = jnp.asarray(False)
    return MetaState(phi, optimizer.init(phi), adapted, zeros, memory, no, no)


def _move(phi: Phi, state: MetaState, learning_rate: float) -> tuple[Any, Any]:
    """Make the pending update: the parameters and the memory after it."""
    generator = meta_gradient_generator(phi, learning_rate)
    memory = optax.tree.where(state.fresh, generator.init(state.adapted), state.memory)
    updates, memory = generator.update(state.gradients, memory)
    return optax.apply_updates(state.adapted, updates), memory


def begin_epoch(
    loss_of: Loss, learning_rate: float
) -> Callable[[MetaState, Any], tuple[MetaState, Array]]:
    """Start an epoch: moments and memory anew, the model as the last epoch left it.

    Args:
        loss_of: of adapted parameters and a batch.
        learning_rate: of the generator's updates.

    Returns:
        `begin(state, batch) -> (state, loss)`; the first batch gives `phi` no gradient.
    """

    def begin(state: MetaState, batch: Any) -> tuple[MetaState, Array]:
        moved, _ = _move(state.phi, state, learning_rate)
        adapted = optax.tree.where(state.pending, moved, state.adapted)
        loss, gradients = jax.value_and_grad(loss_of)(adapted, batch)
        yes = jnp.asarray(True)
        state = state._replace(adapted=adapted, gradients=gradients, pending=yes, fresh=yes)
        return state, loss

    return begin


def meta_step(
    loss_of: Loss, optimizer: optax.GradientTransformation, learning_rate: float
) -> Callable[[MetaState, Any], tuple[MetaState, Array]]:
    """Train `phi` by the losses of K batches, through the updates made before each of them.

    With K = 1 this is the published one-step truncation: a loss is differentiated through the last
    update alone, whose memories are constant.

    Args:
        loss_of: of adapted parameters and a batch.
        optimizer: trains `phi`.
        learning_rate: of the generator's updates.

    Returns:
        `step(state, batches) -> (state, losses (K,))`; every leaf of `batches` has K in front.

    References:
        https://arxiv.org/abs/2412.16901
    """
    # For the backward pass the states between updates are kept, not what the generator computes.
    move = jax.checkpoint(_move, static_argnums=2)

    def losses_of(
        phi: Phi, state: MetaState, batches: Any
    ) -> tuple[Array, tuple[MetaState, Array]]:
        def turn(state: MetaState, batch: Any) -> tuple[MetaState, tuple[Array, Array]]:
            adapted, memory = move(phi, state, learning_rate)
            fixed = jax.lax.stop_gradient(adapted)
            loss, gradients = jax.value_and_grad(loss_of)(fixed, batch)
            # The same derivative as the loss's, without a second pass through the model.
            surrogate = optax.tree.vdot(gradients, adapted)
            state = state._replace(
                adapted=adapted,
                gradients=gradients,
                memory=memory,
                fresh=jnp.asarray(False),
            )
            return state, (surrogate, loss)

        state, (surrogates, losses) = jax.lax.scan(turn, state, batches)
        return surrogates.sum(), (state, losses)

    def step(state: MetaState, batches: Any) -> tuple[MetaState, Array]:
        differentiate = jax.grad(losses_of, has_aux=True)
        meta_gradient, (after, losses) = differentiate(state.phi, state, batches)
        updates, optimizer_state = optimizer.update(meta_gradient, state.optimizer, state.phi)
        phi = optax.apply_updates(state.phi, updates)
        # The pending update, of the last batch's gradient, is made by the new weights.
        return after._replace(phi=phi, optimizer=optimizer_state), losses

    return step
