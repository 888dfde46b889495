"""Terms of the objectives: pure functions of arrays, with masks for padded images.

Everything is a sum over the whole batch and the whole set of classes, without axis names, so that
a batch split over devices gives the same value. Absent classes and padded images contribute
neither to a value nor to a gradient: masked values are replaced before a quotient or a norm, so
that gradients stay finite.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def masked_mean(values: Array, mask: Array | np.ndarray) -> Array:
    """Mean of the values where the mask holds, 0 where it holds nowhere.

    Args:
        values: (batch,).
        mask: (batch,) bool.

    Returns:
        A scalar.

    Examples:
        >>> values, mask = jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])
        >>> float(jaxtta.losses.masked_mean(values, mask))
        2.0
    """
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def entropy(logits: Array) -> Array:
    """Entropy of the predictions in nats.

    Args:
        logits: (…, classes).

    Returns:
        (…).

    Examples:
        >>> logits = jnp.array([[0.0, 0.0], [50.0, 0.0]])  # undecided, and sure
        >>> [f"{x:.3f}" for x in jaxtta.losses.entropy(logits)]
        ['0.693', '0.000']
    """
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_p) * log_p).sum(-1)
