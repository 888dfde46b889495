"""Running adapters over streams: every adapter takes its step on each batch as it is read."""

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from jaxtta import metrics
from jaxtta.adapters import Adapter, Prediction
from jaxtta.data import Batches, StreamBatch, read_ahead
from jaxtta.objectives import Batch

Row = dict[str, Any]


class Scores(NamedTuple):
    """What is kept of each picture's prediction, all (pictures,).

    Attributes:
        top1: whether the label has the highest logit.
        top5: whether it is among the five highest.
        confidence: the winning probability.
        nll: negative log-likelihood of the label, in nats.
        brier: Brier score.
    """

    top1: Any
    top5: Any
    confidence: Any
    nll: Any
    brier: Any


@jax.jit
def score(logits: jax.Array, labels: jax.Array) -> Scores:
    """Score predictions.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.

    Returns:
        One entry a picture.
    """
    return Scores(
        metrics.top_k(logits, labels),
        metrics.top_k(logits, labels, 5),
        jax.nn.softmax(logits).max(-1),
        metrics.nll(logits, labels),
        metrics.brier(logits, labels),
    )


@dataclasses.dataclass
class Record:
    """What one adapter did on one stream so far."""

    scores: list[Scores] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    skipped: list[int] = dataclasses.field(default_factory=list)

    def add(self, number: int, batch: StreamBatch, prediction: Prediction, seconds: float) -> None:
        """Add one batch."""
        scores = score(prediction.logits, batch.labels)
        self.scores.append(Scores(*(np.asarray(x)[batch.mask] for x in scores)))
        self.seconds += seconds
        if bool(prediction.metrics.get("skipped", False)):
            self.skipped.append(number)

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy so far, in per cent."""
        right = np.concatenate([s.top1 for s in self.scores])
        return 100 * float(right.mean()) if len(right) else 0.0

    def row(self) -> Row:
        """The stream's figures."""
        scores = Scores(*(np.concatenate(x) for x in zip(*self.scores, strict=True)))
        finite = np.isfinite(scores.nll)  # a picture whose logits are NaN counts as wrong
        kept = Scores(*(x[finite] for x in scores))
        mean = lambda x: float(x.mean()) if len(x) else None  # noqa: E731
        return {
            "pictures": len(finite),
            "top1": mean(scores.top1),
            "top5": mean(scores.top5),
            "nll": mean(kept.nll),
            "brier": mean(kept.brier),
            "ece": float(metrics.expected_calibration_error(kept.confidence, kept.top1)),
            "without_prediction": int((~finite).sum()),
            "skipped_steps": self.skipped,
            "pictures_per_second": round(len(finite) / self.seconds, 2) if self.seconds else None,
        }


def run(
    adapters: Mapping[str, Adapter],
    params: Any,
    batches: Batches,
    *,
    finished: Callable[[Row], None],
    workers: int = 1,
    progress: bool = True,
) -> list[Row]:
    """Run every adapter over every stream; the state starts anew at each stream.

    Args:
        adapters: by name.
        params: the frozen parameters.
        batches: the streams.
        finished: called with each row as soon as its stream is done, to save it.
        workers: processes that read ahead.
        progress: show a progress bar.

    Returns:
        One row per stream and adapter: names, accuracy and the other figures.
    """
    rows: list[Row] = []
    steps: dict[str, Callable] = {}
    with tqdm(total=len(batches), unit="batch", disable=not progress) as bar:
        stream = iter(read_ahead(batches, workers))
        for corruption in batches.corruptions:
            bar.set_description(corruption)
            for row in _run_stream(adapters, steps, params, batches, stream, bar):
                rows.append({"corruption": corruption, **row})
                finished(rows[-1])
    return rows


def _run_stream(
    adapters: Mapping[str, Adapter],
    steps: dict[str, Callable],
    params: Any,
    batches: Batches,
    stream: Iterator[StreamBatch],
    bar: tqdm,
) -> list[Row]:
    states = {name: adapter.init(params) for name, adapter in adapters.items()}
    records = {name: Record() for name in adapters}
    unreadable: list[str] = []
    for number, batch in enumerate(itertools.islice(stream, batches.per_stream)):
        inputs = Batch(batch.images, batch.mask, batch.index)
        for name, adapter in adapters.items():
            if name not in steps:  # once a sweep, outside the clock
                jitted = jax.jit(adapter.step, donate_argnums=1)
                steps[name] = jitted.lower(params, states[name], inputs).compile()
            start = time.perf_counter()
            states[name], prediction = steps[name](params, states[name], inputs)
            jax.block_until_ready(prediction)
            records[name].add(number, batch, prediction, time.perf_counter() - start)
        lost = batch.pictures[~batch.mask & (batch.pictures >= 0)]
        unreadable += [batches.source.name(int(picture)) for picture in lost]
        bar.set_postfix({name: f"{r.accuracy:.1f}" for name, r in records.items()})
        bar.update()
    if len(unreadable) == len(batches.order):
        raise ValueError(f"none of the pictures could be read, the first is {unreadable[0]}")
    return [{"adapter": n, **r.row(), "unreadable": unreadable} for n, r in records.items()]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all.

    Args:
        path: the file; its folder is made.
        content: anything JSON knows; NaN is refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
