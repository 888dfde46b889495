"""Streams: what an adapter meets without being told when the weather changes, in padded batches.

    streams = make_streams("continual", ("fog", "snow"), (5,), labels, order="shuffled", seed=1)
    for batch in read_ahead(Batches(source, streams, 64), workers=2):
        ...

The settings are those the field names. In which order a stream shows its images is a choice of
its own and goes with any of them.
"""

import bisect
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.corruptions import CLEAN
from jaxtta.data.folders import UnreadableImageError
from jaxtta.data.sources import Domain, Source

SETTINGS = ("reset_each_shift", "continual", "gradual", "mixed")
ORDERS = ("shuffled", "stored", "correlated", "dirichlet")


class Stream(NamedTuple):
    """One sequence of images; an adapter starts anew at its beginning and nowhere else.

    Attributes:
        name: unique among the streams of one seed.
        seed: of the order and of corruptions made on the fly.
        segments: the domains that are reported one by one; one may come twice.
        parts: (images, 2) integers each: the segment's number and the image's number in the
            source. No batch reaches from one part into the next.
    """

    name: str
    seed: int
    segments: tuple[Domain, ...]
    parts: tuple[np.ndarray, ...]

    @property
    def items(self) -> np.ndarray:
        """Segments and images along the whole stream, (images, 2)."""
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
    """Lay out the streams of one seed.

    Args:
        setting: `reset_each_shift`, one stream a domain; `continual`, one stream through all
            corruptions at one severity; `gradual`, one stream that takes every corruption from
            severity 1 to 5 and back; `mixed`, one stream of all corruptions interleaved.
        corruptions: their names, in order.
        severities: what strengths to show; (0,) for data that has its own. Gradual needs 1 to 5.
        labels: (images,) the source's.
        order: `shuffled`, `stored`, `correlated` (sorted by class) or `dirichlet` (each class
            spread unevenly over as many slots as there are classes).
        seed: of everything that is drawn.
        limit: show only so many images: the first in stored order, drawn by the seed otherwise.
        concentration: of the Dirichlet order; the smaller, the nearer to sorted by class.

    Returns:
        The streams.

    Raises:
        ValueError: for an unknown setting or order, or numbers that make no sense.

    References:
        Yuan et al. 2023 (Dirichlet order), https://arxiv.org/abs/2303.13899
    """
    _check(setting, order, limit, concentration)
    first = "stored" if order == "stored" else "shuffled"
    images = arrange(labels, first, np.random.default_rng(seed))[:limit]

    def part(segments: Sequence[int]) -> np.ndarray:
        # Image by image through the segments, so that stored order interleaves them.
        items = np.stack(np.meshgrid(images, segments, indexing="ij"), -1).reshape(-1, 2)
        # Seeded anew at each shift: a stream does not depend on what other streams there are.
        rng = np.random.default_rng([seed, 1])
        if order not in ("stored", "shuffled") or len(segments) > 1:
            items = items[arrange(labels[items[:, 0]], order, rng, concentration)]
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
    """A stream of given images, in this order.

    Args:
        name: what to call it.
        domains: its segments.
        images: (images,) integers, numbers in the source.
        seed: of corruptions made on the fly.
        segments: (images,) integers, each image's place in `domains`; None for the first one.

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


def arrange(
    labels: np.ndarray, order: str, rng: np.random.Generator, concentration: float = 0.1
) -> np.ndarray:
    """Put images into an order.

    Args:
        labels: (images,) integers.
        order: one of `ORDERS`.
        rng: what is drawn comes from here.
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
    """One batch of a stream, in numpy; padding stands at the end of a part's last batch.

    Attributes:
        images: (batch, height, width, 3) uint8.
        mask: (batch,) bool, false for padding and for images that could not be read.
        index: (batch,) integers, each image's place in the stream.
        labels: (batch,) integers.
        source_index: (batch,) integers, each image's number in the source; -1 for padding.
        segments: (batch,) integers, the segment of each image; -1 for padding.
        originals: (batch, canvas, canvas, 3) uint8, the images before resize and crop in a corner
            of a canvas; None where no canvas was asked for.
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
    """Where a batch lies: its stream and part, and its first image's place in both."""

    stream: int
    part: int
    offset: int
    index: int


