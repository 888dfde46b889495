"""Parts of a source, and images that stay in memory."""

import dataclasses
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.corruptions import CLEAN
from jaxtta.data.folders import UnreadableImageError
from jaxtta.data.sources import Domain, Source, Wrapped
from jaxtta.data.streams import StreamBatch


class Arrays(NamedTuple):
    """Images that are in memory as they are.

    Attributes:
        images: (images, height, width, 3) uint8.
        labels: (images,) int32.
        class_names: names of the classes.
        what: what to call them in a message.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    what: str

    def open(self, number: int) -> Image.Image:
        """One image."""
        return Image.fromarray(self.images[number])

    def name(self, number: int) -> str:
        """What to call an image in a message."""
        return f"{self.what} {number}"


@dataclasses.dataclass(frozen=True)
class Part(Wrapped):
    """Some of a source's images, with all of its classes.

    Attributes:
        numbers: (images,) integers, which of its images.
    """

    numbers: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels (images,)."""
        return self.source.labels[self.numbers]

    def _number(self, number: int) -> int:
        return int(self.numbers[number])


class InMemory:
    """A source's clean images, which stay in memory once they were read.

    Whoever reads ahead in other processes hands what came to `keep`: what those processes keep is
    lost with them.

    Attributes:
        source: where they come from.
        images: (images, height, width, 3) uint8; the system gives memory as it is written.
        read_before: (images,) bool, whether an image was read.
        readable: (images,) bool, whether it could be.
    """

    def __init__(self, source: Source) -> None:
        """Begin with nothing read."""
        self.source, self.labels = source, source.labels
        self.class_names, self.preprocess = source.class_names, source.preprocess
        self.images = np.zeros(shape_of(source), np.uint8)
        self.read_before = np.zeros(len(self.labels), bool)
        self.readable = np.zeros(len(self.labels), bool)

    def missing(self, numbers: np.ndarray) -> np.ndarray:
        """Which of these images were not read yet, each once."""
        return np.unique(numbers[~self.read_before[numbers]])

    def keep(self, batch: StreamBatch) -> None:
        """Keep a batch of the source's clean images."""
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
        """One image, read now or before."""
        if not self.read_before[number]:
            self.read_before[number] = True
            self.images[number] = self.source.read(domain, number, seed)
            self.readable[number] = True
        if not self.readable[number]:
            raise UnreadableImageError(f"{self.name(domain, number)}: cannot be read")
        return self.images[number]

    def read_both(self, domain: Domain, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """One image, preprocessed, and read anew as it is stored."""
        return self.source.read_both(domain, number, seed)

    def name(self, domain: Domain, number: int) -> str:
        """What the source calls an image."""
        return self.source.name(domain, number)


def shape_of(source: Source) -> tuple[int, int, int, int]:
    """Shape of all of a source's images at the model's resolution."""
    side = source.preprocess.image_size
    return len(source.labels), side, side, 3


def every(labels: np.ndarray, nth: int) -> np.ndarray:
    """Choose evenly among the images sorted by class.

    Args:
        labels: (images,) integers.
        nth: one in how many; the first of each so many.

    Returns:
        (images,) bool.
    """
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[::nth]] = True
    return chosen
