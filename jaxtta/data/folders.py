"""Images in class folders or with captions."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.content import digest_files

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class ImageFolder(NamedTuple):
    """Images in files, with their classes.

    Attributes:
        root: the folder.
        files: every image; from `image_folder`, sorted by class folder and name.
        labels: (images,) int32, each image's index in `class_names`.
        class_names: names of the classes; from `image_folder`, the class folders' names.
        border: pixels to crop from every side of an image.
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

    def content(self) -> str:
        """A digest of the files."""
        return digest_files(self.files)


def class_folders(root: str | Path) -> list[Path]:
    """The class folders of a folder.

    Args:
        root: the folder; hidden entries are skipped.

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
        root: the dataset's folder, for messages.
        folders: one per class, in label order.
        class_names: the name of each class.

    Returns:
        The images. No image is opened.

    Raises:
        ValueError: if a folder has no image.
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
        root: the folder; hidden entries are skipped.

    Returns:
        The images. No image is opened.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has fewer than two class folders, or a class folder has no image.
    """
    folders = class_folders(root)
    return list_folders(root, folders, [folder.name for folder in folders])


def captioned_folder(root: str | Path) -> ImageFolder:
    """List the images in a folder's `captions.csv`, with columns file and caption.

    Args:
        root: the folder with the file; its paths are relative to this folder.

    Returns:
        The images, with one class per distinct caption. No image is opened.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the file is missing, has other columns, lists a missing image, has an image
            without a caption, or one caption for all.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    table = root / "captions.csv"
    if not table.is_file():
        raise ValueError(f"{root}: has no captions.csv, with columns file and caption")
    files, captions = [], []
    with table.open(newline="", encoding="utf-8-sig") as lines:  # a BOM is allowed
        rows = csv.DictReader(lines)
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{table}: has no columns file and caption")
        for row in rows:
            file, caption = root / (row["file"] or ""), (row["caption"] or "").strip()
            if not file.is_file():
                raise ValueError(f"{table}: line {rows.line_num}: no such image: {row['file']!r}")
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


def read_class_names(path: str | Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Read class names for prompts.

    Args:
        path: a JSON object from folder name to class name (for example ImageNet's wnids), a JSON
            list, or plain text with one name per line; the last two in folder order.
        folders: the class folders' names; may be empty if the file has a list.

    Returns:
        One name per class.

    Raises:
        ValueError: if the file cannot be read or has no name for a folder.
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
        raise ValueError(f"{path}: expected a list of names")
    return tuple(names)


def given_class_names(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[str, ...]:
    """Parse the class names of an option: names, or a single .json or .txt file with them.

    Args:
        names: the option's values; may be empty.
        folders: as for `read_class_names`.

    Returns:
        The names; empty if `names` is.

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
        name: its name in messages; its path by default.

    Returns:
        The image, decoded.

    Raises:
        UnreadableImageError: if it cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except Exception as error:  # Pillow may raise any exception on damaged files
        raise UnreadableImageError(f"{name or file}: cannot be decoded ({error})") from error


class UnreadableImageError(Exception):
    """An image that cannot be read; streams skip it."""
