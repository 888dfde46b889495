"""Images of every mode and format are read as a viewer shows them, or refused."""

import io
import logging
import struct
import zlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from jaxtta import images
from jaxtta.models.preprocess import Preprocessing

SMALL = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
PIXELS = np.asarray(Image.fromarray(SMALL).resize((60, 42), Image.Resampling.BILINEAR))
COLOUR = Image.fromarray(PIXELS)
GREY = np.asarray(COLOUR.convert("L")).copy()
GREY[0, :2] = 0, 255
ORIENTATION = 0x0112


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def opened(content, raw=False):
    return images.open_image(io.BytesIO(content), "x.file", raw)


def tiff(values, bits, samples, photometric=1):
    """A TIFF of one strip, with tags that Pillow does not write."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        rows = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in pairs]
        strip = np.asarray(rows, np.uint8).tobytes()
    else:
        strip = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: len(strip), 339: samples}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    strip += bytes(len(strip) % 2)
    return struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + directory


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_tag_says(form, orientation):
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.swapaxes(0, 1),
        6: np.rot90(PIXELS, 1),  # stored turned to the left, so that it is turned to the right
        7: PIXELS[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(PIXELS, 3),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned))
    content = saved(image, form, exif=exif, quality=100)
    assert np.abs(np.asarray(opened(content), int) - PIXELS).max() <= 12
    if form != "TIFF":  # Pillow turns TIFFs itself
        assert opened(content, raw=True).size == turned.shape[1::-1]


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0II*\0\xff\xff\xff\xff", b"II"])
def test_damaged_exif_data_turn_nothing(exif):
    np.testing.assert_array_equal(opened(saved(COLOUR, "PNG", exif=exif)), PIXELS)


SIXTEEN = GREY.astype(np.uint16) * 257
DEEP = {
    "png": saved(Image.fromarray(SIXTEEN), "PNG"),
    "tiff": saved(Image.fromarray(SIXTEEN), "TIFF"),
    "compressed tiff": saved(Image.fromarray(SIXTEEN), "TIFF", compression="tiff_lzw"),
    "pgm": b"P5 60 42 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "12-bit pgm": b"P5 60 42 4095\n" + (GREY * (4095 / 255)).round().astype(">u2").tobytes(),
    "12-bit tiff": tiff((GREY * (4095 / 255)).round().astype(np.uint16), 12, 1),
    "white is zero": tiff(65535 - SIXTEEN, 16, 1, photometric=0),
    "signed": tiff((GREY * (32767 / 255)).round().astype(np.int16), 16, 2),
    "int32 of 8 bits": saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"),
    "int32 of 16 bits": saved(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"),
    "int32": tiff((GREY * (float(2**31 - 1) / 255)).astype(np.int32), 32, 2),
    "uint32": tiff((GREY * (float(2**32 - 1) / 255)).astype(np.uint32), 32, 1),
    "uint32 of 16 bits": tiff(SIXTEEN.astype(np.uint32), 32, 1),
    "float to 1": saved(Image.fromarray(GREY.astype(np.float32) / 255), "TIFF"),
    "float to 255": saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
    "white is zero float": tiff(1 - GREY.astype(np.float32) / 255, 32, 3, photometric=0),
    "bits": saved(Image.fromarray(GREY > 127), "PNG"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_greys_are_scaled_from_their_range(kind):
    expected = np.where(GREY > 127, 255, 0) if kind == "bits" else GREY
    for raw in (False, True):
        image = np.asarray(opened(DEEP[kind], raw), int)
        np.testing.assert_array_equal(image, np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), np.nan, np.float32), "has values that are not finite"),
        (np.array([[0, np.inf]], np.float32), "has values that are not finite"),
        (np.array([[-1, 1]], np.float32), "values run from -1 to 1, expected 0 to 1 or 255"),
        (np.array([[0, 1.5]], np.float32), "values run from 0 to 1.5, expected 0 to 1 or 255"),
        (np.array([[0, 4000]], np.float32), "values run from 0 to 4000, expected 0 to 1 or 255"),
        (np.array([[-1024, 3071]], np.int32), "run from -1024 to 3071, expected 0 to 255 or 65535"),
        (np.array([[0, 4095]], np.int32), "run from 0 to 4095, expected 0 to 255 or 65535"),
        (np.array([[0, 70000]], np.int32), "run from 0 to 70000, expected"),
    ],
)
def test_values_without_a_known_range_are_refused(values, message):
    with pytest.raises(images.UnreadableImageError, match=rf"^x\.file: cannot be dec.*{message}"):
        opened(saved(Image.fromarray(values), "TIFF"))
    with pytest.raises(ValueError, match=message):
        Preprocessing(14, 14, (14, 14)).rgb(Image.fromarray(values))


def test_signed_values_of_8_bits_are_not_read_as_unsigned():
    values = GREY // 2
    with pytest.raises(images.UnreadableImageError, match="has signed values of 8 bits"):
        opened(tiff(values.astype(np.int8), 8, 2))
    np.testing.assert_array_equal(np.asarray(opened(tiff(values, 8, 1)))[..., 0], values)


def test_rounding_of_floats_is_no_range_of_its_own():
    values = (GREY.astype(np.float32) / 255) * np.float32(1.0000002)
    np.testing.assert_array_equal(np.asarray(images.to_rgb(Image.fromarray(values)))[..., 0], GREY)


ALPHA = np.linspace(0, 255, GREY.size).reshape(GREY.shape).astype(np.uint8)
OPAQUE = np.full_like(ALPHA, 255)


def with_palette(transparency):
    image = COLOUR.quantize(8)
    return saved(image, "PNG", transparency=transparency), image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_are_laid_over_white(mode):
    colours = PIXELS if mode == "RGBA" else np.repeat(GREY[..., None], 3, -1)
    for alpha in (ALPHA, OPAQUE):
        layer = Image.fromarray(np.dstack([colours, alpha])).convert(mode)
        share = alpha[..., None] / 255
        expected = colours * share + 255 * (1 - share)
        assert np.abs(opened(saved(layer, "PNG")) - expected).max() <= 1
        np.testing.assert_array_equal(opened(saved(layer, "PNG"), raw=True), layer.convert("RGB"))
        if alpha is OPAQUE:
            np.testing.assert_array_equal(opened(saved(layer, "PNG")), layer.convert("RGB"))


@pytest.mark.parametrize("form", ["PNG", "TGA"])
def test_an_image_that_is_transparent_everywhere_is_not_a_white_one(form):
    content = saved(Image.fromarray(np.dstack([PIXELS, 0 * OPAQUE])), form)
    with pytest.raises(images.UnreadableImageError, match="is transparent everywhere"):
        opened(content)
    np.testing.assert_array_equal(opened(content, raw=True), PIXELS)


@pytest.mark.parametrize("transparency", [0, bytes([0, 128]), bytes([255, 255])])
def test_transparent_palettes_are_laid_over_white(transparency):
    content, image = with_palette(transparency)
    alpha = np.full(8, 255)
    alpha[: len(transparency) if isinstance(transparency, bytes) else 1] = (
        [*transparency] if isinstance(transparency, bytes) else 0
    )
    share = alpha[np.asarray(image)][..., None] / 255
    colours = np.asarray(image.convert("RGB"))
    assert np.abs(opened(content) - (colours * share + 255 * (1 - share))).max() <= 1
    if alpha.min() == 255:
        np.testing.assert_array_equal(opened(content), colours)


@pytest.mark.parametrize(("mode", "key"), [("RGB", tuple(map(int, PIXELS[3, 4]))), ("L", 255)])
def test_a_transparent_colour_is_white(mode, key):
    image = np.asarray(COLOUR) if mode == "RGB" else GREY
    through = np.all(image == key, -1) if mode == "RGB" else image == key
    shown = np.asarray(opened(saved(Image.fromarray(image), "PNG", transparency=key)))
    assert through.any()
    assert (shown[through] == 255).all()
    same = np.asarray(Image.fromarray(image).convert("RGB"))
    np.testing.assert_array_equal(shown[~through], same[~through])


def test_a_transparent_grey_of_16_bits_is_white():
    key = int(SIXTEEN[3, 4])
    header, chunk = saved(Image.fromarray(SIXTEEN), "PNG"), b"tRNS" + struct.pack(">H", key)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    content, expected = header[:33] + chunk + header[33:], np.where(key == SIXTEEN, 255, GREY)
    np.testing.assert_array_equal(np.asarray(opened(content))[..., 0], expected)
    np.testing.assert_array_equal(np.asarray(opened(content, raw=True))[..., 0], GREY)


def test_cmyk_and_lab():
    jpeg = saved(COLOUR.convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert np.abs(np.asarray(opened(jpeg), int) - PIXELS).max() <= 12
    smooth = Image.fromarray((PIXELS // 2 + 64).astype(np.uint8))
    to_lab = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    lab = saved(ImageCms.profileToProfile(smooth, *to_lab, outputMode="LAB"), "TIFF")
    assert np.abs(np.asarray(opened(lab), int) - np.asarray(smooth, int)).max() <= 4


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_of_several_frames_is_read_and_said_once(form, caplog):
    images._say_frames.cache_clear()
    first, second = (Image.new("RGB", (9, 7), colour) for colour in ("red", "blue"))
    options = {"lossless": True} if form == "WEBP" else {}
    content = saved(first, form, save_all=True, append_images=[second], **options)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            np.testing.assert_array_equal(opened(content), first)
    assert [record.getMessage() for record in caplog.records] == [
        f"of {form} files with several frames, the first frame is read"
    ]


def large():
    """A PNG whose header promises 10 gigapixels."""
    header = struct.pack(">II", 100_000, 100_000) + bytes([8, 2, 0, 0, 0])
    chunk = b"IHDR" + header
    content = saved(COLOUR, "PNG")
    return content[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved(COLOUR, "PNG")[:-30], "truncated"),
        (saved(COLOUR, "JPEG")[:-30], "truncated"),
        (b"", "cannot identify image file"),
        (b"hello", "cannot identify image file"),
        (large(), "decompression bomb"),
    ],
    ids=["png", "jpeg", "empty", "text", "large"],
)
def test_damaged_images_are_refused_in_one_sentence(content, message):
    with pytest.raises(images.UnreadableImageError, match=rf"^x\.file: .*{message}.*$"):
        opened(content)


def test_suffixes_are_of_images():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".jp2", ".bmp", ".tga"} <= {
        *images.SUFFIXES
    }
    assert not {".pdf", ".eps", ".mpg", ".psd", ".h5", ".heic", ".txt"} & {*images.SUFFIXES}
    assert (".avif" in images.SUFFIXES) == features.check("avif")
    assert all(suffix == suffix.lower() for suffix in images.SUFFIXES)


def test_what_cannot_be_printed_is_escaped():
    assert images.printable("plain café 写真 🙂") == "plain café 写真 🙂"
    assert images.printable("caf\udce9/a\nb\x1b[31m\u2028\ud800") == (
        r"caf\xe9/a\nb\x1b[31m\u2028\ud800"
    )


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.data())
def test_jpeg_files_are_read_as_pillow_does(tmp_path_factory, data):
    """To the last bit: any size, quality and layout, turned, damaged, or no JPEG at all."""
    draw, path = data.draw, tmp_path_factory.mktemp("images") / "image.JPEG"
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    coarse = rng.integers(0, 256, (5, 4, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    exif = Image.Exif()
    if orientation := draw(st.integers(0, 9)):
        exif[274] = orientation
    image.convert(draw(st.sampled_from(["RGB", "RGB", "L", "CMYK"]))).save(
        path,
        draw(st.sampled_from(["JPEG", "JPEG", "TIFF"])),
        quality=draw(st.integers(1, 100)),
        subsampling=draw(st.integers(0, 2)),
        progressive=draw(st.booleans()),
        restart_marker_blocks=draw(st.integers(0, 3)),
        exif=exif,
    )
    content = bytearray(path.read_bytes())
    if draw(st.booleans()):
        content = content[: draw(st.integers(1, len(content)))]
    for _ in range(draw(st.integers(0, 2))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    path.write_bytes(content + draw(st.binary(max_size=4)))
    for raw in (False, True):
        try:
            expected = np.asarray(images.open_image(path, raw=raw))
        except images.UnreadableImageError:
            with pytest.raises(images.UnreadableImageError):
                images.read_image(path, raw=raw)
        else:
            np.testing.assert_array_equal(images.read_image(path, raw=raw), expected)
