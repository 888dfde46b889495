"""Streams of images with distribution shifts, in padded batches.

    streams = make_streams("continual", ("fog", "snow"), (5,), labels, order="shuffled", seed=1)
    for batch in read_ahead(Batches(benchmark, streams, 64, model.preprocessing), workers=2):
        ...

The settings have their usual names in the literature. The order of the images in a stream is a
separate option and can be combined with any setting.
"""

import bisect
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.corruptions import CLEAN
from jaxtta.data.datasets import (
    Benchmark,
    Dataset,
    Domain,
    Preprocess,
    labels_of,
    read,
    require_domains,
)
from jaxtta.images import UnreadableImageError

SETTINGS = ("reset_each_shift", "continual", "gradual", "mixed")
ORDERS = ("shuffled", "stored", "correlated", "dirichlet")


class Stream(NamedTuple):
    """One sequence of images; an adapter is reset at its beginning only.

    Attributes:
        name: unique among the streams of one seed.
        seed: random seed of the order and of corruptions made on the fly.
        segments: the domains that are reported separately; a domain may occur twice.
        parts: (images, 2) integers each: the segment's index and the image's index in the source.
            No batch crosses the boundary between two parts.
    """

    name: str
    seed: int
    segments: tuple[Domain, ...]
    parts: tuple[np.ndarray, ...]

    @property
    def items(self) -> np.ndarray:
        """Segment and image indices of the whole stream, (images, 2)."""
        return np.concatenate(self.parts)


def make_streams(
    setting: str,
    corruptions: Sequence[str],
    severities: Sequence[int],
    labels: np.ndarray,
    *,
    order: str = "shuffled",
    seed: int = 1,
    limit: int | None = None,
    concentration: float = 0.1,
) -> list[Stream]:
    """Make the streams of one seed.

    Args:
        setting: `reset_each_shift`, one stream per domain; `continual`, one stream through all
            corruptions at one severity; `gradual`, one stream that takes every corruption from
            severity 1 to 5 and back; `mixed`, one stream of all corruptions interleaved.
        corruptions: their names, in order.
        severities: severities to include; (0,) for data with a fixed one. Gradual needs 1 to 5.
        labels: (images,) the source's labels.
        order: `shuffled`, `stored`, `correlated` (sorted by class) or `dirichlet` (each class
            split by a Dirichlet sample over as many time slots as classes).
        seed: random seed.
        limit: use at most this many images: the first in stored order, otherwise a sample.
        concentration: of the Dirichlet order; smaller values are closer to sorted by class.

    Returns:
        The streams.

    Raises:
        ValueError: for an unknown setting or order, or invalid numbers.

    References:
        Yuan et al. 2023 (Dirichlet order), https://arxiv.org/abs/2303.13899
    """
    _check(setting, order, limit, concentration)
    first = "stored" if order == "stored" else "shuffled"
    images = order_indices(labels, first, np.random.default_rng(seed))[:limit]

    def part(segments: Sequence[int]) -> np.ndarray:
        # All segments of one image before the next, so that stored order interleaves them.
        items = np.stack(np.meshgrid(images, segments, indexing="ij"), -1).reshape(-1, 2)
        # Seeded again at each shift: a stream does not depend on the other streams.
        rng = np.random.default_rng([seed, 1])
        if order not in ("stored", "shuffled") or len(segments) > 1:
            items = items[order_indices(labels[items[:, 0]], order, rng, concentration)]
        return items[:, ::-1].astype(np.int32)

    def stream(name: str, domains: Sequence[Domain], mixed: bool = False) -> Stream:
        numbers = range(len(domains))
        parts = [part(numbers)] if mixed else [part([number]) for number in numbers]
        return Stream(name, seed, tuple(domains), tuple(parts))

    def domains_at(severity: int) -> list[Domain]:
        return [Domain(name, 0 if name == CLEAN else severity) for name in corruptions]

    if setting == "gradual":
        steps = (1, 2, 3, 4, 5, 4, 3, 2, 1)
        domains = [
            Domain(name, severity)
            for name in corruptions
            for severity in ((0,) if name == CLEAN else steps)
        ]
        return [stream(setting, domains)]
    if setting == "reset_each_shift":
        every = dict.fromkeys(d for severity in severities for d in domains_at(severity))
        return [stream(str(domain), [domain]) for domain in every]
    names = [f"{setting}-{severity}" if severity else setting for severity in severities]
    return [
        stream(name, domains_at(severity), mixed=setting == "mixed")
        for name, severity in zip(names, severities, strict=True)
    ]


