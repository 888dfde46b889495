"""Sources: labelled images under several domains, at the model's resolution.

A domain is a corruption at a severity. A source's `read(domain, number, seed)` returns one image:
a clean image corrupted on the fly, or a stored image from folders or arrays of corrupted images.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from jaxtta.data.content import digest_files
from jaxtta.data.corruptions import CLEAN, SMALLEST, check_corruption, corrupt, image_seed
from jaxtta.data.folders import images_in, in_class_order, list_folders
from jaxtta.data.recognise import SEVERITIES, entries_of, hints, is_folder, is_system
from jaxtta.data.text import nfc
from jaxtta.images import UnreadableImageError, open_image, printable

log = logging.getLogger(__name__)


class Domain(NamedTuple):
    """A corruption at a severity.

    Attributes:
        corruption: its name; "clean" for none.
        severity: 1 to 5; 0 for clean images and for data with a single fixed severity.
    """

    corruption: str
    severity: int = 0

    def __str__(self) -> str:
        """The corruption, and its severity if it has one."""
        return f"{self.corruption}-{self.severity}" if self.severity else self.corruption


class Preprocess(Protocol):
    """The preprocessing that a source needs; `jaxtta.models.CLIP.preprocessing` is one."""

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        ...

    def rgb(self, image: Image.Image) -> Image.Image:
        """Convert to 8-bit RGB."""
        ...

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize and crop to (image_size, image_size, 3) uint8."""
        ...


class Images(Protocol):
    """Clean labelled images; `ImageFolder` is one.

    It may also have `content()`, a digest of all images, by which a run notices that they changed.
    """

    @property
    def labels(self) -> np.ndarray:
        """(images,) int32, each image's index in `class_names`."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    def open(self, number: int) -> Image.Image:
        """Return one decoded image of any mode and size, or raise an UnreadableImageError."""
        ...

    def name(self, number: int) -> str:
        """An image's name for messages."""
        ...


class Source(Protocol):
    """Labelled images under several corruptions.

    It may also have `contents(domains)`, a digest of what is stored of each domain's images, by
    which a run notices that they changed.
    """

    @property
    def labels(self) -> np.ndarray:
        """(images,) int32, each image's index in `class_names`."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def preprocess(self) -> Preprocess:
        """The model's preprocessing."""
        ...

    def check(self, domain: Domain) -> None:
        """Raise an error if there is no such domain."""
        ...

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Return one image, (height, width, 3) uint8, or raise an UnreadableImageError.

        The seed is for random corruptions.
        """
        ...

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The same image, and the image before resize and crop, of any size."""
        ...

    def name(self, domain: Domain, number: int) -> str:
        """An image's name for messages."""
        ...


def contents_of(source: Source, domains: Sequence[Domain]) -> dict[Domain, str | None]:
    """A source's digests of its domains' images.

    Args:
        source: the source.
        domains: some of its domains.

    Returns:
        A short text for each, another one if its stored images changed; None where the source
        cannot tell.
    """
    contents = getattr(source, "contents", None)
    return dict.fromkeys(domains) if contents is None else contents(domains)


