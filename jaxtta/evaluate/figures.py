"""Metrics of a model diagnosis and of a check of target images."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta import diagnose, losses, metrics
from jaxtta.data.text import read_rows, read_text
from jaxtta.evaluate.bootstrap import LEVEL, bootstrap, interval

SHOWN = 20  # number of classes, or pairs of classes, to list
EQUAL = 0.01  # accuracy that a sufficient pruned head may lose
LARGEST = 5  # number of axes of the top direction to list
NEIGHBOUR = 10  # the nearest image of the reference, this many-th, that distances are from

Found = dict[str, Any]
"""Metrics by name, in JSON types."""


class Features(NamedTuple):
    """A model's features of a set of images.

    Attributes:
        rows: (images, d) float32, of unit norm.
        labels: (images,) integers; -1 for images without a label.
        lost: names of images that could not be read.
        numbers: (images,) integers, each image's index in its source; empty if not known.
    """

    rows: np.ndarray
    labels: np.ndarray
    lost: list[str]
    numbers: np.ndarray = np.zeros(0, int)


class Answers(NamedTuple):
    """What a model says of every image of a set, in the order of the source.

    Attributes:
        numbers: (images,) integers, each image's index in the source.
        labels: (images,) integers, the predicted classes.
        confidences: (images,), their probabilities.
        entropies: (images,), of the predictions, in nats.
        distances: (images,), from the reference; see `diagnose.neighbour_distances`.
    """

    numbers: np.ndarray
    labels: np.ndarray
    confidences: np.ndarray
    entropies: np.ndarray
    distances: np.ndarray

    def least_sure(self, count: int) -> np.ndarray:
        """Places of the images with the highest entropies, the highest first."""
        return np.argsort(-self.entropies, kind="stable")[:count]


@contextlib.contextmanager
def error_context(context: object) -> Iterator[None]:
    """Prefix a ValueError's message with its context."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{context}: {error}") from error


def logits_of(features: np.ndarray, head: jax.Array) -> jax.Array:
    """Cosines (images, classes)."""
    return jnp.matmul(features, head.T, precision="highest")


def interval_of(right: np.ndarray) -> tuple[float, float]:
    """95 % interval of the accuracy; exact at 0 and 1, where the bootstrap has no width."""
    if right.any() and not right.all():
        bounds = interval(bootstrap(right[:, None], np.ones((len(right), 1)))[:, 0])
        assert bounds is not None  # every resample has images
        return bounds
    bound = ((1 - LEVEL) / 2) ** (1 / len(right))
    return (bound, 1.0) if right.all() else (0.0, 1 - bound)


# --- diagnosis ---


def base_figures(
    head: jax.Array,
    features: Features,
    names: Sequence[str],
    *,
    threshold: float = 6.0,
    detectors: str = "axes",
    precision: float = 0.9,
) -> tuple[Found, jax.Array]:
    """Metrics that depend on the base set only.

    Args:
        head: (C, d).
        features: of the base set.
        names: of the classes.
        threshold: of `outlier_features`.
        detectors: of the classes: coordinate "axes", or "directions" of the head.
        precision: threshold of `concept_detectors`.

    Returns:
        The metrics, and the head's directions (r, d), the most important first.

    Raises:
        ValueError: if all images are of one class, or features are constant or not finite.
    """
    rows, present = features.rows, np.unique(features.labels)
    if len(present) < 2:
        raise ValueError(f"all images are of class {names[present[0]]}, expected two or more")
    outliers = diagnose.outlier_features(rows, threshold)
    ranked = diagnose.privileged_directions(head, rows, outliers.axes)
    top = np.asarray(ranked.directions[0])
    largest = np.argsort(-np.abs(top))[:LARGEST]
    top = top * np.sign(top[largest[0]])  # a direction's sign is arbitrary
    detected = diagnose.concept_detectors(
        rows if detectors == "axes" else np.asarray(logits_of(rows, ranked.directions)),
        features.labels[:, None] == present,
        precision,
    )
    return {
        "outlier_axes": outliers.axes.tolist(),
        "largest_outlier_share": float(outliers.shares.max()),
        "importance": np.asarray(ranked.importance).tolist(),
        "top_direction": [[int(axis), float(top[axis])] for axis in largest],
        "overlap": np.asarray(ranked.overlap).tolist() if outliers.axes.size else None,
        "chance_overlap": outliers.axes.size / rows.shape[1],
        "spread": float(ranked.spread),
        "modality_gap": float(diagnose.modality_gap(jnp.asarray(rows), head)),
        "concepts": [names[label] for label in present],
        "encoded": [names[label] for label in present[detected.encoded]],
        "most_concepts_per_direction": int(detected.per_direction.max()),
    }, ranked.directions


