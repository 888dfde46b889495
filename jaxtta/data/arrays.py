"""Images in arrays: in memory, in one `.npz` file, or a `.npy` file per corruption."""

import dataclasses
import functools
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.corruptions import CLEAN, SEVERITIES
from jaxtta.data.datasets import Domain
from jaxtta.images import is_system
from jaxtta.io import digest_array, digest_files

log = logging.getLogger(__name__)
_FILES = "; --layout cifar-c has five severities in a file, arrays one"


@dataclasses.dataclass(frozen=True)
class ArrayDataset:
    """Images in memory, or those of one severity in a `.npy` file, which each process opens."""

    images: np.ndarray | Path  # (images, height, width, 3) uint8, or the file that has them
    labels: np.ndarray  # (images,) int32
    class_names: tuple[str, ...]
    what: str = "image"  # an image's name in messages, before its index
    severity: int = 0  # which of the file's five severities; 0 if it has one

    @property
    def _array(self) -> np.ndarray:
        return _load(self.images, "r") if isinstance(self.images, Path) else self.images

    @property
    def _first(self) -> int:
        return max(self.severity - 1, 0) * len(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._array[self._first :][: len(self)][number]

    def name(self, number: int) -> str:
        """The image's row, for messages."""
        return f"{self.what} {self._first + number}"

    def content(self) -> str:
        """A digest of the array or file."""
        if isinstance(self.images, Path):
            return _digest(self.images, self.images.stat().st_mtime_ns)
        return digest_array(self.images)

    def check(self) -> None:
        """Raise a ValueError if the array is not as expected, or does not fit the labels."""
        array, place = self._array, self.images if isinstance(self.images, Path) else self.what
        check_labels(place, np.asarray(self.labels), len(self.class_names))
        count = len(self) * (SEVERITIES if self.severity else 1)
        if (array.dtype, array.shape[:1], array.shape[3:]) != (np.uint8, (count,), (3,)):
            found = f"{place}: is {array.dtype} of shape {array.shape}"
            shape = f"({count}, height, width, 3) for {len(self)} labels"
            raise ValueError(f"{found}, expected uint8 of shape {shape}{_FILES}")


@functools.lru_cache(maxsize=64)
def _digest(path: Path, changed: int) -> str:
    """A file's digest, made once for its five severities."""
    return digest_files([path])


def _load(path: Path, mmap_mode: Any = None) -> Any:
    try:
        return np.load(path, mmap_mode, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as an array ({error})") from error


def check_labels(path: object, labels: np.ndarray, classes: int) -> None:
    """Raise a ValueError if they are not integers from 0 to below the number of classes."""
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        kind = f"{labels.dtype} of shape {labels.shape}"
        raise ValueError(f"{path}: labels are {kind}, expected one or more integers")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise ValueError(f"{path}: labels run from {low} to {high}, expected 0 to {classes - 1}")


def open_npz(path: Path) -> ArrayDataset:
    """Open an `.npz` file with images (images, height, width, 3) uint8, labels and class_names."""
    try:
        with _load(path) as arrays:
            images, labels, names = (arrays[k] for k in ("images", "labels", "class_names"))
    except (KeyError, TypeError, ValueError) as error:  # a TypeError: of a .npy file
        raise ValueError(f"{path}: expected images, labels and class_names ({error})") from error
    names = tuple(names.astype(str).tolist())  # also of bytes
    check_labels(path, labels, len(names))
    dataset = ArrayDataset(images, labels.astype(np.int32), names, f"{path.name} image")
    dataset.check()
    return dataset


def open_arrays(
    root: Path, class_names: Sequence[str], stacked: bool = False
) -> dict[Domain, ArrayDataset]:
    """Open a folder of `<corruption>.npy`, `clean.npy` and `labels.npy`.

    Files that are `stacked` have all images at severity 1, then at 2, up to 5, as CIFAR-10-C.
    """
    labels, names = read_labels(root, len(class_names)), tuple(class_names)
    found = {path.stem: path for path in sorted(root.glob("*.npy")) if not is_system(path.name)}
    del found["labels"]
    corrupted = [path for name, path in found.items() if name != CLEAN]
    if not found:
        raise ValueError(f"{root}: has no <corruption>.npy files")
    if stacked and corrupted:
        repeated, labels = labels, labels[: len(_load(corrupted[0], "r")) // SEVERITIES]
        if not np.array_equal(np.resize(labels, len(repeated)), repeated):
            raise ValueError(f"{root}: labels.npy is not the same for each severity{_FILES}")
    elif np.array_equal(np.tile(labels[: len(labels) // SEVERITIES], SEVERITIES), labels):
        log.warning("%s: labels.npy has the same labels five times%s", root, _FILES)
    return {
        Domain(name, severity): ArrayDataset(path, labels, names, f"{path} row", severity)
        for name, path in found.items()
        for severity in (range(1, SEVERITIES + 1) if stacked and name != CLEAN else (0,))
    }


def read_labels(root: str | Path, classes: int = 2**31) -> np.ndarray:
    """Read a folder's `labels.npy`: (labels,) int32, from 0 to below the number of classes."""
    labels = _load(Path(root) / "labels.npy")
    check_labels(Path(root) / "labels.npy", labels, classes)
    return labels.astype(np.int32)