@dataclasses.dataclass(frozen=True)
class CorruptedOnTheFly:
    """Clean images, corrupted as they are read.

    An image is corrupted at the smaller of its own and the model's resolution: large images after
    resize and crop, as in ImageNet-C, and images smaller than the model's input before upsampling,
    as in CIFAR-10-C.

    Attributes:
        images: the clean images.
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

    def contents(self, domains: Sequence[Domain]) -> dict[Domain, str | None]:
        """A digest of the clean images, the same for all domains."""
        content = getattr(self.images, "content", None)
        return dict.fromkeys(domains, None if content is None else content())

    def check(self, domain: Domain) -> None:
        """Raise a ValueError if there is no such corruption or severity."""
        check_corruption(*domain)
        if domain.corruption != CLEAN and self.preprocess.image_size < SMALLEST:
            raise ValueError(
                f"the model's input size is {self.preprocess.image_size} pixels, corruptions "
                f"need at least {SMALLEST}"
            )

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Read, preprocess and corrupt one image."""
        return self.read_both(domain, number, seed)[0]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The image, and its original: as stored if clean, as corrupted otherwise."""
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
    """Corrupted images in ImageNet-C's layout: `<corruption>/<severity>/<class>/…`.

    Images are read as they are stored (see `open_image`). An image that a domain lacks is
    unreadable there.

    Attributes:
        root: the folder.
        preprocess: the model's preprocessing.
        class_names: names of the classes, in label order.
        labels: (images,) int32.
        files: every image's path relative to a domain's folder, the same for all domains.
        domains: the folder of each domain.
    """

    root: Path
    preprocess: Preprocess
    class_names: tuple[str, ...]
    labels: np.ndarray
    files: tuple[str, ...]
    domains: Mapping[Domain, Path]
    _compared: set[Domain] = dataclasses.field(default_factory=set, init=False, compare=False)

    def name(self, domain: Domain, number: int) -> str:
        """The image's path, for messages."""
        return printable(self._path(domain, number))

    def contents(self, domains: Sequence[Domain]) -> dict[Domain, str | None]:
        """A digest of each domain's files."""
        folders = {domain: self.domains[self._known(domain)] for domain in domains}
        return {
            domain: digest_files([folder / file for file in self.files])
            for domain, folder in folders.items()
        }

    def check(self, domain: Domain) -> None:
        """Raise a ValueError if it is missing or has images not listed; log what it lacks."""
        domain = self._known(domain)
        if domain not in self._compared:
            self._compare(domain)
            self._compared.add(domain)

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Read and preprocess one image."""
        return self.read_both(domain, number, seed)[0]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one image, preprocessed and as stored."""
        del seed
        image = open_image(self._path(domain, number), raw=True)
        return self.preprocess(image), np.asarray(image)

    def _path(self, domain: Domain, number: int) -> Path:
        return self.domains[self._known(domain)] / self.files[number]

    def _known(self, domain: Domain) -> Domain:
        """The domain as it is listed, or an error."""
        domain = _of_data(domain)
        if domain in self.domains:
            return domain
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

    def _compare(self, domain: Domain) -> None:
        """Log which of the images a domain lacks, and refuse others.

        The domain that the images were listed from lacks those. Clean images may be more.
        """
        place = self.domains[domain]
        found = (path for path in images_in(place) if path.parent != place)
        own, listed = {str(path.relative_to(place)) for path in found}, set(self.files)
        lacks, others = [f for f in self.files if f not in own], sorted(own - listed)
        if others and domain.corruption != CLEAN:
            poor = (p for p in self.domains.values() if not os.path.lexists(p / others[0]))
            raise ValueError(
                f"{place}: has {len(others)} images that {next(poor, self.root)} lacks, such as "
                f"{printable(others[0])}: complete that folder, or remove them from this one"
            )
        for what, odd in (
            ("lacks %d of %d images, unreadable there", lacks),
            ("has %d images besides the %d listed, left out", others),
        ):
            if odd:
                message = f"%s: {what}, such as %s"
                log.warning(message, place, len(odd), len(listed), printable(odd[0]))


def _of_data(domain: Domain) -> Domain:
    """Drop the severity of clean images."""
    return Domain(CLEAN) if domain.corruption == CLEAN else domain


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items)) or "none"


