"""A model's features of sets of images, read batch by batch."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.models import CLIP, Params, Task, l2_normalize


class FeatureSet(NamedTuple):
    """A model's features of a set of images.

    Attributes:
        rows: (images, d) float32, of unit norm.
        labels: (images,) integers; -1 for images without a label.
        unreadable: names of images that could not be read.
        numbers: (images,) integers, each image's index in its dataset; empty if not known.
    """

    rows: np.ndarray
    labels: np.ndarray
    unreadable: list[str]
    numbers: np.ndarray = np.zeros(0, int)


def read_features(
    model: CLIP, params: Params, batches: Iterable[Any], name_of: Callable[[int], str]
) -> FeatureSet:
    """Encode a set of images.

    Args:
        model: the model.
        params: its parameters.
        batches: of the images, as `data.Batches` makes them.
        name_of: gives the name of an image by its number, for those that cannot be read.

    Returns:
        Their features.

    Raises:
        ValueError: if fewer than two images can be read, or all have the same features.
    """
    rows, labels, numbers, unreadable = [], [], [], []
    for batch in batches:
        rows.append(np.asarray(_encode(model, params, batch.images))[batch.mask])
        labels.append(batch.labels[batch.mask])
        numbers.append(batch.source_index[batch.mask])
        missing = batch.source_index[~batch.mask & (batch.source_index >= 0)]
        unreadable += [name_of(int(number)) for number in missing]
    found = FeatureSet(
        np.concatenate(rows), np.concatenate(labels), unreadable, np.concatenate(numbers)
    )
    if len(found.rows) < 2:
        names = f" ({truncate(unreadable)} could not)" if unreadable else ""
        few = len(found.rows) or "none"
        raise ValueError(f"{few} of the images could be read{names}, expected at least two")
    if not np.ptp(found.rows, axis=0).any():
        raise ValueError("the features are identical for all images")
    return found


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: CLIP, params: Params, images: jax.Array) -> jax.Array:
    return l2_normalize(model.encode_image(params, model.normalize(images)))


def head_of(model: CLIP, params: Params, task: Task) -> jax.Array:
    """The classes' text embeddings, (classes, projection).

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> jaxtta.diagnose.head_of(model, params, task).shape
        (10, 128)
    """
    return jax.jit(model.class_embeddings)(params, model.prompts(task))


def logits_of(rows: np.ndarray, head: jax.Array) -> jax.Array:
    """Cosines (images, classes)."""
    return jnp.matmul(rows, head.T, precision="highest")


def truncate(items: Iterable[object], count: int = 5, between: str = ", ") -> str:
    """List the first items, and the number of all if there are more.

    Examples:
        >>> jaxtta.diagnose.truncate("abcdefg", 2)
        'a, b … (7)'
    """
    items = [*items]
    more = f" … ({len(items)})" if len(items) > count else ""
    return between.join(map(str, items[:count])) + more or "none"
