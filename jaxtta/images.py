"""Image files: which of them are read, and how they become 8-bit RGB.

Pillow decodes them; colour profiles are not applied, as the saving libraries of CLIP do not.
"""

import contextlib
import functools
import io
import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

log = logging.getLogger(__name__)

# Photographs and drawings in pixels. Pillow opens more: vector graphics (EPS, WMF) through other
# programs, films, icons in several sizes, layers (PSD), astronomical and weather data.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM"),
    *("QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP"),
)
SUFFIXES = tuple(
    sorted(suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS)
)
"""Lower-case suffixes of image files: of the formats that the installed Pillow opens (HEIF if its
plugin is registered before jaxtta is imported)."""
_SYSTEM = {  # made by operating systems, NAS servers and tools, in lower case
    *("__macosx", "__pycache__", "lost+found", "system volume information", "$recycle.bin"),
    *("recycler", "found.000", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle"),
    *("#snapshot", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
}
_JPEG, _ORIENTATION = (".jpg", ".jpeg"), 274  # suffixes, and EXIF's tag
_DARK = 16  # of a range that is not written in the file, at least 1/16 must be used
_BITS, _SAMPLES, _PHOTOMETRIC = 258, 339, 262  # TIFF's tags
_SIGNED, _WHITE_IS_ZERO = 2, 0  # and values of the last two


class UnreadableImageError(Exception):
    """An image that cannot be read; streams skip it."""


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden or made by the system, such as ._fog.npy or Thumbs.db."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; False for links to nothing or themselves."""
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file is called like an image; a broken link is one that cannot be read."""
    return entry.name.lower().endswith(SUFFIXES) and (entry.is_symlink() or entry.is_file())


def entries_of(folder: str | Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, sorted, without the system's."""
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not is_system(entry.name)]
    return sorted(shown, key=lambda entry: entry.name)


def lone_images(folder: str | Path) -> list[str]:
    """The names of the images that lie in a folder itself, sorted."""
    return [entry.name for entry in entries_of(folder) if is_image(entry) and not is_folder(entry)]


def find_images(folder: str | Path, outside: str | Path = "") -> tuple[list[str], Counter[str]]:
    """Find the images in a folder and below; links are followed, but no folder is entered twice.

    Args:
        folder: the folder; may be missing.
        outside: a folder that is not entered by a link.

    Returns:
        Their paths in the folder, sorted, and a count of the other files by suffix.
    """
    images, others = [], Counter[str]()
    seen = {os.path.realpath(outside)} - {os.path.realpath(folder)} if outside else set()
    for path, entry in _walk(folder, "", seen) if Path(folder).is_dir() else ():
        if is_image(entry):
            images.append(path)
        else:
            others[Path(path).suffix.lower()] += 1
    return images, others


def _walk(folder: str | Path, above: str, seen: set[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    place = os.path.realpath(folder)
    if place in seen:
        return
    seen.add(place)
    for entry in entries_of(folder):
        if is_folder(entry):
            yield from _walk(entry.path, f"{above}{entry.name}/", seen)
        else:
            yield f"{above}{entry.name}", entry


def list_images(folder: str | Path) -> list[Path]:
    """List the images in a folder and below, sorted, without opening them; links are followed.

    Examples:
        >>> from PIL import Image
        >>> Path("animals").mkdir()
        >>> Image.new("RGB", (4, 4)).save("animals/cat.png")
        >>> jaxtta.images.list_images("animals")[0].as_posix()
        'animals/cat.png'
    """
    paths, others = find_images(folder)
    log_passed_over(folder, others)
    return [Path(folder) / path for path in paths]


def log_passed_over(folder: str | Path, others: Counter[str]) -> None:
    """Log how many files of which suffixes are no images."""
    if others:
        count, place = others.total(), printable(folder)
        log.warning("%s: %d files passed over: %s", place, count, count_suffixes(others))


def count_suffixes(others: Counter[str]) -> str:
    """A count of files by suffix as text: 2 .heic, 1 .txt."""
    named = ((count, printable(suffix)) for suffix, count in others.most_common())
    return ", ".join(f"{count} {suffix or 'without a suffix'}" for count, suffix in named)


def open_image(file: str | Path | BinaryIO, name: str = "", raw: bool = False) -> Image.Image:
    """Open an image as a viewer shows it, or as it is stored.

    The first frame of an animated or multi-page file is read; this is logged once a format.

    Args:
        file: its path, or an open file.
        name: its name in messages; its path by default.
        raw: whether to ignore the EXIF orientation and to drop transparency, as the published
            results on benchmarks do. (Pillow itself applies the orientation of TIFF files.)

    Returns:
        The image in 8-bit RGB; see `to_rgb`.

    Raises:
        UnreadableImageError: if it is no file, cannot be decoded or has no known range of values.
    """
    try:
        if isinstance(file, str | Path) and not stat.S_ISREG(Path(file).stat().st_mode):
            raise ValueError("no file")  # a pipe would be waited for
        with Image.open(file) as image:
            animated = image.format != "MPO" and getattr(image, "is_animated", False)
            image.load()
            if not raw:
                with contextlib.suppress(SyntaxError):  # EXIF data that are not in EXIF's format
                    ImageOps.exif_transpose(image, in_place=True)
            converted = to_rgb(image, raw)
    except Exception as error:  # Pillow may raise any exception on damaged files
        said = f"{printable(name or file)}: cannot be decoded ({printable(error)})"
        raise UnreadableImageError(said) from error
    if animated:
        _say_frames(image.format)
    return converted


def read_image(file: str | Path | BinaryIO, name: str = "", raw: bool = False) -> np.ndarray:
    """Read an image as `open_image` does; JPEG files in colour in two thirds of the time.

    Args:
        file: its path, or an open file.
        name: its name in messages; its path by default.
        raw: as for `open_image`.

    Returns:
        (height, width, 3) uint8.

    Raises:
        UnreadableImageError: as `open_image`.
    """
    pixels = _read_jpeg(file, raw) if isinstance(file, str | Path) else None
    return np.asarray(open_image(file, name, raw)) if pixels is None else pixels


def _read_jpeg(file: str | Path, raw: bool) -> np.ndarray | None:
    """The pixels that Pillow would decode with the same library; None for what only it can read."""
    try:
        if not (stat.S_ISREG(Path(file).stat().st_mode) and str(file).lower().endswith(_JPEG)):
            return None
        content = Path(file).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            plain = image.format == "JPEG" and image.mode == "RGB"
            if not plain or (not raw and image.getexif().get(_ORIENTATION, 1) != 1):
                return None
        return simplejpeg.decode_jpeg(content)
    except Exception:  # Pillow is more lenient, and says what is wrong
        return None


@functools.cache  # once, not for every file
def _say_frames(form: str | None) -> None:
    log.warning("of %s files with several frames, the first frame is read", form)


def to_rgb(image: Image.Image, raw: bool = False) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Greys of more than 8 bits are scaled from the range that their file states: 0 to 2^bits - 1.
    32-bit integers and floats rarely use that range. They are scaled from the smallest range that
    holds the image's values: 8, 16 or 32 bits for integers, 1 or 255 for floats. Negative values,
    NaN, and values that fill less than 1/16 of a larger range are refused.

    Args:
        image: the image; a TIFF's tags are read from it.
        raw: whether transparency is dropped, as `image.convert("RGB")` does. Otherwise, images that
            are not opaque are laid over white, and those that are transparent everywhere refused.

    Returns:
        The image; equal to `image.convert("RGB")` for opaque images of 8 bits.

    Raises:
        ValueError: if the range of the values is not known, or nothing is to be seen.

    Examples:
        >>> from PIL import Image
        >>> jaxtta.images.to_rgb(Image.new("L", (4, 4))).mode
        'RGB'
    """
    if image.mode == "F" or image.mode.startswith("I"):
        grey, key = _eight_bits(image), image.info.get("transparency")
        if key is not None and not raw:
            grey[np.asarray(image) == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "L" and _tag(image, _SAMPLES) == _SIGNED:  # Pillow reads -1 as 255
        raise ValueError("has signed values of 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A").getextrema()
        if not raw and alpha == (0, 0):  # its channel is unused, or there is nothing to see
            raise ValueError("is transparent everywhere")
        if not raw and alpha != (255, 255):
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """A deep grey image as (height, width) uint8."""
    values, bits, samples = np.asarray(image), _tag(image, _BITS), _tag(image, _SAMPLES)
    if image.mode == "I" and bits == 32 and samples != _SIGNED:
        values = values.view(np.uint32)  # Pillow has no mode for them
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        ranges = (1, 255)
    elif image.mode == "I" and bits == 16:
        ranges = (2**15 - 1,)  # signed
    elif image.mode == "I" and image.format != "PPM":  # Pillow scales these to 16 bits
        ranges = (2**8 - 1, 2**16 - 1, np.iinfo(values.dtype).max)
    else:
        ranges = (2 ** (bits or 16) - 1,)
    slack = 1e-3 if image.mode == "F" else 0  # rounding of floats
    peak = next((peak for peak in ranges if high <= peak * (1 + slack)), None)
    if peak is None or low < -slack * peak or (peak != ranges[0] and high < peak / _DARK):
        raise ValueError(
            f"values run from {low:g} to {high:g}, expected 0 to {' or '.join(map(str, ranges))}"
        )
    grey = (np.clip(values / peak, 0, 1) * 255).round().astype(np.uint8)
    return 255 - grey if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO else grey


def _tag(image: Image.Image, tag: int) -> int | None:
    """A TIFF's tag, of its first band; None if it has none."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


def printable(text: object) -> str:
    r"""Escape what cannot be printed on one line: file names may hold any bytes.

    Args:
        text: a path or other text.

    Returns:
        It in one line; bytes that are not UTF-8 as \xe9, line breaks as \n.
    """
    return "".join(map(_escaped, str(text)))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python reads bytes that are not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return character.encode("unicode_escape").decode() if hidden else character
