"""Sources: labelled images under several domains, at the model's resolution.

A domain is a corruption at a severity. A source answers `read(domain, number, seed)` with one
image; what stands behind it (clean images corrupted as they are read, folders or arrays of
ready corrupted ones) is its own business.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from jaxtta.data.corruptions import CLEAN, SMALLEST, check_corruption, corrupt, image_seed
from jaxtta.data.folders import (
    ImageFolder,
    UnreadableImageError,
    image_folder,
    open_image,
)

SEVERITIES = 5


class Domain(NamedTuple):
    """Where a stream's images stand at one time.

    Attributes:
        corruption: its name; "clean" for none.
        severity: 1 to 5; 0 for clean images and for data that has one strength of its own.
    """

    corruption: str
    severity: int = 0

    def __str__(self) -> str:
        """The corruption, and its severity where it has one."""
        return f"{self.corruption}-{self.severity}" if self.severity else self.corruption


class Preprocess(Protocol):
    """What a source needs of a model; `jaxtta.models.CLIP.preprocessing` is one."""

    image_size: int

    def rgb(self, image: Image.Image) -> Image.Image:
        """Convert to 8-bit RGB."""

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize and crop to (image_size, image_size, 3) uint8."""


class Images(Protocol):
    """Clean labelled images; `ImageFolder` is one.

    Attributes:
        labels: (images,) int32, each image's place in `class_names`.
        class_names: names of the classes.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]

    def open(self, number: int) -> Image.Image:
        """One image, decoded, of any mode and size, or an UnreadableImageError."""

    def name(self, number: int) -> str:
        """What to call an image in a message."""


class Source(Protocol):
    """Labelled images under several corruptions."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    preprocess: Preprocess

    def check(self, domain: Domain) -> None:
        """Raise an error if there is no such domain."""

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """One image, (height, width, 3) uint8, or an UnreadableImageError.

        The seed is that of the corruption, where there is something to draw.
        """

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The same image, and as it was before resize and crop, of any size."""

    def name(self, domain: Domain, number: int) -> str:
        """What to call an image in a message."""


@dataclasses.dataclass(frozen=True)
class CorruptedOnTheFly:
    """Clean images, corrupted as they are read.

    An image is corrupted at the smaller of its own and the model's resolution: photographs after
    resize and crop, as ImageNet-C is made, and images smaller than the model's input before
    they are enlarged, as CIFAR-10-C is.

    Attributes:
        images: the clean ones.
        preprocess: the model's preprocessing.
    """

    images: Images
    preprocess: Preprocess

    @property
    def labels(self) -> np.ndarray:
        """Labels (images,)."""
        return self.images.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.images.class_names

    def name(self, domain: Domain, number: int) -> str:
        """The image's path."""
        del domain
        return self.images.name(number)

    def check(self, domain: Domain) -> None:
        """Raise a ValueError if there is no such corruption or severity."""
        check_corruption(*domain)
        if domain.corruption != CLEAN and self.preprocess.image_size < SMALLEST:
            raise ValueError(
                f"the model takes images of {self.preprocess.image_size} pixels, corruptions "
                f"need at least {SMALLEST}"
            )

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Read, preprocess and corrupt one image."""
        return self.read_both(domain, number, seed)[0]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The image; the clean one as it is stored, or a corrupted one as it was corrupted."""
        name = self.images.name(number)
        image = _rgb(self.preprocess, self.images.open(number), name)
        if domain.corruption == CLEAN:
            return self.preprocess(image), np.asarray(image)
        if min(image.size) < SMALLEST:
            raise UnreadableImageError(f"{name}: smaller than {SMALLEST} pixels")
        distort = functools.partial(
            corrupt,
            name=domain.corruption,
            severity=domain.severity,
            seed=image_seed(seed, domain.corruption, domain.severity, number),
        )
        if min(image.size) < self.preprocess.image_size:
            distorted = distort(np.asarray(image))
            return self.preprocess(Image.fromarray(distorted)), distorted
        distorted = distort(self.preprocess(image))
        return distorted, distorted


