"""Per-image predictions of one adapter on one stream: the result that all metrics come from."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from jaxtta import metrics
from jaxtta.data import Domain
from jaxtta.evaluate.provenance import as_json, digest_of
from jaxtta.io import load_arrays, save_arrays

ROWS = ("segment", "image", "label", "prediction", "confidence", "nll", "brier", "top5", "seen")
STEPS = ("seconds", "skipped")


class Scores(NamedTuple):
    """Scores of each image's prediction, (images,) each; `nll` in nats.

    `prediction` is the class of the highest logit, the lowest of equal ones; -1 if one is NaN.
    """

    prediction: Any
    confidence: Any
    nll: Any
    brier: Any
    top5: Any


def score(logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> Scores:
    """Score predictions: logits (batch, classes) against integer labels (batch,)."""
    return _score(logits, metrics.require_labels(labels, logits))


@jax.jit
def _score(logits: jax.Array, labels: jax.Array) -> Scores:
    return Scores(
        jnp.where(jnp.isnan(logits).any(-1), -1, logits.argmax(-1)),
        jax.nn.softmax(logits).max(-1),
        metrics.nll(logits, labels),
        metrics.brier(logits, labels),
        metrics.top_k(logits, labels, 5),
    )


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One adapter on one stream with one seed.

    `rows` has one row per image in stream order, with the columns segment, image (index in the
    dataset), label, the `Scores`, and seen. An image that could not be read is not seen; its scores
    are 0. `nll` is not finite where the logits are not.
    """

    adapter: str  # its name in tables
    stream: str
    seed: int
    setting: str  # of the streams, or "datasets" where each domain is a dataset of its own
    domains: tuple[Domain, ...]  # the stream's segments; a domain may occur twice
    class_names: tuple[str, ...]
    rows: pd.DataFrame
    steps: pd.DataFrame  # one row per batch: seconds, and skipped (the state stayed as it was)
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
        arrays = {f"rows/{name}": self.rows[name].to_numpy() for name in ROWS}
        arrays |= {f"steps/{name}": self.steps[name].to_numpy() for name in STEPS}
        header = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("rows", "steps")
        }
        header = as_json(header)
        save_arrays(path, arrays, {"predictions": header, "digest": digest_of([header, arrays])})

    @classmethod
    def load(cls, path: str | Path) -> "Predictions":
        """Read what `save` wrote; a ValueError if it holds no predictions, or is damaged."""
        arrays, metadata = load_arrays(path)
        header = metadata.get("predictions")
        if not isinstance(header, dict):
            raise ValueError(f"{path}: holds no predictions")
        if metadata.get("digest") != digest_of([header, arrays]):
            raise ValueError(f"{path}: was changed after it was written")
        rows = pd.DataFrame({name: arrays[f"rows/{name}"] for name in ROWS})
        steps = pd.DataFrame({name: arrays[f"steps/{name}"] for name in STEPS})
        header["domains"] = tuple(Domain(*domain) for domain in header["domains"])
        for name in ("class_names", "unreadable"):
            header[name] = tuple(header[name])
        return cls(**header, rows=rows, steps=steps)
