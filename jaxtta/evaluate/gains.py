"""Gains in accuracy over a baseline, and intervals of means, by a paired bootstrap over images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from jaxtta.bootstrap import bootstrap, interval
from jaxtta.evaluate.predictions import Predictions

Interval = tuple[float, float] | None
Outcomes = Predictions | Sequence[Predictions | pd.DataFrame]
"""Predictions, of which all segments count, or single segments' rows from `segment`."""


class Gain(NamedTuple):
    """A gain in top-1 accuracy, in [-1, 1], and its 95 % interval."""

    top1: float
    interval: Interval


def _segments(outcomes: Outcomes) -> list[pd.DataFrame]:
    frames = []
    for each in [outcomes] if isinstance(outcomes, Predictions) else outcomes:
        own = isinstance(each, Predictions)
        frames += [each.segment(n) for n in range(len(each.domains))] if own else [each]
    return frames


def paired_gain(adapter: Outcomes, baseline: Outcomes, datasets: Sequence[str] = ()) -> Gain | None:
    """An adapter's mean gain over a baseline, on the images that both saw.

    An image is resampled with all the segments that show it.

    Args:
        adapter: its segments.
        baseline: the baseline's, of the same domains in the same order.
        datasets: each segment's dataset, where they have different images: these are resampled
            separately and count alike. Empty where all segments show the same images.
    """
    pairs = list(zip(_segments(adapter), _segments(baseline), strict=True))
    groups: dict[str, list[tuple[pd.DataFrame, pd.DataFrame]]] = {}
    for name, pair in zip(datasets or [""] * len(pairs), pairs, strict=True):
        groups.setdefault(name, []).append(pair)
    gains, drawn = [], []
    for number, group in enumerate(groups.values()):
        right, seen = _outcomes(group)
        shown = seen.any(1)
        if shown.any():
            means = bootstrap(right[shown], seen[shown], seed=number)
            share = right.sum(0) / seen.sum(0)
            gains.append(share[0] - share[1])
            drawn.append(means[:, 0] - means[:, 1])
    if not gains:
        return None
    return Gain(float(np.mean(gains)), interval(np.mean(drawn, 0)))


def _outcomes(pairs: list[tuple[pd.DataFrame, pd.DataFrame]]) -> tuple[np.ndarray, np.ndarray]:
    """How often each image was right, and how often both saw it; (images, 2) each."""
    images = 1 + max(int(np.max(rows["image"])) for pair in pairs for rows in pair)
    right, seen = np.zeros((2, images, 2))
    for pair in pairs:
        flags = np.zeros((2, images, 2), bool)  # seen and right, by image and adapter
        for column, rows in enumerate(pair):
            flags[:, rows["image"], column] = rows["seen"], rows["top1"]
        both = flags[0].all(1, keepdims=True)
        seen += both
        right += flags[1] & both
    return right, seen


def mean_intervals(rows: pd.DataFrame) -> dict[str, Interval]:
    """The 95 % intervals of top1, top5, nll and brier of a segment's rows, from `segment`."""
    seen = rows["seen"].to_numpy()
    finite = seen & np.isfinite(rows["nll"])  # the others have no likelihood
    intervals: dict[str, Interval] = {}
    for names, kept in ((["top1", "top5"], seen), (["nll", "brier"], finite)):
        values = rows[names].to_numpy(float)[kept]
        means = bootstrap(values, np.ones_like(values)) if len(values) else None
        for column, name in enumerate(names):
            intervals[name] = None if means is None else interval(means[:, column])
    return intervals
