"""Checks of what users give to models: one sentence each, at no cost under `jit`."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from PIL import Image

RANGE = -0.25, 1.25
"""Values that float images may have: a resize in floats overshoots at edges, by less than this."""


def require_layout(images: Any) -> None:
    """Raise a ValueError for another shape than (batch, height, width, 3) or another dtype."""
    shape = np.shape(images)
    if len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"images have shape {shape}, expected (batch, height, width, 3)")
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or float in [0, 1], not {images.dtype}")


def require_images(images: Any) -> None:
    """Refuse anything but a batch of images as models take them.

    Args:
        images: an array.

    Raises:
        ValueError: for another shape than (batch, height, width, 3), another dtype than uint8 or
            float, or floats far outside [0, 1]: 0 to 255, or normalised already. Values are looked
            at outside `jit` only, and NaN passes: a step skips it, and says so.

    Examples:
        >>> jaxtta.models.require_images(np.zeros((2, 3, 32, 32), np.uint8))  # as PyTorch has them
        Traceback (most recent call last):
        ValueError: ...
    """
    require_layout(images)
    if problem := out_of_range(images):
        raise ValueError(problem)


def out_of_range(images: Any) -> str | None:
    """A sentence about float images far outside [0, 1]; None for others and for traced ones."""
    if isinstance(images, Tracer) or not jnp.issubdtype(images.dtype, jnp.floating):
        return None
    least, greatest = RANGE
    outside = (images < least) | (images > greatest)  # a NaN is neither
    if not outside.any():
        return None
    values = np.asarray(images, np.float32)
    return (
        f"float images run from {np.nanmin(values):.4g} to {np.nanmax(values):.4g}, expected 0 to "
        "1: the model normalises them itself"
    )


def require_pil(images: Any) -> None:
    """Raise a TypeError for anything but a list of PIL images, and a ValueError for none."""
    if isinstance(images, Image.Image) or not isinstance(images, Sequence):
        raise TypeError(f"images is a {type(images).__name__}, expected a list of PIL images")
    if not images:
        raise ValueError("no images to preprocess")
    for number, image in enumerate(images):
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"images[{number}] is a {type(image).__name__}, expected a PIL image: "
                "Image.fromarray(array), Image.open(path)"
            )


def require_dtype(name: str, dtype: Any) -> None:
    """Raise a TypeError for anything but a floating dtype: "bf16", an integer's, a bit count."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name} is {dtype!r}, expected a floating dtype such as jnp.bfloat16")


def require_model(model: Any) -> None:
    """Raise a TypeError for anything but a `Classifier`: a task, parameters, what `load` gives."""
    if not callable(model) or not hasattr(model, "init_context"):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a classifier: "
            "model, params = jaxtta.load(…)"
        )
