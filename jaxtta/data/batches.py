"""Batches of streams: images preprocessed, padded, and read ahead by threads or processes."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Generator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.arrays import ArrayDataset
from jaxtta.data.datasets import Benchmark, Dataset, Preprocess, Subset, labels_of, read, select
from jaxtta.data.folders import ImageFolder
from jaxtta.data.streams import Stream
from jaxtta.images import UnreadableImageError


class StreamBatch(NamedTuple):
    """One batch of a stream, in numpy; a part's last batch is padded at its end."""

    images: np.ndarray  # (batch, height, width, 3) uint8
    mask: np.ndarray  # (batch,) bool, false for padding and for images that could not be read
    index: np.ndarray  # (batch,) integers, each image's index in the stream
    labels: np.ndarray  # (batch,) integers
    source_index: np.ndarray  # (batch,) each image's index in the dataset; -1 for padding
    segments: np.ndarray  # (batch,) each image's segment; -1 for padding
    originals: np.ndarray | None = None  # (batch, canvas, canvas, 3) uint8, of full size, padded
    sizes: np.ndarray | None = None  # (batch, 2) integers, the originals' height and width


@dataclasses.dataclass(frozen=True)
class Batches:
    """All batches of a sweep as one random-access sequence, stream after stream."""

    benchmark: Benchmark
    streams: tuple[Stream, ...]
    size: int  # images per batch
    preprocess: Preprocess
    canvas: int | None = None  # side to which originals are padded; None for no originals

    def __post_init__(self) -> None:
        select(self.benchmark, [d for stream in self.streams for d in stream.segments])

    @functools.cached_property
    def _places(self) -> list[tuple[int, int, np.ndarray]]:
        """Of each batch: its stream, its first image's index there, and its rows of the stream."""
        places = []
        for number, stream in enumerate(self.streams):
            index = 0
            for part in stream.parts:
                for start in range(0, len(part), self.size):
                    places.append((number, index + start, part[start : start + self.size]))
                index += len(part)
        return places

    def of(self, stream: int) -> range:
        """Indices of the batches of one stream."""
        numbers = [place[0] for place in self._places]
        return range(*np.searchsorted(numbers, [stream, stream + 1]).tolist())

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> StreamBatch:
        stream_number, index, items = self._places[int(number)]
        stream, padding = self.streams[stream_number], self.size - len(items)
        segments, numbers = np.pad(items, ((0, padding), (0, 0)), constant_values=-1).T
        side, canvas = self.preprocess.image_size, self.canvas or 0
        images, mask = np.zeros((self.size, side, side, 3), np.uint8), np.zeros(self.size, bool)
        originals = np.zeros((self.size, canvas, canvas, 3), np.uint8)
        sizes = np.ones((self.size, 2), np.int32)
        for row, (segment, image) in enumerate(items.tolist()):
            dataset = self.benchmark[stream.segments[segment]]
            try:
                images[row], original = read(dataset, image, stream.seed, self.preprocess)
            except UnreadableImageError:
                continue  # masked; `source_index` tells which image it is
            mask[row] = True
            if canvas:
                originals[row], sizes[row] = pad_to_canvas(original, canvas)
        indices = (index + np.arange(self.size)).astype(np.int32)
        labels = np.pad(labels_of(self.benchmark)[items[:, 1]], (0, padding))
        known = (images, mask, indices, labels, numbers, segments)
        return StreamBatch(*known, originals, sizes) if canvas else StreamBatch(*known)


def canvas_for(dataset: Dataset, greatest: int = 512, images: int = 50) -> int:
    """The longest side, up to `greatest`, of so many evenly spaced images of a dataset."""
    sides: list[int] = []
    for number in np.unique(np.linspace(0, len(dataset) - 1, images).round().astype(int)):
        with contextlib.suppress(UnreadableImageError):
            sides += dataset[int(number)].shape[:2]
    return min(max(sides, default=greatest), greatest)


def pad_to_canvas(original: np.ndarray, canvas: int) -> tuple[np.ndarray, np.ndarray]:
    """Zero-pad an image, shrunk to fit, to (canvas, canvas, 3) uint8; its size there is (2,)."""
    height, width = original.shape[:2]
    shrink = canvas / max(height, width)
    if shrink < 1:
        height, width = (max(round(shrink * side), 1) for side in (height, width))
        smaller = Image.fromarray(original).resize((width, height), Image.Resampling.BICUBIC)
        original = np.asarray(smaller)
    filled = np.zeros((canvas, canvas, 3), np.uint8)
    filled[:height, :width] = original
    return filled, np.array([height, width], np.int32)


def read_ahead(
    batches: Batches, workers: int = 0, numbers: Sequence[int] | None = None, together: int = 1
) -> Generator[StreamBatch]:
    """Prefetch batches in order, the same for any number of workers.

    Args:
        batches: the batches to read.
        workers: threads that decode files, or processes where images are corrupted or come from
            Python code; these import the script again, which needs `if __name__ == "__main__":`
            then. 0 for one thread.
        numbers: indices of the batches to read, for example to resume; None for all.
        together: how many are used at once; at least as many are read ahead.
    """
    waiting = iter(range(len(batches)) if numbers is None else numbers)
    with contextlib.ExitStack() as stack:
        if workers and not _stored(batches):
            import cloudpickle

            # In a file: Python waits for ever to send more than a pipe holds to an ended process.
            file = stack.enter_context(tempfile.NamedTemporaryFile())
            file.write(cloudpickle.dumps(batches))  # a dataset may be defined in a notebook
            file.flush()
            read = functools.partial(_read_from, file.name)
            spawn = multiprocessing.get_context("spawn")
            pool = futures.ProcessPoolExecutor(workers, spawn, _follow_the_parent)
        else:  # corruptions seed numpy's global state: one thread, in each process
            pool, read = futures.ThreadPoolExecutor(max(workers, 1)), batches.__getitem__
        stack.callback(pool.shutdown, cancel_futures=True)
        try:
            first = itertools.islice(waiting, max(2 * workers, 2, together))
            ahead = collections.deque(pool.submit(read, number) for number in first)
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(pool.submit(read, number) for number in itertools.islice(waiting, 1))
                yield batch
        except futures.BrokenExecutor as error:
            why = 'memory was short, or the script lacks if __name__ == "__main__"'
            raise ChildProcessError(f"a process that reads images has ended: {why}") from error


def _stored(batches: Batches) -> bool:
    """Whether all images are decoded from files, by libraries that other threads run beside."""
    for domain in {domain for stream in batches.streams for domain in stream.segments}:
        dataset = batches.benchmark[domain]
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        records = getattr(dataset, "stored_in", ())  # ArrayRecord's reader is meant for threads
        if not records and not isinstance(dataset, ImageFolder | ArrayDataset):
            return False
    return True


def _follow_the_parent() -> None:
    """Ignore SIGINT; exit with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@functools.lru_cache(maxsize=1)
def _unpickled(path: str) -> Batches:
    return pickle.loads(Path(path).read_bytes())


def _read_from(path: str, number: int) -> StreamBatch:
    return _unpickled(path)[number]
