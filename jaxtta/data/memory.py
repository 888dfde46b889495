"""Parts of a source, and pictures that stay in memory."""

import dataclasses
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.corruptions import CLEAN
from jaxtta.data.folders import UnreadablePictureError
from jaxtta.data.sources import Domain, Source, Wrapped
from jaxtta.data.streams import StreamBatch


class Arrays(NamedTuple):
    """Pictures that are in memory as they are.

    Attributes:
        images: (pictures, height, width, 3) uint8.
        labels: (pictures,) int32.
        class_names: names of the classes.
        what: what to call them in a message.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    what: str

    def open(self, number: int) -> Image.Image:
        """One picture."""
        return Image.fromarray(self.images[number])

    def name(self, number: int) -> str:
        """What to call a picture in a message."""
        return f"{self.what} {number}"


@dataclasses.dataclass(frozen=True)
class Part(Wrapped):
    """Some of a source's pictures, with all of its classes.

    Attributes:
        numbers: (pictures,) integers, which of its pictures.
    """

    numbers: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels (pictures,)."""
        return self.source.labels[self.numbers]

    def _number(self, number: int) -> int:
        return int(self.numbers[number])


class InMemory:
    """A source's clean pictures, which stay in memory once they were read.

    Whoever reads ahead in other processes hands what came to `keep`: what those processes keep is
    lost with them.

    Attributes:
        source: where they come from.
        images: (pictures, height, width, 3) uint8; the system gives memory as it is written.
        read_before: (pictures,) bool, whether a picture was read.
        readable: (pictures,) bool, whether it could be.
    """

    def __init__(self, source: Source) -> None:
        """Begin with nothing read."""
        self.source, self.labels = source, source.labels
        self.class_names, self.preprocess = source.class_names, source.preprocess
        self.images = np.zeros(shape_of(source), np.uint8)
        self.read_before = np.zeros(len(self.labels), bool)
        self.readable = np.zeros(len(self.labels), bool)

    def missing(self, numbers: np.ndarray) -> np.ndarray:
        """Which of these pictures were not read yet, each once."""
        return np.unique(numbers[~self.read_before[numbers]])

    def keep(self, batch: StreamBatch) -> None:
        """Keep a batch of the source's clean pictures."""
        rows = batch.pictures >= 0
        numbers = batch.pictures[rows]
        self.images[numbers], self.readable[numbers] = batch.images[rows], batch.mask[rows]
        self.read_before[numbers] = True

    def check(self, domain: Domain) -> None:
        """Raise a ValueError for anything but clean pictures."""
        if domain.corruption != CLEAN:
            raise ValueError(f"only clean pictures are kept in memory, not {domain}")
        self.source.check(domain)

    def read(self, domain: Domain, number: int, seed: int) -> np.ndarray:
        """One picture, read now or before."""
        if not self.read_before[number]:
            self.read_before[number] = True
            self.images[number] = self.source.read(domain, number, seed)
            self.readable[number] = True
        if not self.readable[number]:
            raise UnreadablePictureError(f"{self.name(domain, number)}: cannot be read")
        return self.images[number]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """One picture, preprocessed, and read anew as it is stored."""
        return self.source.read_both(domain, number, seed)

    def name(self, domain: Domain, number: int) -> str:
        """What the source calls a picture."""
        return self.source.name(domain, number)


def shape_of(source: Source) -> tuple[int, int, int, int]:
    """Shape of all of a source's pictures at the model's resolution."""
    side = source.preprocess.image_size
    return len(source.labels), side, side, 3


def every(labels: np.ndarray, nth: int) -> np.ndarray:
    """Choose evenly among the pictures sorted by class.

    Args:
        labels: (pictures,) integers.
        nth: one in how many; the first of each so many.

    Returns:
        (pictures,) bool.
    """
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[::nth]] = True
    return chosen
