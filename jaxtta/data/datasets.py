"""Datasets are sequences of labelled images; a benchmark has one for each domain.

    dataset = open_dataset("folder", "images")
    benchmark = corrupted(dataset, model.preprocessing)

`dataset[0]` and `benchmark[Domain("fog", 5)][0]` are images, (height, width, 3) uint8.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from jaxtta.corruptions import CLEAN, CORRUPTIONS, SEVERITIES, SMALLEST, corrupt, image_seed
from jaxtta.data.class_names import TABLES
from jaxtta.images import UnreadableImageError
from jaxtta.io import nfc, read_text


class Domain(NamedTuple):
    """A corruption, "clean" or a natural shift, at a severity of 1 to 5, or 0 if it has one."""

    corruption: str
    severity: int = 0

    def __str__(self) -> str:
        return f"{self.corruption}-{self.severity}" if self.severity else self.corruption


class Dataset(Protocol):
    """Labelled images, read by index: (height, width, 3) uint8, or an UnreadableImageError.

    It may have `name(number)`, for messages; `content()`, a digest by which a run notices that the
    images changed; and `check()`, which raises a ValueError before a run.
    """

    @property
    def labels(self) -> np.ndarray:
        """(images,) int32, each image's index in `class_names`."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> np.ndarray: ...


Benchmark = Mapping[Domain, Dataset]
"""The same images under several domains: equal labels, class names and numbers of images."""


class Preprocess(Protocol):
    """A model's preprocessing: resizes and crops to (image_size, image_size, 3) uint8."""

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        ...

    def __call__(self, image: Image.Image, /) -> np.ndarray:
        """Resize and crop."""
        ...


@dataclasses.dataclass
class Subset:
    """Some images of a dataset, with all of its classes; `numbers` are indices or a mask."""

    dataset: Dataset
    numbers: np.ndarray

    def __post_init__(self) -> None:
        numbers = np.asarray(self.numbers, None if len(self.numbers) else int)
        self.numbers = np.arange(len(self.dataset))[numbers]
        self.labels = self.dataset.labels[self.numbers]
        self.class_names = self.dataset.class_names

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.dataset[int(self.numbers[number])]


@dataclasses.dataclass
class Corrupted:
    """A dataset whose images are corrupted as they are read, each by a seed of its own.

    Large images are corrupted after resize and crop, as in ImageNet-C, and images smaller than the
    model's input before they are enlarged, as in CIFAR-10-C.

    Examples:
        >>> fog = jaxtta.data.Corrupted(dataset, "fog", 5, model.preprocessing)  # of `jaxtta.load`
        >>> fog[0].shape
        (32, 32, 3)
    """

    dataset: Dataset
    corruption: str
    severity: int
    preprocess: Preprocess
    seed: int = 0

    def __post_init__(self) -> None:
        self.labels, self.class_names = self.dataset.labels, self.dataset.class_names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        number = range(len(self))[number]
        image = self.dataset[number]
        if min(image.shape[:2]) < SMALLEST:
            raise UnreadableImageError(f"{name_of(self, number)}: smaller than {SMALLEST} pixels")
        if min(image.shape[:2]) >= self.preprocess.image_size:
            image = prepare(image, self.preprocess)
        seed = image_seed(self.seed, self.corruption, self.severity, number)
        return corrupt(image, self.corruption, self.severity, seed)


def read(
    dataset: Dataset, number: int, seed: int, preprocess: Preprocess
) -> tuple[np.ndarray, np.ndarray]:
    """One image at the model's resolution, and as the dataset gives it (corrupted by the seed)."""
    while isinstance(dataset, Subset):
        dataset, number = dataset.dataset, int(dataset.numbers[number])
    made = isinstance(dataset, Corrupted)
    image = (dataclasses.replace(dataset, seed=seed) if made else dataset)[number]
    if made and min(image.shape[:2]) >= preprocess.image_size:  # preprocessed before corruption
        return image, image
    return prepare(image, preprocess), image


