"""An adapter of any objective, any choice of parameters and any optimiser."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import Adapter, Array, Metrics, Objective, Prediction, State
from jaxtta.models import Batch, as_batch


def online(
    objective: Objective,
    context: Callable[[Any], Any],
    trainable: tree.Trainable,
    optimizer: optax.GradientTransformation,
) -> Adapter:
    """Take one optimiser step per batch; predictions are those before the step.

    A fully masked batch leaves the state as it was, bit for bit, and so does a step whose loss or
    update is not finite, or whose optimiser state overflows (`metrics["skipped"]` is true then).

    Args:
        objective: `objective(params, context, batch) -> (loss, (logits, metrics))`.
        context: `context(params)`, evaluated once in `init` and kept in the state.
        trainable: which parameters to adapt, a predicate on paths.
        optimizer: any optax transformation.

    Returns:
        The adapter. Its `init` raises a ValueError if `trainable` chooses nothing.
    """

    def init(params: Any, key: Array | None = None) -> State:
        del key  # nothing random here
        chosen, _ = tree.partition(params, trainable)
        adapted = jax.tree.map(_own, chosen)
        return State(
            adapted,
            optimizer.init(adapted),
            jax.tree.map(jnp.copy, context(params)),
            jnp.zeros((), jnp.int32),
            tree.fingerprint(params),
        )

    def step(params: Any, state: State, batch: Batch | Array) -> tuple[State, Prediction]:
        batch = as_batch(batch, state.seen)

        def loss_of(adapted: Any) -> tuple[Array, tuple[Array, Metrics]]:
            return objective(tree.merge(params, adapted), state.context, batch)

        (loss, (logits, metrics)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.adapted
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.adapted)
        # A gradient can be finite and its square, in the optimiser's moments, no longer.
        finite = (
            jnp.isfinite(loss)
            & tree.all_finite(updates)
            & tree.stays_finite(state.optimizer, optimizer_state)
        )
        valid = batch.mask.sum(dtype=jnp.int32)
        metrics = {
            **metrics,
            "loss": loss,
            "update_norm": optax.tree.norm(updates),
            "skipped": (valid > 0) & ~finite,
        }
        # Neither context nor fingerprint takes part: under vmap they need no stream axis.
        adapted, optimizer_state, seen = optax.tree.where(
            finite & (valid > 0),
            (optax.apply_updates(state.adapted, updates), optimizer_state, state.seen + valid),
            (state.adapted, state.optimizer, state.seen),
        )
        state = state._replace(adapted=adapted, optimizer=optimizer_state, seen=seen)
        return state, Prediction(logits, metrics)

    return Adapter(init, step)


def _own(leaf: Array) -> Array:
    # Adapted leaves stay in float32 under bfloat16 parameters: an update of 1e-3 would be lost.
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)
