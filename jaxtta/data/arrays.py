"""Images in arrays: in memory, in one `.npz` file, or a `.npy` file per corruption."""

import dataclasses
import functools
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.data.content import digest_array, digest_files
from jaxtta.data.corruptions import CLEAN, SEVERITIES
from jaxtta.data.datasets import Domain
from jaxtta.data.recognise import is_system

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ArrayDataset:
    """Images in memory.

    Attributes:
        images: (images, height, width, 3) uint8.
        labels: (images,) int32.
        class_names: names of the classes.
        what: an image's name in messages, before its index.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    what: str = "image"

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, number: int) -> np.ndarray:
        """One image."""
        return self.images[number]

    def name(self, number: int) -> str:
        """An image's name for messages."""
        return f"{self.what} {number}"

    def content(self) -> str:
        """A digest of the images."""
        return digest_array(self.images)


@dataclasses.dataclass(frozen=True)
class ArrayFile:
    """Some rows of a `.npy` file, which every process opens for itself.

    Attributes:
        path: the file: (rows, height, width, 3) uint8.
        labels: (images,) int32.
        class_names: names of the classes.
        severity: the severity whose rows these are, if the file has five; otherwise 0.
    """

    path: Path
    labels: np.ndarray
    class_names: tuple[str, ...]
    severity: int = 0

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        """One image."""
        return open_array(self.path)[self._row(number)]

    def name(self, number: int) -> str:
        """The image's file and row."""
        return f"{self.path} row {self._row(number)}"

    def _row(self, number: int) -> int:
        return max(self.severity - 1, 0) * len(self.labels) + number

    def content(self) -> str:
        """A digest of the file."""
        return _digest(self.path, *_version(self.path))

    def check(self) -> None:
        """Raise a ValueError if the file is not as expected, or does not fit the labels."""
        images, count = len(open_array(self.path)), len(self.labels)
        expected = count * SEVERITIES if self.severity else count
        if images != expected:
            severities = f" at {SEVERITIES} severities" if self.severity else ""
            fits = {count: "arrays", SEVERITIES * count: "cifar-c"}
            hint = f"; use --layout {fits[images]}" if images in fits else ""
            raise ValueError(
                f"{self.path}: has {images} images, expected {expected} for {count} "
                f"labels{severities}{hint}"
            )


def open_array(path: Path) -> np.ndarray:
    """Map a `.npy` file of images into memory, (images, height, width, 3) uint8."""
    return _mapped(path, *_version(path))


def _version(path: Path) -> tuple[int, int]:
    """What another file under the same name differs in."""
    return path.stat().st_mtime_ns, path.stat().st_size


@functools.lru_cache(maxsize=256)
def _digest(path: Path, changed: int, size: int) -> str:
    """A file's digest: all severities in it have the same."""
    del changed, size
    return digest_files([path])


@functools.lru_cache(maxsize=32)  # open files, not images
def _mapped(path: Path, changed: int, size: int) -> np.ndarray:
    del changed, size
    array = _load(path, mmap_mode="r")
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"{path}: is {array.dtype} of shape {array.shape}, expected uint8 of shape (images, "
            "height, width, 3)"
        )
    return array


def _load(path: Path, **options: Any) -> Any:
    try:
        return np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as an array ({error})") from error


def open_npz(path: str | Path) -> ArrayDataset:
    """Open an `.npz` file with images (images, height, width, 3) uint8, labels and class_names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, lacks an array, or its labels do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with _load(path) as arrays:
            images, labels, names = (arrays[k] for k in ("images", "labels", "class_names"))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: expected images, labels and class_names ({error})") from error
    _check_labels(path, labels, len(names))
    if images.shape[1:] != (*images.shape[1:3], 3) or images.dtype != np.uint8:
        raise ValueError(f"{path}: images are {images.dtype} of shape {images.shape}, expected …")
    if len(images) != len(labels):
        raise ValueError(f"{path}: has {len(images)} images and {len(labels)} labels")
    return ArrayDataset(
        images, labels.astype(np.int32), tuple(map(str, names)), f"{path.name} image"
    )


def open_arrays(
    root: str | Path, class_names: Sequence[str], stacked: bool = False
) -> dict[Domain, ArrayFile]:
    """Open a folder of `<corruption>.npy` files and one `labels.npy`.

    Args:
        root: the folder; the same images in the same order in every file; "clean" is `clean.npy`.
        class_names: names of the classes, in label order.
        stacked: whether every file except the clean one has all images at severity 1, then at 2,
            up to 5, as in the public CIFAR-10-C; its labels may be repeated five times.

    Raises:
        FileNotFoundError: if the labels are missing.
        ValueError: if the labels are not integers, are out of range or do not match the files.
    """
    root, names = Path(root), tuple(class_names)
    labels = read_labels(root)
    _check_labels(root / "labels.npy", labels, len(names))
    found = sorted(path.stem for path in root.glob("*.npy") if not is_system(path.name))
    found.remove("labels")
    if not found:
        raise ValueError(f"{root}: has no <corruption>.npy files")
    if stacked:
        labels = _of_one_severity(root, labels, [name for name in found if name != CLEAN])
    elif _repeats(labels):
        log.warning(
            "%s: has the same labels five times; if the images are of five severities, as in "
            "CIFAR-10-C, use --layout cifar-c",
            root / "labels.npy",
        )
    return {
        Domain(name, severity): ArrayFile(root / f"{name}.npy", labels, names, severity)
        for name in found
        for severity in (range(1, SEVERITIES + 1) if stacked and name != CLEAN else (0,))
    }


def read_labels(root: str | Path) -> np.ndarray:
    """Read a folder's `labels.npy`: (labels,) int32, none below 0."""
    path = Path(root) / "labels.npy"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    labels = _load(path)
    _check_labels(path, labels)
    return labels.astype(np.int32)


def _check_labels(path: Path, labels: np.ndarray, classes: int | None = None) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{path}: labels are {labels.dtype} of shape {labels.shape}, expected integers"
        )
    if not len(labels):
        raise ValueError(f"{path}: has no labels")
    low, high = labels.min(), labels.max()
    if low < 0 or (classes is not None and high >= classes):
        expected = (
            "none below 0" if classes is None else f"0 to {classes - 1} for {classes} classes"
        )
        raise ValueError(f"{path}: labels run from {low} to {high}, expected {expected}")


def _of_one_severity(root: Path, labels: np.ndarray, corruptions: Sequence[str]) -> np.ndarray:
    """The labels of one severity, whether `labels.npy` has them once or repeated."""
    images = len(open_array(root / f"{corruptions[0]}.npy")) if corruptions else 0
    if images == SEVERITIES * len(labels):
        return labels
    if not _repeats(labels):
        hint = "; use --layout arrays for images of one severity" if images == len(labels) else ""
        raise ValueError(
            f"{root / 'labels.npy'}: has {len(labels)} labels, expected one for each image of "
            f"{SEVERITIES} severities in the same order, or for each image of one severity{hint}"
        )
    return labels[: len(labels) // SEVERITIES]


def _repeats(labels: np.ndarray) -> bool:
    """Whether there are the same labels five times."""
    return np.array_equal(np.tile(labels[: len(labels) // SEVERITIES], SEVERITIES), labels)