def prepare(image: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Preprocess an image (height, width, 3), unless that would only copy it."""
    leaves = getattr(preprocess, "leaves", None)
    if leaves and leaves(*image.shape[:2]):
        return image
    return preprocess(Image.fromarray(image))


def name_of(dataset: Dataset, number: int) -> str:
    """An image's name for messages; its index if the dataset has no names."""
    while isinstance(dataset, Subset | Corrupted):
        number = int(dataset.numbers[number]) if isinstance(dataset, Subset) else number
        dataset = dataset.dataset
    return getattr(dataset, "name", "image {}".format)(number)


def content_of(dataset: Dataset) -> str | None:
    """A digest of a dataset's stored images; None if it cannot tell whether they changed."""
    return getattr(stored_in(dataset), "content", lambda: None)()


def stored_in(dataset: Dataset) -> Any:
    """The dataset that a subset or corruption reads its images from."""
    return stored_in(dataset.dataset) if isinstance(dataset, Subset | Corrupted) else dataset


def corrupted(dataset: Dataset, preprocess: Preprocess) -> dict[Domain, Dataset]:
    """A benchmark of clean images: as they are, and under every corruption at every severity."""
    return {Domain(CLEAN): dataset} | {
        Domain(name, severity): Corrupted(dataset, name, severity, preprocess)
        for name in CORRUPTIONS
        for severity in range(1, SEVERITIES + 1)
    }


def select(benchmark: Benchmark, domains: Iterable[Domain]) -> None:
    """Raise a ValueError for a domain that a benchmark lacks, or from a dataset's `check`."""
    for corruption, severity in dict.fromkeys(domains):
        if (corruption, severity) not in benchmark:
            same = [str(domain) for domain in benchmark if domain[0] == corruption]
            known = ", ".join(same or dict.fromkeys(domain[0] for domain in benchmark))
            what = f"unknown corruption {corruption!r} of severity {severity}"
            raise ValueError(f"{what}, expected one of {known}")
        getattr(stored_in(benchmark[Domain(corruption, severity)]), "check", lambda: None)()


def labels_of(benchmark: Benchmark) -> np.ndarray:
    """A benchmark's labels (images,) int32, the same in all domains."""
    return next(iter(benchmark.values())).labels


def class_names_of(benchmark: Benchmark) -> tuple[str, ...]:
    """A benchmark's class names, the same in all domains."""
    return next(iter(benchmark.values())).class_names


def subset(benchmark: Benchmark, numbers: np.ndarray) -> dict[Domain, Dataset]:
    """The same images of every domain, by their indices or a mask (images,)."""
    return {domain: Subset(data, numbers) for domain, data in benchmark.items()}


def listed_subset(benchmark: Benchmark, ids: str | Path) -> dict[Domain, Dataset]:
    """The images of a benchmark in folders that a file lists, in the file's order.

    The file has a path a line, of which `<class folder>/<file>` counts; "imagenet-c-5000" stands
    for RobustBench's 5,000 images of ImageNet-C, which many published tables use.
    """
    path = TABLES / f"{ids}.txt" if str(ids) == "imagenet-c-5000" else Path(ids)
    files = getattr(next(iter(benchmark.values())), "files", ())
    wanted, names = (
        ["/".join(Path(nfc(str(file)).strip()).parts[-2:]) for file in listed]
        for listed in (filter(str.strip, read_text(path).split("\n")), files)
    )
    counts = Counter(names)
    odd = [name for name, times in Counter(wanted).items() if times * counts[name] != 1]
    if odd or not wanted:
        what = f"{len(odd)} of {len(wanted)} images are not once in the list and once here"
        raise ValueError(f"{path}: {what}, in {len(names)} files, such as {odd[:1]}")
    numbers = {name: number for number, name in enumerate(names)}
    return subset(benchmark, np.asarray([numbers[name] for name in wanted]))
