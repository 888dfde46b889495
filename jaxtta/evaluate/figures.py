"""The figures of a diagnosis and of a field check: what features, heads and labels come to."""

import contextlib
import csv
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta import diagnose, losses, metrics
from jaxtta.evaluate.bootstrap import LEVEL, bootstrap, interval

SHOWN = 20  # classes or pairs of classes that are listed
EQUAL = 0.01  # of accuracy: what a pruned head may lose and still count as good
LARGEST = 5  # axes of the top direction that are listed

Found = dict[str, Any]
"""Figures by name, as JSON has them."""


class Features(NamedTuple):
    """A model's features of one set.

    Attributes:
        rows: (images, d) float32, of unit norm.
        labels: (images,) integers; -1 where there is none.
        lost: names of images that could not be read.
    """

    rows: np.ndarray
    labels: np.ndarray
    lost: list[str]


@contextlib.contextmanager
def error_context(what: object) -> Iterator[None]:
    """Say in a ValueError what it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def logits_of(features: np.ndarray, head: jax.Array) -> jax.Array:
    """Cosines (images, classes)."""
    return jnp.matmul(features, head.T, precision="highest")


def interval_of(right: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the share that is right, exact where a bootstrap has no width."""
    if right.any() and not right.all():
        return interval(bootstrap(right[:, None], np.ones((len(right), 1)))[:, 0])
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
    """What only the base set decides.

    Args:
        head: (C, d).
        features: of the base set.
        names: of the classes.
        threshold: of `outlier_features`.
        detectors: of classes: "axes", or "directions" of the head.
        precision: of `concept_detectors`.

    Returns:
        The figures, and the head's directions (r, d), the most important first.

    Raises:
        ValueError: if all images are of one class, or features have no value.
    """
    rows, present = features.rows, np.unique(features.labels)
    if len(present) < 2:
        raise ValueError(f"all images are of class {names[present[0]]}, expected two or more")
    outliers = diagnose.outlier_features(rows, threshold)
    ranked = diagnose.privileged_directions(head, rows, outliers.axes)
    top = np.asarray(ranked.directions[0])
    largest = np.argsort(-np.abs(top))[:LARGEST]
    top = top * np.sign(top[largest[0]])  # a direction's sign means nothing
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
        "modality_gap": float(diagnose.modality_gap(rows, head)),
        "concepts": [names[label] for label in present],
        "encoded": [names[label] for label in present[detected.encoded]],
        "most_concepts_per_direction": int(detected.per_direction.max()),
    }, ranked.directions


def set_figures(
    head: jax.Array, ranked: jax.Array, features: Features, fractions: Sequence[float]
) -> Found:
    """What is measured on every set.

    Args:
        head: (C, d).
        ranked: (r, d), its directions, the most important first.
        features: of the set.
        fractions: of the directions, to keep.

    Returns:
        The figures.
    """
    rows, labels, lost = features
    kurtosis = diagnose.activation_kurtosis(rows)
    right = np.asarray(metrics.top_k(logits_of(rows, head), labels))
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
    """The smallest fraction from which on a pruned head stays within `EQUAL` of the whole one.

    Args:
        accuracy: of the whole head.
        fractions: that were kept.
        accuracies: with each of them.

    Returns:
        The fraction; None if not even the largest reaches it.
    """
    pairs = sorted(zip(fractions, accuracies, strict=True), reverse=True)
    good = itertools.takewhile(lambda pair: pair[1] >= accuracy - EQUAL, pairs)
    return min((fraction for fraction, _ in good), default=None)


def pair_figures(
    first: str, second: str, results: Found, features: Mapping[str, np.ndarray]
) -> Found:
    """What two models have in common.

    Args:
        first: one model's name.
        second: another's.
        results: figures by model.
        features: of the base set by model, (images, d).

    Returns:
        The figures.
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
        results: figures by model.
        points: base and shifted accuracy of models that are not robust.
        references: in their place, which of the models are not.

    Returns:
        The values, the line and its points; or the reason why there is none.
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
        values = diagnose.effective_robustness(*np.transpose([*pairs.values()]), line).tolist()
    except ValueError as error:  # the figures so far are worth reporting
        return {"reason": str(error)}
    values = dict(zip(results, values, strict=True))
    return {"values": values, "line": line._asdict(), "points": points}


def read_points(path: Path) -> list[tuple[float, float]]:
    """Read reference models' accuracies.

    Args:
        path: a .json list of objects or a .csv, with base and shifted.

    Returns:
        Base and shifted accuracy of each.

    Raises:
        ValueError: if the file holds something else, or no line goes through the points.
    """
    try:
        text = path.read_text()
        rows = json.loads(text) if path.suffix == ".json" else csv.DictReader(text.splitlines())
        points = [(float(row["base"]), float(row["shifted"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected base and shifted of each model ({error!r})") from error
    with error_context(path):
        diagnose.fit_baseline(*np.reshape(points, (-1, 2)).T)
    return points


# --- field check ---


def space_figures(features: Features, logits: jax.Array, threshold: float = 6.0) -> Found:
    """How images sit in a model's space, and what it predicts.

    Args:
        features: of the images.
        logits: (images, classes).
        threshold: of `outlier_features`.

    Returns:
        The figures.
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


def label_figures(features: Features, logits: jax.Array) -> Found:
    """What labels say of the predictions; nothing where there are none.

    Args:
        features: of the images, some or all of them labelled.
        logits: (images, classes).

    Returns:
        The figures, of the images with labels.
    """
    known = features.labels >= 0
    if not known.any():
        return {}
    labels, classes = features.labels[known], logits.shape[1]
    right = np.asarray(metrics.top_k(logits[known], labels))
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
    """The pairs of classes between which predictions (images, classes) hesitate most."""
    found = diagnose.confused_classes(jax.nn.softmax(logits))
    columns = (column[:SHOWN].tolist() for column in found)
    return [
        {"classes": [names[label] for label in pair], "share": share, "margin": margin}
        for pair, share, margin in zip(*columns, strict=True)
    ]


def shares(labels: np.ndarray, classes: int) -> list[float]:
    """The share of each class among labels."""
    return (np.bincount(labels, minlength=classes) / len(labels)).tolist()
