"""What an objective is: a pure function of parameters, context and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class Batch(NamedTuple):
    """One batch of a stream; the last one of a stream is padded to the same shape.

    Attributes:
        images: (batch, height, width, 3), uint8 or float in [0, 1], at the model's resolution; with
            `sizes`, originals padded to a common canvas.
        mask: (batch,) bool, false for padding.
        index: (batch,) integers, each image's number in its stream, which keys its randomness.
        sizes: (batch, 2) integers, the originals' true height and width; None otherwise.
    """

    images: Array
    mask: Array
    index: Array
    sizes: Array | None = None


def as_batch(batch: Batch | Array, seen: Array) -> Batch:
    """Make a batch of a bare array of images, all valid and numbered from `seen`.

    Args:
        batch: a batch, or (batch, height, width, 3) images.
        seen: how many images the stream has given so far.

    Returns:
        The batch, with the padding's images blackened: a NaN there would reach the gradients
        through the weights, masked loss or not.

    Raises:
        ValueError: if mask, index or sizes have another length than the images.
    """
    if not isinstance(batch, Batch):
        images = jnp.asarray(batch)
        return Batch(images, jnp.ones(len(images), bool), seen + jnp.arange(len(images)))
    for name in ("mask", "index"):
        shape = jnp.shape(getattr(batch, name))
        if shape != (len(batch.images),):
            raise ValueError(f"{name} has shape {shape} for {len(batch.images)} images")
    if batch.sizes is not None and jnp.shape(batch.sizes) != (len(batch.images), 2):
        raise ValueError(f"sizes has shape {jnp.shape(batch.sizes)} for {len(batch.images)} images")
    mask = jnp.asarray(batch.mask, bool)
    images = jnp.where(mask.reshape(-1, *[1] * (jnp.ndim(batch.images) - 1)), batch.images, 0)
    return batch._replace(images=images.astype(batch.images.dtype), mask=mask)


Metrics = dict[str, Array]
Objective = Callable[[Any, Any, Batch], tuple[Array, tuple[Array, Metrics]]]
"""(params, context, batch) to (loss, (logits (batch, classes), named scalars))."""


class Classifier(Protocol):
    """All that an objective knows of a model; `jaxtta.models.CLIP` is one.

    One with an attribute `batch_statistics` that is true takes the batch's mask as well.
    """

    def forward(self, params: Any, classes: Any, images: Array) -> Any:
        """Return logits, embeddings and layer features, as `jaxtta.models.Outputs` has them."""


def forward(model: Classifier, params: Any, classes: Any, batch: Batch) -> Any:
    """Run a model on a batch; padding does not count among the images of one that mixes them.

    Args:
        model: the model.
        params: its parameters.
        classes: what its `forward` takes.
        batch: the batch.

    Returns:
        As `Classifier.forward`.
    """
    mask = (batch.mask,) if getattr(model, "batch_statistics", False) else ()
    return model.forward(params, classes, batch.images, *mask)
