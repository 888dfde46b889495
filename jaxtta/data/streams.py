"""Streams: the pictures of one corruption in an order, cut into padded batches.

A source answers `read(corruption, i)` with one picture at the model's resolution. `Batches` makes
of it a random-access sequence of batches over several corruptions, which Grain reads ahead in
worker processes: one set of workers serves a whole sweep.
"""

import dataclasses
import functools
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from jaxtta.data.corruptions import (
    CLEAN,
    SMALLEST,
    check_corruption,
    corrupt,
    picture_seed,
)
from jaxtta.data.folders import ImageFolder, UnreadablePictureError, open_picture


class Preprocess(Protocol):
    """What a source needs of a model; `jaxtta.clip.CLIP.preprocessing` is one."""

    image_size: int

    def rgb(self, picture: Image.Image) -> Image.Image:
        """Convert to 8-bit RGB."""

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Resize and crop to (image_size, image_size, 3) uint8."""


class Source(Protocol):
    """Labelled pictures under several corruptions."""

    labels: np.ndarray
    class_names: tuple[str, ...]
    preprocess: Preprocess

    def check(self, corruption: str) -> None:
        """Raise an error if there is no such corruption."""

    def read(self, corruption: str, number: int) -> np.ndarray:
        """One picture, (height, width, 3) uint8, or an UnreadablePictureError."""

    def name(self, number: int) -> str:
        """What to call a picture in a message."""


@dataclasses.dataclass(frozen=True)
class CorruptedOnTheFly:
    """Clean pictures from a folder, corrupted as they are read.

    A picture is corrupted at the smaller of its own and the model's resolution: photographs after
    resize and crop, as ImageNet-C is made, and pictures smaller than the model's input before
    they are enlarged, as CIFAR-10-C is.

    Attributes:
        folder: the pictures.
        preprocess: the model's preprocessing.
        severity: 1 to 5.
        seed: of the corruptions; each picture has its own under each corruption.
    """

    folder: ImageFolder
    preprocess: Preprocess
    severity: int = 5
    seed: int = 0

    @property
    def labels(self) -> np.ndarray:
        """Labels (pictures,)."""
        return self.folder.labels

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.folder.class_names

    def name(self, number: int) -> str:
        """The picture's path."""
        return str(self.folder.files[number])

    def check(self, corruption: str) -> None:
        """Raise a ValueError if there is no such corruption."""
        check_corruption(corruption, self.severity)
        if corruption != CLEAN and self.preprocess.image_size < SMALLEST:
            raise ValueError(
                f"the model takes pictures of {self.preprocess.image_size} pixels, corruptions "
                f"need at least {SMALLEST}"
            )

    def read(self, corruption: str, number: int) -> np.ndarray:
        """Read, preprocess and corrupt one picture."""
        picture = open_picture(self.folder.files[number])
        try:
            picture = self.preprocess.rgb(picture)
        except ValueError as error:
            raise UnreadablePictureError(f"{self.name(number)}: {error}") from error
        if corruption != CLEAN and min(picture.size) < SMALLEST:
            raise UnreadablePictureError(f"{self.name(number)}: smaller than {SMALLEST} pixels")
        seed = picture_seed(self.seed, corruption, self.severity, number)
        distort = functools.partial(corrupt, name=corruption, severity=self.severity, seed=seed)
        if min(picture.size) < self.preprocess.image_size:
            return self.preprocess(Image.fromarray(distort(np.asarray(picture))))
        return distort(self.preprocess(picture))


@dataclasses.dataclass(frozen=True)
class CorruptedArrays:
    """Ready corrupted pictures: `<corruption>.npy`, each (pictures, height, width, 3) uint8.

    Attributes:
        root: the folder; the same pictures in the same order in every file.
        preprocess: the model's preprocessing.
        class_names: names of the classes, in the labels' order.
        labels: (pictures,) integers.
    """

    root: Path
    preprocess: Preprocess
    class_names: tuple[str, ...]
    labels: np.ndarray

    def name(self, number: int) -> str:
        """The picture's number."""
        return f"{self.root} picture {number}"

    def check(self, corruption: str) -> None:
        """Raise an error if there is no such file, or it does not fit the labels."""
        _open_array(self.root, corruption, len(self.labels))

    def read(self, corruption: str, number: int) -> np.ndarray:
        """Read and preprocess one picture."""
        array = _open_array(self.root, corruption, len(self.labels))
        return self.preprocess(Image.fromarray(array[number]))


