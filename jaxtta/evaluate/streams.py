"""Streams that several adapters step through, one batch of each stream at a time."""

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxtta import data
from jaxtta.adapters import Adapter, AdapterSpec
from jaxtta.data import Batches, StreamBatch
from jaxtta.evaluate.placement import Placement
from jaxtta.evaluate.predictions import BATCH, IMAGE, Predictions, score
from jaxtta.io import restore_checkpoint, save_checkpoint
from jaxtta.models import Batch

_log = logging.getLogger(__name__)
TIMED = 8  # of so many batches the second is waited for, and timed; the others queue


@dataclasses.dataclass(eq=False)
class StreamRun:
    """Stream `number` with the adapters that have not finished it, whose settings are given."""

    batches: Batches
    number: int
    adapters: Mapping[str, tuple[AdapterSpec, Adapter]]
    params: Any
    note: Mapping[str, Any]  # the adapters' settings, and the content of the images
    folder: Path  # of its checkpoints
    every: int | None = None  # batches between two of them
    done: int = 0
    tree: dict[str, Any] = dataclasses.field(default_factory=dict)  # adapters' states and records

    def __post_init__(self) -> None:
        """Go to the newest checkpoint of these settings."""
        self.stream = self.batches.streams[self.number]
        self.places = self.batches.of(self.number)
        self.labels = data.labels_of(self.batches.benchmark)[self.stream.items[:, 1]]
        if not self.every or not self.folder.is_dir():
            return
        self.begin()
        try:
            if saved := restore_checkpoint(self.folder, self.tree):
                done, tree, note = saved
                fits = note["settings"].items() >= self.note["settings"].items()
                if not fits or self.note["content"] not in (None, note["content"]):
                    raise ValueError("other settings or images, or not known which")
                for node in tree.values():  # arrays that can be written to
                    node["record"] = {key: np.array(x) for key, x in node["record"].items()}
                self.tree, self.done = tree, done
        except ValueError as error:
            _log.warning("%s: ignored, restarting the stream (%s)", self.folder, error)

    @property
    def left(self) -> range:
        """Indices of the batches that are left."""
        return self.places[self.done :]

    def begin(self) -> None:
        """Make the states and records, unless they were restored."""
        for name in {} if self.tree else self.note["settings"]:
            record = {key: np.zeros(len(self.labels), kind) for key, kind in IMAGE.items()}
            record |= {key: np.zeros(len(self.places), kind) for key, kind in BATCH.items()}
            record["seconds"][:] = np.nan
            state = self.adapters[name][1].init(self.params, jax.random.key(self.stream.seed))
            self.tree[name] = {"state": state, "record": record}

    def result(self, name: str, setting: str, about: dict[str, Any]) -> Predictions:
        """The finished stream's predictions of one adapter."""
        record, benchmark = self.tree[name]["record"], self.batches.benchmark
        segments, images = self.stream.items.T
        unreadable = tuple(
            data.name_of(benchmark[self.stream.segments[segment]], image)
            for segment, image in self.stream.items[~record["seen"]].tolist()
        )
        if len(unreadable) == len(images):
            raise ValueError(f"none of the images could be read, such as {unreadable[0]}")
        rows = {"segment": segments, "image": images, "label": self.labels}
        return Predictions(
            adapter=name,
            stream=self.stream.name,
            seed=self.stream.seed,
            setting=setting,
            domains=self.stream.segments,
            class_names=tuple(data.class_names_of(benchmark)),
            rows=pd.DataFrame(rows | {key: record[key] for key in IMAGE}),
            steps=pd.DataFrame({key: record[key] for key in BATCH}),
            unreadable=unreadable,
            settings=self.note["settings"][name],
            about=about,
            peak_memory_gb=peak_memory_gb(),
            content=self.note["content"],
        )


def groups_of(runs: Sequence[StreamRun], size: int) -> list[list[StreamRun]]:
    """Groups of streams that step at once, at most `size`, each of the same adapters."""
    alike: dict[tuple[str, ...], list[StreamRun]] = {}
    for run in runs:
        alike.setdefault((*run.note["settings"],), []).append(run)
    return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]


