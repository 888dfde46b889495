"""How good predictions are: pure functions of arrays, for numpy and JAX alike."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


class Reliability(NamedTuple):
    """How confidence compares with accuracy, in equal bins of confidence; all (bins,).

    Attributes:
        count: images in the bin.
        confidence: their mean confidence; 0 for an empty bin.
        accuracy: the share that is right; 0 for an empty bin.
    """

    count: Array
    confidence: Array
    accuracy: Array


def reliability(confidence: Array, correct: Array, bins: int = 15) -> Reliability:
    """Sort predictions by confidence into bins.

    Args:
        confidence: (images,) the winning probability, in [0, 1].
        correct: (images,) bool.
        bins: number of bins, each open on the left.

    Returns:
        The reliability diagram's numbers.

    References:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """
    which = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)

    def total(values: Array | float) -> Array:
        return jnp.zeros(bins).at[which].add(values)

    count = total(1.0)
    return Reliability(
        count, total(confidence) / jnp.maximum(count, 1), total(correct) / jnp.maximum(count, 1)
    )


def expected_calibration_error(confidence: Array, correct: Array, bins: int = 15) -> Array:
    """Mean gap between confidence and accuracy over equal bins of confidence.

    Args:
        confidence: (images,) the winning probability, in [0, 1].
        correct: (images,) bool.
        bins: number of bins, each open on the left.

    Returns:
        A scalar in [0, 1]; 0 for no images.

    References:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """
    return calibration_gap(reliability(confidence, correct, bins))


def calibration_gap(bins: Reliability) -> Array:
    """The expected calibration error of a reliability diagram, a scalar in [0, 1]."""
    gaps = bins.count * jnp.abs(bins.confidence - bins.accuracy)
    return gaps.sum() / jnp.maximum(bins.count.sum(), 1)


ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's published top-1 error on ImageNet-C, the mean of the five severities."""


def mean_corruption_error(
    errors: Mapping[str, float], baseline: Mapping[str, float] = MappingProxyType(ALEXNET_ERRORS)
) -> float:
    """Error relative to a baseline's, corruption by corruption, averaged.

    Args:
        errors: top-1 error by corruption in [0, 1], each the mean of severities 1 to 5.
        baseline: likewise, of the model that counts as 1.

    Returns:
        The mean of the ratios; the field quotes it in per cent.

    Raises:
        ValueError: if the corruptions are not the baseline's.

    References:
        Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261
    """
    if set(errors) != set(baseline):
        odd = sorted(set(errors) ^ set(baseline))
        raise ValueError(f"the mean corruption error needs the baseline's corruptions, not {odd}")
    return sum(errors[name] / baseline[name] for name in baseline) / len(baseline)


def transfer(matrix: np.ndarray) -> float:
    """Mean accuracy on tasks before they were learnt.

    Args:
        matrix: (tasks, tasks), `matrix[i, j]` the accuracy on task j after training task i.

    Returns:
        The mean over tasks from the second on, of the mean over the steps before each; NaN for one
        task.
    """
    matrix = np.asarray(matrix)
    return float(np.mean([matrix[:j, j].mean() for j in range(1, len(matrix))] or [np.nan]))


def last(matrix: np.ndarray) -> float:
    """Mean accuracy on all tasks after the last one; see `transfer`."""
    return float(np.asarray(matrix)[-1].mean())


def average(matrix: np.ndarray) -> float:
    """Mean accuracy on all tasks over all steps; see `transfer`."""
    return float(np.asarray(matrix).mean())


def modality_gap(images: jax.Array, texts: jax.Array) -> jax.Array:
    """Distance between the mean image and the mean text.

    Args:
        images: (images, projection), of unit norm.
        texts: (texts, projection), of unit norm.

    Returns:
        A scalar.

    References:
        https://arxiv.org/abs/2203.02053
    """
    return jnp.linalg.norm(images.mean(0) - texts.mean(0))


def retrieval_recall(similarities: jax.Array, matches: jax.Array, k: int = 1) -> jax.Array:
    """Share of rows with a match among their k most similar columns.

    Args:
        similarities: (queries, candidates).
        matches: (queries, candidates) bool.
        k: how many candidates are looked at.

    Returns:
        A scalar; give transposed arrays for the other direction.
    """
    _, found = jax.lax.top_k(similarities, k)
    return jnp.take_along_axis(matches, found, 1).any(1).mean()
