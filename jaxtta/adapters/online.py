"""An adapter of any objective, any choice of parameters and any optimiser."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import (
    Adapter,
    Array,
    Objective,
    Prediction,
    State,
    image_check,
    require_state,
)
from jaxtta.models import Batch, Outputs, as_batch
from jaxtta.optim import require_optimizer

USES = {
    "objective": "objective(params, context, batch) -> (loss, (logits, metrics))",
    "context": "lambda params: model.init_context(params, task)",
}


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
        objective: `objective(params, context, batch) -> (loss, (logits, metrics))`, or the model's
            outputs in the logits' place; the predictions then have them too.
        context: `context(params)`, evaluated once in `init` and kept in the state.
        trainable: which parameters to adapt, a predicate on paths.
        optimizer: any optax transformation.

    Returns:
        The adapter. Its `init` raises a ValueError if `trainable` chooses nothing. Its step raises
        a TypeError or ValueError for arguments in another order, the state of another adapter and
        an objective that gives something else. Images that are not in [0, 1] are warned of in the
        first step outside `jit`, where values can be seen.

    Raises:
        TypeError: if the objective or context is not a function, `trainable` not a predicate or
            `optimizer` no optax transformation.
    """
    for name, function in (("objective", objective), ("context", context)):
        if not callable(function):
            given = type(function).__name__
            raise TypeError(f"{name} is a {given}, expected a function: {USES[name]}")
    tree.require_trainable(trainable)
    require_optimizer(optimizer)
    check_values = image_check()

    def init(params: Any, key: Array | None = None) -> State:
        del key  # nothing random here
        tree.require_params(params)
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
        require_state(State, params, state)
        _require_same_adapter(params, state, trainable, optimizer)
        batch = as_batch(batch, state.seen)
        check_values(batch.images)

        def loss_of(adapted: Any) -> tuple[Array, Prediction]:
            return _checked(objective(tree.merge(params, adapted), state.context, batch))

        (loss, prediction), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.adapted)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.adapted)
        # A gradient can be finite and its square, in the optimiser's moments, no longer.
        finite = (
            jnp.isfinite(loss)
            & tree.all_finite(updates)
            & tree.stays_finite(state.optimizer, optimizer_state)
        )
        valid = batch.mask.sum(dtype=jnp.int32)
        metrics = {
            **prediction.metrics,
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
        return state, prediction._replace(metrics=metrics)

    return Adapter(init, step)


def _require_same_adapter(
    params: Any, state: State, trainable: tree.Trainable, optimizer: optax.GradientTransformation
) -> None:
    """Raise a ValueError for another adapter's state; only names are compared, never values."""
    adapted = tree.paths_of(state.adapted)
    chosen = set(filter(trainable, tree.paths_of(params)))
    if odd := sorted({path for path in adapted if not trainable(path)} | chosen - adapted):
        whose = "the state" if odd[0] in adapted else "this adapter"
        raise ValueError(
            f"{odd[0]} is adapted by {whose} alone: the state is another adapter's, or params are "
            "another model's"
        )
    structure = jax.tree.structure(jax.eval_shape(optimizer.init, state.adapted))
    if structure != jax.tree.structure(state.optimizer):
        raise ValueError(
            "state.optimizer is not of this adapter's optimizer: the state is another adapter's"
        )


def _checked(result: Any) -> tuple[Array, Prediction]:
    """Loss and prediction of an objective's (loss, (logits or outputs, metrics))."""

    def is_pair(x: Any) -> bool:
        return isinstance(x, tuple | list) and len(x) == 2

    if not (is_pair(result) and is_pair(result[1]) and isinstance(result[1][1], Mapping)):
        raise TypeError(
            f"the objective gives {_layout(result)}, expected (loss, (logits, metrics)) with a "
            "dict of metrics, {} for none"
        )
    loss, (logits, metrics) = result
    if jnp.shape(loss):
        raise ValueError(
            f"the objective's loss has shape {jnp.shape(loss)}, expected a scalar: "
            "jaxtta.losses.masked_mean(values, batch.mask)"
        )
    if isinstance(logits, Outputs):
        return loss, Prediction(logits.logits, metrics, logits._replace(layer_features=None))
    return loss, Prediction(logits, metrics)


def _layout(result: Any) -> str:
    if isinstance(result, tuple | list):
        return f"({', '.join(map(_layout, result))})"
    return "an array" if isinstance(result, jax.Array) else f"a {type(result).__name__}"


def _own(leaf: Array) -> Array:
    # Adapted leaves stay in float32 under bfloat16 parameters: an update of 1e-3 would be lost.
    return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)
