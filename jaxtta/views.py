"""Augmented views of images, cut from the originals on the device.

    crops = random_resized_crops(key, original, size, 64, 224)     # (64, 224, 224, 3) in [0, 1]

An original is a corner of a padded canvas: (height, width, 3) with `size` (2,), its true height and
width, so that images of any size share one compiled program. Every view is a crop and a resize
in one: two small matrix products, with the antialiased kernels of PIL, which widen as the image
shrinks and see nothing beyond the crop.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
TRIES = 10  # crops drawn before one in the centre is taken, as usual


class Box(NamedTuple):
    """Part of an image, in pixels; scalars or arrays of one shape.

    Attributes:
        top: first row.
        left: first column.
        height: rows.
        width: columns.
    """

    top: Array
    left: Array
    height: Array
    width: Array


def _triangle(x: Array) -> Array:
    return jnp.maximum(1 - jnp.abs(x), 0)


def _cubic(x: Array) -> Array:  # Keys' kernel with a = −1/2, as PIL has it
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0))


KERNELS = {"bilinear": (_triangle, 1.0), "bicubic": (_cubic, 2.0)}
"""The function and how far it reaches, in pixels of the result."""


def resampling(
    canvas: int,
    out: int,
    start: Array | float,
    length: Array,
    first: Array,
    step: Array,
    kernel: str,
) -> Array:
    """The matrix that resamples one axis.

    Args:
        canvas: length of the axis.
        out: length of the result.
        start: () first sample that may be read.
        length: () how many may be read.
        first: () where the first pixel of the result begins, in samples.
        step: () samples a pixel of the result.
        kernel: a key of `KERNELS`.

    Returns:
        (out, canvas), rows of sum 1.
    """
    function, reach = KERNELS[kernel]
    samples = jnp.arange(canvas)
    centres = first + (jnp.arange(out) + 0.5) * step
    width = jnp.maximum(step, 1.0)
    weights = function((samples + 0.5 - centres[:, None]) / width)
    inside = (samples >= start) & (samples < start + length)
    # PIL rounds the ends of the kernel's support to whole samples.
    low = jnp.floor(centres - reach * width + 0.5)[:, None]
    high = jnp.floor(centres + reach * width + 0.5)[:, None]
    weights = jnp.where(inside & (samples >= low) & (samples < high), weights, 0.0)
    return weights / weights.sum(-1, keepdims=True)


def crop_and_resize(image: Array, box: Box, out: int, flip: Array | bool = False) -> Array:
    """Cut a box out of an image and resize it, bilinear with antialiasing.

    Args:
        image: (height, width, 3) float.
        box: what to cut, scalars.
        out: side of the result.
        flip: () whether to mirror left and right.

    Returns:
        (out, out, 3).

    Examples:
        >>> from jaxtta.views import Box, crop_and_resize
        >>> image, box = jnp.zeros((40, 60, 3)), Box(top=0, left=20, height=40, width=40)
        >>> jax.jit(crop_and_resize, static_argnames="out")(image, box, out=8).shape
        (8, 8, 3)
    """
    rows = resampling(
        image.shape[0], out, box.top, box.height, box.top, box.height / out, "bilinear"
    )
    columns = resampling(
        image.shape[1], out, box.left, box.width, box.left, box.width / out, "bilinear"
    )
    columns = jnp.where(flip, columns[::-1], columns)
    return jnp.einsum("oh,hwc,pw->opc", rows, image, columns)


def plain(
    image: Array,
    size: Array,
    out: int,
    resize: int | tuple[int, int] | None = None,
    kernel: str = "bicubic",
    *,
    rounding: str = "transformers",
    resize_longer: bool = False,
    fill: int = 0,
) -> Array:
    """The plain preprocessing: resize, then the centre.

    Args:
        image: (height, width, 3) float in [0, 1].
        size: (2,) true height and width.
        out: side of the result.
        resize: length of the shorter side, or (height, width), before the crop; None for no resize.
        kernel: a key of `KERNELS`.
        rounding: of odd margins, "transformers" or "torchvision".
        resize_longer: whether an integer `resize` is for the longer side.
        fill: grey level around a smaller image.

    Returns:
        (out, out, 3) in [0, 1].

    Examples:
        >>> plain = jax.jit(jaxtta.views.plain, static_argnames=("out", "resize"))
        >>> plain(jnp.zeros((40, 60, 3)), jnp.array([40, 60]), out=8, resize=8).shape
        (8, 8, 3)
    """
    size = size.astype(jnp.float32)
    if resize is None:
        resized = size
    elif isinstance(resize, tuple):
        resized = jnp.array(resize, jnp.float32)
    elif resize_longer:
        resized = jnp.maximum(jnp.round(resize * size / size.max()), 1)
    else:  # as PIL-based preprocessing rounds: the longer side down
        resized = jnp.floor(resize * size / size.min() + 1e-4)

    def axis(number: int) -> tuple[Array, Array]:
        step = size[number] / resized[number]
        half = (resized[number] - out) / 2
        corner = jnp.floor(half)
        if rounding == "torchvision":
            corner = jnp.where(half < 0, jnp.ceil(half), jnp.round(half))
        pixels = corner + jnp.arange(out)
        inside = (pixels >= 0) & (pixels < resized[number])  # around it is `fill`
        matrix = resampling(
            image.shape[number], out, 0.0, size[number], corner * step, step, kernel
        )
        return jnp.where(inside[:, None], matrix, 0), inside

    (rows, inside_rows), (columns, inside_columns) = axis(0), axis(1)
    pixels = jnp.einsum("oh,hwc,pw->opc", rows, image, columns).clip(0, 1)
    inside = inside_rows[:, None] & inside_columns
    return jnp.where(inside[..., None], pixels, fill / 255)


def random_boxes(
    key: Array,
    size: Array,
    count: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw boxes as random resized crops do.

    Args:
        key: PRNG key.
        size: (2,) true height and width.
        count: how many.
        scale: least and greatest share of the area.
        ratio: least and greatest width over height; drawn uniformly in the logarithm.

    Returns:
        Boxes with arrays (count,); where ten draws do not fit, one in the centre.
    """
    height, width = size.astype(jnp.float32)
    keys = jax.random.split(key, 4)
    shape = (count, TRIES)
    area = height * width * jax.random.uniform(keys[0], shape, minval=scale[0], maxval=scale[1])
    low, high = jnp.log(ratio[0]), jnp.log(ratio[1])
    aspect = jnp.exp(jax.random.uniform(keys[1], shape, minval=low, maxval=high))
    h, w = jnp.round(jnp.sqrt(area / aspect)), jnp.round(jnp.sqrt(area * aspect))
    fits = (h > 0) & (w > 0) & (h <= height) & (w <= width)
    # The whole image, or as much of it as the ratio allows.
    fallback_w = jnp.minimum(width, jnp.round(height * ratio[1]))
    fallback_h = jnp.minimum(height, jnp.round(width / ratio[0]))
    chosen = jnp.argmax(fits, -1)[:, None]
    found = fits.any(-1)
    h = jnp.where(found, jnp.take_along_axis(h, chosen, 1)[:, 0], fallback_h)
    w = jnp.where(found, jnp.take_along_axis(w, chosen, 1)[:, 0], fallback_w)
    top, left = (
        jnp.where(
            found,
            jnp.floor(jax.random.uniform(k, (count,)) * (side - x + 1)),
            jnp.floor((side - x) / 2),
        )
        for k, side, x in ((keys[2], height, h), (keys[3], width, w))
    )
    return Box(top, left, h, w)