def corrupted_folders(
    root: str | Path,
    preprocess: Preprocess,
    names_of: Callable[[Sequence[str]], Sequence[str]] = tuple,
) -> CorruptedFolders:
    """Open a folder in ImageNet-C's layout.

    The classes are those of all domains. The images of a class are listed from the domain with the
    most classes that has any; the others have the same file names. What a domain lacks is logged,
    and unreadable there: for a domain that lacks a class now, for the others by `check`, which
    refuses a corruption with images that are not listed.

    Args:
        root: contains `<corruption>/<severity>/<class>/…`, or folders that do (`noise/`, `blur/`,
            as in the public archives), and optionally `clean/<class>/…` with the same names.
        preprocess: the model's preprocessing.
        names_of: class names from the names of the class folders, which it gets in label order.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the layout is different, a domain is there twice, there are fewer than two
            classes, or a class has no image in any domain.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    domains = _domains(root)
    for folder in _folders(root):
        if not any(folder in path.parents for path in domains.values()):
            for domain, place in _domains(folder).items():
                if domains.setdefault(domain, place) != place:
                    raise ValueError(f"{root}: {domain} is in {domains[domain]} and in {place}")
    if not domains:
        raise ValueError(
            f"{root}: has no <corruption>/<severity 1 to {SEVERITIES}> folders"
            f"{hints(root, _folders(root))}"
        )
    classes = {place: {path.name for path in _folders(place)} for place in domains.values()}
    places = sorted(classes, key=lambda place: -len(classes[place]))  # stable: the first of equals
    known = set().union(*classes.values())
    if len(known) < 2:
        raise ValueError(f"{places[0]}: has {len(known)} class folders, expected at least two")
    folders = in_class_order(_first_with_images(places, name) for name in known)
    names = names_of([nfc(folder.name) for folder in folders])
    listed = list_folders(root, folders, names)
    files = tuple(
        str(path.relative_to(folders[label].parent))
        for path, label in zip(listed.files, listed.labels, strict=True)
    )
    source = CorruptedFolders(root, preprocess, tuple(names), listed.labels, files, domains)
    for domain, place in domains.items():
        if classes[place] != known:
            source.check(domain)
    return source


def _first_with_images(places: Sequence[Path], name: str) -> Path:
    """A class's folder in the first domain that has images of it."""
    folders = [place / name for place in places]
    return next((folder for folder in folders if any(images_in(folder))), folders[0])


def _folders(root: Path) -> list[Path]:
    return sorted(root / entry.name for entry in entries_of(root) if is_folder(entry))


def _domains(root: Path) -> dict[Domain, Path]:
    domains = {}
    for folder in _folders(root):
        if folder.name == CLEAN:
            domains[Domain(CLEAN)] = folder
            continue
        for severity in range(1, SEVERITIES + 1):
            if (folder / str(severity)).is_dir():
                domains[Domain(folder.name, severity)] = folder / str(severity)
    return domains


@dataclasses.dataclass(frozen=True)
class CorruptedArrays:
    """Corrupted images in arrays: `<corruption>.npy`, each (images, height, width, 3) uint8.

    Attributes:
        root: the folder; the same images in the same order in every file.
        preprocess: the model's preprocessing.
        class_names: names of the classes, in label order.
        labels: (images,) int32.
        stacked: whether a file has all images at severity 1, then all at 2, up to 5, as in the
            public CIFAR-10-C and CIFAR-100-C; otherwise it has a single severity, 0.
    """

    root: Path
    preprocess: Preprocess
    class_names: tuple[str, ...]
    labels: np.ndarray
    stacked: bool = False

    def name(self, domain: Domain, number: int) -> str:
        """The image's file and row."""
        return f"{self.root / domain.corruption}.npy row {self._row(domain, number)}"

    def contents(self, domains: Sequence[Domain]) -> dict[Domain, str | None]:
        """A digest of each domain's file."""
        found = {
            name: digest_files([self.root / f"{name}.npy"])
            for name in dict.fromkeys(domain.corruption for domain in domains)
        }
        return {domain: found[domain.corruption] for domain in domains}

    def check(self, domain: Domain) -> None:
        """Raise a ValueError if the file is missing, or labels or severities do not match."""
        self._open(domain)

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Read and preprocess one image."""
        return self.read_both(domain, number, seed)[0]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one image, preprocessed and as stored."""
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
                f"{self.root}: severity is {severity}, expected 0 for files with one severity"
            )
        expected = len(self.labels) * (SEVERITIES if stacked else 1)
        if len(array) != expected:
            severities = f" at {SEVERITIES} severities" if stacked else ""
            other = "cifar-c" if len(array) == SEVERITIES * expected else "arrays"
            fits = len(array) in (SEVERITIES * expected, len(self.labels))
            hint = f"; use --layout {other}" if fits else ""
            raise ValueError(
                f"{self.root / corruption}.npy: has {len(array)} images, expected {expected} for "
                f"{len(self.labels)} labels{severities}{hint}"
            )
        return array


