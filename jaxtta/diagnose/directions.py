"""Privileged directions: singular directions of a linear head, by their contribution to its logits.

ranked = privileged_directions(head, features, outlier_features(features).axes)
pruned_accuracy(head, ranked.directions, features, labels, fractions=(0.1, 0.2, 0.5, 1.0))
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from jaxtta.diagnose.sums import Features, RunningMean, as_features, sum_images
from jaxtta.metrics import top_k

Array = jax.Array
product = functools.partial(jnp.matmul, precision="highest")


class PrivilegedDirections(NamedTuple):
    """A head's r directions, the most important first.

    Attributes:
        importance: (r,), singular value times mean |cosine|.
        directions: (r, d), orthonormal; their signs are arbitrary.
        singular_values: (r,).
        cosines: (r,), mean over images of |cos| between direction and features.
        overlap: (r,), the share of each direction's squared length on the outlier axes, in [0, 1];
            (number of outlier axes) / d on average for a random direction.
    """

    importance: Array
    directions: Array
    singular_values: Array
    cosines: Array
    overlap: Array

    @property
    def spread(self) -> Array:
        """Coefficient of variation of the importance: standard deviation over mean."""
        return self.importance.std() / self.importance.mean()


def head_directions(head: Array) -> Array:
    """Right singular vectors of a linear head.

    Args:
        head: (C, d), a row for each class; the class text embeddings for zero-shot heads.

    Returns:
        (r, d) with r = min(C, d), orthonormal, computed in float64 on the host.

    Raises:
        ValueError: if the head has one class, is zero or not finite.

    Examples:
        >>> jaxtta.diagnose.head_directions(jnp.ones((2, 5))).shape  # two classes
        (2, 5)
    """
    matrix = np.asarray(head, np.float64)
    if matrix.ndim != 2 or len(matrix) < 2:
        raise ValueError(f"the head has shape {matrix.shape}, expected (C, d) with C at least 2")
    if not np.isfinite(matrix).all() or not matrix.any():
        raise ValueError("the head is zero or has entries that are not finite")
    return jnp.asarray(np.linalg.svd(matrix, full_matrices=False)[2])


@jax.jit
def cosine_stats(directions: Array, features: Array, mask: Array | None = None) -> RunningMean:
    """Sum over images of |cos| between each direction and the image's features.

    Args:
        directions: (r, d), of unit norm.
        features: (batch, d).
        mask: (batch,) bool, false for padding; None for none.

    Returns:
        The sums, (r,), for `rank_directions`.
    """
    features = as_features(features, directions.shape[1])
    largest = jnp.abs(features).max(1, keepdims=True)
    defined = (largest > 0) & jnp.isfinite(largest)
    features = jnp.where(defined, features, 1) / jnp.where(defined, largest, 1)
    unit = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    return sum_images(jnp.abs(product(unit, directions.T)), defined[:, 0], mask)


def rank_directions(
    head: Array, directions: Array, sums: RunningMean, axes: Sequence[int] | np.ndarray = ()
) -> PrivilegedDirections:
    """Sort directions by importance, from the sums of `cosine_stats` over all images.

    Args:
        head: (C, d).
        directions: (r, d), from `head_directions`.
        sums: (r,), from `cosine_stats`.
        axes: (outliers,) integers, the outlier axes.

    Returns:
        The directions, the most important first.

    Raises:
        ValueError: if an image's features are zero or not finite, or an axis is out of range.
    """
    cosines = sums.mean("features that are zero or not finite")
    axes = np.unique(np.asarray(axes, int))
    if axes.size and not 0 <= axes[0] <= axes[-1] < directions.shape[1]:
        raise ValueError(f"axes {axes.tolist()} are not all below {directions.shape[1]}")
    singular_values = jnp.linalg.norm(product(jnp.asarray(head), directions.T), axis=0)
    importance, overlap = singular_values * cosines, (directions[:, axes] ** 2).sum(1)
    columns = (importance, directions, singular_values, cosines, overlap)
    return PrivilegedDirections(*(column[jnp.argsort(-importance)] for column in columns))


def privileged_directions(
    head: Array, features: Features, axes: Sequence[int] | np.ndarray = ()
) -> PrivilegedDirections:
    """Rank a head's singular directions by their contribution to its logits.

    Args:
        head: (C, d), a row for each class; the class text embeddings for zero-shot heads.
        features: (images, d), normalised or not.
        axes: (outliers,) integers, the outlier axes; see `outlier_features`.

    Returns:
        The head's right singular vectors by importance, σ_i · mean |cos(v_i, h)|.

    Raises:
        ValueError: if the head has one class, the features do not match it, or an image's are zero.

    Examples:
        >>> head = jnp.array([[3.0, 0.0], [0.0, 1.0]])  # two classes
        >>> features = jnp.array([[1.0, 1.0], [1.0, -1.0]])
        >>> found = jaxtta.diagnose.privileged_directions(head, features)
        >>> [f"{x:.2f}" for x in found.importance]  # singular values 3 and 1, cosines of 0.71
        ['2.12', '0.71']

    References:
        Interpreting CLIP, https://arxiv.org/abs/2310.13040
    """
    directions = head_directions(head)
    sums = cosine_stats(directions, jnp.asarray(features))
    return rank_directions(head, directions, sums, axes)


def prune_directions(
    head: Array, directions: Array, *, count: int | None = None, fraction: float | None = None
) -> Array:
    """Project a head onto its most important directions.

    Args:
        head: (C, d).
        directions: (r, d), the head's right singular vectors, the most important first.
        count: number of directions to keep; give either this or the fraction.
        fraction: share of the r directions to keep, rounded to the nearest number, at least one.

    Returns:
        (C, d), of rank at most `count`.

    Raises:
        ValueError: if not exactly one of count and fraction is given, or it is out of range.

    Examples:
        >>> head = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> directions = jaxtta.diagnose.head_directions(head)
        >>> pruned = jaxtta.diagnose.prune_directions(head, directions, count=1)
        >>> bool(jnp.allclose(pruned, jnp.array([[3.0, 0.0], [0.0, 0.0]]), atol=1e-5))
        True
    """
    if count is None and fraction is not None:
        count = _count(fraction, len(directions))
    elif count is None or fraction is not None:
        raise ValueError("pruning needs either a count or a fraction")
    if not 1 <= count <= len(directions):
        raise ValueError(f"count is {count}, expected 1 to {len(directions)} directions")
    if np.shape(head)[1:] != directions.shape[1:]:
        raise ValueError(f"a head {np.shape(head)} does not match directions {directions.shape}")
    kept = directions[:count]
    return product(product(jnp.asarray(head), kept.T), kept)


@functools.partial(jax.jit, static_argnames="counts")
def pruning_stats(
    head: Array,
    directions: Array,
    features: Array,
    labels: Array,
    mask: Array | None = None,
    *,
    counts: tuple[int, ...],
) -> RunningMean:
    """Count the images that a head classifies correctly with its first directions only.

    Args:
        head: (C, d).
        directions: (r, d), as in `prune_directions`.
        features: (batch, d).
        labels: (batch,) integers.
        mask: (batch,) bool, false for padding; None for none.
        counts: (prunings,), numbers of directions to keep.

    Returns:
        The sums, (prunings,); their mean is the accuracy.
    """
    features = as_features(features, directions.shape[1])
    read, written = product(features, directions.T), product(head, directions.T)
    defined = jnp.isfinite(features).all(1) & (labels >= 0) & (labels < len(head))
    labels, logits, correct = jnp.clip(labels, 0, len(head) - 1), 0.0, {}
    for start, stop in itertools.pairwise((0, *sorted(set(counts)))):
        logits += product(read[:, start:stop], written[:, start:stop].T)
        correct[stop] = top_k(logits, labels)
    return sum_images(jnp.stack([correct[count] for count in counts], 1), defined, mask)


def pruned_accuracy(
    head: Array,
    directions: Array,
    features: Features,
    labels: ArrayLike,
    fractions: Sequence[float] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
) -> np.ndarray:
    """Accuracy of a head by the fraction of its directions that is kept.

    Args:
        head: (C, d).
        directions: (r, d), as in `prune_directions`.
        features: (images, d).
        labels: (images,) integers.
        fractions: (prunings,), each in (0, 1].

    Returns:
        (prunings,).

    Raises:
        ValueError: if labels do not match the images or classes, or a fraction is out of range.

    Examples:
        >>> head, features = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.eye(2)
        >>> directions, labels = jaxtta.diagnose.head_directions(head), np.array([0, 1])
        >>> pruned_accuracy = jaxtta.diagnose.pruned_accuracy
        >>> pruned_accuracy(head, directions, features, labels, fractions=(0.5, 1.0)).tolist()
        [0.5, 1.0]

    References:
        Interpreting CLIP, https://arxiv.org/abs/2310.13040
    """
    counts = tuple(_count(fraction, len(directions)) for fraction in fractions)
    head, labels = jnp.asarray(head), jnp.asarray(labels)
    if labels.shape != (len(features),):
        raise ValueError(f"labels {labels.shape} do not match {len(features)} images")
    stats = functools.partial(pruning_stats, head, directions, counts=counts)
    pieces = [slice(i, i + 4096) for i in range(0, max(len(labels), 1), 4096)]  # logits are large
    sums = functools.reduce(
        RunningMean.merge, (stats(jnp.asarray(features[piece]), labels[piece]) for piece in pieces)
    )
    reason = f"a label outside 0 to {len(head) - 1} or features that are not finite"
    return jax.device_get(sums).mean(reason)


def _count(fraction: float, directions: int) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}, expected a number above 0, at most 1")
    return max(1, round(fraction * directions))