def random_resized_crops(
    key: Array,
    image: Array,
    size: Array,
    count: int,
    out: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Cut random boxes, resize them and mirror half of them.

    Args:
        key: PRNG key; the same key, the same views.
        image: (height, width, 3) float in [0, 1].
        size: (2,) true height and width.
        count: how many views.
        out: side of a view.
        scale: least and greatest share of the area.
        ratio: least and greatest width over height.

    Returns:
        (count, out, out, 3) in [0, 1].

    Examples:
        >>> image, size = jnp.zeros((40, 60, 3)), jnp.array([40, 50])  # the rest is padding
        >>> crops = jax.jit(jaxtta.views.random_resized_crops, static_argnames=("count", "out"))
        >>> crops(jax.random.key(0), image, size, count=4, out=8).shape
        (4, 8, 8, 3)
    """
    box_key, flip_key = jax.random.split(key)
    boxes = random_boxes(box_key, size, count, scale, ratio)
    flips = jax.random.bernoulli(flip_key, shape=(count,))
    return jax.vmap(crop_and_resize, (None, 0, None, 0))(image, boxes, out, flips)


def crop_flip_cutmix(
    key: Array, images: Array, targets: Array, padding: int, share: float
) -> tuple[Array, Array]:
    """The training augmentation of small images: shifted crops, mirror images and CutMix.

    Args:
        key: PRNG key.
        images: (batch, side, side, 3), in random order: each may get a part of the next.
        targets: (batch, classes), mixed as the images are.
        padding: black pixels around an image before the crop.
        share: of the images that are mixed.

    References:
        Yun et al. 2019, https://arxiv.org/abs/1905.04899
    """
    crop_key, flip_key, mix_key = jax.random.split(key, 3)
    batch, side = images.shape[:2]
    padded = jnp.pad(images, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * padding + 1)
    images = jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)
    flipped = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)

    which_key, area_key, centre_key = jax.random.split(mix_key, 3)
    mixed = jax.random.bernoulli(which_key, share, (batch, 1))
    # The area is uniform, as of Beta(1, 1), until the image's border cuts the rectangle.
    extent = mixed * side * jnp.sqrt(jax.random.uniform(area_key, (batch, 1)))
    centre = jax.random.uniform(centre_key, (2, batch, 1), maxval=side)
    rows, columns = jnp.abs(jnp.arange(side) + 0.5 - centre) < extent / 2
    pasted = rows[:, :, None] & columns[:, None, :]
    part = pasted.mean((1, 2))[:, None]
    images = jnp.where(pasted[..., None], jnp.roll(images, 1, 0), images)
    return images, (1 - part) * targets + part * jnp.roll(targets, 1, 0)
