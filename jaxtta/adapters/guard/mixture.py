"""Mixing the frozen model's answers with an adapted model's.

The adapted logits are divided by the temperature at which their mean entropy is the frozen model's,
so that an overconfident model has no louder voice; the served answer is the log of the mixture.
"""

import jax
import jax.numpy as jnp

from jaxtta.adapters.base import Array
from jaxtta.losses import entropy, masked_mean

TEMPERATURES = (-3.0, 9.0)
"""Range of log T: an adapted model may have logits thousands of times too large."""


def log_temperature(logits: Array, target: Array, mask: Array, halvings: int = 18) -> Array:
    """Logarithm of the temperature at which the mean entropy of logits is another model's.

    Args:
        logits: (batch, classes), finite where the mask holds.
        target: () the mean entropy wanted, in nats.
        mask: (batch,) bool.
        halvings: of the interval `TEMPERATURES`; 18 leave an error below 1e-4.

    Returns:
        A scalar, an end of the interval where no temperature in it will do.
    """

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        warmer = masked_mean(entropy(logits * jnp.exp(-middle)), mask) < target
        return jnp.where(warmer, middle, low), jnp.where(warmer, high, middle)

    dtype = jnp.result_type(logits)
    low, high = (jnp.full((), end, dtype) for end in TEMPERATURES)
    low, high = jax.lax.fori_loop(0, halvings, halve, (low, high))
    return (low + high) / 2


def mix(reference: Array, adapted: Array, share: Array) -> Array:
    """Log of the mixture of two models' probabilities.

    Args:
        reference: the frozen model's logits (batch, classes).
        adapted: the adapted model's, cooled.
        share: () or (batch, 1), of the adapted model, in [0, 1].

    Returns:
        (batch, classes); a row of which one model's logits are not finite is the other model's.
    """
    reference, adapted = jax.nn.log_softmax(reference), jax.nn.log_softmax(adapted)
    usable = [jnp.isfinite(x).all(-1, keepdims=True) for x in (reference, adapted)]
    share = jnp.where(usable[1], jnp.where(usable[0], share, 1), 0)
    safe = [jnp.where(ok, x, 0) for ok, x in zip(usable, (reference, adapted), strict=True)]
    both = jnp.logaddexp(safe[0] + jnp.log1p(-share), safe[1] + jnp.log(share))
    # A share of 0 or 1 leaves that model's answer as it is, bit for bit.
    return jnp.where(share == 0, reference, jnp.where(share == 1, adapted, both))