def stream_of(
    name: str,
    domains: Sequence[Domain],
    images: np.ndarray,
    seed: int,
    segments: np.ndarray | None = None,
) -> Stream:
    """A stream of the given images, in this order.

    Args:
        name: its name.
        domains: its segments.
        images: (images,) integers, indices in the source.
        seed: random seed of corruptions made on the fly.
        segments: (images,) integers, each image's index in `domains`; None for all 0.

    Returns:
        The stream, in one part.
    """
    segments = np.zeros(len(images)) if segments is None else segments
    items = np.stack([segments, images], 1).astype(np.int32)
    return Stream(name, seed, tuple(domains), (items,))


def _check(setting: str, order: str, limit: int | None, concentration: float) -> None:
    for what, value, known in (("setting", setting, SETTINGS), ("order", order, ORDERS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}, expected one of {', '.join(known)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    if not concentration > 0:
        raise ValueError(f"concentration is {concentration}, expected a positive number")


def order_indices(
    labels: np.ndarray, order: str, rng: np.random.Generator, concentration: float = 0.1
) -> np.ndarray:
    """Order images.

    Args:
        labels: (images,) integers.
        order: one of `ORDERS`.
        rng: random generator.
        concentration: of the Dirichlet order.

    Returns:
        (images,) a permutation.
    """
    if order == "stored":
        return np.arange(len(labels))
    shuffled = rng.permutation(len(labels))
    if order == "shuffled":
        return shuffled
    if order == "correlated":
        return shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes = np.unique(labels)
    slot = np.empty(len(labels), int)
    for name in classes:
        members = shuffled[labels[shuffled] == name]
        shares = rng.dirichlet(np.full(len(classes), concentration))
        edges = (np.cumsum(shares[:-1]) * len(members)).round().astype(int)
        slot[members] = np.searchsorted(edges, np.arange(len(members)), side="right")
    again = rng.permutation(len(labels))
    return again[np.argsort(slot[again], kind="stable")]


class StreamBatch(NamedTuple):
    """One batch of a stream, in numpy; a part's last batch is padded at its end.

    Attributes:
        images: (batch, height, width, 3) uint8.
        mask: (batch,) bool, false for padding and for images that could not be read.
        index: (batch,) integers, each image's index in the stream.
        labels: (batch,) integers.
        source_index: (batch,) integers, each image's index in the source; -1 for padding.
        segments: (batch,) integers, the segment of each image; -1 for padding.
        originals: (batch, canvas, canvas, 3) uint8, full-size images zero-padded to a common size;
            None without a canvas.
        sizes: (batch, 2) integers, the originals' height and width.
    """

    images: np.ndarray
    mask: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    source_index: np.ndarray
    segments: np.ndarray
    originals: np.ndarray | None = None
    sizes: np.ndarray | None = None


class Place(NamedTuple):
    """Location of a batch: its stream and part, and its first image's index in both."""

    stream: int
    part: int
    offset: int
    index: int


@dataclasses.dataclass(frozen=True)
class Batches:
    """All batches of a sweep as one random-access sequence, stream after stream.

    Attributes:
        benchmark: the images.
        streams: the streams.
        size: images per batch.
        preprocess: the model's preprocessing.
        canvas: size to which originals are padded; larger originals are shrunk first. None for no
            originals.
    """

    benchmark: Benchmark
    streams: tuple[Stream, ...]
    size: int
    preprocess: Preprocess
    canvas: int | None = None

    def __post_init__(self) -> None:
        """Check that the benchmark has the streams' domains."""
        require_domains(self.benchmark, [d for stream in self.streams for d in stream.segments])

    @functools.cached_property
    def places(self) -> list[Place]:
        """Location of each batch."""
        places = []
        for number, stream in enumerate(self.streams):
            before = 0
            for part, items in enumerate(stream.parts):
                for offset in range(0, len(items), self.size):
                    places.append(Place(number, part, offset, before + offset))
                before += len(items)
        return places

    def of(self, stream: int) -> range:
        """Indices of the batches of one stream."""
        numbers = [place.stream for place in self.places]
        return range(bisect.bisect_left(numbers, stream), bisect.bisect_right(numbers, stream))

    def __len__(self) -> int:
        """Number of batches of all streams."""
        return len(self.places)

    def __getitem__(self, number: int) -> StreamBatch:
        """Read one batch."""
        place = self.places[int(number)]
        stream = self.streams[place.stream]
        items = stream.parts[place.part][place.offset : place.offset + self.size]
        padding = self.size - len(items)
        segments, numbers = np.pad(items, ((0, padding), (0, 0)), constant_values=-1).T
        side, mask = self.preprocess.image_size, np.zeros(self.size, bool)
        images = np.zeros((self.size, side, side, 3), np.uint8)
        originals = sizes = None
        if self.canvas:
            originals = np.zeros((self.size, self.canvas, self.canvas, 3), np.uint8)
            sizes = np.ones((self.size, 2), np.int32)
        for row, (segment, image) in enumerate(items.tolist()):
            dataset = self.benchmark[stream.segments[segment]]
            try:
                images[row], original = read(dataset, image, stream.seed, self.preprocess)
            except UnreadableImageError:
                continue  # masked; `source_index` tells which image it is
            mask[row] = True
            if self.canvas and originals is not None and sizes is not None:
                originals[row], sizes[row] = pad_to_canvas(original, self.canvas)
        return StreamBatch(
            images,
            mask,
            (place.index + np.arange(self.size)).astype(np.int32),
            np.pad(labels_of(self.benchmark)[items[:, 1]], (0, padding)),
            numbers,
            segments,
            originals,
            sizes,
        )


def canvas_for(dataset: Dataset, greatest: int = 512, images: int = 50) -> int:
    """Choose a canvas size for a dataset, independent of the streams.

    Args:
        dataset: the dataset; of a benchmark, the clean images if there are any.
        greatest: the maximum size; larger images are shrunk.
        images: number of images sampled, evenly spaced.

    Returns:
        The longest side among them, at most `greatest`; `greatest` if none can be read.
    """
    sides: list[int] = []
    for number in np.unique(np.linspace(0, len(dataset) - 1, images).round().astype(int)):
        with contextlib.suppress(UnreadableImageError):
            sides += dataset[int(number)].shape[:2]
    return min(max(sides, default=greatest), greatest)


def pad_to_canvas(original: np.ndarray, canvas: int) -> tuple[np.ndarray, np.ndarray]:
    """Zero-pad an image to a square canvas.

    Args:
        original: (height, width, 3) uint8.
        canvas: side in pixels; a larger image is shrunk first.

    Returns:
        The canvas (canvas, canvas, 3) uint8, and the image's height and width on it (2,).
    """
    shrink = canvas / max(original.shape[:2])
    if shrink < 1:
        height, width = (max(round(shrink * side), 1) for side in original.shape[:2])
        smaller = Image.fromarray(original).resize((width, height), Image.Resampling.BICUBIC)
        original = np.asarray(smaller)
    height, width = original.shape[:2]
    filled = np.zeros((canvas, canvas, 3), np.uint8)
    filled[:height, :width] = original
    return filled, np.array([height, width], np.int32)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    batches: Batches
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> StreamBatch:
        return self.batches[self.numbers[index]]


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Batches in a file, from which each process reads them.

    Python writes what a new process gets into a pipe and waits for it to be read; if there is more
    than fits the pipe and the process ends before it reads, it waits for ever.
    """

    path: str
    length: int

    @functools.cached_property
    def batches(self) -> _Chosen:
        with Path(self.path).open("rb") as file:
            return pickle.load(file)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> StreamBatch:
        return self.batches[index]


def _follow_the_parent(worker: int, workers: int) -> None:
    """Ignore SIGINT; exit with the parent."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def read_ahead(
    batches: Batches, workers: int = 0, numbers: Sequence[int] | None = None
) -> Iterator[StreamBatch]:
    """Prefetch batches in order.

    Args:
        batches: the batches to read.
        workers: processes that decode and corrupt images; 0 = a thread of this process. Each
            process imports the script again, so a script with workers needs
            `if __name__ == "__main__":`.
        numbers: indices of the batches to read, for example to resume; None for all.

    Returns:
        An iterator over the batches, the same for any number of workers. It raises a
        ChildProcessError if a process ends early.

    Raises:
        RuntimeError: in a process that is importing the script that has started it.
    """
    from absl import flags

    # Python itself refuses this too late: Grain's threads are waiting for the process by then.
    if workers and getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "read_ahead starts processes, which import the script again: put the script's work "
            'under if __name__ == "__main__": or use workers=0'
        )
    if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which nothing has parsed here
        flags.FLAGS.mark_as_parsed()
    chosen = _Chosen(batches, tuple(range(len(batches)) if numbers is None else numbers))
    return _read_in_processes(chosen, workers) if workers else iter(_dataset(chosen))


def _dataset(batches: Any) -> Any:
    import grain

    # One thread per process: the corruptions seed numpy's global state.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return grain.MapDataset.source(batches).to_iter_dataset(options)


def _read_in_processes(batches: _Chosen, workers: int) -> Iterator[StreamBatch]:
    import cloudpickle  # as Grain does: a source may be defined in a notebook
    import grain

    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        cloudpickle.dump(batches, file)
        file.flush()
        options = grain.MultiprocessingOptions(workers, 2)
        dataset = _dataset(_Stored(file.name, len(batches)))
        dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_the_parent)
        # By pipe: Grain frees shared memory so late that Python reports a leak at exit.
        by_pipe = grain.experimental.DatasetOptions(min_shm_size=2**40)
        try:
            yield from grain.experimental.WithOptionsIterDataset(dataset, by_pipe)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise ChildProcessError(
                "a process that reads images has ended early: killed, perhaps for lack of memory, "
                'or started by a script without if __name__ == "__main__": use fewer workers or 0'
            ) from error
