"""How good predictions are: pure functions of arrays, for numpy and JAX alike."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Array = jax.Array
ArrayLike = jax.typing.ArrayLike
ROUNDING = 1e-5
"""By how much a probability may exceed 1."""


def require_labels(labels: ArrayLike, logits: ArrayLike) -> Array:
    """Check the labels of a batch.

    Args:
        labels: (batch,) integers, 0 to classes − 1.
        logits: (batch, classes), of which the shape is used.

    Returns:
        The labels, int32.

    Raises:
        TypeError: if they are not integers.
        ValueError: if the logits have another number of dimensions, there is not one label an
            image, or one is outside 0 to classes − 1; values are looked at outside `jit` only.

    Examples:
        >>> jaxtta.metrics.require_labels(np.array([0, 3]), np.zeros((2, 3)))
        Traceback (most recent call last):
        ValueError: labels run from 0 to 3, expected 0 to 2: leave out images without a label
    """
    shape = jnp.shape(logits)
    if len(shape) != 2:
        raise ValueError(f"logits have shape {shape}, expected (batch, classes)")
    images, classes = shape
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels are {labels.dtype}, expected integers: labels.astype(int)")
    if labels.shape != (images,):
        raise ValueError(f"labels have shape {labels.shape}, expected ({images},), one per image")
    if images and not isinstance(labels, Tracer):
        values = np.asarray(labels)
        least, greatest = values.min(), values.max()
        if least < 0 or greatest >= classes:
            raise ValueError(
                f"labels run from {least} to {greatest}, expected 0 to {classes - 1}: leave out "
                "images without a label"
            )
    return jnp.asarray(labels, jnp.int32)  # uint8 cannot count 300 classes


def _own(values: Array, labels: Array) -> Array:
    """Each row's value at its label, (batch,); NaN for a label that is not a class."""
    classes = values.shape[-1]
    labels = jnp.where((labels >= 0) & (labels < classes), labels, classes)  # -1 is not the last
    return jnp.take_along_axis(values, labels[:, None], -1, mode="fill")[:, 0]


def top_k(logits: ArrayLike, labels: ArrayLike, k: int = 1) -> Array:
    """Whether the label is among the k highest logits; of equal ones the lowest index is first.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.
        k: how many, at least 1.

    Returns:
        (batch,) bool; for k = 1 the same as `logits.argmax(-1) == labels`, except that a row that
        holds a NaN is never right. Neither is a label that is not a class, under `jit`.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if they do not match the logits, or k is below 1.

    Examples:
        >>> logits, labels = jnp.array([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]), jnp.array([0, 1])
        >>> jaxtta.metrics.top_k(logits, labels).tolist()
        [True, False]
        >>> jaxtta.metrics.top_k(logits, labels, k=2).tolist()
        [True, True]
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    logits = jnp.asarray(logits)
    labels = require_labels(labels, logits)
    own = _own(logits, labels)[:, None]
    earlier = jnp.arange(logits.shape[-1]) < labels[:, None]
    before = (logits > own) | (logits == own) & earlier
    return (before.sum(-1) < k) & ~jnp.isnan(own[:, 0]) & ~jnp.isnan(logits).any(-1)


def nll(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Negative log-likelihood of the labels.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.

    Returns:
        (batch,), in nats; NaN for a label that is not a class, under `jit`.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if they do not match the logits.

    Examples:
        >>> f"{jaxtta.metrics.nll(jnp.zeros((1, 2)), jnp.array([1]))[0]:.3f}"  # ln 2
        '0.693'
    """
    logits = jnp.asarray(logits)
    return -_own(jax.nn.log_softmax(logits), require_labels(labels, logits))