def _open_array(root: Path, corruption: str) -> np.ndarray:
    path = root / f"{corruption}.npy"
    if not path.exists() or corruption == "labels":
        known = sorted(_arrays_in(root) - {"labels"})
        raise ValueError(f"unknown corruption {corruption!r}, {root} has {_listed(known)}")
    status = path.stat()
    return _mapped(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=32)  # open files, not images
def _mapped(path: Path, changed: int, size: int) -> np.ndarray:
    del changed, size  # another file under the same name is opened anew
    array = _load(path, mmap_mode="r")
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"{path}: is {array.dtype} of shape {array.shape}, expected uint8 of shape (images, "
            "height, width, 3)"
        )
    return array


def _arrays_in(root: Path) -> set[str]:
    return {path.stem for path in root.glob("*.npy") if not is_system(path.name)}


def _load(path: Path, **options: Any) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as an array ({error})") from error


def corrupted_arrays(
    root: str | Path, preprocess: Preprocess, class_names: Sequence[str], stacked: bool = False
) -> CorruptedArrays:
    """Open a folder of `<corruption>.npy` files and one `labels.npy`.

    Args:
        root: the folder; "clean" is `clean.npy`, if present.
        preprocess: the model's preprocessing.
        class_names: names of the classes, in label order.
        stacked: whether every file except the clean one has five severities in sequence, as in the
            public CIFAR-10-C; its labels may be repeated five times.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if the folder or the labels are missing.
        ValueError: if the labels are not integers, are out of range or do not match the files.
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
    elif _repeats(labels):
        log.warning(
            "%s: has the same labels five times; if the images are of five severities, as in "
            "CIFAR-10-C, use --layout cifar-c",
            root / "labels.npy",
        )
    return CorruptedArrays(root, preprocess, tuple(class_names), labels, stacked)


def read_labels(root: str | Path) -> np.ndarray:
    """Read a folder's `labels.npy`.

    Args:
        root: the folder.

    Returns:
        (labels,) int32, none below 0.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not contain labels.
    """
    path = Path(root) / "labels.npy"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    labels = _load(path)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: is {labels.dtype} of shape {labels.shape}, expected integers")
    if not len(labels):
        raise ValueError(f"{path}: has no labels")
    if labels.min() < 0:
        raise ValueError(
            f"{path}: labels run from {labels.min()} to {labels.max()}, expected none below 0"
        )
    return labels.astype(np.int32)


def _of_one_severity(root: Path, labels: np.ndarray) -> np.ndarray:
    """The labels of one severity, whether `labels.npy` has them once or repeated."""
    corruptions = sorted(_arrays_in(root) - {"labels", CLEAN})
    images = len(_open_array(root, corruptions[0])) if corruptions else 0
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


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A view of a source with renamed domains or renumbered images.

    Attributes:
        source: the original source.
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
        """The source's name for the image."""
        return self.source.name(self._domain(domain), self._number(number))

    def contents(self, domains: Sequence[Domain]) -> dict[Domain, str | None]:
        """The source's digests of the images."""
        found = contents_of(self.source, [self._domain(domain) for domain in domains])
        return {domain: found[self._domain(domain)] for domain in domains}

    def check(self, domain: Domain) -> None:
        """Raise an error if there is no such domain."""
        self.source.check(self._domain(domain))

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """Read one image."""
        return self.source.read(self._domain(domain), self._number(number), seed)

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Read one image, preprocessed and as stored."""
        return self.source.read_both(self._domain(domain), self._number(number), seed)

    def _domain(self, domain: Domain) -> Domain:
        return domain

    def _number(self, number: int) -> int:
        return number


@dataclasses.dataclass(frozen=True)
class Named(Wrapped):
    """A source whose clean images are a domain with another name: a natural distribution shift.

    Attributes:
        domain: the name of this domain, with severity 0.
    """

    domain: str

    def _domain(self, domain: Domain) -> Domain:
        if domain != Domain(self.domain):
            raise ValueError(f"unknown domain {domain}, expected {self.domain}")
        return Domain(CLEAN)