@dataclasses.dataclass(frozen=True)
class Batches:
    """All batches of a sweep as one random-access sequence, stream after stream.

    Attributes:
        source: where images come from.
        streams: the streams.
        size: images a batch.
        canvas: side of the originals' canvas; a larger original is shrunk to fit. None for no
            originals.
    """

    source: Source
    streams: tuple[Stream, ...]
    size: int
    canvas: int | None = None

    @functools.cached_property
    def places(self) -> list[Place]:
        """Where each batch lies."""
        places = []
        for number, stream in enumerate(self.streams):
            before = 0
            for part, items in enumerate(stream.parts):
                for offset in range(0, len(items), self.size):
                    places.append(Place(number, part, offset, before + offset))
                before += len(items)
        return places

    def of(self, stream: int) -> range:
        """Numbers of the batches of one stream."""
        numbers = [place.stream for place in self.places]
        return range(bisect.bisect_left(numbers, stream), bisect.bisect_right(numbers, stream))

    def __len__(self) -> int:
        """Batches of all streams."""
        return len(self.places)

    def __getitem__(self, number: int) -> StreamBatch:
        """Read one batch."""
        place = self.places[int(number)]
        stream = self.streams[place.stream]
        items = stream.parts[place.part][place.offset : place.offset + self.size]
        read = [self._read(stream, *item) for item in items.tolist()]
        side = self.source.preprocess.image_size
        padding = self.size - len(items)
        images = np.zeros((self.size, side, side, 3), np.uint8)
        originals = sizes = None
        if self.canvas:
            originals = np.zeros((self.size, self.canvas, self.canvas, 3), np.uint8)
            sizes = np.ones((self.size, 2), np.int32)
        for row, both in enumerate(read):
            if both is None:
                continue
            images[row], original = both
            if self.canvas:
                originals[row], sizes[row] = on_canvas(original, self.canvas)
        segments, numbers = np.pad(items, ((0, padding), (0, 0)), constant_values=-1).T
        return StreamBatch(
            images,
            np.asarray([both is not None for both in read] + [False] * padding),
            (place.index + np.arange(self.size)).astype(np.int32),
            np.pad(self.source.labels[items[:, 1]], (0, padding)),
            numbers,
            segments,
            originals,
            sizes,
        )

    def _read(
        self, stream: Stream, segment: int, image: int
    ) -> tuple[np.ndarray, np.ndarray | None] | None:
        """An image, and where a canvas waits for it its original."""
        domain = stream.segments[segment]
        try:
            if self.canvas:
                return self.source.read_both(domain, image, stream.seed)
            return self.source.read(domain, image, stream.seed), None
        except UnreadableImageError:
            return None  # masked; whoever reads the batch knows which by `source_index`


def canvas_for(source: Source, domain: Domain, greatest: int = 512, images: int = 50) -> int:
    """A side for the canvas that suits a source, whatever streams are made of it.

    Args:
        source: the images.
        domain: any of its domains, looked at where it has no clean images.
        greatest: the largest side to choose; larger images are shrunk.
        images: how many are looked at, from the first to the last.

    Returns:
        The longest side among them, or `greatest` if that is less or none can be read.
    """
    with contextlib.suppress(ValueError):  # it has no clean images
        source.check(Domain(CLEAN))
        domain = Domain(CLEAN)
    sides: list[int] = []
    for number in np.unique(np.linspace(0, len(source.labels) - 1, images).round().astype(int)):
        with contextlib.suppress(UnreadableImageError):
            sides += source.read_both(domain, int(number), 0)[1].shape[:2]
    return min(max(sides, default=greatest), greatest)


def on_canvas(original: np.ndarray, canvas: int) -> tuple[np.ndarray, np.ndarray]:
    """Put an image into the corner of a canvas.

    Args:
        original: (height, width, 3) uint8.
        canvas: side; a larger image is shrunk to fit.

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

    def __getitem__(self, place: int) -> StreamBatch:
        return self.batches[self.numbers[place]]


def _follow_the_parent(worker: int, workers: int) -> None:
    """Leave interrupts to the parent, and do not outlive it, even if it is killed."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end() -> None:
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=end, daemon=True).start()


def read_ahead(
    batches: Batches, workers: int = 1, numbers: Sequence[int] | None = None
) -> Iterator[StreamBatch]:
    """Read batches in order, ahead of their use.

    Args:
        batches: what to read.
        workers: processes that decode and corrupt; 0 for this process.
        numbers: which batches, to go on where something stopped; None for all.

    Returns:
        An iterator over the batches, the same for any number of workers.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # Grain reads its own; here no absl app has parsed any
        flags.FLAGS.mark_as_parsed()
    chosen = _Chosen(batches, tuple(range(len(batches)) if numbers is None else numbers))
    # One thread a process: the corruptions seed numpy's global state.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = grain.MapDataset.source(chosen).to_iter_dataset(options)
    if workers:
        options = grain.MultiprocessingOptions(workers, 2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_follow_the_parent)
        # By pipe: Grain's shared memory is freed so late that Python calls it leaked at exit.
        by_pipe = grain.experimental.DatasetOptions(min_shm_size=2**40)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, by_pipe)
    return iter(dataset)