def brier(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Brier score, the squared distance of the probabilities from the label.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.

    Returns:
        (batch,), in [0, 2]; NaN for a label that is not a class, under `jit`.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if they do not match the logits.

    Examples:
        >>> jaxtta.metrics.brier(jnp.zeros((1, 2)), jnp.array([1])).tolist()
        [0.5]
    """
    probabilities = jax.nn.softmax(jnp.asarray(logits))
    labels = require_labels(labels, probabilities)
    score = ((probabilities - jax.nn.one_hot(labels, probabilities.shape[-1])) ** 2).sum(-1)
    return jnp.where(jnp.isnan(_own(probabilities, labels)), jnp.nan, score)


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


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> Reliability:
    """Sort predictions by confidence into bins.

    Args:
        confidence: (images,) the winning probability, in [0, 1].
        correct: (images,) bool.
        bins: number of bins, each open on the left.

    Returns:
        The reliability diagram's numbers; NaN where a confidence is not in [0, 1], under `jit`.

    Raises:
        ValueError: if the two differ in length, a value is not in [0, 1] (looked at outside `jit`
            only), or there is no bin.

    Examples:
        >>> confidence, correct = np.array([0.9, 0.9, 0.3]), np.array([True, False, False])
        >>> bins = jaxtta.metrics.reliability(confidence, correct, bins=2)
        >>> bins.count.tolist(), bins.accuracy.tolist()
        ([1.0, 2.0], [0.0, 0.5])

    References:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599
    """
    confidence, correct = jnp.asarray(confidence), jnp.asarray(correct)
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1")
    if confidence.ndim != 1 or confidence.shape != correct.shape:
        raise ValueError(
            f"confidence has shape {confidence.shape} and correct {correct.shape}, expected "
            "(images,) for both"
        )
    confidence = _shares(confidence, "confidence")
    correct = _shares(correct, "correct") if correct.dtype != bool else correct
    which = jnp.clip(jnp.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)

    def total(values: Array | float) -> Array:
        return jnp.zeros(bins).at[which].add(values)

    count = total(1.0)
    return Reliability(
        count, total(confidence) / jnp.maximum(count, 1), total(correct) / jnp.maximum(count, 1)
    )


def _shares(values: Array, name: str) -> Array:
    """Numbers in [0, 1], to rounding; others are refused, and NaN where they are traced."""
    inside = (values >= 0) & (values <= 1 + ROUNDING)
    if not isinstance(values, Tracer) and not inside.all():
        odd = values[~inside][0]
        raise ValueError(f"{name} holds {odd}, expected numbers in [0, 1]")
    return jnp.where(inside, values, jnp.nan)


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> Array:
    """Mean gap between confidence and accuracy over equal bins of confidence.

    Args:
        confidence: (images,) the winning probability, in [0, 1].
        correct: (images,) bool.
        bins: number of bins, each open on the left.

    Returns:
        A scalar in [0, 1]; 0 for no images.

    Raises:
        ValueError: as `reliability`.

    Examples:
        >>> confidence, correct = np.array([0.75, 0.75]), np.array([True, False])
        >>> float(jaxtta.metrics.expected_calibration_error(confidence, correct))
        0.25

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
        ValueError: if the corruptions are not the baseline's, or an error is not in [0, 1].

    Examples:
        >>> errors = {name: 0.5 * error for name, error in jaxtta.metrics.ALEXNET_ERRORS.items()}
        >>> round(jaxtta.metrics.mean_corruption_error(errors), 3)
        0.5

    References:
        Hendrycks and Dietterich 2019, https://arxiv.org/abs/1903.12261
    """
    if set(errors) != set(baseline):
        odd = sorted(set(errors) ^ set(baseline))
        raise ValueError(f"the mean corruption error needs the baseline's corruptions, not {odd}")
    for name, error in errors.items():
        if not 0 <= error <= 1:
            raise ValueError(f"the error on {name} is {error}, expected a share in [0, 1]")
    return sum(errors[name] / baseline[name] for name in baseline) / len(baseline)


def transfer(matrix: np.ndarray) -> float:
    """Mean accuracy on tasks before they were learnt.

    Args:
        matrix: (tasks, tasks), `matrix[i, j]` the accuracy on task j after training task i.

    Returns:
        The mean over tasks from the second on, of the mean over the steps before each; NaN for one
        task.

    Raises:
        ValueError: if the matrix is not square.

    Examples:
        >>> accuracies = np.array([[0.9, 0.5, 0.2], [0.8, 0.9, 0.4], [0.7, 0.8, 0.9]])  # of 3 tasks
        >>> f"{jaxtta.metrics.transfer(accuracies):.3f}"  # 0.5, and the mean of 0.2 and 0.4
        '0.400'
        >>> f"{jaxtta.metrics.last(accuracies):.3f}", f"{jaxtta.metrics.average(accuracies):.3f}"
        ('0.800', '0.678')
    """
    matrix = np.asarray(matrix)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"accuracies have shape {matrix.shape}, expected (tasks, tasks)")
    return float(np.mean([matrix[:j, j].mean() for j in range(1, len(matrix))] or [np.nan]))


def last(matrix: np.ndarray) -> float:
    """Mean accuracy on all tasks after the last one; see `transfer`."""
    return float(np.asarray(matrix)[-1].mean())


def average(matrix: np.ndarray) -> float:
    """Mean accuracy on all tasks over all steps; see `transfer`."""
    return float(np.asarray(matrix).mean())


def modality_gap(images: Array, texts: Array) -> Array:
    """Distance between the mean image and the mean text.

    Args:
        images: (images, projection), of unit norm.
        texts: (texts, projection), of unit norm.

    Returns:
        A scalar.

    Examples:
        >>> float(jaxtta.metrics.modality_gap(jnp.array([[1.0, 0.0]]), jnp.array([[-1.0, 0.0]])))
        2.0

    References:
        https://arxiv.org/abs/2203.02053
    """
    return jnp.linalg.norm(images.mean(0) - texts.mean(0))


def retrieval_recall(similarities: ArrayLike, matches: ArrayLike, k: int = 1) -> Array:
    """Share of rows with a match among their k most similar columns.

    Args:
        similarities: (queries, candidates).
        matches: (queries, candidates) bool.
        k: how many candidates are looked at.

    Returns:
        A scalar; give transposed arrays for the other direction. Of equal similarities the lowest
        index is first, and a NaN matches nothing.

    Raises:
        ValueError: if the two differ in shape, or k is not 1 to the number of candidates.

    Examples:
        >>> similarities = np.array([[0.9, 0.1], [0.8, 0.2]])  # the first column is nearest to both
        >>> float(jaxtta.metrics.retrieval_recall(similarities, np.eye(2, dtype=bool)))
        0.5
    """
    similarities, matches = jnp.asarray(similarities), jnp.asarray(matches)
    if similarities.ndim != 2 or similarities.shape != matches.shape:
        raise ValueError(
            f"similarities have shape {similarities.shape} and matches {matches.shape}, expected "
            "(queries, candidates) for both"
        )
    if not 1 <= k <= similarities.shape[1]:
        raise ValueError(f"k is {k}, expected 1 to the {similarities.shape[1]} candidates")
    matches = matches.astype(bool) & ~jnp.isnan(similarities)
    _, found = jax.lax.top_k(jnp.nan_to_num(similarities, nan=-jnp.inf, posinf=jnp.inf), k)
    return jnp.take_along_axis(matches, found, 1).any(1).mean()


ALIGNMENT = ("modality gap", "image to text", "text to image")


def image_text_alignment(
    images: np.ndarray, texts: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Modality gap and retrieval of images and captions.

    Args:
        images: (images, projection), of unit norm.
        texts: (images, projection), of unit norm, the same for the same label.
        labels: (images,) integers.

    Returns:
        The modality gap, and the share of images and of distinct captions whose nearest caption or
        image is a match; named as in `ALIGNMENT`.

    Examples:
        >>> rows, labels = np.eye(2, dtype=np.float32), np.array([0, 1])
        >>> jaxtta.metrics.image_text_alignment(rows, rows, labels)
        {'modality gap': 0.0, 'image to text': 1.0, 'text to image': 1.0}
    """
    _, first, place = np.unique(labels, return_index=True, return_inverse=True)
    similarities, matches = images @ texts[first].T, place[:, None] == np.arange(len(first))
    values = (
        modality_gap(jnp.asarray(images), jnp.asarray(texts)),
        retrieval_recall(similarities, matches),
        retrieval_recall(similarities.T, matches.T),
    )
    return dict(zip(ALIGNMENT, map(float, values), strict=True))
