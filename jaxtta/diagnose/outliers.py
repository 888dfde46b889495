"""How far an image's features are from Gaussian ones, and on which axes they stick out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.diagnose.sums import RunningMean, as_features, sum_images

Array = jax.Array
FAULT = "features that are constant or not finite"


def standardised(features: Array) -> tuple[Array, Array]:
    """Standardise each image's features over its d entries.

    Args:
        features: (images, d).

    Returns:
        The features with mean 0 and standard deviation 1, and (images,) whether they could be.
    """
    features = as_features(features)
    features = features - features[:, :1]  # equal entries become exact zeros
    extent = features.max(1, keepdims=True) - features.min(1, keepdims=True)
    varies = (extent > 0) & jnp.isfinite(extent)
    features = features / jnp.where(varies, extent, 1)  # so that no power overflows
    centred = features - features.mean(1, keepdims=True)
    std = jnp.sqrt((centred**2).mean(1, keepdims=True))
    return centred / jnp.where(varies, std, 1), varies[:, 0]


@jax.jit
def kurtosis_stats(features: Array, mask: Array | None = None) -> RunningMean:
    """Kurtosis of each image's features, summed; its mean is `activation_kurtosis`.

    Args:
        features: (batch, d).
        mask: (batch,) bool, false for padding; None for none.

    Returns:
        The sums, scalars.
    """
    z, varies = standardised(features)
    return sum_images((z**4).mean(1), varies, mask)


def activation_kurtosis(features: Array) -> float:
    """Mean over images of the kurtosis of the d entries of their features.

    Args:
        features: (images, d), normalised or not.

    Returns:
        The fourth standardised moment, not its excess: 3 for Gaussian entries, d at most.

    Raises:
        ValueError: if an image's features are constant or not finite.

    References:
        Interpreting CLIP, https://arxiv.org/abs/2310.13040
    """
    return float(kurtosis_stats(features).mean(FAULT))


class OutlierFeatures(NamedTuple):
    """The axes of a feature space that carry outliers.

    Attributes:
        axes: (outliers,) integers, ascending.
        shares: (d,), the share of the images in which each axis sticks out.
    """

    axes: np.ndarray
    shares: np.ndarray


@functools.partial(jax.jit, static_argnames="threshold")
def outlier_stats(
    features: Array, mask: Array | None = None, *, threshold: float = 6.0
) -> RunningMean:
    """Count the images in which each axis sticks out, as `outlier_features` defines it.

    Args:
        features: (batch, d).
        mask: (batch,) bool, false for padding; None for none.
        threshold: in standard deviations.

    Returns:
        The sums, (d,), for `outlier_axes`.

    Raises:
        ValueError: if no entry of d can be that far out.
    """
    z, varies = standardised(features)
    limit = (z.shape[1] - 1) ** 0.5  # where one entry differs and all others are equal
    if not 0 < threshold < limit:
        raise ValueError(
            f"threshold is {threshold}, expected a positive number below {limit:.2f}, "
            f"the most that one of {z.shape[1]} entries can stick out"
        )
    return sum_images(jnp.abs(z) > threshold, varies, mask)


def outlier_axes(sums: RunningMean, share: float = 0.5) -> OutlierFeatures:
    """The outlier axes by the counts of `outlier_stats`; see `outlier_features`."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected a number above 0, at most 1")
    shares = jax.device_get(sums).mean(FAULT)  # float64: 7 of 10 is not below 0.7
    return OutlierFeatures(np.flatnonzero(shares >= share), shares)


def outlier_features(
    features: Array, threshold: float = 6.0, share: float = 0.5
) -> OutlierFeatures:
    """Find the axes whose entries stick out of most images' features.

    An axis sticks out of an image's features if its entry lies more than `threshold` standard
    deviations from the mean, both over the image's own d entries.

    Args:
        features: (images, d), normalised or not.
        threshold: k axes that stick out equally far reach √(d/k) standard deviations at most.
        share: of the images, in which an axis has to stick out.

    Returns:
        The axes, and each axis's share.

    Raises:
        ValueError: if an image's features are constant or not finite, or an option makes no sense.

    References:
        Interpreting CLIP, https://arxiv.org/abs/2310.13040
    """
    return outlier_axes(outlier_stats(features, threshold=threshold), share)
