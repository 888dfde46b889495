"""Meta-training of the meta gradient generator, on the losses after its updates.

    state = init_meta_training(phi, adapted, optimizer)
    state, loss = begin_epoch(loss_of, 1e-4)(state, first)        # no gradient for phi yet
    state, losses = meta_step(loss_of, optimizer, 1e-4)(state, batches)

`loss_of(adapted, batch)` is any loss of the adapted parameters. The gradients that the generator
reads are constants, so a batch costs one forward and one backward pass of the model, however many
updates are differentiated through.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtta.optim.checks import require_optimizer
from jaxtta.optim.meta_gradient import MGGParams, meta_gradient_generator

Array = jax.Array
Loss = Callable[[Any, Any], Array]


class MetaState(NamedTuple):
    """The state of meta-training.

    Attributes:
        phi: the generator's weights.
        optimizer: state of the optimiser that trains `phi`.
        adapted: the model's parameters that the generator updates.
        gradients: of the last batch, not applied yet.
        memory: the generator's state before that update.
        pending: () bool, whether there is an update to apply; false before the first batch.
        memory_is_initial: () bool, whether the memory is to be initialised from `phi`.
    """

    phi: MGGParams
    optimizer: Any
    adapted: Any
    gradients: Any
    memory: Any
    pending: Array
    memory_is_initial: Array


def init_meta_training(
    phi: MGGParams, adapted: Any, optimizer: optax.GradientTransformation
) -> MetaState:
    """Initialise the state of meta-training.

    Args:
        phi: weights to start from.
        adapted: the model's parameters that are adapted; they are kept from epoch to epoch.
        optimizer: trains `phi`.

    Returns:
        The state.

    Raises:
        TypeError: if the optimizer is not an optax transformation.

    Examples:
        >>> phi = jaxtta.optim.init_meta_gradient_generator(jax.random.key(0))
        >>> state = jaxtta.optim.init_meta_training(phi, {"scale": jnp.ones(3)}, optax.adam(1e-2))
        >>> state.adapted["scale"].shape, bool(state.pending)
        ((3,), False)
    """
    require_optimizer(optimizer)
    phi = jax.tree.map(jnp.asarray, phi)
    adapted = jax.tree.map(jnp.asarray, adapted)
    zeros = jax.tree.map(jnp.zeros_like, adapted)
    memory = meta_gradient_generator(phi, 1.0).init(adapted)
    flags = jnp.asarray(False), jnp.asarray(False)
    return MetaState(phi, optimizer.init(phi), adapted, zeros, memory, *flags)


def _apply_pending(phi: MGGParams, state: MetaState, learning_rate: float) -> tuple[Any, Any]:
    """The adapted parameters and the memory after the pending update."""
    generator = meta_gradient_generator(phi, learning_rate)
    memory = optax.tree.where(state.memory_is_initial, generator.init(state.adapted), state.memory)
    updates, memory = generator.update(state.gradients, memory)
    return optax.apply_updates(state.adapted, updates), memory


def begin_epoch(
    loss_of: Loss, learning_rate: float
) -> Callable[[MetaState, Any], tuple[MetaState, Array]]:
    """Start an epoch: reset the generator's state, keep the adapted parameters.

    Args:
        loss_of: loss of adapted parameters and a batch.
        learning_rate: of the generator's updates.

    Returns:
        `begin(state, batch) -> (state, loss)`; the first batch gives `phi` no gradient.
    """

    def begin(state: MetaState, batch: Any) -> tuple[MetaState, Array]:
        updated, _ = _apply_pending(state.phi, state, learning_rate)
        adapted = optax.tree.where(state.pending, updated, state.adapted)
        loss, gradients = jax.value_and_grad(loss_of)(adapted, batch)
        state = state._replace(adapted=adapted, gradients=gradients)
        flags = {"pending": jnp.asarray(True), "memory_is_initial": jnp.asarray(True)}
        return state._replace(**flags), loss

    return begin


def meta_step(
    loss_of: Loss, optimizer: optax.GradientTransformation, learning_rate: float
) -> Callable[[MetaState, Any], tuple[MetaState, Array]]:
    """Train `phi` on the losses of K batches, through the update before each batch.

    With K = 1 this is the paper's one-step truncation: the loss is differentiated through the last
    update only, and the memories before it are constants.

    Args:
        loss_of: loss of adapted parameters and a batch.
        optimizer: trains `phi`.
        learning_rate: of the generator's updates.

    Returns:
        `step(state, batches) -> (state, losses (K,))`; each leaf of `batches` has a leading axis K.

    Examples:
        >>> def loss_of(adapted, batch):
        ...     return ((adapted["scale"] - batch) ** 2).mean()
        >>> phi, adam = jaxtta.optim.load_mgg(jaxtta.assets.PHI)[0], optax.adam(0.01)
        >>> state = jaxtta.optim.init_meta_training(phi, {"scale": jnp.ones(3)}, adam)
        >>> state, _ = jax.jit(jaxtta.optim.begin_epoch(loss_of, 1e-3))(state, jnp.zeros(3))
        >>> step = jax.jit(jaxtta.optim.meta_step(loss_of, adam, 1e-3))
        >>> state, losses = step(state, jnp.zeros((2, 3)))
        >>> losses.shape
        (2,)

    References:
        https://arxiv.org/abs/2412.16901
    """
    require_optimizer(optimizer)
    # The backward pass stores the states between updates and recomputes the generator.
    apply_pending = jax.checkpoint(_apply_pending, static_argnums=2)

    def losses_of(
        phi: MGGParams, state: MetaState, batches: Any
    ) -> tuple[Array, tuple[MetaState, Array]]:
        def scan_step(state: MetaState, batch: Any) -> tuple[MetaState, tuple[Array, Array]]:
            adapted, memory = apply_pending(phi, state, learning_rate)
            fixed = jax.lax.stop_gradient(adapted)
            loss, gradients = jax.value_and_grad(loss_of)(fixed, batch)
            # The same derivative as the loss's, without a second pass through the model.
            surrogate = jnp.asarray(optax.tree.vdot(gradients, adapted))
            state = state._replace(adapted=adapted, gradients=gradients, memory=memory)
            return state._replace(memory_is_initial=jnp.asarray(False)), (surrogate, loss)

        state, (surrogates, losses) = jax.lax.scan(scan_step, state, batches)
        return surrogates.sum(), (state, losses)

    def step(state: MetaState, batches: Any) -> tuple[MetaState, Array]:
        differentiate = jax.grad(losses_of, has_aux=True)
        meta_gradient, (after, losses) = differentiate(state.phi, state, batches)
        updates, optimizer_state = optimizer.update(meta_gradient, state.optimizer, state.phi)
        phi = optax.apply_updates(state.phi, updates)
        # The pending update, by the last batch's gradient, will use the new weights.
        return after._replace(phi=phi, optimizer=optimizer_state), losses

    return step
