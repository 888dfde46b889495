"""Images in class folders or with captions."""

import itertools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.content import digest_files
from jaxtta.data.recognise import entries_of, is_folder, refuse_other_layouts
from jaxtta.data.text import nfc, read_rows
from jaxtta.images import SUFFIXES, UnreadableImageError, open_image, printable

log = logging.getLogger(__name__)


class ImageFolder(NamedTuple):
    """Images in files, with their classes.

    Attributes:
        root: the folder.
        files: every image; from `image_folder`, sorted by class folder and name.
        labels: (images,) int32, each image's index in `class_names`.
        class_names: names of the classes; from `image_folder`, the class folders' names.
        border: pixels to crop from every side of an image.
        raw: whether images are read as they are stored, as benchmarks are: not turned by their EXIF
            orientation, and without transparency. Own images are turned upright.
    """

    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    border: int = 0
    raw: bool = False

    def open(self, number: int) -> Image.Image:
        """Open one image in 8-bit RGB, or raise an UnreadableImageError."""
        image = open_image(self.files[number], raw=self.raw)
        if not self.border:
            return image
        if min(image.size) <= 2 * self.border:
            raise UnreadableImageError(
                f"{self.name(number)}: {image.width}×{image.height} pixels leave nothing "
                f"within a border of {self.border}"
            )
        width, height = image.size
        return image.crop((self.border, self.border, width - self.border, height - self.border))

    def name(self, number: int) -> str:
        """The image's path, for messages."""
        return printable(self.files[number])

    def content(self) -> str:
        """A digest of the files, with how they are read."""
        read = "as stored" if self.raw else "upright"
        return f"{digest_files(self.files)}, {read}, border {self.border}"


def class_folders(root: str | Path) -> list[Path]:
    """The class folders of a folder.

    Args:
        root: the folder; hidden and system entries are skipped, links are followed.

    Returns:
        Their paths, sorted by `in_class_order`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has fewer than two class folders, if they are splits or corruptions, or if
            two have the same name.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    folders = in_class_order(root / entry.name for entry in entries_of(root) if is_folder(entry))
    refuse_other_layouts(root, folders)
    return folders


def in_class_order(folders: Iterable[Path]) -> list[Path]:
    """Sort class folders by name, with the numbers in names as numbers (0 to 11; c1 to c12).

    Args:
        folders: their paths.

    Returns:
        The same, sorted.

    Raises:
        ValueError: if two have the same name in different Unicode forms.
    """
    folders = sorted(folders, key=lambda folder: (_with_numbers(nfc(folder.name)), folder.name))
    for folder, following in itertools.pairwise(folders):
        if nfc(folder.name) == nfc(following.name):
            raise ValueError(f"{folder}: two class folders have this name, in two Unicode forms")
    return folders


def _with_numbers(name: str) -> list[str | int]:
    """A name's parts: text and numbers in turn, so that parts in the same place can be compared."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def list_folders(
    root: str | Path, folders: Sequence[Path], class_names: Sequence[str], raw: bool = False
) -> ImageFolder:
    """List the images of class folders.

    What is passed over is logged: files of other formats, by suffix. So is how many images lie in
    sub-folders of the class folders; they belong to the class folder.

    Args:
        root: the dataset's folder, for messages.
        folders: one per class, in label order.
        class_names: the name of each class.
        raw: whether images are read as they are stored.

    Returns:
        The images. No image is opened.

    Raises:
        ValueError: if a folder has no image.
    """
    files, labels, others, nested = [], [], Counter[str](), []
    for label, folder in enumerate(folders):
        found, passed = _listed(folder, root)
        if not found:
            also = f", it has {_counted(passed)}, which cannot be read here" if passed else ""
            raise ValueError(f"{folder}: class folder without images{also}")
        files += found
        labels += [label] * len(found)
        others += passed
        nested += [path for path in found if path.parent != folder]
    _say_passed_over(root, others)
    if nested and len(folders) > 1:
        log.warning(
            "%s: %d of %d images lie in sub-folders of the class folders, such as %s, and are of "
            "the class folder's class; if they are the classes, give the folder that holds them",
            *(printable(root), len(nested), len(files), printable(nested[0].parent)),
        )
    labels = np.asarray(labels, np.int32)
    return ImageFolder(Path(root), tuple(files), labels, tuple(class_names), raw=raw)


