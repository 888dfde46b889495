"""Similarity of two models' features on the same images."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.diagnose.sums import Features, as_features

Array = jax.Array


class CrossMoments(NamedTuple):
    """Means of two models' features and the products of their deviations, summed over images.

    Attributes:
        count: () number of images.
        mean_x: (d1,).
        mean_y: (d2,).
        xx: (d1, d1).
        xy: (d1, d2).
        yy: (d2, d2).
    """

    count: Array
    mean_x: Array
    mean_y: Array
    xx: Array
    xy: Array
    yy: Array

    def merge(self, other: Self) -> Self:
        """The moments of the union of two sets of images; either may be empty."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)
        x, y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.count * share
        return type(self)(
            count,
            self.mean_x + x * share,
            self.mean_y + y * share,
            self.xx + other.xx + weight * jnp.outer(x, x),
            self.xy + other.xy + weight * jnp.outer(x, y),
            self.yy + other.yy + weight * jnp.outer(y, y),
        )

    def cka(self) -> float:
        """`linear_cka` of the images, with the same errors."""
        if self.count < 2:
            raise ValueError(f"similarity over {int(self.count)} images, expected at least two")
        xx, xy, yy = (np.linalg.norm(np.asarray(m, np.float64)) for m in self[3:])
        if not np.isfinite(xx + xy + yy):
            raise ValueError("features have entries that are not finite")
        if not xx * yy:
            raise ValueError("a model's features are the same for all images")
        return float(xy**2 / (xx * yy))


@jax.jit
def cross_moments(x: Array, y: Array, mask: Array | None = None) -> CrossMoments:
    """Moments of one batch.

    Args:
        x: (batch, d1), one model's features.
        y: (batch, d2), the other's on the same images.
        mask: (batch,) bool, false for padding; None for none.

    Returns:
        The moments.

    Examples:
        >>> from functools import reduce
        >>> x, y = np.random.default_rng(0).normal(size=(2, 20, 3))
        >>> parts = (jaxtta.diagnose.cross_moments(x[i : i + 10], y[i : i + 10]) for i in (0, 10))
        >>> cka = reduce(jaxtta.diagnose.CrossMoments.merge, parts).cka()
        >>> bool(np.isclose(cka, jaxtta.diagnose.linear_cka(x, y)))
        True
    """
    row = 0 if mask is None else jnp.argmax(mask)
    mask = jnp.ones(len(x), bool) if mask is None else jnp.asarray(mask, bool)
    count = mask.sum(dtype=jnp.float32)
    means, deviations = [], []
    for features in (as_features(x), as_features(y)):
        rows = jnp.where(mask[:, None], features, 0)
        first = rows[row] if len(rows) else 0  # equal rows become exact zeros
        rows = jnp.where(mask[:, None], rows - first, 0)
        mean = rows.sum(0) / jnp.maximum(count, 1)
        means.append(first + mean)
        deviations.append(jnp.where(mask[:, None], rows - mean, 0))
    a, b = deviations
    products = (jnp.matmul(p.T, q, precision="highest") for p, q in ((a, a), (a, b), (b, b)))
    return CrossMoments(count, *means, *products)


def linear_cka(x: Features, y: Features) -> float:
    """Linear centred kernel alignment of two models' features.

    Args:
        x: (images, d1), one model's features.
        y: (images, d2), the other's on the same images.

    Returns:
        A number in [0, 1]; 1 if one is a rotation and scaling of the other.

    Raises:
        ValueError: if the numbers of images differ or are below two, or features are equal for all
            images or not finite.

    Examples:
        >>> features = np.random.default_rng(0).normal(size=(20, 3))
        >>> round(jaxtta.diagnose.linear_cka(features, 2 * features[:, ::-1]), 3)
        1.0

    References:
        Kornblith et al. 2019, https://arxiv.org/abs/1905.00414
    """
    if len(x) != len(y):
        raise ValueError(f"features of {len(x)} and of {len(y)} images do not match")
    return cross_moments(jnp.asarray(x), jnp.asarray(y)).cka()