def finish(
    runs: Sequence[StreamRun],
    on: Placement,
    steps: dict[str, Callable],
    source: Iterator[StreamBatch],
    bar: tqdm,
) -> Iterator[StreamRun]:
    """Step through the rest of a group's streams; give each at its end, before the others go on.

    `steps` are the adapters' compiled ones. A stream at its end has masked batches.
    """
    states: dict[str, Any] = {}
    queue: list[Any] = []  # a round's scores are fetched while the next is computed
    for run in runs:
        run.begin()
    for name in runs[0].note["settings"]:
        states[name] = on.states([run.tree[name].pop("state") for run in runs])
    while live := {place: run for place, run in enumerate(runs) if run.left}:
        title = _title([*live.values()], on)
        bar.set_description(title, refresh=False)
        batch, placed = on.batch([next(source) if run.left else None for run in runs])
        timed = [run for run in live.values() if run.done % TIMED == min(1, len(run.places) - 1)]
        scores: dict[str, Any] = {}
        for name, state in states.items():
            spec, adapter = runs[0].adapters[name]
            inputs = inputs_of(placed, spec)
            if name not in steps:  # once per sweep, and not timed
                bar.set_description(f"compiling {name} …")
                steps[name] = on.compile(adapter, state, inputs)
                bar.set_description(title)
            if timed:
                jax.block_until_ready((queue, scores, state))
            start = time.perf_counter()
            states[name], prediction = steps[name](on.params, state, inputs)
            jax.block_until_ready(prediction if timed else None)
            for run in timed:
                run.tree[name]["record"]["seconds"][run.done] = time.perf_counter() - start
            logits, metrics = prediction.logits, prediction.metrics
            scores[name] = score(logits.reshape(-1, logits.shape[-1]), batch.labels.ravel())
            scores[name]["skipped"] = metrics.get("skipped", np.zeros(on.streams, bool))
        queue.append(({place: (run, run.done) for place, run in live.items()}, batch, scores))
        for run in live.values():
            run.done += 1
        ended = [run for run in live.values() if not run.left]
        due = {i: r for i, r in live.items() if r.left and r.every and r.done % r.every == 0}
        while len(queue) > (0 if due or ended else 1):
            _keep(bar, *queue.pop(0))
        if due and jax.process_index() == 0:
            apart = {name: on.apart(state) for name, state in states.items()}
            for i, run in due.items():
                tree = {name: x | {"state": apart[name][i]} for name, x in run.tree.items()}
                save_checkpoint(run.folder, run.done, tree, run.note)
        yield from ended


def _title(live: Sequence[StreamRun], on: Placement) -> str:
    first, more, idle = live[0].stream, len(live) - 1, on.devices - len(live)
    text = f"{first.name} seed {first.seed}" + (f" and {more} more" if more else "")
    return text + (f", {idle} of {on.devices} devices idle" if idle and not on.splits_batch else "")


def _keep(bar: tqdm, steps: Mapping[int, Any], batch: StreamBatch, scores: Any) -> None:
    """Fetch a round's scores, and show the top-1 accuracy so far in per cent."""
    shown, masks, indices = {}, np.atleast_2d(batch.mask), np.atleast_2d(batch.index)
    for name, values in scores.items():
        right, total, skipped = 0, 0, np.ravel(values.pop("skipped"))
        values = {key: np.asarray(value).reshape(masks.shape) for key, value in values.items()}
        for place, (run, number) in steps.items():
            record, mask = run.tree[name]["record"], masks[place]
            seen = indices[place][mask]
            record["skipped"][number] = skipped[place]
            record["seen"][seen] = True
            for key, value in values.items():
                record[key][seen] = value[place][mask]
            right += ((record["prediction"] == run.labels) & record["seen"]).sum()
            total += record["seen"].sum()
        shown[name] = f"{100 * right / max(total, 1):.1f}"
    bar.set_postfix(shown)
    bar.update(len(steps))


def inputs_of(batch: Any, spec: AdapterSpec) -> Batch:
    """What the adapter's step takes of a batch."""
    if spec.needs_originals:
        return Batch(batch.originals, batch.mask, batch.index, batch.sizes)
    return Batch(batch.images, batch.mask, batch.index)


def peak_memory_gb() -> float:
    """Peak memory so far, of the fullest accelerator or of this process."""
    each = [device.memory_stats() or {} for device in jax.local_devices()]
    used = max(stats.get("peak_bytes_in_use", 0) for stats in each)
    unit = 1 if sys.platform == "darwin" else 1024
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 1e9
