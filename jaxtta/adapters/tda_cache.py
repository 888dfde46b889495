"""TDA's caches: of each class, the features of a few images of the lowest entropy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtta.adapters.base import Array


class TDACache(NamedTuple):
    """The images that each class keeps.

    Attributes:
        features: (classes, size, projection), of unit norm.
        entropy: (classes, size) in nats, infinite where there is room.
        probabilities: (classes, size, classes) of the negative cache; None in the positive one.
    """

    features: Array
    entropy: Array
    probabilities: Any = None


Caches = tuple[TDACache, TDACache]
"""The positive and the negative one."""


def tda_caches(
    classes: int, projection: int, size: int = 3, negative_size: int = 2, dtype: Any = jnp.float32
) -> Caches:
    """Empty caches, positive and negative, of `size` and `negative_size` images a class."""

    def empty(size: int) -> TDACache:
        features = jnp.zeros((classes, size, projection), dtype)
        return TDACache(features, jnp.full((classes, size), jnp.inf, dtype))

    probabilities = jnp.zeros((classes, negative_size, classes), dtype)
    return empty(size), empty(negative_size)._replace(probabilities=probabilities)


def enter(cache: TDACache, label: Array, image: TDACache, enters: Array) -> TDACache:
    """Put an image in the place of its class's least sure one, if it is surer than that.

    Args:
        cache: before the image.
        label: () the class that it is predicted as.
        image: as a cache, without the axes of class and slot.
        enters: () whether it may.

    Returns:
        The cache after the image.
    """
    slots = jax.lax.dynamic_index_in_dim(cache.entropy, label, keepdims=False)
    worst = slots.argmax()  # the first where there is room
    here = enters & (image.entropy < slots[worst]) & (jnp.arange(len(slots)) == worst)

    def put(kept: Array, new: Array) -> Array:
        row = jax.lax.dynamic_index_in_dim(kept, label, keepdims=False)
        row = jnp.where(here.reshape(-1, *[1] * new.ndim), new, row)
        return jax.lax.dynamic_update_index_in_dim(kept, row, label, 0)

    return jax.tree.map(put, cache, image)
