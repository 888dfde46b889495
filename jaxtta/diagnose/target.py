"""How images from the field differ from those that a model is known on, without their labels.

field, half = mmd_to_reference(field_features, reference_features)
field.squared, half.squared                 # how far apart, and two halves of the reference
field.p_value                               # whether chance explains it
confused_classes(probabilities).classes[0]  # the two classes that it hesitates between most
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Discrepancy(NamedTuple):
    """The maximum mean discrepancy of two sets of features.

    Attributes:
        squared: unbiased estimate of its square; around 0, and negative as well, for two sets from
            one distribution.
        bandwidth: of the Gaussian kernel, in units of the features.
        permuted: (permutations,), the same estimate with the images dealt at random into two sets
            of the same sizes.
    """

    squared: float
    bandwidth: float
    permuted: np.ndarray

    @property
    def p_value(self) -> float:
        """How often sets dealt at random lie as far apart, in (0, 1]."""
        return float((1 + (self.permuted >= self.squared).sum()) / (1 + len(self.permuted)))

    @property
    def null_quantile(self) -> float:
        """What 95 % of the sets dealt at random stay below."""
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

    Time and memory grow with the square of the number of images in both sets: draw some.

    Args:
        x: (images, d), one set's features.
        y: (other images, d), the other's.
        bandwidth: of the kernel; None for the median distance of two images in both sets
            together. Discrepancies compare only at the same one.
        permutations: how many times the images are dealt anew.
        seed: of the dealing.

    Returns:
        The discrepancy and its permutations.

    Raises:
        ValueError: if the sets have other than two dimensions or different d, fewer than two
            images, entries that are not finite or nearly all equal images; or an option makes
            no sense.

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
    both -= both.mean(0)  # distances stay, rounding shrinks
    squares = (both**2).sum(1)
    distances = np.maximum(squares[:, None] + squares - 2 * both @ both.T, 0)
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(distances[np.triu_indices(len(both), 1)])))
        if not bandwidth:
            raise ValueError("features are the same for most images")
    if not 0 < bandwidth < np.inf:
        raise ValueError(f"bandwidth is {bandwidth}, expected a positive number")
    kernel = np.exp(-distances / (2 * bandwidth**2))
    np.fill_diagonal(kernel, 0)  # the estimate is unbiased without each image's own
    rng, first = np.random.default_rng(seed), len(sets[0])
    dealt = np.zeros((len(both), 1 + permutations))
    dealt[:first, 0] = 1  # as they came
    for column in dealt.T[1:]:
        column[rng.permutation(len(both))[:first]] = 1
    found = _estimates(kernel, dealt)
    return Discrepancy(float(found[0]), bandwidth, found[1:])


def _estimates(kernel: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Unbiased estimates, one a column: which images are in the first set."""
    n, m = members[:, 0].sum(), len(members) - members[:, 0].sum()
    within = (members * (kernel @ members)).sum(0)
    across = members.T @ kernel.sum(1) - within
    others = kernel.sum() - within - 2 * across
    return within / (n * (n - 1)) + others / (m * (m - 1)) - 2 * across / (n * m)


def mmd_to_reference(
    field: ArrayLike, reference: ArrayLike, *, most: int = 1000, seed: int = 0
) -> tuple[Discrepancy, Discrepancy]:
    """How far images lie from one half of a reference, and how far its other half does.

    All three samples are drawn at the same size and measured at the same bandwidth, so that the
    second discrepancy is a yardstick for the first.

    Args:
        field: (images, d), features.
        reference: (other images, d), at least four.
        most: images of each sample.
        seed: of all that is drawn.

    Returns:
        The field's discrepancy and that of the two halves.

    Raises:
        ValueError: as `mmd` does.
    """
    field, reference = np.asarray(field), np.asarray(reference)
    rng = np.random.default_rng(seed)
    count = min(len(field), len(reference) // 2, most)
    drawn = reference[rng.permutation(len(reference))[: 2 * count]]
    near, far = drawn[:count], drawn[count:]
    apart = mmd(field[rng.permutation(len(field))[:count]], near, seed=seed)
    return apart, mmd(far, near, bandwidth=apart.bandwidth, seed=seed)


class ConfusablePairs(NamedTuple):
    """Pairs of classes between which predictions hesitate, the most doubtful first.

    A pair's doubt is its share times one minus its margin.

    Attributes:
        classes: (pairs, 2) integers, ascending in each pair.
        shares: (pairs,), the share of the images whose two likeliest classes these are.
        margins: (pairs,), the mean difference of the two probabilities over those images.
    """

    classes: np.ndarray
    shares: np.ndarray
    margins: np.ndarray


def confused_classes(probabilities: ArrayLike) -> ConfusablePairs:
    """Find the classes that compete for the same images.

    Args:
        probabilities: (images, classes).

    Returns:
        The pairs that are the two likeliest classes of some image.

    Raises:
        ValueError: if there are no images or fewer than two classes, or entries are not finite.
    """
    probabilities = np.asarray(probabilities)
    if probabilities.ndim != 2 or not len(probabilities) or probabilities.shape[1] < 2:
        raise ValueError(
            f"probabilities have shape {probabilities.shape}, expected (images, classes) with at "
            "least one image and two classes"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities are not all finite")
    likeliest = np.argpartition(probabilities, -2, axis=1)[:, -2:]
    highest = np.take_along_axis(probabilities, likeliest, 1).astype(np.float64)
    margins = np.abs(highest[:, 1] - highest[:, 0])
    pairs, which, counts = np.unique(
        np.sort(likeliest, 1), axis=0, return_inverse=True, return_counts=True
    )
    shares, means = counts / len(margins), np.bincount(which.ravel(), margins) / counts
    order = np.argsort(-shares * (1 - means), kind="stable")
    return ConfusablePairs(pairs[order], shares[order], means[order])
