"""Some steps of an optimiser on one batch, in a scan.

descent, moments = descend(loss, start, optimizer, optimizer.init(start), iterations=10)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

Array = jax.Array


class Descent(NamedTuple):
    """Where some steps of an optimiser lead.

    Attributes:
        adapted: the adapted parameters.
        losses: (…) the loss before each step, in order.
    """

    adapted: Any
    losses: Array


def descend(
    loss: Callable[[Any], Array],
    start: Any,
    optimizer: optax.GradientTransformation,
    moments: Any,
    iterations: int,
) -> tuple[Descent, Any]:
    """Take some steps of an optimiser.

    Args:
        loss: of the adapted parameters.
        start: where they start.
        optimizer: an optax transformation.
        moments: its state.
        iterations: steps, at least one.

    Returns:
        Where they lead, and the optimiser's state there.
    """

    def iterate(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Array]:
        adapted, moments = carry
        value, gradients = jax.value_and_grad(loss)(adapted)
        updates, moments = optimizer.update(gradients, moments, adapted)
        return (optax.apply_updates(adapted, updates), moments), value

    (adapted, moments), losses = jax.lax.scan(iterate, (start, moments), length=iterations)
    return Descent(adapted, losses), moments
