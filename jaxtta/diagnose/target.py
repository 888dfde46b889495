"""Distribution shift of unlabelled target images from a reference set.

target, half = mmd_to_reference(target_features, reference_features)
target.squared, half.squared                # discrepancy, and that of two halves of the reference
target.p_value                              # permutation test
neighbour_distances(target_features, reference_features)     # of each image
confused_classes(probabilities).classes[0]  # the most often confused pair of classes
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Discrepancy(NamedTuple):
    """The maximum mean discrepancy of two sets of features.

    Attributes:
        squared: unbiased estimate of its square; close to 0, possibly negative, for two sets from
            one distribution.
        bandwidth: of the Gaussian kernel, in units of the features.
        permuted: (permutations,), the same estimate for random permutations of the images between
            the two sets.
    """

    squared: float
    bandwidth: float
    permuted: np.ndarray

    @property
    def p_value(self) -> float:
        """p-value of the permutation test, in (0, 1]."""
        return float((1 + (self.permuted >= self.squared).sum()) / (1 + len(self.permuted)))

    @property
    def null_quantile(self) -> float:
        """95 % quantile of the estimate under random permutations."""
        return float(np.quantile(self.permuted, 0.95))


def mmd(
    x: ArrayLike,
    y: ArrayLike,
    *,
    bandwidth: float | None = None,
    permutations: int = 500,
    seed: int = 0,
) -> Discrepancy:
    """Maximum mean discrepancy with a Gaussian kernel, and its permutation test.

    Time and memory are quadratic in the number of images of both sets: use samples.

    Args:
        x: (images, d), features of one set.
        y: (other images, d), features of the other set.
        bandwidth: of the kernel; None for the median distance of two images in the union of both
            sets. Discrepancies are comparable at the same bandwidth only.
        permutations: number of random permutations.
        seed: random seed of the permutations.

    Returns:
        The discrepancy and its permutations.

    Raises:
        ValueError: if the sets are not two-dimensional or differ in d, have fewer than two images,
            entries that are not finite or nearly all images equal; or an option is out of range.

    Examples:
        >>> x, y = np.random.default_rng(0).normal(size=(2, 50, 3))
        >>> jaxtta.diagnose.mmd(x, y + 3).p_value < 0.05
        True

    References:
        Gretton et al. 2012, https://jmlr.org/papers/v13/gretton12a.html
    """
    sets = [np.asarray(features, np.float64) for features in (x, y)]
    shapes = [features.shape for features in sets]
    if any(len(shape) != 2 or shape[0] < 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"features have shapes {shapes[0]} and {shapes[1]}, expected two (images, d) with at "
            "least two images"
        )
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}, expected at least 1")
    both = np.concatenate(sets)
    if not np.isfinite(both).all():
        raise ValueError("features have entries that are not finite")
    both -= both.mean(0)  # the same distances, smaller rounding errors
    squares = (both**2).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * both @ both.T, 0)
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(distances[np.triu_indices(len(both), 1)])))
        if not bandwidth:
            raise ValueError("features are the same for most images")
    if not 0 < bandwidth < np.inf:
        raise ValueError(f"bandwidth is {bandwidth}, expected a positive number")
    kernel = np.exp(-distances / (2 * bandwidth**2))
    np.fill_diagonal(kernel, 0)  # the unbiased estimate leaves out the diagonal
    rng, first = np.random.default_rng(seed), len(sets[0])
    members = np.zeros((len(both), 1 + permutations))
    members[:first, 0] = 1  # the sets themselves
    for column in members.T[1:]:
        column[rng.permutation(len(both))[:first]] = 1
    estimates = _estimates(kernel, members)
    return Discrepancy(float(estimates[0]), bandwidth, estimates[1:])


def _estimates(kernel: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Unbiased estimate for each column of (images, columns), 1 for images in the first set."""
    n, m = members[:, 0].sum(), len(members) - members[:, 0].sum()
    within = (members * (kernel @ members)).sum(0)
    across = members.T @ kernel.sum(1) - within
    others = kernel.sum() - within - 2 * across
    return within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * across / (n * m)


