"""Running sums of the images of each class, as they are predicted.

sums = no_images((classes, projection), jnp.float32)
sums = sums.add(features, members_of(logits, mask))
sums.means, sums.mean
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtta.adapters.base import Array, dot


class ClassSums(NamedTuple):
    """Sums of unit embeddings along a stream.

    Attributes:
        sums: (classes, projection).
        counts: (classes,) int32, how many images they are of.
    """

    sums: Array
    counts: Array

    @property
    def means(self) -> Array:
        """Class means (classes, projection), 0 for a class without images."""
        return self.sums / jnp.maximum(self.counts, 1)[:, None]

    @property
    def mean(self) -> Array:
        """Mean of all images (projection,)."""
        return self.sums.sum(0) / jnp.maximum(self.counts.sum(), 1)

    def add(self, features: Array, members: Array) -> "ClassSums":
        """With a batch's features (batch, projection); members is (batch, classes) bool."""
        added = dot(members.T.astype(features.dtype), jax.lax.stop_gradient(features))
        return ClassSums(self.sums + added, self.counts + members.sum(0, dtype=jnp.int32))


def members_of(logits: Array, mask: Array) -> Array:
    """Which class each image is predicted as, (batch, classes) bool; padding is of none."""
    return (logits.argmax(-1)[:, None] == jnp.arange(logits.shape[-1])) & mask[:, None]


def no_images(shape: tuple[int, ...], dtype: Any) -> ClassSums:
    """Sums of no images; the shape is (classes, projection)."""
    return ClassSums(jnp.zeros(shape, dtype), jnp.zeros(shape[0], jnp.int32))
