"""The tables of a sweep, made once; text, CSV, plots and pages show them.

A corruption's accuracy is the mean over its severities and seeds. Means over corruptions leave out
clean images, which have a row of their own, as is usual in the literature.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxtta import metrics
from jaxtta.corruptions import CLEAN
from jaxtta.data import Domain
from jaxtta.evaluate.gains import mean_intervals, paired_gain
from jaxtta.evaluate.predictions import Predictions
from jaxtta.images import printable

BASELINE = "zero_shot"
DATASETS = "datasets"
"""The setting of results whose domains are datasets with images of their own."""
Pair = tuple[str, str, pd.DataFrame, pd.DataFrame]
"""Adapter, corruption, and the rows of the adapter and of the baseline."""


class Summary(NamedTuple):
    """What reports of a sweep show; shares and gains in [-1, 1], NaN where unknown.

    Attributes:
        segments: a row per adapter, stream, seed and segment: `summary.csv`.
        table: by corruption and adapter: the metrics' means, the `gain` over the baseline on common
            images, its 95 % interval `low` to `high`, and `significance`: 1, 0 or -1.
        means: by adapter, over corruptions; `spread` is the standard deviation over seeds.
        classes: by adapter, dataset and class, of all images in the means: accuracy and the most
            frequent confusion: `classes.csv`.
        results: what all this was computed from.
        averaged: the corruptions in the means: all but clean images, unless there are no others.
        baseline: the adapter that gains are relative to; None if it was not run.
        noun: what a row of the table is: "corruption" or "dataset".
    """

    segments: pd.DataFrame
    table: pd.DataFrame
    means: pd.DataFrame
    classes: pd.DataFrame
    results: tuple[Predictions, ...]
    averaged: tuple[str, ...]
    baseline: str | None
    noun: str

    @property
    def adapters(self) -> list[str]:
        """Names, in the order of the results."""
        return [*self.means.index]

    @property
    def corruptions(self) -> list[str]:
        """Names, in the order of the results."""
        return [*self.table.index.unique("corruption")]

    @property
    def compared(self) -> list[str]:
        """The adapters that have a gain over the baseline."""
        return [*self.means.index[self.means["gain"].notna()]]

    @property
    def severities(self) -> list[int]:
        """In ascending order, without 0."""
        return sorted({*self.segments["severity"]} - {0})


def summarise(results: Sequence[Predictions], baseline: str = BASELINE) -> Summary:
    """Compute all tables of a sweep.

    Args:
        results: of one sweep.
        baseline: the adapter that gains are relative to, if it was run.

    Returns:
        The summary; names in it are escaped where they cannot be printed.

    Raises:
        ValueError: if there are no results.
    """
    if not results:
        raise ValueError("there are no results to report")
    clean = functools.cache(printable)  # all results have the same class names
    results = tuple(
        dataclasses.replace(
            result,
            adapter=clean(result.adapter),
            stream=clean(result.stream),
            domains=tuple(Domain(clean(d.corruption), d.severity) for d in result.domains),
            class_names=tuple(map(clean, result.class_names)),
        )
        for result in results
    )
    datasets = all(result.setting == DATASETS for result in results)
    frames = {_key(r): [r.segment(n) for n in range(len(r.domains))] for r in results}
    lines, counts, pairs = [], [], []
    for result in results:
        adapter, stream, seed = _key(result)
        others = [] if adapter == baseline else frames.get((baseline, stream, seed), [])
        for number, rows in enumerate(frames[_key(result)]):
            domain = result.domains[number]
            pair = [(adapter, domain.corruption, rows, own) for own in others[number : number + 1]]
            pairs += pair
            line = dict(zip(("adapter", "stream", "seed"), _key(result), strict=True))
            line |= {"setting": result.setting, "segment": number, **domain._asdict()}
            lines.append(line | _metrics(rows) | _gain(pair) | _speed(result))
            names = np.array(["", *result.class_names], object)  # the first: nothing finite
            own = (
                rows[rows["seen"]].value_counts(["label", "prediction"]).reset_index(name="images")
            )
            own["class"], own["mistaken_for"] = (names[own[c] + 1] for c in own.columns[:2])
            dataset = domain.corruption if datasets else ""
            counts.append(
                own.assign(adapter=adapter, corruption=domain.corruption, dataset=dataset)
            )
    segments, confusions = pd.DataFrame(lines), pd.concat(counts)
    corruptions = segments["corruption"].unique()
    averaged = tuple(name for name in corruptions if name != CLEAN) or (*corruptions,)
    table, means = _tables(segments, pairs, averaged, datasets)
    errors = [_corruption_error(name, segments, results) for name in means.index]
    means["corruption_error"] = np.array(errors, float)
    return Summary(
        segments.rename(columns={"low": "gain_low", "high": "gain_high"}),
        table,
        means,
        _classes(confusions[confusions["corruption"].isin(averaged)]),
        results,
        averaged,
        baseline if baseline in means.index else None,
        "dataset" if datasets else "corruption",
    )


def _key(result: Predictions) -> tuple[str, str, int]:
    return result.adapter, result.stream, result.seed


def _metrics(rows: pd.DataFrame) -> dict[str, Any]:
    """All metrics of one segment."""
    seen = rows[rows["seen"]]
    finite = seen[np.isfinite(seen["nll"])]  # an image with NaN logits counts as wrong
    intervals = mean_intervals(rows)
    line: dict[str, Any] = {"images": len(seen)}
    for name in ("top1", "top5", "nll", "brier"):
        source = seen if name.startswith("top") else finite
        line[name] = source[name].astype(float).mean()
        line[f"{name}_low"], line[f"{name}_high"] = intervals[name] or (None, None)
    scores = (finite[name].to_numpy() for name in ("confidence", "top1"))
    return line | {
        "ece": float(metrics.expected_calibration_error(*scores)) if len(finite) else None,
        "mean_per_class_recall": seen.groupby("label")["top1"].mean().mean(),
        "without_prediction": len(seen) - len(finite),
        "unreadable": len(rows) - len(seen),
    }


def _gain(pairs: Sequence[Pair], datasets: bool = False) -> dict[str, float | None]:
    """The gain over several segments; an image is resampled with all that show it."""
    _, names, own, others = zip(*pairs, strict=True) if pairs else ((),) * 4
    gain = paired_gain(own, others, names if datasets else ()) if pairs else None
    low, high = (gain and gain.interval) or (None, None)
    return {"gain": gain and gain.top1, "low": low, "high": high}


def _speed(result: Predictions) -> dict[str, Any]:
    images, seconds = int(result.rows["seen"].sum()), float(result.steps["seconds"].sum())
    return {
        "skipped_steps": int(result.steps["skipped"].sum()),
        "images_per_second": round(images / seconds, 2) if images and seconds else None,
        "seconds_per_image": seconds / images if images and seconds else None,
        "peak_memory_gb": result.peak_memory_gb or None,
    }


def _tables(
    segments: pd.DataFrame, pairs: Sequence[Pair], averaged: Sequence[str], datasets: bool
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table by corruption and adapter, and the means by adapter."""
    adapters = pd.Index(segments["adapter"].unique(), name="adapter")
    corruptions = pd.Index(segments["corruption"].unique(), name="corruption")
    every = pd.MultiIndex.from_product([corruptions, adapters])
    columns = ["top1", "mean_per_class_recall", "ece", "nll", "brier", "seconds_per_image"]
    values = segments.astype(dict.fromkeys(columns, float))
    table = values.groupby(["corruption", "adapter"])[columns].mean().reindex(every)
    means = table[table.index.isin(averaged, "corruption")].groupby("adapter").mean()
    gains = [_gain([p for p in pairs if p[:2] == (adapter, name)]) for name, adapter in every]
    table = table.join(pd.DataFrame(gains, every, dtype=float))
    gains = [
        _gain([p for p in pairs if p[0] == name and p[1] in averaged], datasets)
        for name in adapters
    ]
    means = means.reindex(adapters).join(pd.DataFrame(gains, adapters, dtype=float))
    for frame in (table, means):
        frame["significance"] = 1 * (frame["low"] > 0) - 1 * (frame["high"] < 0)
    own = segments[segments["corruption"].isin(averaged)]
    seeds = own.groupby(["adapter", "seed", "corruption"])["top1"].mean()
    means["spread"] = seeds.groupby(["adapter", "seed"]).mean().groupby("adapter").std()
    means["images_per_second"] = 1 / means["seconds_per_image"]
    means["peak_memory_gb"] = segments.groupby("adapter")["peak_memory_gb"].max().astype(float)
    return table, means


