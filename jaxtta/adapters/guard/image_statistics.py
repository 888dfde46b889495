"""Cheap statistics of images, and whether those of the last images differ from all before.

each = image_statistics(batch.images, batch.sizes)              # (batch, 5)
environment = observe(environment, each, mask, half_life)
largest_z(environment)                                          # above 6: another environment
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtta.adapters.base import Array

NAMES = ("brightness", "log contrast", "colour", "log sharpness", "log fine detail")


class Environment(NamedTuple):
    """Moments of the statistics of all images since the last change, and of the last ones.

    Attributes:
        count: () images since the change.
        mean: (5,) of all.
        squares: (5,) sum of squared deviations of all.
        recent: (5,) decayed mean of the last ones.
        weight: () decayed number of the last ones.
        weight_squares: () decayed sum of their squared weights.
    """

    count: Array
    mean: Array
    squares: Array
    recent: Array
    weight: Array
    weight_squares: Array


def empty(dtype: Any = jnp.float32) -> Environment:
    """An environment of which no image was seen."""
    scalar, vector = jnp.zeros((), dtype), jnp.zeros(len(NAMES), dtype)
    return Environment(scalar, vector, vector, vector, scalar, scalar)


def image_statistics(images: Any, sizes: Any = None) -> Array:
    """Brightness, log contrast, colour, log sharpness and log fine detail.

    Args:
        images: (batch, height, width, 3), uint8 or float in [0, 1].
        sizes: (batch, 2) true heights and widths of images on a canvas; None for whole images.

    Returns:
        (batch, 5).
    """
    pixels = images.astype(jnp.float32) / (255 if images.dtype == jnp.uint8 else 1)
    height, width = images.shape[1:3]
    inside = jnp.ones((len(images), height, width))
    if sizes is not None:
        rows = jnp.arange(height) < jnp.asarray(sizes)[:, :1]
        inside = inside * (rows[:, :, None] & (jnp.arange(width) < sizes[:, 1:])[:, None])

    def mean(values: Array, where: Array) -> Array:
        total = jnp.maximum(where.sum((1, 2)), 1)
        return jnp.where(where > 0, values, 0).sum((1, 2)) / total

    grey = pixels @ jnp.array([0.299, 0.587, 0.114])
    brightness = mean(grey, inside)
    spread = mean((grey - brightness[:, None, None]) ** 2, inside)
    colour = mean(jnp.abs(pixels - pixels.mean(-1, keepdims=True)).sum(-1), inside)
    across, pair = jnp.diff(grey, axis=2), inside[:, :, 1:] * inside[:, :, :-1]
    down, pair_down = jnp.diff(grey, axis=1), inside[:, 1:] * inside[:, :-1]
    slope = mean(jnp.abs(across), pair) + mean(jnp.abs(down), pair_down)
    curve = mean(jnp.abs(jnp.diff(across, axis=2)), pair[:, :, 1:] * pair[:, :, :-1])
    least = 1 / 255  # a blank image has none of them
    logs = [jnp.log(x + least) for x in (jnp.sqrt(spread), slope, curve)]
    return jnp.stack([brightness, logs[0], colour, logs[1], logs[2]], -1)


def observe(before: Environment, each: Array, mask: Array | np.ndarray, half_life: float) -> Any:
    """Add a batch's statistics (batch, 5); rows where the mask is false count for nothing."""
    count = mask.sum().astype(before.mean.dtype)
    share = jnp.maximum(count, 1)
    values = jnp.where(mask[:, None], each, 0).astype(before.mean.dtype)
    mean = values.sum(0) / share
    squares = jnp.where(mask[:, None], (values - mean) ** 2, 0).sum(0)
    total = before.count + count
    part = count / jnp.maximum(total, 1)
    decay = 0.5 ** (count / half_life)
    weight = decay * before.weight + count
    return Environment(
        total,
        before.mean + part * (mean - before.mean),
        before.squares + squares + (mean - before.mean) ** 2 * before.count * part,
        (decay * before.weight * before.recent + count * mean) / jnp.maximum(weight, 1),
        weight,
        decay**2 * before.weight_squares + count,
    )


def largest_z(now: Environment) -> Array:
    """How far the mean of the last images is from that of all, in standard errors; the largest."""
    variance = now.squares / jnp.maximum(now.count, 1) + 1e-6
    images = now.weight**2 / jnp.maximum(now.weight_squares, 1)  # that count alike
    # The last images are among all; there is nothing to compare while they are all there is.
    independent = jnp.maximum(1 / jnp.maximum(images, 1) - 1 / jnp.maximum(now.count, 1), 0)
    difference = jnp.abs(now.recent - now.mean)
    z = difference / jnp.sqrt(variance * jnp.maximum(independent, 1e-3))
    return jnp.where(independent > 1e-3, z, 0).max()