def list_images(folder: str | Path) -> list[Path]:
    """List the images in a folder and below; files of other formats are logged by suffix.

    Args:
        folder: the folder; hidden and system entries are skipped, links are followed.

    Returns:
        Their paths, sorted; may be empty. No image is opened.
    """
    found, others = _listed(Path(folder), folder)
    _say_passed_over(folder, others)
    return found


def _say_passed_over(root: str | Path, others: Counter[str]) -> None:
    if others:
        count, place = others.total(), printable(root)
        log.warning("%s: %d files passed over: %s", place, count, _counted(others))


def images_in(folder: str | Path) -> Iterator[Path]:
    """The images in a folder and below, sorted. System entries are skipped, links followed.

    Args:
        folder: the folder; may be missing.

    Yields:
        Their paths. No image is opened.
    """
    if Path(folder).is_dir():
        yield from (Path(entry) for entry in _walk(folder, set()) if _is_image(entry))


def _listed(folder: Path, root: str | Path) -> tuple[list[Path], Counter[str]]:
    """The images of a class folder, sorted, and a count of its other files by suffix."""
    found, others = [], Counter[str]()
    outside = {os.path.realpath(root)} - {os.path.realpath(folder)}
    for entry in _walk(folder, outside):
        if _is_image(entry):
            found.append(Path(entry))
        else:
            others[Path(entry).suffix.lower()] += 1
    return found, others


def _walk(folder: str | Path, seen: set[str]) -> Iterator[os.DirEntry[str]]:
    """Every file below, sorted; links to folders are followed, but no folder is entered twice."""
    place = os.path.realpath(folder)
    if place in seen:
        return
    seen.add(place)
    for entry in sorted(entries_of(folder), key=lambda entry: entry.name):
        if is_folder(entry):
            yield from _walk(entry.path, seen)
        else:
            yield entry


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file is called like an image; a broken link is one that cannot be read."""
    return entry.name.lower().endswith(SUFFIXES) and (entry.is_symlink() or entry.is_file())


def _counted(suffixes: Counter[str]) -> str:
    """A count as text: 2 .heic, 1 .txt."""
    return ", ".join(
        f"{count} {printable(suffix) or 'without a suffix'}"
        for suffix, count in suffixes.most_common()
    )


def image_folder(root: str | Path) -> ImageFolder:
    """List the images of `root/<class>/…`, to be opened upright.

    Args:
        root: the folder; hidden and system entries are skipped.

    Returns:
        The images; numbers in the names of class folders are sorted as numbers. No image is opened.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has fewer than two class folders, if they are splits or corruptions, or a
            class folder has no image.
    """
    folders = class_folders(root)
    alone = sum(map(_is_image, filter(lambda entry: not is_folder(entry), entries_of(root))))
    if alone:
        log.warning("%s: %d images outside the class folders passed over", printable(root), alone)
    return list_folders(root, folders, [nfc(folder.name) for folder in folders])


def captioned_folder(root: str | Path) -> ImageFolder:
    """List the images in a folder's `captions.csv`, to be opened upright.

    Args:
        root: the folder with the file, which has columns file and caption, separated by commas,
            semicolons or tabs; its paths are relative to this folder.

    Returns:
        The images, with one class per distinct caption. No image is opened.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the file is missing, not UTF-8, has other columns, lists a missing image, has
            an image without a caption, or one caption for all.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    table = root / "captions.csv"
    if not table.is_file():
        raise ValueError(f"{root}: has no captions.csv, with columns file and caption")
    files, captions = [], []
    for line, row in read_rows(table, ("file", "caption")):
        file, caption = _existing(root, row["file"]), nfc(row["caption"]).strip()
        if file is None:
            raise ValueError(f"{line}: no such image: {row['file']!r}")
        if not caption:
            raise ValueError(f"{table}: {row['file']} has no caption")
        files.append(file)
        captions.append(caption)
    if not files:
        raise ValueError(f"{table}: lists no image")
    names, labels = np.unique(captions, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{table}: has one caption for all images, expected at least two")
    return ImageFolder(root, tuple(files), labels.astype(np.int32), tuple(names.tolist()))


def _existing(root: Path, name: str) -> Path | None:
    """A file by its name in either Unicode form: disks and spreadsheets may differ."""
    forms = (root / form for form in (name, nfc(name), unicodedata.normalize("NFD", name)))
    return next((path for path in forms if path.is_file()), None)
