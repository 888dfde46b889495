"""Running adapters over streams; all adapters step on each batch as it is read."""

import dataclasses
import itertools
import logging
import resource
import sys
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from jaxtta.adapters import Adapter
from jaxtta.data import Batches, Stream, StreamBatch, contents_of, read_ahead
from jaxtta.evaluate.checkpoint import Checkpoints
from jaxtta.evaluate.record import Record, gain
from jaxtta.evaluate.results import Cell, Results, digest_of
from jaxtta.models import Batch

BASELINE = "zero_shot"
log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Job:
    """One stream and the adapters that have not finished it."""

    stream: Stream
    numbers: range
    adapters: list[str]
    states: dict[str, Any]
    records: dict[str, Record]
    checkpoints: Checkpoints
    content: str | None
    done: int = 0


def run(
    adapters: Mapping[str, Adapter],
    params: Any,
    batches: Batches,
    results: Results,
    *,
    setting: str = "",
    from_originals: Collection[str] = (),
    workers: int = 0,
    worker: tuple[int, int] = (0, 1),
    checkpoint_every: int | None = None,
    save_predictions: bool = False,
    trust_data: bool = False,
    progress: bool = True,
) -> list[Cell]:
    """Run every adapter over every stream and save each cell when its stream is finished.

    Existing cells are not recomputed. Adapters step in lockstep, so that each image is read once.

    Args:
        adapters: the adapters by name.
        params: the frozen parameters.
        batches: the streams.
        results: the folder, locked during the run.
        setting: name of the streams' setting, for the cells.
        from_originals: adapters that make their own views; `batches` needs a canvas for them.
        workers: processes that prefetch batches, as for `data.read_ahead`; 0 = none.
        worker: index of this machine and number of machines that share the streams.
        checkpoint_every: batches between two checkpoints within a stream.
        save_predictions: save an `.npz` with per-image predictions of each cell.
        trust_data: take earlier results without a look at whether the stored images are still the
            same.
        progress: show a progress bar.

    Returns:
        The cells of this worker's streams, by stream, in the order of the adapters.

    Raises:
        ValueError: if the folder has another sweep or results of other images, no image of a stream
            can be read, or the canvas is missing.
        OSError: if the folder cannot be written; finished results are saved.
    """
    if from_originals and batches.canvas is None:
        raise ValueError(f"{', '.join(from_originals)} makes its own views: batches need a canvas")
    cells: dict[tuple[str, int, str], Cell] = {}
    share = range(worker[0], len(batches.streams), worker[1])
    with results.claim(worker):
        contents = dict.fromkeys(share) if trust_data else _contents(batches, share, progress)
        for number, name in itertools.product(share, adapters):
            stream = batches.streams[number]
            cell = results.read(name, stream.name, stream.seed, contents[number])
            if cell is not None:
                cells[stream.name, stream.seed, name] = cell
        if cells and not trust_data and None in contents.values():
            log.warning(
                "%s: earlier results are taken as they are, since %s cannot tell whether its "
                "images have changed: it has no contents(domains)",
                *(results.root, type(batches.source).__name__),
            )
        missing = {
            number: [n for n in adapters if (*_key(batches.streams[number]), n) not in cells]
            for number in share
        }
        jobs = [
            _prepare(
                *(number, names, adapters, params, batches, results, checkpoint_every),
                contents[number],
            )
            for number, names in missing.items()
            if names
        ]
        to_read = [number for job in jobs for number in job.numbers[job.done :]]
        total = sum(len(job.numbers) for job in jobs)
        bar = tqdm(
            total=total,
            initial=total - len(to_read),
            unit="batch",
            disable=not progress or not jobs,
        )
        with bar:
            source = iter(read_ahead(batches, workers, to_read)) if jobs else iter(())
            steps: dict[str, Callable] = {}
            for job in jobs:
                _run_stream(job, adapters, steps, params, from_originals, source, bar)
                baseline = cells.get((*_key(job.stream), BASELINE))
                for name, cell in _cells(job, batches, baseline, setting).items():
                    arrays = job.records[name].arrays() if save_predictions else None
                    cell["content"] = job.content
                    cells[(*_key(job.stream), name)] = results.write(cell, arrays)
                job.checkpoints.remove()
                job.states.clear()
                job.records.clear()
            next(source, None)  # ends the reader processes
    order = [(*_key(batches.streams[number]), name) for number in share for name in adapters]
    return [cells[key] for key in order]


def _key(stream: Stream) -> tuple[str, int]:
    return stream.name, stream.seed


