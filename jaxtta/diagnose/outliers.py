"""Kurtosis and outlier axes of a model's features."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.diagnose.sums import Features, RunningMean, as_features, sum_images

Array = jax.Array
UNDEFINED_REASON = "features that are constant or not finite"


def standardised(features: Features) -> tuple[Array, Array]:
    """Standardise each image's features over its d entries.

    Args:
        features: (images, d).

    Returns:
        The features with mean 0 and standard deviation 1, and (images,) bool, false where features
        are constant or not finite.
    """
    features = as_features(features)
    features = features - features[:, :1]  # constant features become exact zeros
    extent = features.max(1, keepdims=True) - features.min(1, keepdims=True)
    varies = (extent > 0) & jnp.isfinite(extent)
    features = features / jnp.where(varies, extent, 1)  # avoids overflow of powers
    centred = features - features.mean(1, keepdims=True)
    std = jnp.sqrt((centred**2).mean(1, keepdims=True))
    return centred / jnp.where(varies, std, 1), varies[:, 0]


@jax.jit
def kurtosis_stats(features: Array, mask: Array | None = None) -> RunningMean:
    """Sum over images of their features' kurtosis; its mean is `activation_kurtosis`.

    Args:
        features: (batch, d).
        mask: (batch,) bool, false for padding; None for none.

    Returns:
        The sums, scalars.
    """
    z, varies = standardised(features)
    return sum_images((z**4).mean(1), varies, mask)


def activation_kurtosis(features: Features) -> float:
    """Mean over images of the kurtosis of the d entries of their features.

    Args:
        features: (images, d), normalised or not.

    Returns:
        The fourth standardised moment, not the excess kurtosis: 3 for Gaussian entries, at most d.

    Raises:
        ValueError: if an image's features are constant or not finite.

    Examples:
        >>> features = jax.random.normal(jax.random.key(0), (100, 512))
        >>> 2.9 < jaxtta.diagnose.activation_kurtosis(features) < 3.1  # Gaussian
        True

    References:
        Interpreting CLIP, https://arxiv.org/abs/2310.13040
    """
    return float(kurtosis_stats(jnp.asarray(features)).mean(UNDEFINED_REASON))


class OutlierFeatures(NamedTuple):
    """Outlier axes of a feature space.

    Attributes:
        axes: (outliers,) integers, ascending.
        shares: (d,), the share of the images in which each axis is an outlier.
    """

    axes: np.ndarray
    shares: np.ndarray


@functools.partial(jax.jit, static_argnames="threshold")
def outlier_stats(
    features: Array, mask: Array | None = None, *, threshold: float = 6.0
) -> RunningMean:
    """Count the images in which each axis is an outlier; see `outlier_features`.

    Args:
        features: (batch, d).
        mask: (batch,) bool, false for padding; None for none.
        threshold: in standard deviations.

    Returns:
        The sums, (d,), for `outlier_axes`.

    Raises:
        ValueError: if the threshold is not positive, or no entry of d can exceed it.
    """
    z, varies = standardised(features)
    limit = (z.shape[1] - 1) ** 0.5  # reached if one entry differs and all others are equal
    if not 0 < threshold < limit:
        raise ValueError(
            f"threshold is {threshold}, expected a positive number below {limit:.2f}, "
            f"the largest deviation that one of {z.shape[1]} entries can have"
        )
    return sum_images(jnp.abs(z) > threshold, varies, mask)


def outlier_axes(sums: RunningMean, share: float = 0.5) -> OutlierFeatures:
    """Outlier axes from the counts of `outlier_stats`; see `outlier_features`."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected a number above 0, at most 1")
    shares = np.asarray(
        jax.device_get(sums).mean(UNDEFINED_REASON)
    )  # float64: 7 of 10 is not below 0.7
    return OutlierFeatures(np.flatnonzero(shares >= share), shares)


def outlier_features(
    features: Features, threshold: float = 6.0, share: float = 0.5
) -> OutlierFeatures:
    """Find the axes that are outliers in most images' features.

    An axis is an outlier in an image if its entry is more than `threshold` standard deviations from
    the mean, both over the image's d entries.

    Args:
        features: (images, d), normalised or not.
        threshold: in standard deviations; k equally large outliers reach at most √(d/k).
        share: minimum share of the images in which the axis is an outlier.

    Returns:
        The outlier axes, and the share of every axis.

    Raises:
        ValueError: if an image's features are constant or not finite, or an option is out of range.

    Examples:
        >>> features = jax.random.normal(jax.random.key(0), (10, 64)).at[:, 5].set(100.0)
        >>> jaxtta.diagnose.outlier_features(features).axes.tolist()
        [5]

    References:
        Interpreting CLIP, https://arxiv.org/abs/2310.13040
    """
    return outlier_axes(outlier_stats(jnp.asarray(features), threshold=threshold), share)
