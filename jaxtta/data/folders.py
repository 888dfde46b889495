"""Images in folders, by class or with captions."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class ImageFolder(NamedTuple):
    """Images in files, with their classes.

    Attributes:
        root: the folder.
        files: every image; from `image_folder`, sorted by class folder and name.
        labels: (images,) int32, each image's place in `class_names`.
        class_names: names of the classes; from `image_folder`, the class folders' names.
        border: pixels to cut off on every side of an image.
    """

    root: Path
    files: tuple[Path, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    border: int = 0

    def open(self, number: int) -> Image.Image:
        """Open one image, or raise an UnreadableImageError."""
        image = open_image(self.files[number])
        if not self.border:
            return image
        if min(image.size) <= 2 * self.border:
            raise UnreadableImageError(
                f"{self.files[number]}: {image.width}×{image.height} pixels leave nothing "
                f"within a border of {self.border}"
            )
        width, height = image.size
        return image.crop((self.border, self.border, width - self.border, height - self.border))

    def name(self, number: int) -> str:
        """The image's path."""
        return str(self.files[number])


def class_folders(root: str | Path) -> list[Path]:
    """The class folders of a folder.

    Args:
        root: the folder; hidden entries are passed over.

    Returns:
        Their paths, sorted by name.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has fewer than two class folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(f"{root}: has {len(folders)} class folders, expected at least two")
    return folders


def list_folders(
    root: str | Path, folders: Sequence[Path], class_names: Sequence[str]
) -> ImageFolder:
    """List the images of class folders.

    Args:
        root: what to call the whole.
        folders: one a class, in the labels' order.
        class_names: what each is called.

    Returns:
        What is in them. No image is opened.

    Raises:
        ValueError: if one of them has no image.
    """
    files, labels = [], []
    for label, folder in enumerate(folders):
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not found:
            raise ValueError(f"{folder}: class folder without images")
        files += found
        labels += [label] * len(found)
    return ImageFolder(Path(root), tuple(files), np.asarray(labels, np.int32), tuple(class_names))


def image_folder(root: str | Path) -> ImageFolder:
    """List the images of `root/<class>/…`.

    Args:
        root: the folder; hidden entries are passed over.

    Returns:
        What is in it. No image is opened.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has fewer than two class folders, or one of them has no image.
    """
    folders = class_folders(root)
    return list_folders(root, folders, [folder.name for folder in folders])


def captioned_folder(root: str | Path) -> ImageFolder:
    """List the images that a folder's `captions.csv` names, in columns file and caption.

    Args:
        root: the folder that the file lies in and its paths begin at.

    Returns:
        What is in it, a class for each different caption. No image is opened.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there is no such file, it has other columns, names an image that is not
            there, leaves one without a caption, or has the same caption for all.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    table = root / "captions.csv"
    if not table.is_file():
        raise ValueError(f"{root}: has no captions.csv, with columns file and caption")
    files, captions = [], []
    with table.open(newline="", encoding="utf-8-sig") as lines:  # as spreadsheets save it
        rows = csv.DictReader(lines)
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{table}: has no columns file and caption")
        for row in rows:
            file, caption = root / (row["file"] or ""), (row["caption"] or "").strip()
            if not file.is_file():
                raise ValueError(f"{table}: line {rows.line_num} names no image: {row['file']!r}")
            if not caption:
                raise ValueError(f"{table}: {row['file']} has no caption")
            files.append(file)
            captions.append(caption)
    if not files:
        raise ValueError(f"{table}: names no image")
    names, labels = np.unique(captions, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{table}: has one caption for all images, expected at least two")
    return ImageFolder(root, tuple(files), labels.astype(np.int32), tuple(names.tolist()))


def read_class_names(path: str | Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Read what to call the classes in prompts.

    Args:
        path: a JSON object from folder name to class name (ImageNet's wnids, say), a JSON list, or
            plain text with a name a line, the last two in the folders' order.
        folders: the class folders' names; may be empty if the file holds a list.

    Returns:
        One name a class.

    Raises:
        ValueError: if the file cannot be read so, or lacks a folder's name.
    """
    try:
        text = Path(path).read_text()
        names = json.loads(text) if Path(path).suffix == ".json" else text.splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as class names ({error})") from error
    if isinstance(names, dict):
        if not folders:
            raise ValueError(f"{path}: is an object by folder name, expected a list of names")
        missing = [folder for folder in folders if folder not in names]
        if missing:
            raise ValueError(f"{path}: has no name for {', '.join(missing[:5])}")
        names = [names[folder] for folder in folders]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: holds something else than names")
    return tuple(names)


def given_class_names(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[str, ...]:
    """Class names as an option gives them: themselves, or a single .json or .txt file of them.

    Args:
        names: what was given; may be empty.
        folders: as for `read_class_names`.

    Returns:
        The names; empty if none were given.

    Raises:
        ValueError: as `read_class_names`.
    """
    if len(names) == 1 and Path(names[0]).suffix in (".json", ".txt"):
        return read_class_names(names[0], folders)
    return tuple(names)


def open_image(file: Path | BinaryIO, name: str = "") -> Image.Image:
    """Open and decode an image.

    Args:
        file: its path, or an open file.
        name: what to call it in a message, if not by its path.

    Returns:
        The image, decoded.

    Raises:
        UnreadableImageError: if it cannot be read whole.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Exception as error:  # Pillow's plugins raise what they please on broken files
        raise UnreadableImageError(f"{name or file}: cannot be decoded ({error})") from error


class UnreadableImageError(Exception):
    """An image that cannot be used; the stream goes on without it."""
