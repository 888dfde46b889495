"""Images in arrays: in memory, in one `.npz` file, or a `.npy` file per corruption."""

import dataclasses
import functools
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.data.corruptions import CLEAN, SEVERITIES
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
    def _array(self) -> np.ndarray:
        return self.images if isinstance(self.images, np.ndarray) else _mapped(self.images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        return self._array[self._row(number)]

    def name(self, number: int) -> str:
        """The image's row, for messages."""
        return f"{self.what} {self._row(number)}"

    def content(self) -> str:
        """A digest of the array or file."""
        if isinstance(self.images, np.ndarray):
            return digest_array(self.images)
        return _digest(self.images, self.images.stat().st_mtime_ns, self.images.stat().st_size)

    def check(self) -> None:
        """Raise a ValueError if the array is not as expected, or does not fit the labels."""
        array, count = self._array, len(self.labels)
        place = self.what if isinstance(self.images, np.ndarray) else self.images
        if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
            found = f"{place}: is {array.dtype} of shape {array.shape}"
            raise ValueError(f"{found}, expected uint8 of shape (images, height, width, 3)")
        expected = count * SEVERITIES if self.severity else count
        if len(array) != expected:
            severities = f" at {SEVERITIES} severities" if self.severity else ""
            layout = {count: "arrays", SEVERITIES * count: "cifar-c"}.get(len(array))
            hint = f"; use --layout {layout}" if layout and isinstance(self.images, Path) else ""
            found = f"{place}: has {len(array)} images, expected {expected} for {count} labels"
            raise ValueError(f"{found}{severities}{hint}")

    def _row(self, number: int) -> int:
        return max(self.severity - 1, 0) * len(self.labels) + number


@functools.lru_cache(maxsize=256)  # all severities in a file have the same
def _digest(path: Path, changed: int, size: int) -> str:
    del changed, size
    return digest_files([path])


def _mapped(path: Path) -> np.ndarray:
    return _mapped_once(path, path.stat().st_mtime_ns, path.stat().st_size)


@functools.lru_cache(maxsize=32)  # open files, not images
def _mapped_once(path: Path, changed: int, size: int) -> np.ndarray:
    del changed, size  # another file under the same name is opened anew
    return _load(path, mmap_mode="r")


def _load(path: Path, **options: Any) -> Any:
    try:
        return np.load(path, allow_pickle=False, **options)
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
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
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
    root: str | Path, class_names: Sequence[str], stacked: bool = False
) -> dict[Domain, ArrayDataset]:
    """Open a folder of `<corruption>.npy` files and one `labels.npy`.

    Args:
        root: the folder; the same images in the same order in every file; "clean" is `clean.npy`.
        class_names: names of the classes, in label order.
        stacked: whether every file except the clean one has all images at severity 1, then at 2,
            up to 5, as in the public CIFAR-10-C; its labels may be repeated five times.
    """
    root, names = Path(root), tuple(class_names)
    labels, place = read_labels(root), Path(root) / "labels.npy"
    check_labels(place, labels, len(names))
    found = {path.stem: path for path in sorted(root.glob("*.npy")) if not is_system(path.name)}
    del found["labels"]
    if not found:
        raise ValueError(f"{root}: has no <corruption>.npy files")
    repeated = np.array_equal(np.tile(labels[: len(labels) // SEVERITIES], SEVERITIES), labels)
    if stacked:
        first = next((path for name, path in found.items() if name != CLEAN), None)
        images = len(_mapped(first)) if first else 0
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
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    labels = _load(path)
    check_labels(path, labels)
    return labels.astype(np.int32)