@functools.lru_cache(maxsize=32)  # open files, not pictures
def _open_array(root: Path, corruption: str, pictures: int) -> np.ndarray:
    path = root / f"{corruption}.npy"
    if not path.exists():
        known = sorted(p.stem for p in root.glob("*.npy") if p.stem != "labels")
        raise ValueError(
            f"unknown corruption {corruption!r}, {root} has {', '.join(known) or 'none'}"
        )
    array = _load(path, mmap_mode="r")
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(
            f"{path}: is {array.dtype} of shape {array.shape}, expected uint8 of shape (pictures, "
            "height, width, 3)"
        )
    if len(array) != pictures:
        raise ValueError(f"{path}: has {len(array)} pictures for {pictures} labels")
    return array


def _load(path: Path, **options: Any) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False, **options)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as an array ({error})") from error


def corrupted_arrays(
    root: str | Path, preprocess: Preprocess, class_names: Sequence[str]
) -> CorruptedArrays:
    """Open a folder of `<corruption>.npy` files beside one `labels.npy`.

    Args:
        root: the folder.
        preprocess: the model's preprocessing.
        class_names: names of the classes, in the labels' order.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if folder or labels are missing.
        ValueError: if the labels are no integers or lie outside the classes.
    """
    root = Path(root)
    path = root / "labels.npy"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    labels = _load(path)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{path}: is {labels.dtype} of shape {labels.shape}, expected integers")
    if not len(labels):
        raise ValueError(f"{path}: holds no labels")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise ValueError(
            f"{path}: labels run from {labels.min()} to {labels.max()}, expected 0 to "
            f"{len(class_names) - 1} for {len(class_names)} class names"
        )
    return CorruptedArrays(root, preprocess, tuple(class_names), labels.astype(np.int32))


class StreamBatch(NamedTuple):
    """One batch of a stream, in numpy; padding stands at the end of a stream's last batch.

    Attributes:
        images: (batch, height, width, 3) uint8.
        mask: (batch,) bool, false for padding and for pictures that could not be read.
        index: (batch,) integers, each picture's number in the stream.
        labels: (batch,) integers.
        pictures: (batch,) integers, each picture's number in the source; -1 for padding.
    """

    images: np.ndarray
    mask: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    pictures: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batches:
    """All batches of a sweep as one sequence: stream after stream, in the same order of pictures.

    Attributes:
        source: where pictures come from.
        corruptions: one stream each.
        order: (pictures,) which pictures, in which order.
        size: pictures a batch.
    """

    source: Source
    corruptions: tuple[str, ...]
    order: np.ndarray
    size: int

    @property
    def per_stream(self) -> int:
        """Batches of one stream."""
        return -(-len(self.order) // self.size)

    def __len__(self) -> int:
        """Batches of all streams."""
        return self.per_stream * len(self.corruptions)

    def __getitem__(self, number: int) -> StreamBatch:
        """Read one batch."""
        stream, number = divmod(int(number), self.per_stream)
        pictures = self.order[number * self.size : (number + 1) * self.size]
        read = [self._read(self.corruptions[stream], int(picture)) for picture in pictures]
        side = self.source.preprocess.image_size
        blank = np.zeros((side, side, 3), np.uint8)
        padding = self.size - len(pictures)
        return StreamBatch(
            np.stack([blank if x is None else x for x in read] + [blank] * padding),
            np.asarray([x is not None for x in read] + [False] * padding),
            (number * self.size + np.arange(self.size)).astype(np.int32),
            np.pad(self.source.labels[pictures], (0, padding)),
            np.pad(pictures, (0, padding), constant_values=-1),
        )

    def _read(self, corruption: str, picture: int) -> np.ndarray | None:
        try:
            return self.source.read(corruption, picture)
        except UnreadablePictureError:
            return None  # masked; whoever reads the batch knows which by `pictures`


def picture_order(pictures: int, *, shuffle: int | None, limit: int | None = None) -> np.ndarray:
    """Which pictures a stream shows, in which order.

    Args:
        pictures: how many there are.
        shuffle: seed of the shuffling; None for stored order.
        limit: take only the first so many after shuffling.

    Returns:
        Their numbers.

    Raises:
        ValueError: if there is none, or the limit is below one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    order = np.arange(pictures)
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(pictures)
    return order[:limit]


def _leave_interrupts_to_the_parent(worker: int, workers: int) -> None:
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def read_ahead(batches: Batches, workers: int = 1) -> Iterator[StreamBatch]:
    """Read all batches in order, ahead of their use.

    Args:
        batches: what to read.
        workers: processes that decode and corrupt; 0 for this process.

    Returns:
        An iterator over the batches, the same for any number of workers.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads its own; here no absl app has parsed any
        flags.FLAGS.mark_as_parsed()
    # One thread a process: the corruptions seed numpy's global state.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
    if workers:
        options = grain.MultiprocessingOptions(workers, 2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_leave_interrupts_to_the_parent)
    return iter(dataset)
