"""Recording an adapter on a stream: scores of every image, and metrics computed from them."""

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtta import metrics
from jaxtta.adapters import Prediction
from jaxtta.data import Stream, StreamBatch
from jaxtta.evaluate.bootstrap import bootstrap, interval

Figures = dict[str, Any]
CURVE_POINTS = 100


class Scores(NamedTuple):
    """Scores of each image's prediction, all (images,).

    Attributes:
        top1: whether the label has the highest logit; the lowest index of equal ones, as argmax.
        top5: whether it is among the five highest.
        confidence: the highest probability.
        nll: negative log-likelihood of the label, in nats.
        brier: Brier score.
        prediction: the class with the highest logit.
    """

    top1: Any
    top5: Any
    confidence: Any
    nll: Any
    brier: Any
    prediction: Any


def score(logits: jax.typing.ArrayLike, labels: jax.typing.ArrayLike) -> Scores:
    """Score predictions.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.

    Returns:
        One entry per image. Of equal logits the lowest index counts, as in published code; logits
        with a NaN are never right.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if a label is not a class, or there is not one an image.
    """
    return _score(logits, metrics.require_labels(labels, logits))


@jax.jit
def _score(logits: jax.Array, labels: jax.Array) -> Scores:
    return Scores(
        metrics.top_k(logits, labels),
        metrics.top_k(logits, labels, 5),
        jax.nn.softmax(logits).max(-1),
        metrics.nll(logits, labels),
        metrics.brier(logits, labels),
        logits.argmax(-1),
    )


@dataclasses.dataclass
class Record:
    """The scores of one adapter on one stream so far.

    Attributes:
        stream: the stream.
        scores: of all images in stream order; zeros for images not yet seen.
        seen: (images,) bool, whether the image was processed and readable.
        skipped: (batches,) bool, whether the step left the state unchanged.
        seconds: time spent in steps.
    """

    stream: Stream
    scores: Scores
    seen: np.ndarray
    skipped: np.ndarray
    seconds: np.ndarray

    @classmethod
    def empty(cls, stream: Stream, batches: int) -> "Record":
        """An empty record."""
        images = sum(map(len, stream.parts))
        kinds = Scores(bool, bool, np.float32, np.float32, np.float32, np.int32)
        scores = Scores(*(np.zeros(images, kind) for kind in kinds))
        return cls(
            stream, scores, np.zeros(images, bool), np.zeros(batches, bool), np.zeros(batches)
        )

    def add(self, number: int, batch: StreamBatch, prediction: Prediction, seconds: float) -> None:
        """Add batch `number` of the stream."""
        places = batch.index[batch.mask]
        for kept, values in zip(self.scores, score(prediction.logits, batch.labels), strict=True):
            kept[places] = np.asarray(values)[batch.mask]
        self.seen[places] = True
        self.skipped[number] = bool(prediction.metrics.get("skipped", False))
        self.seconds[number] = seconds

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy so far, in per cent."""
        return 100 * float(self.scores.top1[self.seen].mean()) if self.seen.any() else 0.0

    def figures(self) -> Figures:
        """All metrics, of each segment and of the whole stream."""
        images, seconds = int(self.seen.sum()), float(self.seconds.sum())
        items = self.stream.items
        return {
            "segments": [self._segment(n, items) for n in range(len(self.stream.segments))],
            "running": self._running(),
            "skipped_steps": np.flatnonzero(self.skipped).tolist(),
            "images": images,
            "images_per_second": round(images / seconds, 2) if seconds else None,
        }

    def _segment(self, number: int, items: np.ndarray) -> Figures:
        segments, images = items.T
        chosen = np.flatnonzero(segments == number)
        # Sorted by image, so that rows of different streams can be paired.
        chosen = chosen[np.argsort(images[chosen])]
        seen = self.seen[chosen]
        scores = Scores(*(x[chosen][seen] for x in self.scores))
        finite = np.isfinite(scores.nll)  # an image with NaN logits counts as wrong
        kept = Scores(*(x[finite] for x in scores))
        bins = metrics.reliability(kept.confidence, kept.top1)
        domain = self.stream.segments[number]
        return {
            "corruption": domain.corruption,
            "severity": domain.severity,
            "images": len(finite),
            **{name: _mean(getattr(scores, name)) for name in ("top1", "top5")},
            **{name: _mean(getattr(kept, name)) for name in ("nll", "brier")},
            "ece": float(metrics.calibration_gap(bins)) if finite.any() else None,
            "intervals": _intervals(scores, kept),
            "gain": None,
            "without_prediction": int((~finite).sum()),
            "reliability": {k: np.asarray(v).tolist() for k, v in bins._asdict().items()},
            **_flags(images[chosen], seen, self.scores.top1[chosen]),
        }

    def _running(self) -> list[tuple[int, float]]:
        """Number of images and accuracy so far, at about a hundred points of the stream."""
        right = np.cumsum(self.scores.top1 & self.seen)
        count = np.cumsum(self.seen)
        points = np.unique(np.linspace(0, len(count) - 1, CURVE_POINTS).round().astype(int))
        return [(int(count[p]), float(right[p] / count[p])) for p in points if count[p]]

    def arrays(self) -> dict[str, np.ndarray]:
        """One entry per image in stream order, for saving."""
        segments, images = self.stream.items.T
        return {"segment": segments, "image": images, "seen": self.seen} | self.scores._asdict()


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=float)) if len(values) else None


def _intervals(scores: Scores, kept: Scores) -> dict[str, tuple[float, float] | None]:
    intervals = {}
    for names, source in ((("top1", "top5"), scores), (("nll", "brier"), kept)):
        values = np.stack([getattr(source, name) for name in names], 1).astype(float)
        if len(values):
            means = bootstrap(values, np.ones_like(values))
            intervals |= {name: interval(means[:, k]) for k, name in enumerate(names)}
        else:
            intervals |= dict.fromkeys(names)
    return intervals


def _flags(images: np.ndarray, seen: np.ndarray, right: np.ndarray) -> Figures:
    """Bit masks of the source's images that were seen and correctly classified."""
    flags = np.zeros((2, images.max() + 1), bool)
    flags[:, images] = seen, seen & right
    return {
        "bits": flags.shape[1],
        "seen": base64.b64encode(np.packbits(flags[0]).tobytes()).decode(),
        "correct": base64.b64encode(np.packbits(flags[1]).tobytes()).decode(),
    }


