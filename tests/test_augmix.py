"""AugMix's operations are PIL's, and its mixtures stay images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bundled_image
from PIL import Image, ImageOps

from jaxtta import augmix


@pytest.fixture(params=[0, 7])
def image(request):
    return bundled_image("ship", request.param).resize((40, 36))


def ours(function, image, *arguments):
    pixels = jnp.asarray(np.asarray(image), jnp.float32) / 255
    return 255 * np.asarray(jax.jit(function)(pixels, *arguments))


def test_tones_are_pils(image):
    for function, expected in [
        (augmix.autocontrast, ImageOps.autocontrast(image)),
        (augmix.equalize, ImageOps.equalize(image)),
        (lambda x: augmix.posterize(x, jnp.array(3)), ImageOps.posterize(image, 3)),
        (lambda x: augmix.solarize(x, jnp.array(100)), ImageOps.solarize(image, 100)),
    ]:
        difference = np.abs(ours(function, image) - np.asarray(expected, np.float32))
        assert difference.max() <= 1.01
    flat = jnp.full((8, 8, 3), 0.25)
    np.testing.assert_array_equal(augmix.autocontrast(flat), flat)
    np.testing.assert_allclose(augmix.equalize(flat), 64 / 255, atol=1e-6)


@pytest.mark.parametrize(("kind", "amount"), [(0, 0.7), (0, -1), (1, 1), (2, -0.5), (3, 1), (4, 1)])
def test_maps_are_pils(image, kind, amount):
    width, height = image.size
    matrix = augmix._matrix(jnp.array(kind), jnp.float32(amount), height, width)
    if kind == 0:
        expected = image.rotate(30 * amount, Image.Resampling.BILINEAR)
    else:
        coefficients = [1, 0, 0, 0, 1, 0]
        place, value = [(1, 0.3), (3, 0.3), (2, width / 3), (5, height / 3)][kind - 1]
        coefficients[place] = value * amount
        expected = image.transform(
            image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR
        )
    difference = np.abs(ours(augmix.warp, image, matrix) - np.asarray(expected, np.float32))
    assert np.mean(difference > 1.5) < 0.01  # PIL's fixed point may see another edge


def test_mixtures(image):
    pixels = jnp.asarray(np.asarray(image), jnp.float32) / 255
    keys = jax.random.split(jax.random.key(0), 12)
    mix = jax.jit(jax.vmap(lambda key: augmix.augmix(key, pixels, severity=3.0)))
    mixed = mix(keys)
    assert mixed.shape == (12, *pixels.shape)
    assert mixed.min() >= 0
    assert mixed.max() <= 1 + 1e-6
    changes = np.abs(mixed - pixels).mean((1, 2, 3))
    assert changes.min() > 0
    assert changes.max() < 0.3
    np.testing.assert_array_equal(mix(keys), mixed)
    # alone as among others
    alone = jax.jit(lambda key: augmix.augmix(key, pixels, severity=3.0))(keys[4])
    np.testing.assert_allclose(alone, mixed[4], atol=1e-5)
    assert len({round(float(c), 5) for c in changes}) == 12
