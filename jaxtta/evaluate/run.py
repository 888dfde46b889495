"""One stream of a sweep: the adapters' states and what they predicted so far."""

import dataclasses
import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxtta.adapters import Adapter, AdapterSpec
from jaxtta.data import Batches, StreamBatch, class_names_of, labels_of, name_of
from jaxtta.evaluate.checkpoint import restore_checkpoint, save_checkpoint
from jaxtta.evaluate.predictions import Predictions, Scores, score
from jaxtta.models import Batch

log = logging.getLogger(__name__)
IMAGE: dict[str, Any] = Scores(np.int32, np.float32, np.float32, np.float32, bool)._asdict()
IMAGE["seen"] = bool
BATCH: dict[str, Any] = {"seconds": np.float32, "skipped": bool}


@dataclasses.dataclass
class StreamRun:
    """Stream `number` with the adapters that have not finished it, whose `settings` are given."""

    batches: Batches
    number: int
    adapters: Mapping[str, tuple[AdapterSpec, Adapter]]
    params: Any
    settings: Mapping[str, dict[str, Any]]
    content: str | None
    folder: Path  # of its checkpoints
    every: int | None = None  # batches between two of them
    done: int = 0
    tree: dict[str, Any] = dataclasses.field(default_factory=dict)  # adapters' states and records

    def __post_init__(self) -> None:
        """Go to the newest checkpoint of these settings."""
        self.stream = self.batches.streams[self.number]
        self.places = self.batches.of(self.number)
        self.labels = labels_of(self.batches.benchmark)[self.stream.items[:, 1]]
        if not self.every or not self.folder.is_dir():
            return
        self._begin()
        try:
            found = restore_checkpoint(self.folder, self.tree)
            if found is None:
                raise ValueError("nothing saved")
            step, tree, note = found
            if any(note["settings"].get(name) != own for name, own in self.settings.items()):
                raise ValueError("another stream or other settings")
            if self.content is not None and note["content"] != self.content:
                raise ValueError("other images, or not known which")
            for node in tree.values():  # arrays that can be written to
                node["record"] = {key: np.array(x) for key, x in node["record"].items()}
            self.tree, self.done = tree, step
        except ValueError as error:
            log.warning("%s: ignored, restarting the stream (%s)", self.folder, error)
            self.remove()

    def _begin(self) -> None:
        for name in self.settings:
            record = {key: np.zeros(len(self.labels), kind) for key, kind in IMAGE.items()}
            record |= {key: np.zeros(len(self.places), kind) for key, kind in BATCH.items()}
            state = self.adapters[name][1].init(self.params, jax.random.key(self.stream.seed))
            self.tree[name] = {"state": state, "record": record}

    def finish(self, steps: dict[str, Callable], source: Iterator[StreamBatch], bar: tqdm) -> None:
        """Step through the rest of the stream; `steps` are the adapters' compiled ones."""
        if not self.tree:
            self._begin()
        title = f"{self.stream.name} seed {self.stream.seed}"
        bar.set_description(title)
        for number in range(self.done, len(self.places)):
            batch = next(source)
            read: Any = batch  # numpy arrays, which the compiled step transfers
            plain = Batch(read.images, read.mask, read.index)
            uncut = Batch(read.originals, read.mask, read.index, read.sizes)
            for name, node in self.tree.items():
                spec, adapter = self.adapters[name]
                inputs = uncut if spec.needs_originals else plain
                if name not in steps:  # once per sweep, and not timed
                    bar.set_description(f"compiling {name} …")
                    step = jax.jit(adapter.step, donate_argnums=1)
                    steps[name] = step.lower(self.params, node["state"], inputs).compile()
                    bar.unpause()  # leaves the compilation out of the time per batch
                    bar.set_description(title)
                start = time.perf_counter()
                node["state"], prediction = steps[name](self.params, node["state"], inputs)
                jax.block_until_ready(prediction)
                record, seen = node["record"], batch.index[batch.mask]
                record["seconds"][number] = time.perf_counter() - start
                record["skipped"][number] = bool(prediction.metrics.get("skipped", False))
                record["seen"][seen] = True
                for key, values in score(prediction.logits, batch.labels)._asdict().items():
                    record[key][seen] = np.asarray(values)[batch.mask]
            bar.set_postfix({name: self._accuracy(name) for name in self.tree})
            bar.update()
            if self.every and (number + 1) % self.every == 0 and number + 1 < len(self.places):
                note = {"settings": self.settings, "content": self.content}
                save_checkpoint(self.folder, number + 1, self.tree, note)

    def _accuracy(self, name: str) -> str:
        """Top-1 accuracy so far, in per cent."""
        record = self.tree[name]["record"]
        right = (record["prediction"] == self.labels)[record["seen"]]
        return f"{100 * right.mean():.1f}" if len(right) else "–"

    def result(self, name: str, setting: str, about: dict[str, Any]) -> Predictions:
        """The finished stream's predictions of one adapter."""
        record, benchmark = self.tree[name]["record"], self.batches.benchmark
        segments, images = self.stream.items.T
        unreadable = tuple(
            name_of(benchmark[self.stream.segments[segment]], image)
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
            class_names=tuple(class_names_of(benchmark)),
            rows=pd.DataFrame(rows | {key: record[key] for key in IMAGE}),
            steps=pd.DataFrame({key: record[key] for key in BATCH}),
            unreadable=unreadable,
            settings=self.settings[name],
            about=about,
            peak_memory_gb=peak_memory_gb(),
            content=self.content,
        )

    def remove(self) -> None:
        """Forget the states and the checkpoints."""
        self.tree = {}
        shutil.rmtree(self.folder, ignore_errors=True)


def peak_memory_gb() -> float:
    """Peak memory so far, of the accelerator or of this process."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    unit = 1 if sys.platform == "darwin" else 1024
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 1e9
