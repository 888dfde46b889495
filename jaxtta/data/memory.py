"""Subsets of a source, and images kept in memory."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.content import digest_array
from jaxtta.data.corruptions import CLEAN
from jaxtta.data.sources import Domain, Source, Wrapped, contents_of
from jaxtta.data.streams import StreamBatch
from jaxtta.images import UnreadableImageError

IMAGENET_C_5000 = "imagenet-c-5000"
_TABLES = Path(__file__).parent / "tables"


class Arrays(NamedTuple):
    """Images in an array in memory.

    Attributes:
        images: (images, height, width, 3) uint8.
        labels: (images,) int32.
        class_names: names of the classes.
        what: the name of an image in messages.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    what: str

    def open(self, number: int) -> Image.Image:
        """One image."""
        return Image.fromarray(self.images[number])

    def name(self, number: int) -> str:
        """An image's name for messages."""
        return f"{self.what} {number}"

    def content(self) -> str:
        """A digest of the images."""
        return digest_array(self.images)


@dataclasses.dataclass(frozen=True)
class Part(Wrapped):
    """A subset of a source's images, with all of its classes.

    Attributes:
        numbers: (images,) integers, indices of its images.
    """

    numbers: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels (images,)."""
        return self.source.labels[self.numbers]

    def _number(self, number: int) -> int:
        return int(self.numbers[number])


def listed_part(source: Source, listed: str | Path) -> Part:
    """The images of a source that a file lists, in the file's order.

    Args:
        source: one of images in folders.
        listed: a text file with a path a line, of which `<class folder>/<file>` counts; or
            "imagenet-c-5000", RobustBench's 5,000 images of ImageNet-C, which many published tables
            read.

    Returns:
        The subset, with all of the source's classes.

    Raises:
        ValueError: if the source has no files, or lacks one of the list or has it several times.
    """
    files = getattr(source, "files", None) or getattr(getattr(source, "images", None), "files", ())
    names = [Path(file).parts[-2:] for file in files]
    numbers = {name: number for number, name in enumerate(names)}
    path = _TABLES / f"{listed}.txt" if str(listed) == IMAGENET_C_5000 else Path(listed)
    try:
        wanted = [Path(line).parts[-2:] for line in path.read_text("utf-8-sig").split("\n") if line]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a list of images ({error})") from error
    missing = [name for name in wanted if name not in numbers]
    if missing or not wanted:
        first = f", such as {'/'.join(missing[0])}" if missing else ""
        raise ValueError(
            f"{path}: lists {len(wanted)} images, of which the {len(files)} files here lack "
            f"{len(missing)}{first}"
        )
    counts = Counter(names)
    several = [name for name in wanted if counts[name] > 1]
    if several:
        raise ValueError(f"{path}: several files here end in {'/'.join(several[0])}")
    return Part(source, np.asarray([numbers[name] for name in wanted]))


class InMemory:
    """A source's clean images, kept in memory after the first read.

    Images read by other processes are passed to `keep`, because the memory of those processes is
    not shared.

    Attributes:
        source: the source of the images.
        images: (images, height, width, 3) uint8; memory is allocated when it is first written.
        read_before: (images,) bool, whether each image has been read.
        readable: (images,) bool, whether each image could be read.
    """

    def __init__(self, source: Source) -> None:
        """Allocate the arrays; no image is read."""
        self.source, self.labels = source, source.labels
        self.class_names, self.preprocess = source.class_names, source.preprocess
        self.images = np.zeros(shape_of(source), np.uint8)
        self.read_before = np.zeros(len(self.labels), bool)
        self.readable = np.zeros(len(self.labels), bool)

    def missing(self, numbers: np.ndarray) -> np.ndarray:
        """The distinct images among these that have not been read."""
        return np.unique(numbers[~self.read_before[numbers]])

    def keep(self, batch: StreamBatch) -> None:
        """Store a batch of the source's clean images."""
        rows = batch.source_index >= 0
        numbers = batch.source_index[rows]
        self.images[numbers], self.readable[numbers] = batch.images[rows], batch.mask[rows]
        self.read_before[numbers] = True

    def check(self, domain: Domain) -> None:
        """Raise a ValueError for anything but clean images."""
        if domain.corruption != CLEAN:
            raise ValueError(f"only clean images are kept in memory, not {domain}")
        self.source.check(domain)

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """One image, from memory if it was read before."""
        if not self.read_before[number]:
            self.read_before[number] = True
            self.images[number] = self.source.read(domain, number, seed)
            self.readable[number] = True
        if not self.readable[number]:
            raise UnreadableImageError(f"{self.name(domain, number)}: cannot be read")
        return self.images[number]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """One image, preprocessed and as stored; always read from the source."""
        return self.source.read_both(domain, number, seed)

    def name(self, domain: Domain, number: int) -> str:
        """The source's name for an image."""
        return self.source.name(domain, number)

    def contents(self, domains: Sequence[Domain]) -> dict[Domain, str | None]:
        """The source's digests of the images."""
        return contents_of(self.source, domains)


def shape_of(source: Source) -> tuple[int, int, int, int]:
    """Shape of the array of all images of a source, at the model's resolution."""
    side = source.preprocess.image_size
    return len(source.labels), side, side, 3


def every(labels: np.ndarray, nth: int) -> np.ndarray:
    """Select every nth image, stratified by class.

    Args:
        labels: (images,) integers.
        nth: the step; the first of every `nth` images is selected.

    Returns:
        (images,) bool.
    """
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[::nth]] = True
    return chosen
