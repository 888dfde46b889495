"""Batches of streams: images preprocessed, padded, and read ahead by other processes."""

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxtta.data.datasets import Benchmark, Dataset, Preprocess, labels_of, read, require_domains
from jaxtta.data.streams import Stream
from jaxtta.images import UnreadableImageError


class StreamBatch(NamedTuple):
    """One batch of a stream, in numpy; a part's last batch is padded at its end.

    Without a canvas there are no originals: full-size images, zero-padded to a common size.
    """

    images: np.ndarray  # (batch, height, width, 3) uint8
    mask: np.ndarray  # (batch,) bool, false for padding and for images that could not be read
    index: np.ndarray  # (batch,) integers, each image's index in the stream
    labels: np.ndarray  # (batch,) integers
    source_index: np.ndarray  # (batch,) each image's index in the dataset; -1 for padding
    segments: np.ndarray  # (batch,) each image's segment; -1 for padding
    originals: np.ndarray | None = None  # (batch, canvas, canvas, 3) uint8
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
        require_domains(self.benchmark, [d for stream in self.streams for d in stream.segments])

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
        return range(bisect.bisect_left(numbers, stream), bisect.bisect_right(numbers, stream))

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
        padded = (originals, sizes) if canvas else ()
        return StreamBatch(images, mask, indices, labels, numbers, segments, *padded)


def canvas_for(dataset: Dataset, greatest: int = 512, images: int = 50) -> int:
    """A canvas size for a dataset: the longest side of so many evenly spaced images.

    It is at most `greatest`, also if none can be read.
    """
    sides: list[int] = []
    for number in np.unique(np.linspace(0, len(dataset) - 1, images).round().astype(int)):
        with contextlib.suppress(UnreadableImageError):
            sides += dataset[int(number)].shape[:2]
    return min(max(sides, default=greatest), greatest)


def pad_to_canvas(original: np.ndarray, canvas: int) -> tuple[np.ndarray, np.ndarray]:
    """Zero-pad an image (height, width, 3) to a square, shrunk first if it is larger.

    Returns the canvas (canvas, canvas, 3) uint8, and the image's height and width on it (2,).
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


@functools.lru_cache(maxsize=1)
def _unpickled(path: str) -> tuple[Batches, Sequence[int]]:
    return pickle.loads(Path(path).read_bytes())


def _read_from(path: str, index: int) -> StreamBatch:
    batches, numbers = _unpickled(path)
    return batches[numbers[index]]


def _follow_the_parent(worker: int, workers: int) -> None:
    """Ignore SIGINT; exit with the parent."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def read_ahead(
    batches: Batches, workers: int = 0, numbers: Sequence[int] | None = None
) -> Iterator[StreamBatch]:
    """Prefetch batches in order, the same for any number of workers.

    Args:
        batches: the batches to read.
        workers: processes that decode and corrupt images; 0 = a thread of this process. Each
            process imports the script again, so a script with workers needs
            `if __name__ == "__main__":`.
        numbers: indices of the batches to read, for example to resume; None for all.

    Raises:
        ChildProcessError: if a process ends early, as the batches are read.
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
    numbers = range(len(batches)) if numbers is None else tuple(numbers)
    if workers:
        return _read_in_processes(batches, numbers, workers)
    return iter(_dataset(len(numbers), lambda index: batches[numbers[index]]))


def _dataset(length: int, read: Callable[[int], StreamBatch]) -> Any:
    import grain

    # One thread per process: the corruptions seed numpy's global state.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return grain.MapDataset.range(length).map(read).to_iter_dataset(options)


def _read_in_processes(
    batches: Batches, numbers: Sequence[int], workers: int
) -> Iterator[StreamBatch]:
    import cloudpickle  # as Grain does: a dataset may be defined in a notebook
    import grain

    # In a file: Python writes what a new process gets into a pipe and waits for it to be read, for
    # ever if it is more than fits the pipe and the process has ended.
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        try:
            cloudpickle.dump((batches, numbers), file)
        except (TypeError, pickle.PicklingError) as error:
            raise TypeError(
                f"no other process can read these images ({error}): use 0 workers"
            ) from error
        file.flush()
        options = grain.MultiprocessingOptions(workers, 2)
        dataset = _dataset(len(numbers), functools.partial(_read_from, file.name))
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
