"""The check of target images: how they differ from a reference set, and what a model predicts.

check, answers = check_target(target_features, reference_features, head, scale, class_names)
check.target.p_value, check.labelled, answers.least_sure(12)
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta import losses, metrics
from jaxtta.bootstrap import accuracy_interval
from jaxtta.diagnose.features import FeatureSet, logits_of
from jaxtta.diagnose.outliers import activation_kurtosis, outlier_features
from jaxtta.diagnose.target import (
    Discrepancy,
    confused_classes,
    mmd_to_reference,
    neighbour_distances,
)
from jaxtta.io import error_context

SHOWN = 20  # number of classes, or pairs of classes, to list
NEIGHBOUR = 10  # distances are from this nearest image of the reference


@dataclasses.dataclass(frozen=True)
class UnlabelledMetrics:
    """Metrics of a set's features and predictions, without labels.

    Attributes:
        images: number of images that were read.
        unreadable: names of the others.
        kurtosis: of the features.
        outlier_axes: axes that are outliers in most images.
        entropy: mean, of the predictions, in nats.
        confidence: mean probability of the predicted classes.
        predicted: (classes,), how often each class is predicted, as a share.
        squared_mmd: to half the reference.
        null_quantile: its 95 % quantile if both sets had one distribution.
        p_value: of the permutation test.
    """

    images: int
    unreadable: list[str]
    kurtosis: float
    outlier_axes: list[int]
    entropy: float
    confidence: float
    predicted: list[float]
    squared_mmd: float
    null_quantile: float
    p_value: float


@dataclasses.dataclass(frozen=True)
class LabelledMetrics:
    """Metrics of the predictions on those images that have labels.

    Attributes:
        images: number of images with labels.
        accuracy: top-1.
        interval: its 95 % interval.
        shares: (classes,), of the labels.
        recall: (classes,); None for a class without images.
    """

    images: int
    accuracy: float
    interval: tuple[float, float]
    shares: list[float]
    recall: list[float | None]


@dataclasses.dataclass(frozen=True)
class ConfusedPair:
    """Two classes, the share of images whose two likeliest classes they are, and the margin."""

    classes: tuple[str, str]
    share: float
    margin: float


@dataclasses.dataclass(frozen=True)
class TargetCheck:
    """The check of target images with one model.

    Attributes:
        classes: their names.
        target: metrics of the images.
        reference: metrics of the reference, with the same classes.
        confused: the most often confused pairs of classes.
        labelled: metrics of the images with labels; None if no image has one.
        reference_name: what the reference is.
        preprocessing: of the model's images.
    """

    classes: tuple[str, ...]
    target: UnlabelledMetrics
    reference: UnlabelledMetrics
    confused: list[ConfusedPair]
    labelled: LabelledMetrics | None = None
    reference_name: str = ""
    preprocessing: str = ""

    def never_predicted(self) -> list[str]:
        """Names of the classes that are predicted for no image."""
        pairs = zip(self.classes, self.target.predicted, strict=True)
        return [name for name, share in pairs if not share]

    def commonest(self) -> list[int]:
        """Indices of the classes predicted most often, at most `SHOWN`."""
        return np.argsort(-np.asarray(self.target.predicted), kind="stable")[:SHOWN].tolist()


class Answers(NamedTuple):
    """What a model says of every target image, in the order of the dataset.

    Attributes:
        numbers: (images,) integers, each image's index in the dataset, or in the features.
        labels: (images,) integers, the predicted classes.
        confidences: (images,), their probabilities.
        entropies: (images,), of the predictions, in nats.
        distances: (images,), from the reference; see `diagnose.neighbour_distances`.
        reference_entropies: (reference images,), of the predictions there, in nats.
    """

    numbers: np.ndarray
    labels: np.ndarray
    confidences: np.ndarray
    entropies: np.ndarray
    distances: np.ndarray
    reference_entropies: np.ndarray

    def least_sure(self, count: int) -> np.ndarray:
        """Places of the images with the highest entropies, the highest first."""
        return np.argsort(-self.entropies, kind="stable")[:count]


def check_target(
    target: FeatureSet,
    reference: FeatureSet,
    head: jax.Array,
    class_names: Sequence[str],
    *,
    scale: float | jax.Array = 100.0,
    outlier_threshold: float = 6.0,
    seed: int = 0,
) -> tuple[TargetCheck, Answers]:
    """Check target images with one model.

    Args:
        target: features of the images, with or without labels.
        reference: features of a reference set; its labels are not used.
        head: (classes, d), the text embeddings of the target's classes.
        class_names: names of the classes.
        scale: the logits by cosine, exp(logit_scale).
        outlier_threshold: in standard deviations; see `outlier_features`.
        seed: of the samples and permutations.

    Returns:
        The metrics, and what the model says of every image.

    Raises:
        ValueError: if features are constant, not finite or nearly all the same; it names the set.

    Examples:
        >>> from jaxtta.diagnose import FeatureSet, check_target
        >>> rows = np.random.default_rng(0).normal(size=(60, 64)).astype(np.float32)
        >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        >>> target, reference = (FeatureSet(x, np.full(30, -1), []) for x in np.split(rows, 2))
        >>> head = jnp.eye(2, 64)  # text embeddings of the classes
        >>> check, answers = check_target(target, reference, head, ["cat", "dog"])
        >>> check.target.images, answers.labels.shape
        (30, (30,))
    """
    logits = scale * logits_of(target.rows, head), scale * logits_of(reference.rows, head)
    with error_context("target images"):
        shift, baseline = mmd_to_reference(target.rows, reference.rows, seed=seed)
        own = unlabelled_metrics(target, logits[0], shift, outlier_threshold)
    with error_context("reference images"):
        other = unlabelled_metrics(reference, logits[1], baseline, outlier_threshold)
    pairs = confused_classes(np.asarray(jax.nn.softmax(logits[0])))
    columns = (column[:SHOWN].tolist() for column in pairs)
    confused = [
        ConfusedPair((class_names[int(a)], class_names[int(b)]), share, margin)
        for (a, b), share, margin in zip(*columns, strict=True)
    ]
    labelled = labelled_metrics(target, logits[0])
    check = TargetCheck(tuple(class_names), own, other, confused, labelled)
    return check, answers_to(target, logits[0], reference.rows, logits[1])


def unlabelled_metrics(
    features: FeatureSet, logits: jax.Array, shift: Discrepancy, outlier_threshold: float = 6.0
) -> UnlabelledMetrics:
    """Metrics of features and predictions, without labels; see `check_target`."""
    probabilities = np.asarray(jax.nn.softmax(logits))
    return UnlabelledMetrics(
        images=len(features.rows),
        unreadable=features.unreadable,
        kurtosis=activation_kurtosis(features.rows),
        outlier_axes=outlier_features(features.rows, outlier_threshold).axes.tolist(),
        entropy=float(losses.entropy(logits).mean()),
        confidence=float(probabilities.max(-1).mean()),
        predicted=_shares(probabilities.argmax(-1), logits.shape[1]),
        squared_mmd=shift.squared,
        null_quantile=shift.null_quantile,
        p_value=shift.p_value,
    )


def labelled_metrics(features: FeatureSet, logits: jax.Array) -> LabelledMetrics | None:
    """Metrics of the predictions for logits (images, classes); None if no image has a label."""
    known = features.labels >= 0
    if not known.any():
        return None
    labels, classes = features.labels[known], logits.shape[1]
    right = np.asarray(metrics.top_k(logits[known], jnp.asarray(labels)))
    return LabelledMetrics(
        images=len(labels),
        accuracy=float(right.mean()),
        interval=accuracy_interval(right),
        shares=_shares(labels, classes),
        recall=[
            float(right[labels == label].mean()) if label in labels else None
            for label in range(classes)
        ],
    )


def answers_to(
    target: FeatureSet, logits: jax.Array, reference: np.ndarray, reference_logits: jax.Array
) -> Answers:
    """What a model says of every image, and its entropies on the reference; see `check_target`."""
    numbers = target.numbers if len(target.numbers) else np.arange(len(target.rows))
    order = np.argsort(numbers)
    probabilities = np.asarray(jax.nn.softmax(logits))
    nearest = min(NEIGHBOUR, len(reference))
    distances = neighbour_distances(target.rows, reference, neighbour=nearest)
    return Answers(
        numbers[order],
        probabilities.argmax(1)[order],
        probabilities.max(1)[order],
        np.asarray(losses.entropy(logits))[order],
        distances[order],
        np.asarray(losses.entropy(reference_logits)),
    )


def _shares(labels: np.ndarray, classes: int) -> list[float]:
    return (np.bincount(labels, minlength=classes) / len(labels)).tolist()
