"""Means over images that arrive in batches, the same for any division into batches.

sums = functools.reduce(RunningMean.merge, (kurtosis_stats(features) for features in batches))
sums.mean()
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

Array = jax.Array


class RunningMean(NamedTuple):
    """A quantity of each image, summed over images.

    Attributes:
        count: () number of images.
        total: (…), the sum over those for which the quantity is defined.
        undefined: () number of the others.
    """

    count: Array
    total: Array
    undefined: Array

    def merge(self, other: Self) -> Self:
        """The sums over both sets of images."""
        return type(self)(*(a + b for a, b in zip(self, other, strict=True)))

    def mean(self, fault: str = "features or labels that give no value") -> Array:
        """The mean (…); raises a ValueError without images, or where one is undefined."""
        if not self.count:
            raise ValueError("a mean over no images")
        if self.undefined:
            raise ValueError(f"{self.undefined} of {self.count} images have {fault}")
        return self.total / self.count


def sum_images(values: Array, defined: Array, mask: Array | None) -> RunningMean:
    """Sum a quantity over one batch.

    Args:
        values: (batch, …).
        defined: (batch,) bool, whether the image has a value.
        mask: (batch,) bool, false for padding; None for none.

    Returns:
        The sums.
    """
    mask = jnp.ones(len(values), bool) if mask is None else jnp.asarray(mask, bool)
    rows = (mask & defined).reshape(-1, *(1,) * (values.ndim - 1))
    return RunningMean(mask.sum(), jnp.where(rows, values, 0).sum(0), (mask & ~defined).sum())


def as_features(features: Array, entries: int | None = None) -> Array:
    """Features (images, d) in at least float32; raises a ValueError for other shapes."""
    features = jnp.asarray(features)
    if features.ndim != 2 or entries not in (None, features.shape[1]):
        expected = f"(images, {entries or 'd'})"
        raise ValueError(f"features have shape {features.shape}, expected {expected}")
    return features.astype(jnp.promote_types(features.dtype, jnp.float32))
