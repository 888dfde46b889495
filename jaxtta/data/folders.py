"""Images in class folders or with captions."""

import dataclasses
import itertools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxtta.data.content import digest_files
from jaxtta.data.recognise import entries_of, folders_in, is_folder, refuse_other_layouts
from jaxtta.images import SUFFIXES, UnreadableImageError, open_image, printable
from jaxtta.io import nfc, read_rows

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A dataset of image files.

    Attributes:
        root: the folder.
        paths: each image's path in it.
        labels: (images,) int32, each image's index in `class_names`.
        class_names: names of the classes.
        border: pixels to crop from every side of an image.
        raw: whether images are read as they are stored, as benchmarks are: not turned by their EXIF
            orientation, and without transparency. Own images are turned upright.
    """

    root: Path
    paths: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    border: int = 0
    raw: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """Every image's path."""
        return tuple(self.root / path for path in self.paths)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        """Open one image in 8-bit RGB, or raise an UnreadableImageError."""
        pixels = np.asarray(open_image(self.root / self.paths[number], raw=self.raw))
        height, width, _ = pixels.shape
        if min(height, width) <= 2 * self.border:
            raise UnreadableImageError(
                f"{self.name(number)}: {width}×{height} pixels leave nothing within a border of "
                f"{self.border}"
            )
        return pixels[self.border : height - self.border, self.border : width - self.border]

    def name(self, number: int) -> str:
        """The image's path, for messages."""
        return printable(self.root / self.paths[number])

    def content(self) -> str:
        """A digest of the files, with how they are read."""
        how = "as stored" if self.raw else "upright"
        return f"{digest_files(self.files)}, {how}, border {self.border}"


def class_folders(root: str | Path) -> list[Path]:
    """The class folders of a folder, in the order of `in_class_order`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has fewer than two class folders, if they are splits or corruptions, or if
            two have the same name.
    """
    folders = in_class_order(folders_in(Path(root)))
    refuse_other_layouts(Path(root), folders)
    return folders


def in_class_order(folders: Iterable[Path]) -> list[Path]:
    """Sort class folders by name, with the numbers in names as numbers (0 to 11; c1 to c12).

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
    """List the images of class folders, without opening them.

    Files of other formats are logged by suffix, and how many images lie in sub-folders of the class
    folders; these are of the class folder's class.

    Args:
        root: the dataset's folder, which contains the class folders (or is the only one).
        folders: one per class, in label order.
        class_names: the name of each class.
        raw: whether images are read as they are stored.

    Raises:
        ValueError: if a folder has no image.
    """
    root = Path(root)
    paths, labels, others, nested = [], [], Counter[str](), []
    for label, folder in enumerate(folders):
        name = "" if folder == root else folder.name
        listed, passed = _listed(folder, name, root)
        if not listed:
            also = f", it has {_counted(passed)}, which cannot be read here" if passed else ""
            raise ValueError(f"{folder}: class folder without images{also}")
        paths += listed
        labels += [label] * len(listed)
        others += passed
        nested += [folder.parent / path for path in listed if path.count("/") > bool(name)]
    _log_passed_over(root, others)
    if nested and len(folders) > 1:
        log.warning(
            "%s: %d of %d images lie in sub-folders of the class folders, such as %s, and are of "
            "the class folder's class; if they are the classes, give the folder that holds them",
            *(printable(root), len(nested), len(paths), printable(nested[0].parent)),
        )
    labels = np.asarray(labels, np.int32)
    return ImageFolder(root, tuple(paths), labels, tuple(class_names), raw=raw)


def list_images(folder: str | Path) -> list[Path]:
    """List the images in a folder and below, sorted; links are followed, none is opened.

    Files of other formats are logged by suffix; hidden and system entries are skipped.
    """
    paths, others = _listed(Path(folder), "", folder)
    _log_passed_over(folder, others)
    return [Path(folder) / path for path in paths]


def _log_passed_over(root: str | Path, others: Counter[str]) -> None:
    if others:
        count, place = others.total(), printable(root)
        log.warning("%s: %d files passed over: %s", place, count, _counted(others))


def images_in(folder: Path) -> Iterator[str]:
    """The paths in a folder of the images in it and below, sorted; none if there is no folder."""
    if folder.is_dir():
        yield from (path for path, entry in _walk(folder, "", set()) if _is_image(entry))


def _listed(folder: Path, name: str, root: str | Path) -> tuple[list[str], Counter[str]]:
    """The images of a class folder, sorted, and a count of its other files by suffix."""
    images, others = [], Counter[str]()
    outside = {os.path.realpath(root)} - {os.path.realpath(folder)}
    for path, entry in _walk(folder, name, outside):
        if _is_image(entry):
            images.append(path)
        else:
            others[Path(path).suffix.lower()] += 1
    return images, others


def _walk(folder: str | Path, name: str, seen: set[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Every file below, sorted, with its path from `name` on.

    Links to folders are followed, but no folder is entered twice.
    """
    place = os.path.realpath(folder)
    if place in seen:
        return
    seen.add(place)
    for entry in sorted(entries_of(folder), key=lambda entry: entry.name):
        path = f"{name}/{entry.name}" if name else entry.name
        if is_folder(entry):
            yield from _walk(entry.path, path, seen)
        else:
            yield path, entry


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
    """List the images of `root/<class>/…`, to be opened upright; see `class_folders`."""
    folders = class_folders(root)
    alone = sum(_is_image(entry) for entry in entries_of(root) if not is_folder(entry))
    if alone:
        log.warning("%s: %d images outside the class folders passed over", printable(root), alone)
    return list_folders(root, folders, [nfc(folder.name) for folder in folders])


def captioned_folder(root: str | Path) -> ImageFolder:
    """List the images in a folder's `captions.csv`, to be opened upright, a class a caption.

    Args:
        root: the folder with the file, which has columns file and caption, separated by commas,
            semicolons or tabs; its paths are relative to this folder.

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
    paths, captions = [], []
    for line, row in read_rows(table, ("file", "caption")):
        # disks and spreadsheets may have a name in different Unicode forms
        forms = (
            row["file"],
            *(unicodedata.normalize(form, row["file"]) for form in ("NFC", "NFD")),
        )
        path = next((form for form in forms if (root / form).is_file()), None)
        caption = nfc(row["caption"]).strip()
        if path is None:
            raise ValueError(f"{line}: no such image: {row['file']!r}")
        if not caption:
            raise ValueError(f"{table}: {row['file']} has no caption")
        paths.append(path)
        captions.append(caption)
    if not paths:
        raise ValueError(f"{table}: lists no image")
    names, labels = np.unique(captions, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{table}: has one caption for all images, expected at least two")
    return ImageFolder(root, tuple(paths), labels.astype(np.int32), tuple(names.tolist()))