def _rgb(preprocess: Preprocess, image: Image.Image, name: str) -> Image.Image:
    try:
        return preprocess.rgb(image)
    except ValueError as error:
        raise UnreadableImageError(f"{name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class CorruptedFolders:
    """Ready corrupted images as ImageNet-C has them: `<corruption>/<severity>/<class>/…`.

    Attributes:
        root: the folder.
        preprocess: the model's preprocessing.
        class_names: names of the classes, in the labels' order.
        labels: (images,) int32.
        files: every image's path within a domain's folder, the same in all of them.
        domains: which there are, and each one's folder.
    """

    root: Path
    preprocess: Preprocess
    class_names: tuple[str, ...]
    labels: np.ndarray
    files: tuple[str, ...]
    domains: Mapping[Domain, Path]

    def name(self, domain: Domain, number: int) -> str:
        """The image's path."""
        return str(self.domains[_of_data(domain)] / self.files[number])

    def check(self, domain: Domain) -> None:
        """Raise a ValueError if there is no such folder."""
        if _of_data(domain) in self.domains:
            return
        severities = [d.severity for d in self.domains if d.corruption == domain.corruption]
        if severities:
            raise ValueError(
                f"{self.root}: {domain.corruption} has severity {_listed(severities)}, not "
                f"{domain.severity}"
            )
        known = dict.fromkeys(d.corruption for d in self.domains)
        raise ValueError(
            f"unknown corruption {domain.corruption!r}, {self.root} has {_listed(known)}"
        )

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Read and preprocess one image."""
        return self.read_both(domain, number, seed)[0]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one image, preprocessed and as it is stored."""
        del seed
        self.check(domain)
        name = self.name(domain, number)
        image = _rgb(self.preprocess, open_image(Path(name)), name)
        return self.preprocess(image), np.asarray(image)


def _of_data(domain: Domain) -> Domain:
    """Clean images have no severity, whatever a sweep over severities calls them."""
    return Domain(CLEAN) if domain.corruption == CLEAN else domain


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items)) or "none"


def corrupted_folders(
    root: str | Path,
    preprocess: Preprocess,
    listing: Callable[[Path], ImageFolder] = image_folder,
) -> CorruptedFolders:
    """Open a folder laid out as ImageNet-C.

    The images are listed from one domain; the others have the same ones under the same names.

    Args:
        root: holds `<corruption>/<severity>/<class>/…`, or folders that do (`noise/`, `blur/`, as
            the public archives unpack), and perhaps `clean/<class>/…` with the same names.
        preprocess: the model's preprocessing.
        listing: lists one domain's folder; `imagenet` where class folders are wnids.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if nothing in it is laid out so, or the listed domain is refused.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    domains = _domains(root)
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not any(folder in path.parents for path in domains.values()):
            domains |= _domains(folder)
    if not domains:
        raise ValueError(f"{root}: holds no <corruption>/<severity 1 to {SEVERITIES}> folders")
    first = next(iter(domains.values()))
    listed = listing(first)
    files = tuple(str(path.relative_to(first)) for path in listed.files)
    return CorruptedFolders(root, preprocess, listed.class_names, listed.labels, files, domains)


def _domains(root: Path) -> dict[Domain, Path]:
    domains = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if folder.name == CLEAN:
            domains[Domain(CLEAN)] = folder
            continue
        for severity in range(1, SEVERITIES + 1):
            if (folder / str(severity)).is_dir():
                domains[Domain(folder.name, severity)] = folder / str(severity)
    return domains


@dataclasses.dataclass(frozen=True)
class CorruptedArrays:
    """Ready corrupted images: `<corruption>.npy`, each (images, height, width, 3) uint8.

    Attributes:
        root: the folder; the same images in the same order in every file.
        preprocess: the model's preprocessing.
        class_names: names of the classes, in the labels' order.
        labels: (images,) int32.
        stacked: whether a file holds all images at severity 1, then all at 2, up to 5, as the
            public CIFAR-10-C and CIFAR-100-C do; otherwise it holds one strength, severity 0.
    """

    root: Path
    preprocess: Preprocess
    class_names: tuple[str, ...]
    labels: np.ndarray
    stacked: bool = False

    def name(self, domain: Domain, number: int) -> str:
        """The image's file and row."""
        return f"{self.root / domain.corruption}.npy row {self._row(domain, number)}"

    def check(self, domain: Domain) -> None:
        """Raise a ValueError if the file lacks, does not fit the labels or has other severities."""
        self._open(domain)

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Read and preprocess one image."""
        return self.read_both(domain, number, seed)[0]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one image, preprocessed and as it is stored."""
        del seed
        stored = self._open(domain)[self._row(domain, number)]
        return self.preprocess(Image.fromarray(stored)), stored

    def _row(self, domain: Domain, number: int) -> int:
        domain = _of_data(domain)
        return max(domain.severity - 1, 0) * len(self.labels) + number

    def _open(self, domain: Domain) -> np.ndarray:
        corruption, severity = _of_data(domain)
        stacked = self.stacked and corruption != CLEAN
        array = _open_array(self.root, corruption)
        if stacked and severity not in range(1, SEVERITIES + 1):
            raise ValueError(f"{self.root}: severity is {severity}, expected 1 to {SEVERITIES}")
        if not stacked and severity:
            raise ValueError(
                f"{self.root}: severity is {severity}, expected 0 as the files hold one strength"
            )
        expected = len(self.labels) * (SEVERITIES if stacked else 1)
        if len(array) != expected:
            severities = f" at {SEVERITIES} severities" if stacked else ""
            raise ValueError(
                f"{self.root / corruption}.npy: has {len(array)} images, expected {expected} for "
                f"{len(self.labels)} labels{severities}"
            )
        return array


