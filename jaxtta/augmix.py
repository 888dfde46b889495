"""AugMix: an image mixed with chains of small distortions of itself.

    mixed = augmix(key, image)                              # (height, width, 3) in [0, 1]
    mixed = jax.vmap(augmix)(jax.random.split(key, 64), views)

The operations are PIL's, on images in [0, 1]; none of them is a corruption of ImageNet-C.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# Greatest magnitudes, at level 10: degrees, shear, share of the side, bits taken away, levels.
ROTATION, SHEAR, TRANSLATION, BITS, THRESHOLD = 30.0, 0.3, 1 / 3, 4, 256


def autocontrast(image: Array) -> Array:
    """Stretch every channel of (height, width, 3) to all of [0, 1].

    Examples:
        >>> image = jnp.linspace(0.4, 0.6, 3)[None, :, None]  # grey, one channel
        >>> jaxtta.augmix.autocontrast(image).ravel().round(2).tolist()
        [0.0, 0.5, 1.0]
    """
    low, high = image.min((0, 1)), image.max((0, 1))
    flat = high <= low
    return jnp.where(flat, image, (image - low) / jnp.where(flat, 1, high - low)).clip(0, 1)


def equalize(image: Array) -> Array:
    """Spread the 256 levels of every channel of (height, width, 3) evenly."""

    def channel(levels: Array) -> Array:
        counts = jnp.bincount(levels.ravel(), length=256)
        step = (levels.size - counts[levels.max()]) // 255
        table = (step // 2 + jnp.cumsum(counts) - counts) // jnp.maximum(step, 1)
        return jnp.where(step > 0, table.clip(0, 255)[levels], levels)

    return jax.vmap(channel, 2, 2)(_levels(image)) / 255


def posterize(image: Array, bits: Array) -> Array:
    """Keep only the highest bits of (height, width, 3).

    Examples:
        >>> image = jnp.array([10, 100, 200])[None, :, None] / 255
        >>> (255 * jaxtta.augmix.posterize(image, jnp.array(1))).ravel().round().tolist()
        [0.0, 0.0, 128.0]
    """
    unit = 2 ** (8 - bits)
    return _levels(image) // unit * unit / 255


def solarize(image: Array, threshold: Array) -> Array:
    """Invert what is at or above a threshold from 0 to 256.

    Examples:
        >>> image = jnp.array([10, 100, 200])[None, :, None] / 255
        >>> (255 * jaxtta.augmix.solarize(image, jnp.array(128))).ravel().round().tolist()
        [10.0, 100.0, 55.0]
    """
    levels = _levels(image)
    return jnp.where(levels >= threshold, 255 - levels, levels) / 255


def _levels(image: Array) -> Array:
    return jnp.round(255 * image).astype(jnp.int32).clip(0, 255)


def warp(image: Array, matrix: Array) -> Array:
    """Move pixels by an affine map, bilinear, black where nothing comes from.

    Args:
        image: (height, width, 3).
        matrix: (2, 3), from (x, y, 1) in the result to (x, y) in the image, in pixels.

    Returns:
        (height, width, 3).

    Examples:
        >>> image = jnp.array([1.0, 2.0, 3.0])[None, :, None]
        >>> shift = jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])  # each pixel from its right
        >>> jaxtta.augmix.warp(image, shift).ravel().tolist()
        [2.0, 3.0, 0.0]
    """
    height, width, _ = image.shape
    y, x = jnp.mgrid[:height, :width] + 0.5
    x, y = jnp.einsum("ij,jhw->ihw", matrix, jnp.stack([x, y, jnp.ones_like(x)]))
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)

    def sample(channel: Array) -> Array:
        return jax.scipy.ndimage.map_coordinates(channel, [y - 0.5, x - 0.5], 1, mode="nearest")

    return jnp.where(inside[..., None], jax.vmap(sample, 2, 2)(image), 0)


def _matrix(kind: Array, amount: Array, height: int, width: int) -> Array:
    """The map of a rotation, a shear along x or y, or a translation along x or y."""
    radians = jnp.deg2rad(ROTATION * amount)
    cos, sin = jnp.cos(radians), jnp.sin(radians)
    x, y = width / 2, height / 2
    zero, one = jnp.zeros(()), jnp.ones(())
    shear, shift = SHEAR * amount, TRANSLATION * amount
    maps = [
        [cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y],
        [one, shear, zero, zero, one, zero],
        [one, zero, zero, shear, one, zero],
        [one, zero, shift * width, zero, one, zero],
        [one, zero, zero, zero, one, shift * height],
    ]
    return jnp.stack([jnp.stack(row) for row in maps])[kind].reshape(2, 3)


def distort(key: Array, image: Array, severity: float = 1.0) -> Array:
    """Apply one of nine operations, drawn with its magnitude.

    Args:
        key: PRNG key.
        image: (height, width, 3) in [0, 1].
        severity: the greatest level, up to 10; levels are drawn from 0.1.

    Returns:
        (height, width, 3) in [0, 1].
    """
    kind_key, level_key, sign_key = jax.random.split(key, 3)
    kind = jax.random.randint(kind_key, (), 0, 9)
    share = jax.random.uniform(level_key, minval=0.1, maxval=severity) / 10
    sign = jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)
    matrix = _matrix((kind - 4).clip(0), sign * share, *image.shape[:2])
    operations = [
        autocontrast,
        equalize,
        lambda x: posterize(x, BITS - jnp.floor(share * BITS).astype(jnp.int32)),
        lambda x: solarize(x, THRESHOLD - jnp.floor(share * THRESHOLD).astype(jnp.int32)),
        lambda x: warp(x, matrix),
    ]
    return jax.lax.switch(kind.clip(max=4), operations, image)


def augmix(
    key: Array, image: Array, severity: float = 1.0, chains: int = 3, depth: int = 3
) -> Array:
    """Mix an image with chains of distortions.

    Args:
        key: PRNG key.
        image: (height, width, 3) in [0, 1].
        severity: of every operation, up to 10.
        chains: how many are mixed, with weights from a Dirichlet distribution.
        depth: most operations a chain; how many is drawn.

    Returns:
        (height, width, 3) in [0, 1].

    Examples:
        >>> keys = jax.random.split(jax.random.key(0), 2)  # a key an image
        >>> jax.jit(jax.vmap(jaxtta.augmix.augmix))(keys, jnp.zeros((2, 8, 8, 3))).shape
        (2, 8, 8, 3)

    References:
        https://arxiv.org/abs/1912.02781
    """
    weight_key, share_key, length_key, chain_key = jax.random.split(key, 4)
    weights = jax.random.dirichlet(weight_key, jnp.ones(chains))
    lengths = jax.random.randint(length_key, (chains,), 1, depth + 1)

    def chain(key: Array, length: Array) -> Array:
        def operate(result: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
            key, number = step
            return jnp.where(number < length, distort(key, result, severity), result), None

        steps = jax.random.split(key, depth), jnp.arange(depth)
        return jax.lax.scan(operate, image, steps)[0]

    mixed = jax.vmap(chain)(jax.random.split(chain_key, chains), lengths)
    share = jax.random.uniform(share_key)  # Beta(1, 1)
    return share * image + (1 - share) * jnp.einsum("c,chwd->hwd", weights, mixed)