def mmd_to_reference(
    target: ArrayLike, reference: ArrayLike, *, most: int = 1000, seed: int = 0
) -> tuple[Discrepancy, Discrepancy]:
    """Discrepancy of target images, and of one half of a reference, from the other half.

    All samples have the same size and the same bandwidth, so the second discrepancy is a baseline
    for the first.

    Args:
        target: (images, d), features.
        reference: (other images, d), features of at least four images.
        most: maximum number of images in each sample.
        seed: random seed of samples and permutations.

    Returns:
        The discrepancy of the target from one half, and that of the other half.

    Raises:
        ValueError: as `mmd` does.

    Examples:
        >>> reference = np.random.default_rng(0).normal(size=(80, 3))
        >>> target, half = jaxtta.diagnose.mmd_to_reference(reference[:40] + 3, reference)
        >>> target.squared > half.squared
        True
    """
    target, reference = np.asarray(target), np.asarray(reference)
    if len(reference) < 4:
        raise ValueError(f"the reference has {len(reference)} images, expected at least four")
    rng = np.random.default_rng(seed)
    count = min(len(target), len(reference) // 2, most)
    sample = reference[rng.permutation(len(reference))[: 2 * count]]
    half, other_half = sample[:count], sample[count:]
    shift = mmd(target[rng.permutation(len(target))[:count]], half, seed=seed)
    return shift, mmd(other_half, half, bandwidth=shift.bandwidth, seed=seed)


def neighbour_distances(
    target: ArrayLike, reference: ArrayLike, *, neighbour: int = 10
) -> np.ndarray:
    """Distance of each target image from the reference set: from its k-th nearest image.

    Large distances mark single images that are unlike all of the reference.

    Args:
        target: (images, d), features.
        reference: (other images, d), features.
        neighbour: k; at most as many as the reference has.

    Returns:
        (images,), Euclidean; from 0 to 2 for features of unit norm.

    Raises:
        ValueError: if the sets are not two-dimensional or differ in d, the reference has fewer than
            k images, or entries are not finite.

    Examples:
        >>> reference = np.zeros((10, 2))
        >>> jaxtta.diagnose.neighbour_distances([[3.0, 4.0], [0.0, 0.0]], reference).tolist()
        [5.0, 0.0]

    References:
        Sun et al. 2022, https://arxiv.org/abs/2204.06507
    """
    target, reference = np.asarray(target, np.float32), np.asarray(reference, np.float32)
    if target.ndim != 2 or reference.ndim != 2 or target.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features have shapes {target.shape} and {reference.shape}, expected two (images, d)"
        )
    if not 1 <= neighbour <= len(reference):
        raise ValueError(f"neighbour is {neighbour}, expected 1 to {len(reference)}")
    if not (np.isfinite(target).all() and np.isfinite(reference).all()):
        raise ValueError("features have entries that are not finite")
    squares = (reference**2).sum(1)
    found = []
    for rows in np.array_split(target, max(1, len(target) // 1000)):  # bounds the memory
        distances = (rows**2).sum(1)[:, None] + squares - 2 * rows @ reference.T
        found.append(np.partition(distances, neighbour - 1, axis=1)[:, neighbour - 1])
    return np.sqrt(np.maximum(np.concatenate(found), 0))


class ConfusablePairs(NamedTuple):
    """Pairs of classes that are easily confused, the most ambiguous first.

    Pairs are sorted by share times (1 - margin).

    Attributes:
        classes: (pairs, 2) integers, ascending in each pair.
        shares: (pairs,), the share of the images whose two most likely classes are the pair.
        margins: (pairs,), the mean difference of the two probabilities over those images.
    """

    classes: np.ndarray
    shares: np.ndarray
    margins: np.ndarray


def confused_classes(probabilities: ArrayLike) -> ConfusablePairs:
    """Find the pairs of classes that are the two most likely ones of the same images.

    Args:
        probabilities: (images, classes).

    Returns:
        The pairs that are the two most likely classes of at least one image.

    Raises:
        ValueError: if there are no images or fewer than two classes, or an entry is not in [0, 1].

    Examples:
        >>> probabilities = [[0.5, 0.4, 0.1], [0.4, 0.5, 0.1], [0.0, 0.1, 0.9]]
        >>> pairs = jaxtta.diagnose.confused_classes(probabilities)
        >>> pairs.classes[0].tolist(), f"{pairs.shares[0]:.2f}"
        ([0, 1], '0.67')
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or not len(probabilities) or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities have shape {probabilities.shape}, expected (images, classes) with at "
            "least one image and two classes"
        )
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-5)).all():
        raise ValueError("probabilities are not all in [0, 1]: jax.nn.softmax(logits) gives them")
    likeliest = np.argpartition(probabilities, -2, axis=1)[:, -2:]
    highest = np.take_along_axis(probabilities, likeliest, 1).astype(np.float64)
    margins = np.abs(highest[:, 1] - highest[:, 0])
    pairs, which, counts = np.unique(
        np.sort(likeliest, 1), axis=0, return_inverse=True, return_counts=True
    )
    shares, means = counts / len(margins), np.bincount(which.ravel(), margins) / counts
    order = np.argsort(-shares * (1 - means), kind="stable")
    return ConfusablePairs(pairs[order], shares[order], means[order])