def set_figures(
    head: jax.Array, ranked: jax.Array, features: Features, fractions: Sequence[float]
) -> Found:
    """Metrics of one set.

    Args:
        head: (C, d).
        ranked: (r, d), its directions, the most important first.
        features: of the set.
        fractions: shares of the directions to keep, in (0, 1].

    Returns:
        The metrics.
    """
    rows, labels, lost, _ = features
    kurtosis = diagnose.activation_kurtosis(rows)
    right = np.asarray(metrics.top_k(logits_of(rows, head), jnp.asarray(labels)))
    return {
        "images": len(rows),
        "lost": lost,
        "accuracy": float(right.mean()),
        "interval": interval_of(right),
        "kurtosis": kurtosis,
        "pruned": diagnose.pruned_accuracy(head, ranked, rows, labels, fractions).tolist(),
    }


def smallest_sufficient_fraction(
    accuracy: float, fractions: Sequence[float], accuracies: Sequence[float]
) -> float | None:
    """Smallest fraction from which pruned heads lose at most `EQUAL` accuracy.

    Args:
        accuracy: of the full head.
        fractions: (prunings,), of the directions kept.
        accuracies: (prunings,), of the pruned heads.

    Returns:
        The fraction; None if the largest fraction is not sufficient.
    """
    pairs = sorted(zip(fractions, accuracies, strict=True), reverse=True)
    good = itertools.takewhile(lambda pair: pair[1] >= accuracy - EQUAL, pairs)
    return min((fraction for fraction, _ in good), default=None)


def pair_figures(
    first: str, second: str, results: Found, features: Mapping[str, np.ndarray]
) -> Found:
    """Similarity of two models.

    Args:
        first: one model's name.
        second: the other's name.
        results: metrics by model.
        features: of the base set by model, (images, d).

    Returns:
        The metrics.
    """
    concepts = np.array(results[first]["concepts"])
    a, b = (np.isin(concepts, results[name]["encoded"]) for name in (first, second))
    with error_context(f"{first} and {second}"):
        cka = diagnose.linear_cka(features[first], features[second])
    return {
        "models": [first, second],
        "cka": cka,
        "shared": concepts[diagnose.shared_concepts(a, b)].tolist(),
        "unique": [concepts[diagnose.unique_concepts(*x)].tolist() for x in ((a, b), (b, a))],
    }


def robustness_of(
    results: Found, points: Sequence[tuple[float, float]] = (), references: Sequence[str] = ()
) -> Found:
    """Effective robustness by model.

    Args:
        results: metrics by model.
        points: base and shifted accuracies of models that are not robust.
        references: instead of points, names of those models that are not robust.

    Returns:
        The values, the baseline and its points; or the reason why there are none.
    """
    pairs = {name: (r["base_accuracy"], r["shifted_accuracy"]) for name, r in results.items()}
    if any(shifted is None for _, shifted in pairs.values()):
        return {"reason": "there are no shifted sets"}
    points = points or [pairs[name] for name in references]
    if not points:
        reason = "it takes models that are not robust, by --reference-points or --references"
        return {"reason": reason}
    try:
        line = diagnose.fit_baseline(*np.transpose(points))
        base, shifted = np.transpose([*pairs.values()])
        values = diagnose.effective_robustness(base, shifted, line).tolist()
    except ValueError as error:  # report the other metrics
        return {"reason": str(error)}
    values = dict(zip(results, values, strict=True))
    return {"values": values, "line": line._asdict(), "points": points}


