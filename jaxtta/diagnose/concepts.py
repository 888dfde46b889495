"""Concept detection by single directions of a feature space."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class ConceptDetectors(NamedTuple):
    """How well each direction detects each concept.

    Attributes:
        precision: (directions, concepts), average precision with the better sign.
        sign: (directions, concepts), that sign, 1 or -1.
        detects: (directions, concepts) bool, whether the precision reaches the threshold.
    """

    precision: np.ndarray
    sign: np.ndarray
    detects: np.ndarray

    @property
    def encoded(self) -> np.ndarray:
        """(concepts,) bool, whether at least one direction detects the concept."""
        return np.asarray(self.detects.any(0))

    @property
    def per_direction(self) -> np.ndarray:
        """(directions,), the number of concepts that each direction detects."""
        return self.detects.sum(1)


def concept_detectors(
    scores: ArrayLike, labels: ArrayLike, threshold: float = 0.9
) -> ConceptDetectors:
    """Average precision of directions as detectors of concepts, with both signs.

    A random direction has an average precision of about the share of the images with the concept.
    Time is proportional to directions times (images + true labels); memory, apart from arguments
    and result, to images + labels.

    Args:
        scores: (images, directions): the features for coordinate axes, `features @ directions.T`
            for other directions.
        labels: (images, concepts) bool, whether the image has the concept.
        threshold: minimum average precision to detect a concept.

    Returns:
        The precisions, signs and detections.

    Raises:
        ValueError: if scores are not finite, labels do not match the images or are not boolean, or
            a concept is in all images or in none.

    Examples:
        >>> scores = np.array([[0.9, 0.1], [0.8, 0.3], [0.2, 0.2], [0.1, 0.4]])  # of two directions
        >>> striped = np.array([[True], [True], [False], [False]])  # images by concepts
        >>> found = jaxtta.diagnose.concept_detectors(scores, striped)
        >>> found.precision[:, 0].round(2).tolist(), found.encoded.tolist()
        ([1.0, 0.83], [True])

    References:
        Interpreting CLIP, https://arxiv.org/abs/2310.13040
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 2 or labels.ndim != 2 or len(scores) != len(labels):
        raise ValueError(
            f"labels {labels.shape} do not match scores {scores.shape}: expected "
            "(images, concepts) and (images, directions)"
        )
    truth = labels.astype(bool)
    if not np.array_equal(truth, labels):
        raise ValueError("labels have entries that are neither true nor false")
    sizes = truth.sum(0)
    if len(trivial := np.flatnonzero((sizes == 0) | (sizes == len(truth)))):
        raise ValueError(f"concepts {trivial.tolist()} are in all images or in none")
    concepts, images = np.nonzero(truth.T)  # every true label, concept by concept
    both = np.empty((2, scores.shape[1], len(sizes)))
    for direction in range(scores.shape[1]):
        column = scores[:, direction]
        if not np.isfinite(column).all():
            raise ValueError(f"scores of direction {direction} are not finite")
        both[:, direction] = _precisions(column, concepts, images, sizes)
    best = both.max(0)
    return ConceptDetectors(best, np.where(both[0] >= both[1], 1, -1), best >= threshold)


def shared_concepts(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Concepts that both models encode, (concepts,) bool, from their `encoded`.

    Examples:
        >>> jaxtta.diagnose.shared_concepts([True, True, False], [True, False, False]).tolist()
        [True, False, False]
    """
    first, second = _same_concepts(first, second)
    return first & second


def unique_concepts(first: ArrayLike, second: ArrayLike) -> np.ndarray:
    """Concepts that the first model encodes and the second does not, (concepts,) bool.

    Examples:
        >>> jaxtta.diagnose.unique_concepts([True, True, False], [True, False, False]).tolist()
        [False, True, False]
    """
    first, second = _same_concepts(first, second)
    return first & ~second


def _same_concepts(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape:
        raise ValueError(f"concepts {first.shape} do not match concepts {second.shape}")
    return first, second


def _precisions(
    scores: np.ndarray, concepts: np.ndarray, images: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Average precision of the scores and of their negatives, (2, concepts).

    The mean over a concept's images of the concept's share among all images with at least their
    score. Equal scores are treated as one threshold.
    """
    count = len(scores)
    order = np.argsort(scores)
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    lower, upto = _runs(scores[order])
    # one sort orders the images of all concepts by their scores, ascending in each
    own = np.sort(concepts * count + place[images]) - concepts * count
    starts = np.cumsum(sizes) - sizes
    own_lower, own_upto = _runs(concepts * count + lower[own])
    own_lower, own_upto = own_lower - starts[concepts], own_upto - starts[concepts]
    above = (sizes[concepts] - own_lower) / (count - lower[own])
    below = own_upto / upto[own]
    return np.stack([np.add.reduceat(shares, starts) / sizes for shares in (above, below)])


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end index of the run of equal neighbours around each value."""
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    edges = np.concatenate([[0], edges, [len(values)]])
    return np.repeat(edges[:-1], np.diff(edges)), np.repeat(edges[1:], np.diff(edges))
