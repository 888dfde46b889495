"""Strong augmentation that keeps the classes: colours, small affine maps, mirror images.

    view = strong_view(key, image)                          # (height, width, 3) in [0, 1]
    views = jax.vmap(strong_view)(jax.random.split(key, 64), images)

The ranges are those of CoTTA's augmentation, which later methods took over.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

BRIGHTNESS, CONTRAST, SATURATION, GAMMA = (0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (0.7, 1.3)
HUE, DEGREES, SHIFT, SCALE = 0.06, 15.0, 1 / 16, (0.9, 1.1)
BLUR, NOISE = (0.001, 0.5), 0.005  # standard deviations, in pixels and of values

# Luma and two chroma axes, on which a change of hue is a rotation.
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def jitter(key: Array, image: Array) -> Array:
    """Change brightness, contrast, saturation, hue and gamma of (height, width, 3) in [0, 1]."""
    keys = jax.random.split(key, 5)
    ranges = (BRIGHTNESS, CONTRAST, SATURATION, GAMMA, (-HUE, HUE))
    bright, contrast, saturation, gamma, hue = (
        jax.random.uniform(key, (), image.dtype, *each)
        for key, each in zip(keys, ranges, strict=True)
    )
    to_yiq = jnp.asarray(YIQ, image.dtype)
    image = (image * bright).clip(0, 1)
    mean = (image @ to_yiq[0]).mean()
    image = (mean + contrast * (image - mean)).clip(0, 1)
    luma, red, blue = jnp.moveaxis(image @ to_yiq.T, -1, 0)
    cos, sin = jnp.cos(2 * jnp.pi * hue), jnp.sin(2 * jnp.pi * hue)
    turned = jnp.stack([cos * red - sin * blue, sin * red + cos * blue])
    yiq = jnp.concatenate([luma[None], saturation * turned])
    image = jnp.moveaxis(yiq, 0, -1) @ jnp.linalg.inv(to_yiq).T
    return image.clip(0, 1) ** gamma


def small_affine(key: Array, image: Array) -> Array:
    """Rotate, shift and scale (height, width, 3) about its centre, mirrored beyond its edges."""
    height, width, _ = image.shape
    turn_key, shift_key, scale_key = jax.random.split(key, 3)
    angle = jnp.deg2rad(jax.random.uniform(turn_key, (), image.dtype, -DEGREES, DEGREES))
    sides = jnp.array([height, width], image.dtype)
    shift = jnp.round(sides * jax.random.uniform(shift_key, (2,), image.dtype, -SHIFT, SHIFT))
    scale = jax.random.uniform(scale_key, (), image.dtype, *SCALE)
    centre = (sides - 1) / 2
    y, x = jnp.mgrid[:height, :width].astype(image.dtype) - (centre + shift)[:, None, None]
    cos, sin = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    places = [centre[0] + sin * x + cos * y, centre[1] + cos * x - sin * y]

    def sample(channel: Array) -> Array:
        return jax.scipy.ndimage.map_coordinates(channel, places, 1, mode="mirror")

    return jax.vmap(sample, 2, 2)(image)


def blur_and_noise(key: Array, image: Array) -> Array:
    """Blur (height, width, 3) a little and add a little noise."""
    blur_key, noise_key = jax.random.split(key)
    sigma = jax.random.uniform(blur_key, (), image.dtype, *BLUR)
    weights = jax.nn.softmax(-((jnp.arange(-2.0, 3.0) / sigma) ** 2) / 2).astype(image.dtype)
    for axis in (0, 1):
        wide = jnp.pad(image, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        parts = (
            w * jax.lax.slice_in_dim(wide, i, i + image.shape[axis], axis=axis)
            for i, w in enumerate(weights)
        )
        image = sum(parts, jnp.zeros_like(image))
    return image + NOISE * jax.random.normal(noise_key, image.shape, image.dtype)


def in_unit_range(images: Array | np.ndarray) -> Array:
    """Images, uint8 or float in [0, 1], as float in [0, 1]."""
    images = jnp.asarray(images)
    return images / 255 if images.dtype == jnp.uint8 else images


def strong_view(key: Array, image: Array, noisy: bool = False) -> Array:
    """Draw one strongly augmented view of an image.

    Args:
        key: PRNG key; the same key, the same view.
        image: (height, width, 3), uint8 or float in [0, 1].
        noisy: whether to blur and add noise too.

    Returns:
        (height, width, 3) in [0, 1].

    Examples:
        >>> from jaxtta.strong_views import strong_view
        >>> keys = jax.random.split(jax.random.key(0), 2)  # a key an image
        >>> jax.jit(jax.vmap(strong_view))(keys, jnp.zeros((2, 8, 8, 3), jnp.uint8)).shape
        (2, 8, 8, 3)

    References:
        Wang et al., CVPR 2022, https://arxiv.org/abs/2203.13591
    """
    image = in_unit_range(image)
    colour_key, affine_key, noise_key, flip_key = jax.random.split(key, 4)
    image = small_affine(affine_key, jitter(colour_key, image))
    image = blur_and_noise(noise_key, image) if noisy else image
    return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image).clip(0, 1)
