"""Per-image predictions of an adapter on a stream; gains and intervals, by a paired bootstrap."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxtta import metrics
from jaxtta.bootstrap import bootstrap, interval
from jaxtta.data import Domain
from jaxtta.io import as_json, digest_of, load_arrays, save_arrays

Interval = tuple[float, float] | None
Segments = Sequence[pd.DataFrame]
IMAGE: dict[str, Any] = {
    "prediction": np.int32,
    **dict.fromkeys(("confidence", "nll", "brier"), np.float32),
    **dict.fromkeys(("top5", "seen"), bool),
}
BATCH = {"seconds": np.float32, "skipped": bool}
TABLES = {"rows": ("segment", "image", "label", *IMAGE), "steps": (*BATCH,)}


def score(logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Score predictions: logits (batch, classes) against integer labels (batch,).

    Returns (batch,) each: prediction, the class of the highest logit, the lowest of equal ones, or
    -1 if one is NaN; confidence; nll in nats; brier; top5.
    """
    return _score(logits, metrics.require_labels(labels, logits))


@jax.jit
def _score(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    return {
        "prediction": jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1)),
        "confidence": jax.nn.softmax(logits).max(-1),
        "nll": metrics.nll(logits, labels),
        "brier": metrics.brier(logits, labels),
        "top5": metrics.top_k(logits, labels, 5),
    }


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One adapter on one stream with one seed.

    `rows` has one row per image in stream order, with the columns segment, image (index in the
    dataset), label, the scores, and seen. An image that could not be read is not seen; its scores
    are 0. `nll` is not finite where the logits are not.
    """

    adapter: str  # its name in tables
    stream: str
    seed: int
    setting: str  # of the streams, or "datasets" where each domain is a dataset of its own
    domains: tuple[Domain, ...]  # the stream's segments; a domain may occur twice
    class_names: tuple[str, ...]
    rows: pd.DataFrame
    steps: pd.DataFrame  # a row per batch: seconds, NaN if not timed; skipped: the state stayed
    unreadable: tuple[str, ...]  # names of the images that were not seen, in stream order
    settings: dict[str, Any]  # what identifies the result: model, data, streams, adapter
    about: dict[str, Any]  # command, versions, device and the like, which change no result
    peak_memory_gb: float  # of the process or accelerator, up to the stream's end
    content: str | None = None  # digest of the stored images, if it was taken

    @property
    def top1(self) -> np.ndarray:
        """Whether each image was seen and rightly classified, (images,) bool."""
        return (self.rows["seen"] & (self.rows["prediction"] == self.rows["label"])).to_numpy()

    def segment(self, number: int) -> pd.DataFrame:
        """One segment's rows with a column `top1`, sorted by image so that adapters pair up."""
        rows = self.rows.assign(top1=self.top1).query(f"segment == {number}")
        return rows.sort_values("image", ignore_index=True)

    def save(self, path: str | Path) -> None:
        """Write the file, atomically."""
        arrays = {
            f"{table}/{name}": getattr(self, table)[name].to_numpy()
            for table, names in TABLES.items()
            for name in names
        }
        header = as_json({name: x for name, x in vars(self).items() if name not in TABLES})
        save_arrays(path, arrays, {"predictions": header, "digest": digest_of([header, arrays])})

    @classmethod
    def load(cls, path: str | Path) -> "Predictions":
        """Read what `save` wrote; a ValueError if it holds no predictions, or is damaged."""
        arrays, metadata = load_arrays(path)
        header: Any = metadata.get("predictions")
        if metadata.get("digest") != digest_of([header, arrays]):
            raise ValueError(f"{path}: holds no predictions, or was changed after it was written")
        for name in ("class_names", "unreadable"):
            header[name] = tuple(header[name])
        header["domains"] = tuple(Domain(*domain) for domain in header["domains"])
        for table, names in TABLES.items():
            header[table] = pd.DataFrame({name: arrays[f"{table}/{name}"] for name in names})
        return cls(**header)


class Gain(NamedTuple):
    """A gain in top-1 accuracy, in [-1, 1], and its 95 % interval."""

    top1: float
    interval: Interval


def paired_gain(adapter: Segments, baseline: Segments, datasets: Sequence[str] = ()) -> Gain | None:
    """An adapter's mean gain over a baseline, on the images that both saw.

    The segments' rows are from `Predictions.segment`. An image is resampled with all segments that
    show it. `datasets` names each segment's dataset where they have different images: these are
    resampled separately and count alike.
    """
    groups: dict[str, list[pd.DataFrame]] = {}
    for number, (own, other) in enumerate(zip(adapter, baseline, strict=True)):
        rows = own.merge(other, on="image", validate="1:1").query("seen_x and seen_y")
        rows = rows[["image", "top1_x", "top1_y"]].assign(seen=1)
        groups.setdefault(datasets[number] if datasets else "", []).append(rows)
    gains, drawn = [], []
    for number, group in enumerate(groups.values()):
        sums = pd.concat(group).groupby("image").sum().to_numpy(float)
        right, seen = sums[:, :2], sums[:, [2, 2]]
        if len(sums):
            means = bootstrap(right, seen, seed=number)
            share = right.sum(0) / seen.sum(0)
            gains.append(share[0] - share[1])
            drawn.append(means[:, 0] - means[:, 1])
    return Gain(float(np.mean(gains)), interval(np.mean(drawn, 0))) if gains else None


def mean_intervals(rows: pd.DataFrame) -> dict[str, Interval]:
    """The 95 % intervals of top1, top5, nll and brier of a segment's rows, from `segment`."""
    seen = rows[rows["seen"]]
    finite = seen[np.isfinite(seen["nll"])]  # the others have no likelihood
    intervals: dict[str, Interval] = {}
    for frame, names in ((seen, ["top1", "top5"]), (finite, ["nll", "brier"])):
        values = frame[names].to_numpy(float)
        means = bootstrap(values, np.ones_like(values))
        intervals |= {name: interval(means[:, column]) for column, name in enumerate(names)}
    return intervals