def _classes(counts: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by adapter, dataset and class, and the most frequent confusion."""
    key = ["adapter", "dataset", "label", "class"]
    pooled = counts.groupby([*key, "prediction", "mistaken_for"], sort=False)["images"].sum()
    pooled = pooled.reset_index()
    total = pooled.groupby(key, sort=False)["images"].sum()
    total = total.sort_index(level="label", sort_remaining=False)
    hit = pooled["label"] == pooled["prediction"]
    right = pooled[hit].groupby(key)["images"].sum().reindex(total.index, fill_value=0)
    wrong = pooled[~hit & (pooled["prediction"] >= 0)].sort_values("images", kind="stable")
    wrong = wrong.groupby(key).last().reindex(total.index)
    columns = {"images": total, "accuracy": right / total, "mistaken_for": wrong["mistaken_for"]}
    return pd.DataFrame(columns | {"mistaken_share": wrong["images"] / total}).reset_index()


def _corruption_error(
    adapter: str, segments: pd.DataFrame, results: Sequence[Predictions]
) -> float | None:
    """Mean corruption error; None but for all of ImageNet-C, which AlexNet's errors are of."""
    for result in results:
        layout = {k: v for group in result.settings.values() for k, v in group.items()}.get(
            "layout"
        )
        if layout != "imagenet-c" or len(result.rows) != 50_000 * len(result.domains):
            return None
    own = segments[segments["adapter"] == adapter]
    found = own.groupby(["corruption", "severity"])["top1"].mean().unstack()
    found = found.reindex(index=[*metrics.ALEXNET_ERRORS], columns=range(1, 6))
    if found.isna().any(axis=None):
        return None
    return metrics.mean_corruption_error((1 - found.mean(axis=1)).to_dict())
