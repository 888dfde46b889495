"""Views of one image, and what is asked of their predictions: functions that methods share.

The first view is the plain preprocessing, the others are random resized crops, half of them
mirrored.

    views = cut_views(model, key, image, None, 64)                  # (64, side, side, 3) in [0, 1]
    logits = in_chunks(lambda x: model(params, classes, x).logits, views, 8)
    sure = logits[most_confident(logits, share_of(0.1, 64))]
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtta import views as view_ops
from jaxtta.adapters.base import Array
from jaxtta.losses import entropy
from jaxtta.models import Batch
from jaxtta.models.checks import require_model

PIL_KERNELS = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of the kernels that views can be resized with."""


def cut_views(
    model: Any,
    key: Array,
    image: Array,
    size: Array | None,
    count: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Cut an image's views.

    Args:
        model: for the side of a view and, of full-size images, the plain preprocessing.
        key: PRNG key of this image.
        image: (height, width, 3), uint8 or float in [0, 1].
        size: (2,) true height and width where the image is an original on a canvas; None where
            it has the model's resolution.
        count: N, at least one.
        scale: least and greatest share of a random crop's area.
        ratio: least and greatest width over height of a random crop.

    Returns:
        (N, side, side, 3) in [0, 1], the plain view first.

    Raises:
        ValueError: if an image without size is not at the model's resolution, or one with a size
            comes to a model that has no preprocessing.
    """
    side, preprocessing = model.image_size, getattr(model, "preprocessing", None)
    if size is None and image.shape[:2] != (side, side):
        raise ValueError(
            f"an image of {image.shape[0]}×{image.shape[1]} pixels, expected {side}×{side}, "
            "or an original with its size"
        )
    original = image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image
    if size is None:
        first, size = original, jnp.array(original.shape[:2])
    elif preprocessing is None:
        raise ValueError(
            f"a full-size image, but the model has no preprocessing: give {side}×{side}"
        )
    else:
        first = view_ops.plain(
            original,
            size,
            side,
            preprocessing.resize,
            PIL_KERNELS[preprocessing.resample],
            rounding=preprocessing.rounding,
            resize_longer=preprocessing.resize_longer,
            fill=preprocessing.fill,
        )
    others = view_ops.random_resized_crops(key, original, size, count - 1, side, scale, ratio)
    return jnp.concatenate([first[None], others])


def preprocessed(model: Any, batch: Batch) -> Batch:
    """Bring full-size images to the model's resolution; a batch without sizes stays as it is."""
    if batch.sizes is None:
        return batch
    key = jax.random.key(0)  # the plain view has nothing random

    def plain(row: tuple[Array, Array]) -> Array:
        return cut_views(model, key, *row, 1)[0]

    images = jax.lax.map(plain, (batch.images, batch.sizes))
    return batch._replace(images=images, sizes=None)


def in_chunks(function: Callable[[Array], Any], rows: Array, rows_per_chunk: int) -> Any:
    """Apply a function of rows, to a tree of rows, to at most `rows_per_chunk` at a time."""
    count = -(-len(rows) // rows_per_chunk)
    if count == 1:
        return function(rows)
    size = -(-len(rows) // count)  # all chunks as even as can be, so that few rows are padding
    padded = jnp.pad(rows, ((0, count * size - len(rows)), *((0, 0),) * (rows.ndim - 1)))
    parts = jax.lax.map(function, padded.reshape(count, size, *rows.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:])[: len(rows)], parts)


def share_of(fraction: float, views: int) -> int:
    """How many views a fraction of them is, rounded down; at least one."""
    return max(int(fraction * views), 1)


def most_confident(logits: Array, count: int | None = None) -> Array:
    """The views (N, classes) of lowest entropy, the surest first; all of them for None."""
    return jnp.argsort(entropy(logits))[:count]


def mean_log_probability(logits: Array) -> Array:
    """Logarithm (classes,) of the mean probability over views (views, classes)."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), 0) - jnp.log(len(logits))


def marginal_entropy(logits: Array) -> Array:
    """Entropy in nats of the mean probability over views (views, classes)."""
    mean = mean_log_probability(logits)
    return -(jnp.exp(mean) * mean).sum()


def cosine_logits(scale: Array, embeddings: Array, classes: Array) -> Array:
    """Logits (…, classes) of embeddings (…, projection), as CLIP has them for unit vectors."""
    return scale * jnp.matmul(embeddings, classes.T, precision="highest")


def require_cosines(model: Any, method: str) -> None:
    """Raise a ValueError for a model whose logits are not scaled cosines."""
    require_model(model)
    if not hasattr(model, "logit_scale"):
        raise ValueError(f"{method} needs a model with cosine logits; this one has no logit_scale")


def require_views(model: Any, method: str) -> None:
    """Raise a TypeError or ValueError for a model that views of one image cannot be given to."""
    require_model(model)
    if model.mixes_batch:
        raise ValueError(
            f'{method} needs images that do not mix: with_batch_norm_statistics("running")'
        )
    kernel = getattr(getattr(model, "preprocessing", None), "resample", 2)
    if kernel not in PIL_KERNELS:
        raise ValueError(
            f"the checkpoint resizes with PIL's filter {kernel}, expected 2 (bilinear) or 3 "
            "(bicubic)"
        )


def require_one_by_one(images: Any, method: str) -> None:
    """Raise a ValueError for a batch split over explicit mesh axes, whose images no loop takes."""
    if jax.typeof(images).sharding.spec[0] is not None:
        raise ValueError(
            f"{method} takes images one after another and cannot split them over explicit mesh "
            "axes: split the stream with jaxtta.parallel.streams"
        )
