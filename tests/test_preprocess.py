import json

import numpy as np
import pytest
from PIL import Image

from jaxtta.models.preprocess import Preprocessing, read_preprocessing


def image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-20, 20, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def published(settings):
    """transformers' own processor on PIL, under the name that its version has for it."""
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as P
    except ImportError:
        from transformers.models.clip.image_processing_clip import CLIPImageProcessor as P
    return P(**settings)


SETTINGS = [
    {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
    {"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}, "resample": 2},
    {"size": {"height": 48, "width": 48}, "do_center_crop": False},
    {"size": {"shortest_edge": 40}, "crop_size": {"height": 48, "width": 48}},
    {"size": 48, "crop_size": 48},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [(100, 75), (75, 101), (48, 48), (31, 60)])
def test_equals_transformers_to_one_grey_level(tmp_path, settings, size):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    ours = read_preprocessing(path, 48)(image(*size))
    theirs = published({**settings, "do_rescale": False, "do_normalize": False})
    reference = theirs(image(*size), return_tensors="np")["pixel_values"][0]
    reference = np.moveaxis(np.asarray(reference), 0, -1)
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(float) - reference).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_other_modes_become_rgb_as_in_transformers(mode):
    converted = image(60, 50).convert(mode)
    ours = Preprocessing(48, 48, (48, 48))(converted)
    theirs = published({**SETTINGS[0], "do_rescale": False, "do_normalize": False})
    reference = np.moveaxis(theirs(converted, return_tensors="np")["pixel_values"][0], 0, -1)
    assert np.abs(ours.astype(float) - reference).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bits_are_scaled_not_clipped(mode):
    grey = np.asarray(image(60, 50).convert("L"))
    deep = Image.fromarray((grey.astype(np.uint16) * 257).astype("<u2"))
    deep = deep if mode == "I;16" else deep.convert("I")
    preprocessing = Preprocessing(48, 48, (48, 48))
    eight = preprocessing(Image.fromarray(grey))
    np.testing.assert_array_equal(preprocessing(deep), eight)


def test_transparent_images_are_laid_over_white():
    colours = image(48, 48)
    half = colours.copy()
    half.putalpha(128)
    preprocessing = Preprocessing(48, 48, (48, 48))
    expected = np.asarray(colours) * (128 / 255) + 127
    assert np.abs(preprocessing(half) - expected).max() <= 1


def test_without_a_file_clips_own_settings_hold():
    preprocessing = read_preprocessing(None, 224)
    assert preprocessing == Preprocessing(224, 224, (224, 224))
    assert preprocessing(image(300, 260)).shape == (224, 224, 3)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"size": {}}',
        '{"crop_size": [1]}',
        '{"crop_size": 40}',
        '{"do_center_crop": false, "size": {"height": 48, "width": 40}}',
        '{"do_rescale": false}',
        "[]",
        '{"do_center_crop": false, "size": {"shortest_edge": 48}}',
        '{"image_mean": [0.5]}',
        '{"image_std": [0.5, 0, 0.5]}',
        '{"resample": 99}',
        '{"rescale_factor": 1}',
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path, content):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"preprocessor_config.json: cannot be read"):
        read_preprocessing(path, 48)


def test_settings_that_miss_the_models_size_are_refused():
    with pytest.raises(ValueError, match=r"gives an image of 40×40, its model takes 48×48"):
        Preprocessing(48, 56, (40, 40))(image(60, 60))