def read_points(path: Path) -> list[tuple[float, float]]:
    """Read the accuracies of reference models.

    Args:
        path: of a .json list of objects or a .csv, with base and shifted.

    Returns:
        Base and shifted accuracy of each model.

    Raises:
        ValueError: if the file has another content, or no baseline can be fitted.
    """
    try:
        if path.suffix == ".json":
            rows = json.loads(read_text(path))
        else:
            rows = [row for _, row in read_rows(path, ("base", "shifted"))]
        points = [(float(row["base"]), float(row["shifted"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected base and shifted of each model ({error!r})") from error
    with error_context(path):
        diagnose.fit_baseline(*np.reshape(points, (-1, 2)).T)
    return points


# --- check of target images ---


def space_figures(features: Features, logits: jax.Array, threshold: float = 6.0) -> Found:
    """Metrics of features and predictions, without labels.

    Args:
        features: of the images.
        logits: (images, classes).
        threshold: of `outlier_features`.

    Returns:
        The metrics.
    """
    probabilities = np.asarray(jax.nn.softmax(logits))
    outliers = diagnose.outlier_features(features.rows, threshold)
    return {
        "images": len(features.rows),
        "lost": features.lost,
        "kurtosis": diagnose.activation_kurtosis(features.rows),
        "outlier_axes": outliers.axes.tolist(),
        "entropy": float(losses.entropy(logits).mean()),
        "confidence": float(probabilities.max(-1).mean()),
        "predicted": shares(probabilities.argmax(-1), probabilities.shape[1]),
    }


def image_answers(features: Features, logits: jax.Array, reference: np.ndarray) -> Answers:
    """What a model says of every image.

    Args:
        features: of the images.
        logits: (images, classes).
        reference: (other images, d), features.

    Returns:
        The answers.
    """
    order = np.argsort(features.numbers)
    probabilities = np.asarray(jax.nn.softmax(logits))[order]
    nearest = min(NEIGHBOUR, len(reference))
    return Answers(
        features.numbers[order],
        probabilities.argmax(1),
        probabilities.max(1),
        np.asarray(losses.entropy(logits))[order],
        diagnose.neighbour_distances(features.rows, reference, neighbour=nearest)[order],
    )


def label_figures(features: Features, logits: jax.Array) -> Found:
    """Metrics of the predictions on labelled images; none if no image has a label.

    Args:
        features: of the images, some or all with labels.
        logits: (images, classes).

    Returns:
        The metrics of the images with labels.
    """
    known = features.labels >= 0
    if not known.any():
        return {}
    labels, classes = features.labels[known], logits.shape[1]
    right = np.asarray(metrics.top_k(logits[known], jnp.asarray(labels)))
    return {
        "labels": len(labels),
        "accuracy": float(right.mean()),
        "interval": interval_of(right),
        "labelled": shares(labels, classes),
        "recall": [
            float(right[labels == label].mean()) if label in labels else None
            for label in range(classes)
        ],
    }


def confused(logits: jax.Array, names: Sequence[str]) -> list[Found]:
    """The most often confused pairs of classes for logits (images, classes)."""
    pairs = diagnose.confused_classes(np.asarray(jax.nn.softmax(logits)))
    columns = (column[:SHOWN].tolist() for column in pairs)
    return [
        {"classes": [names[label] for label in pair], "share": share, "margin": margin}
        for pair, share, margin in zip(*columns, strict=True)
    ]


def shares(labels: np.ndarray, classes: int) -> list[float]:
    """The share of each class among labels (images,), as a list (classes,)."""
    return (np.bincount(labels, minlength=classes) / len(labels)).tolist()
