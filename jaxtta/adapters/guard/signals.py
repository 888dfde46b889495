"""What a guard sees: decayed averages of both models' answers, and scalars made of them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtta.adapters.base import Array, Metrics
from jaxtta.adapters.guard.mixture import log_temperature
from jaxtta.losses import entropy, masked_mean


class Averages(NamedTuple):
    """Decayed sums over the images, since the adapter last began anew.

    Attributes:
        weight: () of the images.
        reference: (classes,) of the frozen model's probabilities.
        adapted: (classes,) of the adapted model's, cooled.
        log_temperature: () of the batches' log temperatures.
        disagreement: () of images that the models put into different classes.
    """

    weight: Array
    reference: Array
    adapted: Array
    log_temperature: Array
    disagreement: Array


def no_averages(classes: int, dtype: Any) -> Averages:
    """The averages of no image."""
    scalar, vector = jnp.zeros((), dtype), jnp.zeros(classes, dtype)
    return Averages(scalar, vector, vector, scalar, scalar)


def average(
    before: Averages, reference: Array, adapted: Array, mask: Array, half_life: float
) -> tuple[Averages, Array]:
    """Add a batch's answers.

    Args:
        before: the averages so far.
        reference: the frozen model's logits (batch, classes), finite where the mask holds.
        adapted: the adapted model's.
        mask: (batch,) bool.
        half_life: images after which half is forgotten.

    Returns:
        The averages now, and the adapted logits, cooled with the averaged temperature.
    """
    count = mask.sum().astype(before.weight.dtype)
    decay = 0.5 ** (count / half_life)
    weight = decay * before.weight + count
    own = log_temperature(adapted, masked_mean(entropy(reference), mask), mask)
    temperature = decay * before.log_temperature + count * own
    cooled = adapted * jnp.exp(-temperature / jnp.maximum(weight, 1e-6))

    def total(logits: Array) -> Array:
        return jnp.where(mask[:, None], jax.nn.softmax(logits), 0).sum(0)

    apart = (mask & (reference.argmax(-1) != adapted.argmax(-1))).sum()
    after = Averages(
        weight,
        decay * before.reference + total(reference),
        decay * before.adapted + total(cooled),
        temperature,
        decay * before.disagreement + apart,
    )
    return after, cooled


def log_marginals(now: Averages) -> tuple[Array, Array]:
    """The log of how often either model predicts each class, (classes,)."""
    weight = jnp.maximum(now.weight, 1e-6)
    first, second = (jnp.log(jnp.maximum(x / weight, 1e-9)) for x in (now.reference, now.adapted))
    return first, second


def signals_of(now: Averages) -> Metrics:
    """Scalars by name.

    narrowing: nats of the class marginal's entropy that adaptation has taken away. variety: of the
    frozen model's classes, 0 for one class and 1 for as many as there can be, all alike.
    divergence: Jensen-Shannon, between the marginals, in nats. disagreement: share of images in
    different classes. entropy_gap: log temperature at which the mean entropies are equal.
    """
    weight = jnp.maximum(now.weight, 1e-6)
    first, second = log_marginals(now)
    most = jnp.maximum(jnp.minimum(len(first), now.weight), 2)
    middle = jnp.logaddexp(first, second) - jnp.log(2)
    divergence = entropy(middle) - (entropy(first) + entropy(second)) / 2
    return {
        "narrowing": entropy(first) - entropy(second),
        "variety": (jnp.exp(entropy(first)) - 1) / (most - 1),
        "divergence": divergence,
        "disagreement": now.disagreement / weight,
        "entropy_gap": now.log_temperature / weight,
    }


def distance(state: Any, source: Any) -> Array:
    """Euclidean distance of what is adapted from where it began; of all floats of other states."""
    if hasattr(state, "adapted"):
        state, source = state.adapted, source.adapted
    floats = [
        (a - b).astype(jnp.float32)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(source), strict=True)
        if jnp.issubdtype(a.dtype, jnp.floating)
    ]
    return optax.tree.norm(floats) if floats else jnp.zeros(())
