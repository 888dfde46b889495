"""Means over images in batches, independent of the division into batches.

sums = functools.reduce(RunningMean.merge, (kurtosis_stats(features) for features in batches))
sums.mean()
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Features = jax.Array | np.ndarray
"""Feature arrays of either kind, (images, d)."""


class RunningMean(NamedTuple):
    """A running mean over images.

    Attributes:
        count: () number of images.
        total: (…), the sum over images with a defined value.
        undefined: () number of images without one.

    Examples:
        >>> from functools import reduce
        >>> from jaxtta.diagnose import RunningMean, kurtosis_stats
        >>> batches = np.split(np.random.default_rng(0).normal(size=(8, 16)), 2)
        >>> sums = reduce(RunningMean.merge, map(kurtosis_stats, batches))
        >>> int(sums.count), sums.mean().shape
        (8, ())
    """

    count: Array
    total: Array
    undefined: Array

    def merge(self, other: Self) -> Self:
        """Combine the sums over two sets of images."""
        return type(self)(*(a + b for a, b in zip(self, other, strict=True)))

    def mean(self, undefined_reason: str = "features or labels without a value") -> Array:
        """The mean (…); raises a ValueError if there are no images or undefined values."""
        if not self.count:
            raise ValueError("a mean over no images")
        if self.undefined:
            raise ValueError(f"{self.undefined} of {self.count} images have {undefined_reason}")
        return self.total / self.count


def sum_images(values: Array, defined: Array, mask: Array | None) -> RunningMean:
    """Sum a quantity over one batch.

    Args:
        values: (batch, …).
        defined: (batch,) bool, whether the image's value is defined.
        mask: (batch,) bool, false for padding; None for none.

    Returns:
        The sums.
    """
    mask = jnp.ones(len(values), bool) if mask is None else jnp.asarray(mask, bool)
    rows = (mask & defined).reshape(-1, *(1,) * (values.ndim - 1))
    return RunningMean(mask.sum(), jnp.where(rows, values, 0).sum(0), (mask & ~defined).sum())


def as_features(features: Features, entries: int | None = None) -> Array:
    """Features (images, d) in at least float32; raises a ValueError for other shapes."""
    features = jnp.asarray(features)
    if features.ndim != 2 or entries not in (None, features.shape[1]):
        expected = f"(images, {entries or 'd'})"
        raise ValueError(f"features have shape {features.shape}, expected {expected}")
    return features.astype(jnp.promote_types(features.dtype, jnp.float32))
