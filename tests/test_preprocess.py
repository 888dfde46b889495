import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxtta.models.checkpoints.preprocessing import read_preprocessing
from jaxtta.models.preprocess import CLIP_MEAN, CLIP_STD, Preprocessing


def image(width, height, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-20, 20, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def published(settings, kind="CLIP"):
    """transformers' own processor on PIL, under the name that its version has for it."""
    import transformers

    name = f"{kind.lower()}.image_processing_pil_{kind.lower()}"
    try:
        module = importlib.import_module(f"transformers.models.{name}")
        return getattr(module, f"{kind}ImageProcessorPil")(**settings)
    except ImportError:  # transformers 4
        return getattr(transformers, f"{kind}ImageProcessor")(**settings)


def theirs(settings, picture, kind="CLIP"):
    """What transformers makes of an image before it is scaled."""
    processor = published({**settings, "do_rescale": False, "do_normalize": False}, kind)
    pixels = processor(picture, return_tensors="np")["pixel_values"][0]
    return np.moveaxis(np.asarray(pixels), 0, -1).astype(float)


def written(folder, content, name="preprocessor_config.json", side=48, **options):
    """What is read of a file with this content."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return read_preprocessing(folder, Preprocessing(side, side, (side, side)), **options)


SQUARE = {"height": 48, "width": 48}
CLIPS = [
    {"size": {"shortest_edge": 48}, "crop_size": SQUARE},
    {"size": {"shortest_edge": 56}, "crop_size": SQUARE, "resample": 2},
    {"size": {"shortest_edge": 55}, "crop_size": SQUARE},
    {"size": {"height": 61, "width": 53}, "crop_size": SQUARE},
    {"size": SQUARE, "do_center_crop": False},
    {"size": {"shortest_edge": 40}, "crop_size": SQUARE},
    {"size": {"shortest_edge": 41}, "crop_size": SQUARE},
    {"size": 48, "crop_size": 48},
    {"size": [48, 48], "do_center_crop": False, "crop_size": None},
    {"size": [57, 63], "crop_size": [48, 48], "resample": 0},
    {"size": 52, "crop_size": 48, "resample": 1},
    {"do_resize": False, "crop_size": 48, "size": None},
]
OTHERS = [
    ("ViT", {"size": 48}, 48),
    ("ViT", {"size": SQUARE, "resample": 3}, 48),
    ("ViT", {}, 224),
    ("Siglip", {"size": SQUARE}, 48),
    ("Siglip", {}, 224),
    ("DeiT", {}, 224),
    ("DeiT", {"size": 55, "crop_size": 48}, 48),
    ("Bit", {"size": 55, "crop_size": 48}, 48),
    ("CLIP", {}, 224),
]
SIZES = [(100, 75), (75, 101), (48, 48), (31, 60), (97, 32)]


@pytest.mark.parametrize("settings", CLIPS)
@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers_to_one_grey_level(tmp_path, settings, size):
    ours = written(tmp_path, settings)[0](image(*size))
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(float) - theirs(settings, image(*size))).max() <= 1


@pytest.mark.parametrize(("kind", "settings", "side"), OTHERS)
@pytest.mark.parametrize("suffix", ["ImageProcessor", "ImageProcessorFast", "FeatureExtractor"])
def test_other_processors_have_their_own_defaults(tmp_path, kind, settings, side, suffix):
    key = "feature_extractor_type" if suffix == "FeatureExtractor" else "image_processor_type"
    preprocessing, _ = written(tmp_path, {key: kind + suffix, **settings}, side=side)
    for size in SIZES:
        ours = preprocessing(image(*size))
        assert np.abs(ours.astype(float) - theirs(settings, image(*size), kind)).max() <= 1
    reference = published(settings, kind)
    np.testing.assert_allclose(preprocessing.mean, reference.image_mean, atol=1e-6)
    np.testing.assert_allclose(preprocessing.std, reference.image_std, atol=1e-6)


@pytest.mark.parametrize(
    "key",
    [
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "do_normalize",
        "resample",
        "image_mean",
        "image_std",
        "rescale_factor",
        "do_convert_rgb",
    ],
)
def test_what_is_absent_is_the_processors_default(tmp_path, key):
    full = {**CLIPS[1], "resample": 3, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    expected, _ = written(tmp_path, full)
    assert written(tmp_path, {k: v for k, v in full.items() if k != key})[0] == expected
    if not key.startswith("do_") and key != "resample":
        assert written(tmp_path, {**full, key: None})[0] == expected


def test_a_flag_that_is_null_is_off_as_in_transformers(tmp_path):
    square = {**CLIPS[1], "size": SQUARE}
    for key in ("do_resize", "do_center_crop", "do_normalize", "do_convert_rgb"):
        off, null = (written(tmp_path, {**square, key: value}) for value in (False, None))
        assert null == off
        published({**square, key: None})(image(60, 50))  # runs
    with pytest.raises(ValueError, match="only images scaled by 1/255"):
        written(tmp_path, {**square, "do_rescale": None})
    with pytest.raises(ValueError, match="resample is None, expected one of"):
        written(tmp_path, {**square, "resample": None})  # 4 takes another one, 5 refuses it


def test_two_files_that_differ_are_said(tmp_path, caplog):
    settings = {**CLIPS[0], "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    written(tmp_path, settings)
    written(tmp_path, {"image_processor": settings}, "processor_config.json")
    assert not caplog.text
    whole = {"image_processor": settings | {"image_mean": [0.25] * 3, "resample": 2}}
    assert written(tmp_path, whole, "processor_config.json")[0].resample == 2
    assert "preprocessor_config.json has another image_mean, resample" in caplog.text


def test_whether_a_number_is_a_square_may_stand_in_the_file(tmp_path):
    settings = {"size": 48, "crop_size": 48, "default_to_square": None}
    assert written(tmp_path, settings)[0].resize == 48
    assert written(tmp_path, settings | {"default_to_square": False})[0].resize == 48
    assert written(tmp_path, settings | {"default_to_square": True})[0].resize == (48, 48)


@pytest.mark.parametrize("given", [0, 1, 2, 3, 4, 5])
def test_filters_by_number_and_name(tmp_path, given):
    name = Image.Resampling(given).name
    for value in (given, name, name.lower()):
        assert written(tmp_path, {**CLIPS[0], "resample": value})[0].resample == given


def test_one_number_as_mean_is_every_channels(tmp_path):
    settings = {**CLIPS[0], "image_mean": 0.5, "image_std": 0.25}
    preprocessing, _ = written(tmp_path, settings)
    assert (preprocessing.mean, preprocessing.std) == ((0.5,) * 3, (0.25,) * 3)
    reference = published(settings)(image(60, 50), return_tensors="np")["pixel_values"][0]
    ours = (preprocessing(image(60, 50)) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(np.moveaxis(reference, 0, -1), ours, atol=0.02)


# Where the settings are.


def test_processor_config_comes_first_as_in_transformers_5(tmp_path):
    plain, nested = {**CLIPS[0], "image_mean": 0.5}, {**CLIPS[0], "image_mean": 0.25}
    _, origin = written(tmp_path, plain)
    assert origin == str(tmp_path / "preprocessor_config.json")
    whole = {"image_processor": nested, "processor_class": "CLIPProcessor"}
    preprocessing, origin = written(tmp_path, whole, "processor_config.json")
    assert origin == str(tmp_path / "processor_config.json")
    assert preprocessing.mean == (0.25,) * 3
    # Of transformers 4, which keeps other things there.
    preprocessing, origin = written(tmp_path, {"image_seq_len": 4}, "processor_config.json")
    assert origin == str(tmp_path / "preprocessor_config.json")
    assert preprocessing.mean == (0.5,) * 3


def test_what_clips_processor_saves_is_read(tmp_path, embedded):
    """Of the transformers that is installed: 5 writes processor_config.json, 4 the other file."""
    from transformers import AutoTokenizer, CLIPProcessor

    settings = {"size": SQUARE, "do_center_crop": False, "resample": 2, "image_mean": [0.5] * 3}
    tokenizer = AutoTokenizer.from_pretrained(embedded[0].source)
    CLIPProcessor(published(settings), tokenizer).save_pretrained(tmp_path)
    preprocessing, origin = read_preprocessing(tmp_path, Preprocessing(48, 48, (48, 48)))
    expected = Preprocessing(48, (48, 48), None, 2, (0.5,) * 3, CLIP_STD)
    assert preprocessing == expected
    assert Path(origin).exists()


def test_defaults_that_are_taken_are_said(tmp_path, caplog):
    default = Preprocessing(48, 48, (48, 48))
    preprocessing, origin = read_preprocessing(tmp_path, default)
    assert (preprocessing, origin) == (default, "CLIP's defaults")
    assert "has neither processor_config.json nor preprocessor_config.json" in caplog.text
    caplog.clear()
    written(tmp_path, {**CLIPS[0], "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert "CLIPImageProcessor's are taken: resample 3" in caplog.text
    caplog.clear()
    whole = {**CLIPS[0], "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    written(tmp_path, whole)
    assert not caplog.text


def test_the_model_says_where_its_preprocessing_is_from(embedded):
    from jaxtta import assets, models

    said = models.describe_preprocessing(embedded[0])
    assert said.startswith("preprocessing: 32, shorter side resized to 32, bicubic, centre crop 32")
    assert "mean (0.4815, 0.4578, 0.4082)" in said
    assert said.endswith(f"from {Path(assets.MODEL) / 'preprocessor_config.json'}")


# Centres.


@pytest.mark.parametrize(
    ("length", "window", "transformers", "torchvision"),
    [
        (53, 48, 2, 2),
        (51, 48, 1, 2),
        (49, 48, 0, 0),
        (48, 48, 0, 0),
        (47, 48, -1, 0),
        (45, 48, -2, -1),
        (44, 48, -2, -2),
    ],
)
def test_odd_margins_are_each_librarys(length, window, transformers, torchvision):
    """transformers: (h − c) // 2. torchvision: round((h − c) / 2), pads by floor((c − h) / 2)."""
    rows = Image.fromarray(np.arange(100, 100 + length, dtype=np.uint8)[:, None].repeat(window, 1))
    for rounding, start in (("transformers", transformers), ("torchvision", torchvision)):
        crop = Preprocessing(window, None, (window, window), rounding=rounding)(rows)[:, 0, 0]
        expected = [100 + i if 0 <= i < length else 0 for i in range(start, start + window)]
        assert crop.tolist() == expected


def test_longer_side_with_a_fill():
    """OpenCLIP's resize_mode longest: rounded, in the middle of grey."""
    preprocessing = Preprocessing(
        48, 48, (48, 48), rounding="torchvision", resize_longer=True, fill=7
    )
    pixels = preprocessing(Image.new("RGB", (100, 73), (200, 200, 200)))
    inside = np.flatnonzero((pixels == 200).all((1, 2)))
    assert (inside[0], len(inside)) == (6, 35)  # round(73 / (100 / 48)) of 48
    assert (np.delete(pixels, inside, 0) == 7).all()


def test_a_thin_image_keeps_a_pixel():
    longest = Preprocessing(48, 48, (48, 48), resize_longer=True)
    assert longest(Image.new("RGB", (1, 500), "white")).max() == 255


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_other_modes_become_rgb_as_in_transformers(mode):
    converted = image(60, 50).convert(mode)
    ours = Preprocessing(48, 48, (48, 48))(converted)
    assert np.abs(ours.astype(float) - theirs(CLIPS[0], converted)).max() <= 1


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ({"size": {}}, "size is {}"),
        ({"size": "48"}, "size is '48'"),
        ({"size": [48]}, r"size is \[48\]"),
        ({"size": True}, "size is True"),
        ({"size": {"shortest_edge": 48.5}}, "expected shortest_edge, or height and width"),
        ({"size": {"longest_edge": 48}}, "expected shortest_edge, or height and width"),
        ({"size": {"max_height": 48, "max_width": 48}}, "expected shortest_edge, or height"),
        ({"size": {"shortest_edge": 48, "longest_edge": 96}}, "4 and 5 read differently"),
        ({"crop_size": [1]}, r"crop_size is \[1\]"),
        ({"crop_size": {}}, "crop_size is {}"),
        ({"crop_size": {"shortest_edge": 48}}, "expected height and width"),
        ({"crop_size": 40}, "gives images of 40×40, the model takes 48×48"),
        ({}, "gives images of 224×224 .CLIPImageProcessor's default is size"),
        ({"do_center_crop": False, "size": {"height": 48, "width": 40}}, "images of 48×40"),
        ({"do_center_crop": False, "size": {"shortest_edge": 48}}, "of different sizes"),
        ({"do_rescale": False}, "only images scaled by 1/255"),
        ({"rescale_factor": 1}, "only images scaled by 1/255"),
        ({"rescale_factor": "a"}, "'a' stands where a number"),
        ({"image_mean": [0.5]}, "three numbers each"),
        ({"image_mean": "grey"}, "'grey' stands where a number"),
        ({"image_std": [0.5, 0, 0.5]}, "std above 0"),
        ({"resample": 99}, r"resample is 99, expected one of 0 \(nearest\)"),
        ({"resample": "cubic"}, "resample is 'cubic'"),
        ({"do_pad": True}, "do_pad is True, which is not supported"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "'Siglip2ImageProcessor', known are"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path, content, message):
    if isinstance(content, dict):
        full = {**CLIPS[0], **content} if content else {}
        content = json.dumps(full)
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"preprocessor_config.json: .*{message}") as caught:
        read_preprocessing(tmp_path, Preprocessing(48, 48, (48, 48)))
    assert "\n" not in str(caught.value)


def test_settings_that_miss_the_models_size_are_refused():
    with pytest.raises(ValueError, match=r"gives an image of 40×40, its model takes 48×48"):
        Preprocessing(48, 56, (40, 40))(image(60, 60))
