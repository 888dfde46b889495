"""What `online` checks: whose state it is given, and what an objective gives."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtta import tree
from jaxtta.adapters.base import Array, Prediction, State
from jaxtta.models import Outputs


def require_same_adapter(
    params: Any,
    state: State,
    trainable: tree.Trainable,
    optimizer: Callable[[Any], Any],
    memory: Callable[[Any, Any], Any],
) -> None:
    """Raise a ValueError for another adapter's state; only names are compared, never values.

    Args:
        params: the model's parameters.
        state: what the step was given.
        trainable: which parameters this adapter adapts.
        optimizer: makes the optimiser's first state of the adapted parameters.
        memory: makes the method's first memory of params and context.
    """
    adapted = tree.paths_of(state.adapted)
    chosen = set(filter(trainable, tree.paths_of(params)))
    if odd := sorted({path for path in adapted if not trainable(path)} | chosen - adapted):
        whose = "the state" if odd[0] in adapted else "this adapter"
        raise ValueError(
            f"{odd[0]} is adapted by {whose} alone: the state is another adapter's, or params are "
            "another model's"
        )
    structure = jax.tree.structure(jax.eval_shape(optimizer, state.adapted))
    if structure != jax.tree.structure(state.optimizer):
        raise ValueError(
            "state.optimizer is not of this adapter's optimizer: the state is another adapter's"
        )
    if not alike(lambda: memory(params, state.context), state.memory):
        raise ValueError(
            "state.memory is not of this adapter's method: the state is another adapter's"
        )


def alike(make: Callable[[], Any], memory: Any) -> bool:
    """Whether a memory has the paths and shapes of what `make()` gives; nothing is computed."""
    made, given = (
        [(path, jnp.shape(leaf)) for path, leaf in jax.tree.leaves_with_path(each)]
        for each in (jax.eval_shape(make), memory)
    )
    return made == given


def checked(result: Any, remembers: bool) -> tuple[Array, tuple[Prediction, Any]]:
    """Take apart what an objective gives.

    Args:
        result: (loss, (logits or outputs, metrics)), with the memory as a third if it `remembers`.
        remembers: whether the objective has a memory.

    Returns:
        The loss, and a pair of the prediction and the memory, () where there is none.
    """
    wanted = "(loss, (logits, metrics, memory))" if remembers else "(loss, (logits, metrics))"
    auxiliary: Any = result[1] if _has(result, 2) else None
    if not (_has(auxiliary, 2 + remembers) and isinstance(auxiliary[1], Mapping)):
        raise TypeError(
            f"the objective gives {_layout(result)}, expected {wanted} with a "
            "dict of metrics, {} for none"
        )
    loss, (logits, metrics, *memory) = result
    if jnp.shape(loss):
        raise ValueError(
            f"the objective's loss has shape {jnp.shape(loss)}, expected a scalar: "
            "jaxtta.losses.masked_mean(values, batch.mask)"
        )
    prediction = Prediction(logits, metrics)
    if isinstance(logits, Outputs):
        outputs = logits._replace(layer_features=None)
        prediction = Prediction(logits.logits, metrics, outputs)
    return loss, (prediction, memory[0] if remembers else ())


def _has(x: Any, count: int) -> bool:
    return isinstance(x, tuple | list) and len(x) == count


def _layout(result: Any) -> str:
    if isinstance(result, tuple | list):
        return f"({', '.join(map(_layout, result))})"
    return "an array" if isinstance(result, jax.Array) else f"a {type(result).__name__}"
