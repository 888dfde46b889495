"""Views agree with PIL's crops and resizes, whatever the canvas they lie on."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bundled_image
from PIL import Image

from jaxtta import views
from jaxtta.models.preprocess import Preprocessing


def photograph(number, height, width):
    """A real image of some size."""
    return bundled_image("ship", number).resize((width, height), Image.Resampling.BICUBIC)


def on_canvas(image, side):
    pixels = np.asarray(image, np.float32) / 255
    canvas = np.full((side, side, 3), 7.0, np.float32)  # what lies outside must not be read
    canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
    return canvas, np.array(pixels.shape[:2])


crop = jax.jit(views.crop_and_resize, static_argnums=2)
LONGEST = {"rounding": "torchvision", "resize_longer": True, "fill": 9}
plain = jax.jit(views.plain, static_argnums=(2, 3), static_argnames=tuple(LONGEST))


@hypothesis.given(
    st.integers(20, 90), st.integers(20, 90), st.data(), st.sampled_from([32, 48]), st.booleans()
)
@hypothesis.settings(max_examples=25)
def test_crops_are_pils(height, width, data, out, flip):
    image = photograph(data.draw(st.integers(0, 50)), height, width)
    top, left = data.draw(st.integers(0, height - 5)), data.draw(st.integers(0, width - 5))
    h, w = data.draw(st.integers(3, height - top)), data.draw(st.integers(3, width - left))
    expected = image.crop((left, top, left + w, top + h))
    expected = expected.resize((out, out), Image.Resampling.BILINEAR)
    if flip:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas, _ = on_canvas(image, 96)
    ours = crop(canvas, views.Box(*map(jnp.float32, (top, left, h, w))), out, flip)
    assert np.abs(255 * np.asarray(ours) - np.asarray(expected, np.float32)).max() < 2


@hypothesis.given(
    st.integers(20, 96),
    st.integers(20, 96),
    st.sampled_from([(32, 32), (32, 36), (32, 28), (32, (36, 40)), (32, None)]),
    st.sampled_from([{}, {"rounding": "torchvision"}, LONGEST]),
)
@hypothesis.settings(max_examples=20)
def test_the_plain_view_is_the_preprocessing(height, width, sizes, options):
    out, resize = sizes
    image = photograph(0, height, width)
    expected = Preprocessing(out, resize, (out, out), **options)(image)
    canvas, size = on_canvas(image, 96)
    ours = 255 * np.asarray(plain(canvas, size, out, resize, **options))
    assert np.abs(ours - expected).max() < 3


def test_the_same_key_gives_the_same_views_on_any_canvas():
    image = photograph(3, 50, 64)
    cut = jax.jit(views.random_resized_crops, static_argnums=(3, 4))
    key = jax.random.key(5)
    small, size = on_canvas(image, 64)
    large, _ = on_canvas(image, 90)
    a = cut(key, small, size, 6, 32)
    np.testing.assert_allclose(a, cut(key, large, size, 6, 32), atol=1e-5)
    assert np.abs(a - cut(jax.random.key(6), small, size, 6, 32)).max() > 0.1
    assert a.shape == (6, 32, 32, 3)
    assert a.min() >= 0
    assert a.max() <= 1 + 1e-6


@pytest.mark.parametrize("size", [(32, 32), (300, 20), (20, 300)])
def test_boxes_lie_in_the_image_and_have_the_sizes_asked_for(size):
    boxes = jax.jit(views.random_boxes, static_argnums=2)(jax.random.key(0), jnp.array(size), 500)
    top, left, h, w = map(np.asarray, boxes)
    assert np.all((top >= 0) & (left >= 0) & (h >= 1) & (w >= 1))
    assert np.all((top + h <= size[0]) & (left + w <= size[1]))
    assert np.all(np.concatenate([top, left, h, w]) % 1 == 0)
    if size == (32, 32):
        area, ratio = h * w / 1024, w / h
        assert 0.05 < area.min() < 0.15
        assert 0.85 < area.max() <= 1
        assert 0.6 < ratio.min() < 0.85
        assert 1.2 < ratio.max() < 1.6
        assert np.mean(area) == pytest.approx(0.5, abs=0.08)


def test_training_crops_and_mixtures_stay_images_with_their_classes():
    """An image of one value and its class: the shares of values and targets are the same."""
    values = jnp.arange(1, 33, dtype=jnp.uint8) * 7
    images = jnp.broadcast_to(values[:, None, None, None], (32, 16, 16, 3))
    targets = jax.nn.one_hot(jnp.arange(32), 32)
    shown, mixed = views.crop_flip_cutmix(jax.random.key(0), images, targets, 0, 0.5)
    assert (shown.shape, shown.dtype) == (images.shape, images.dtype)
    shares = (shown[..., 0] == values[:, None, None]).mean((1, 2))
    np.testing.assert_allclose(mixed[jnp.arange(32), jnp.arange(32)], shares, atol=1e-6)
    np.testing.assert_allclose(mixed.sum(1), 1, atol=1e-6)
    assert 0.2 < (shares < 1).mean() < 0.8
    padded, same = views.crop_flip_cutmix(jax.random.key(0), images, targets, 4, 0.0)
    np.testing.assert_array_equal(same, targets)
    black = (padded == 0).mean((1, 2, 3))
    assert 0 < black.mean() < 0.5
