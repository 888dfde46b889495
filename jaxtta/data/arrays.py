"""Images in arrays: in memory, in one `.npz` file, or a `.npy` file per corruption."""

import dataclasses
import functools
import logging
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.corruptions import CLEAN, SEVERITIES
from jaxtta.data.datasets import Domain
from jaxtta.images import is_system
from jaxtta.io import digest_array, digest_files

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ArrayDataset:
    """Images in memory, or those of one severity in a `.npy` file, which each process opens."""

    images: np.ndarray | Path  # (images, height, width, 3) uint8, or the file that has them
    labels: np.ndarray  # (images,) int32
    class_names: tuple[str, ...]
    what: str = "image"  # an image's name in messages, before its index
    severity: int = 0  # which of the file's five severities; 0 if it has one

    @property
    def root(self) -> Path | None:
        """The folder of the file."""
        return self.images.parent if isinstance(self.images, Path) else None

    @property
    def _array(self) -> np.ndarray:
        return _once(_mapped, self.images) if isinstance(self.images, Path) else self.images

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
            return _once(_digest, self.images)
        return digest_array(self.images)

    def check(self) -> None:
        """Raise a ValueError if the array is not as expected, or does not fit the labels."""
        array, count = self._array, len(self.labels)
        place = self.images if isinstance(self.images, Path) else self.what
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
            found = f"{place}: is {array.dtype} of shape {array.shape}"
            raise ValueError(f"{found}, expected uint8 of shape (images, height, width, 3)")
        check_labels(place, np.asarray(self.labels), len(self.class_names))
        expected = count * SEVERITIES if self.severity else count
        if len(array) != expected:
            severities = f" at {SEVERITIES} severities" if self.severity else ""
            layout = {count: "arrays", SEVERITIES * count: "cifar-c"}.get(len(array))
            hint = f"; use --layout {layout}" if layout and isinstance(self.images, Path) else ""
            found = f"{place}: has {len(array)} images, expected {expected} for {count} labels"
            raise ValueError(f"{found}{severities}{hint}")


def _once(function: Callable[[Path], Any], path: Path) -> Any:
    """What a function made of a file, until the file changes."""
    status = path.stat()
    return _remembered(function, path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)  # open files, not images
def _remembered(function: Callable[[Path], Any], path: Path, changed: int, size: int) -> Any:
    del changed, size
    return function(path)


def _digest(path: Path) -> str:
    return digest_files([path])


def _mapped(path: Path) -> np.ndarray:
    return _load(path, mmap_mode="r")


def _load(path: Path, **options: Any) -> Any:
    try:
        return np.load(path, allow_pickle=False, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as an array ({error})") from error


def check_labels(path: object, labels: np.ndarray, classes: int | None = None) -> None:
    """Raise a ValueError if they are not integers from 0 to below the number of classes."""
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        kind = f"{labels.dtype} of shape {labels.shape}"
        raise ValueError(f"{path}: labels are {kind}, expected integers")
    if not len(labels):
        raise ValueError(f"{path}: has no labels")
    low, high = labels.min(), labels.max()
    if low < 0 or (classes is not None and high >= classes):
        expected = f"0 to {classes - 1} for {classes} classes" if classes else "none below 0"
        raise ValueError(f"{path}: labels run from {low} to {high}, expected {expected}")


def open_npz(path: Path) -> ArrayDataset:
    """Open an `.npz` file with images (images, height, width, 3) uint8, labels and class_names."""
    try:
        with _load(path) as arrays:
            images, labels, names = (arrays[k] for k in ("images", "labels", "class_names"))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected images, labels and class_names ({error})") from error
    check_labels(path, labels, len(names))
    names, what = tuple(map(str, names)), f"{path.name} image"
    dataset = ArrayDataset(images, labels.astype(np.int32), names, what)
    dataset.check()
    return dataset


def open_arrays(
    root: Path, class_names: Sequence[str], stacked: bool = False
) -> dict[Domain, ArrayDataset]:
    """Open a folder of `<corruption>.npy` and `clean.npy` files, and one `labels.npy` for them.

    If they are `stacked`, every file except the clean one has all images at severity 1, then at 2,
    up to 5, as in the public CIFAR-10-C; the labels may be repeated five times.
    """
    labels, place, names = read_labels(root), root / "labels.npy", tuple(class_names)
    check_labels(place, labels, len(names))
    found = {path.stem: path for path in sorted(root.glob("*.npy")) if not is_system(path.name)}
    del found["labels"]
    if not found:
        raise ValueError(f"{root}: has no <corruption>.npy files")
    repeated = np.array_equal(np.tile(labels[: len(labels) // SEVERITIES], SEVERITIES), labels)
    if stacked:
        first = next((path for name, path in found.items() if name != CLEAN), None)
        images = len(_once(_mapped, first)) if first else 0
        if images != SEVERITIES * len(labels):
            if not repeated:
                one = images == len(labels)
                hint = "; use --layout arrays for images of one severity" if one else ""
                raise ValueError(
                    f"{place}: has {len(labels)} labels, expected one for each image of "
                    f"{SEVERITIES} severities in the same order, or of one severity{hint}"
                )
            labels = labels[: len(labels) // SEVERITIES]
    elif repeated:
        log.warning(
            "%s: has the same labels five times; if the images are of five severities, as in "
            "CIFAR-10-C, use --layout cifar-c",
            place,
        )
    return {
        Domain(name, severity): ArrayDataset(path, labels, names, f"{path} row", severity)
        for name, path in found.items()
        for severity in (range(1, SEVERITIES + 1) if stacked and name != CLEAN else (0,))
    }


def read_labels(root: str | Path) -> np.ndarray:
    """Read a folder's `labels.npy`: (labels,) int32, none below 0."""
    path = Path(root) / "labels.npy"
    labels = _load(path)
    check_labels(path, labels)
    return labels.astype(np.int32)