@functools.lru_cache(maxsize=32)  # open files, not images
def _open_array(root: Path, corruption: str) -> np.ndarray:
    path = root / f"{corruption}.npy"
    if not path.exists() or corruption == "labels":
        known = sorted(p.stem for p in root.glob("*.npy") if p.stem != "labels")
        raise ValueError(f"unknown corruption {corruption!r}, {root} has {_listed(known)}")
    array = _load(path, mmap_mode="r")
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"{path}: is {array.dtype} of shape {array.shape}, expected uint8 of shape (images, "
            "height, width, 3)"
        )
    return array


def _load(path: Path, **options: Any) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as an array ({error})") from error


def corrupted_arrays(
    root: str | Path, preprocess: Preprocess, class_names: Sequence[str], stacked: bool = False
) -> CorruptedArrays:
    """Open a folder of `<corruption>.npy` files beside one `labels.npy`.

    Args:
        root: the folder; "clean" is `clean.npy`, where there is one.
        preprocess: the model's preprocessing.
        class_names: names of the classes, in the labels' order.
        stacked: whether every file but the clean one holds five severities after one another, as
            the public CIFAR-10-C does; its labels may be repeated five times likewise.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if folder or labels are missing.
        ValueError: if the labels are no integers, lie outside the classes or do not fit the files.
    """
    root = Path(root)
    labels = read_labels(root)
    if labels.max() >= len(class_names):
        raise ValueError(
            f"{root / 'labels.npy'}: labels run from {labels.min()} to {labels.max()}, expected 0 "
            f"to {len(class_names) - 1} for {len(class_names)} class names"
        )
    if stacked:
        labels = _of_one_severity(root, labels)
    return CorruptedArrays(root, preprocess, tuple(class_names), labels, stacked)


def read_labels(root: str | Path) -> np.ndarray:
    """Read a folder's `labels.npy`.

    Args:
        root: the folder.

    Returns:
        (labels,) int32, none below 0.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else than labels.
    """
    path = Path(root) / "labels.npy"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    labels = _load(path)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: is {labels.dtype} of shape {labels.shape}, expected integers")
    if not len(labels):
        raise ValueError(f"{path}: holds no labels")
    if labels.min() < 0:
        raise ValueError(
            f"{path}: labels run from {labels.min()} to {labels.max()}, expected none below 0"
        )
    return labels.astype(np.int32)


def _of_one_severity(root: Path, labels: np.ndarray) -> np.ndarray:
    """The labels once, whether `labels.npy` holds them once or for each severity."""
    corruptions = sorted({p.stem for p in root.glob("*.npy")} - {"labels", CLEAN})
    if corruptions and len(_open_array(root, corruptions[0])) == SEVERITIES * len(labels):
        return labels
    once = labels[: len(labels) // SEVERITIES]
    if not np.array_equal(np.tile(once, SEVERITIES), labels):
        raise ValueError(
            f"{root / 'labels.npy'}: has {len(labels)} labels, expected one for each image of "
            f"{SEVERITIES} severities in the same order, or for each image of one severity"
        )
    return once


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A source behind other names of its domains, or other numbers of its images.

    Attributes:
        source: the images.
    """

    source: Source

    @property
    def labels(self) -> np.ndarray:
        """Labels (images,)."""
        return self.source.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.source.class_names

    @property
    def preprocess(self) -> Preprocess:
        """The model's preprocessing."""
        return self.source.preprocess

    def name(self, domain: Domain, number: int) -> str:
        """What the source calls the image."""
        return self.source.name(self._domain(domain), self._number(number))

    def check(self, domain: Domain) -> None:
        """Raise an error if there is no such domain."""
        self.source.check(self._domain(domain))

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Read one image."""
        return self.source.read(self._domain(domain), self._number(number), seed)

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one image, preprocessed and as it is stored."""
        return self.source.read_both(self._domain(domain), self._number(number), seed)

    def _domain(self, domain: Domain) -> Domain:
        return domain

    def _number(self, number: int) -> int:
        return number


@dataclasses.dataclass(frozen=True)
class Named(Wrapped):
    """A source whose clean images are a domain by another name: a dataset that is a shift itself.

    Attributes:
        domain: what they are called, with severity 0.
    """

    domain: str

    def _domain(self, domain: Domain) -> Domain:
        if domain != Domain(self.domain):
            raise ValueError(f"unknown domain {domain}, expected {self.domain}")
        return Domain(CLEAN)