def _contents(batches: Batches, share: Sequence[int], progress: bool) -> dict[int, str | None]:
    """One digest of the stored images of each stream."""
    domains = dict.fromkeys(d for number in share for d in batches.streams[number].segments)
    with tqdm(total=1, desc="checking the images", leave=False, disable=not progress) as bar:
        known = contents_of(batches.source, list(domains))
        bar.update()
    found: dict[int, str | None] = {}
    for number in share:
        parts = [known[domain] for domain in batches.streams[number].segments]
        found[number] = None if None in parts else digest_of(parts)
    return found


def _prepare(
    number: int,
    names: list[str],
    adapters: Mapping[str, Adapter],
    params: Any,
    batches: Batches,
    results: Results,
    checkpoint_every: int | None,
    content: str | None,
) -> _Job:
    """Prepare a stream, from its beginning or from a checkpoint."""
    stream, numbers = batches.streams[number], batches.of(number)
    folder = results.root / "checkpoints" / f"{stream.name}--seed{stream.seed}"
    settings = {name: results.settings_of(name) for name in adapters}
    items = zlib.crc32(stream.items.tobytes())
    identity = digest_of([settings, stream.segments, items])
    checkpoints = Checkpoints(folder, checkpoint_every, identity, content)
    job = _Job(stream, numbers, names, {}, {}, checkpoints, content)
    if folder.is_dir() and checkpoint_every is not None:
        _start(job, adapters, params)
        job.done = job.checkpoints.restore(job.states, job.records)
    return job


def _start(job: _Job, adapters: Mapping[str, Adapter], params: Any) -> None:
    for name in job.adapters:
        job.states[name] = adapters[name].init(params, jax.random.key(job.stream.seed))
        job.records[name] = Record.empty(job.stream, len(job.numbers))


def _run_stream(
    job: _Job,
    adapters: Mapping[str, Adapter],
    steps: dict[str, Callable],
    params: Any,
    from_originals: Collection[str],
    source: Iterator[StreamBatch],
    bar: tqdm,
) -> None:
    if not job.states:
        _start(job, adapters, params)
    bar.set_description(f"{job.stream.name} seed {job.stream.seed}")
    for number in range(job.done, len(job.numbers)):
        batch = next(source)
        read: Any = batch  # numpy arrays, which the compiled step transfers
        plain = Batch(read.images, read.mask, read.index)
        uncut = Batch(read.originals, read.mask, read.index, read.sizes)
        for name in job.adapters:
            inputs = uncut if name in from_originals else plain
            if name not in steps:  # compiled once per sweep, not timed
                bar.set_description(f"compiling {name} …")
                jitted = jax.jit(adapters[name].step, donate_argnums=1)
                steps[name] = jitted.lower(params, job.states[name], inputs).compile()
                bar.unpause()  # leaves the compilation out of the time per batch
                bar.set_description(f"{job.stream.name} seed {job.stream.seed}")
            start = time.perf_counter()
            job.states[name], prediction = steps[name](params, job.states[name], inputs)
            jax.block_until_ready(prediction)
            job.records[name].add(number, batch, prediction, time.perf_counter() - start)
        bar.set_postfix({name: f"{r.accuracy:.1f}" for name, r in job.records.items()})
        bar.update()
        if job.checkpoints.due(number + 1) and number + 1 < len(job.numbers):
            job.checkpoints.save(number + 1, job.states, job.records)


def _cells(job: _Job, batches: Batches, baseline: Cell | None, setting: str) -> dict[str, Cell]:
    """The finished stream's cells, with the gain over the baseline if that was run."""
    cells = {
        name: {
            "adapter": name,
            "stream": job.stream.name,
            "seed": job.stream.seed,
            "setting": setting,
            **job.records[name].figures(),
            "peak_memory_gb": peak_memory_gb(),
        }
        for name in job.adapters
    }
    record = next(iter(job.records.values()))
    if not record.seen.any():
        segment, image = job.stream.items[0]
        first = batches.source.name(job.stream.segments[segment], int(image))
        raise ValueError(f"none of the images could be read, such as {first}")
    unreadable: list[list[str]] = [[] for _ in job.stream.segments]
    for segment, image in job.stream.items[~record.seen].tolist():
        unreadable[segment].append(batches.source.name(job.stream.segments[segment], image))
    baseline = cells.get(BASELINE, baseline)
    for name, cell in cells.items():
        for number, segment in enumerate(cell["segments"]):
            segment["unreadable"] = unreadable[number]
            if baseline is not None and name != BASELINE:
                segment["gain"] = gain([segment], [baseline["segments"][number]])
    return cells


def peak_memory_gb() -> float:
    """Peak memory so far, of the accelerator or of this process."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    unit = 1 if sys.platform == "darwin" else 1024
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 1e9
