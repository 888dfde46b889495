"""How good predictions are: pure functions of arrays, for numpy and JAX alike."""

import jax
import jax.numpy as jnp

Array = jax.Array


def top_k(logits: Array, labels: Array, k: int = 1) -> Array:
    """Whether the label is among the k highest logits.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.
        k: how many.

    Returns:
        (batch,) bool. A tie or a NaN counts against the label.
    """
    own = jnp.take_along_axis(logits, labels[:, None], -1)
    # how many others are not clearly below
    return (~(logits < own)).sum(-1) - 1 < k


def nll(logits: Array, labels: Array) -> Array:
    """Negative log-likelihood of the labels in nats, (batch,)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1)[:, 0]


def brier(logits: Array, labels: Array) -> Array:
    """Brier score, the squared distance of the probabilities from the label, (batch,)."""
    target = jax.nn.one_hot(labels, logits.shape[-1])
    return ((jax.nn.softmax(logits) - target) ** 2).sum(-1)


def expected_calibration_error(confidence: Array, correct: Array, bins: int = 15) -> Array:
    """Mean gap between confidence and accuracy over equal bins of confidence.

    Args:
        confidence: (pictures,) the winning probability, in [0, 1].
        correct: (pictures,) bool.
        bins: number of bins, each open on the left.

    Returns:
        A scalar in [0, 1]; 0 for no pictures.

    References:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """
    which = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = jnp.zeros(bins).at[which].add(correct - confidence)
    return jnp.abs(gaps).sum() / max(len(confidence), 1)