def outcomes(segment: Figures, images: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Decode which images of a segment were seen and which were correctly classified.

    Args:
        segment: a segment of a cell.
        images: minimum length of the arrays.

    Returns:
        Two bool arrays, indexed by the image's index in the source.
    """

    def flags(name: str) -> np.ndarray:
        bits = np.frombuffer(base64.b64decode(segment[name]), np.uint8)
        bits = np.unpackbits(bits, count=segment["bits"]).astype(bool)
        return np.pad(bits, (0, max(images - len(bits), 0)))

    return flags("seen"), flags("correct")


def paired(
    segments: Sequence[Figures], baseline: Sequence[Figures]
) -> tuple[np.ndarray, np.ndarray]:
    """Pair the outcomes of an adapter and the baseline on the same images.

    Args:
        segments: the adapter's segments.
        baseline: the baseline's segments, of the same domains in the same order.

    Returns:
        How often each image was classified correctly, and how often both saw it; (images, 2)
        each, for the adapter and the baseline.
    """
    size = max(segment["bits"] for segment in (*segments, *baseline))
    right, seen = np.zeros((2, size, 2))
    for pair in zip(segments, baseline, strict=True):
        flags = [outcomes(segment, size) for segment in pair]
        both = flags[0][0] & flags[1][0]
        seen += both[:, None]
        right += np.stack([correct & both for _, correct in flags], 1)
    return right, seen


def gain(
    segments: Sequence[Figures], baseline: Sequence[Figures], independent: bool = False
) -> Figures | None:
    """An adapter's gain in top-1 accuracy over the baseline, on the images that both saw.

    Args:
        segments: the adapter's segments, averaged; an image is resampled with all its domains.
        baseline: the baseline's segments, of the same domains in the same order.
        independent: the domains are datasets with different images, resampled separately.

    Returns:
        The gain in [-1, 1] and its interval; None if both saw no common image.
    """
    groups: dict[str, list[tuple[Figures, Figures]]] = {}
    for pair in zip(segments, baseline, strict=True):
        groups.setdefault(pair[0]["corruption"] if independent else "", []).append(pair)
    gains, drawn = [], []
    for number, pairs in enumerate(groups.values()):
        right, seen = paired(*zip(*pairs, strict=True))
        if seen.any():
            shown = seen.any(1)
            means = bootstrap(right[shown], seen[shown], seed=number)
            share = right.sum(0) / seen.sum(0)
            gains.append(share[0] - share[1])
            drawn.append(means[:, 0] - means[:, 1])
    if not gains:
        return None
    return {"top1": float(np.mean(gains)), "interval": interval(np.mean(drawn, 0))}
