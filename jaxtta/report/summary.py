"""The tables of a sweep, made once; text, CSV, plots and pages show them.

A corruption's accuracy is the mean over its severities and seeds. Means over corruptions leave out
clean images, which have a row of their own, as is usual in the literature.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxtta import metrics
from jaxtta.corruptions import CLEAN
from jaxtta.data import Domain
from jaxtta.evaluate.predictions import Predictions, mean_intervals, paired_gain
from jaxtta.evaluate.store import differences
from jaxtta.images import printable

BASELINE = "zero_shot"
DATASETS = "datasets"
"""The setting of results whose domains are datasets with images of their own."""
COUNTED = ["adapter", "corruption", "dataset", "number"]
IMAGENET_C_IMAGES = 50_000  # of each domain; AlexNet's errors are of all of them
METRICS = ["top1", "mean_per_class_recall", "ece", "nll", "brier", "seconds_per_image"]
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
    """Compute all tables of a sweep, with gains over `baseline` if it was run.

    Raises:
        ValueError: if there are no results, or they are of several sweeps.
    """
    _require_one_sweep(results)
    clean = functools.cache(printable)  # many results have the same class names
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
    datasets = results[0].setting == DATASETS
    frames = {_key(r): [r.segment(n) for n in range(len(r.domains))] for r in results}
    lines, pairs, counts, class_names = [], [], {}, {}
    for result in results:
        adapter, stream, seed = _key(result)
        others = [] if adapter == baseline else frames.get((baseline, stream, seed), [])
        for number, domain in enumerate(result.domains):
            rows = frames[_key(result)][number]
            pair = [(adapter, domain.corruption, rows, own) for own in others[number : number + 1]]
            pairs += pair
            line = {"adapter": adapter, "stream": stream, "seed": seed, "setting": result.setting}
            line |= {"segment": number, **domain._asdict(), **_metrics(rows)}
            lines.append(line | _gain(pair) | _speed(result))
            dataset = domain.corruption if datasets else ""
            class_names[dataset] = result.class_names
            counts[adapter, domain.corruption, dataset, len(counts)] = rows[
                rows["seen"]
            ].value_counts(["label", "prediction"])
    segments = pd.DataFrame(lines)
    names = [*segments["corruption"].unique()]
    averaged = tuple(name for name in names if name != CLEAN) or (*names,)
    counts = {key: found for key, found in counts.items() if key[1] in averaged}
    table, means = _tables(segments, pairs, averaged, datasets)
    means["corruption_error"] = _corruption_errors(segments, results)
    return Summary(
        segments.rename(columns={"low": "gain_low", "high": "gain_high"}),
        table,
        means,
        _classes(pd.concat(counts, names=COUNTED), class_names),
        results,
        averaged,
        baseline if baseline in means.index else None,
        "dataset" if datasets else "corruption",
    )


def _key(result: Predictions) -> tuple[str, str, int]:
    return result.adapter, result.stream, result.seed


def _require_one_sweep(results: Sequence[Predictions]) -> None:
    """Files of several sweeps may be below one folder; their rows must not be paired."""
    if not results:
        raise ValueError("there are no results to report")
    shared, keys = [], set()
    for result in results:
        model, data, streams = (result.settings.get(n, {}) for n in ("model", "data", "streams"))
        own = {} if result.setting == DATASETS else dict(data)  # datasets have images of their own
        own |= {name: x for name, x in streams.items() if name not in ("domains", "images")}
        shared.append({"setting": result.setting, "weights": model.get("weights")} | own)
        said = differences(shared[0], shared[-1]).replace("this run", "another")
        if _key(result) in keys:
            said = f"{result.adapter} on {result.stream} with seed {result.seed} twice"
        if said:
            raise ValueError(f"these are results of several sweeps, give one's folder: {said}")
        keys.add(_key(result))


def _metrics(rows: pd.DataFrame) -> dict[str, Any]:
    """All metrics of one segment."""
    seen = rows[rows["seen"]]
    finite = seen[np.isfinite(seen["nll"])]  # an image with NaN logits counts as wrong
    line: dict[str, Any] = {"images": len(seen)}
    for name, bounds in mean_intervals(rows).items():
        line[name] = (seen if name.startswith("top") else finite)[name].astype(float).mean()
        line[f"{name}_low"], line[f"{name}_high"] = bounds or (None, None)
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
    gain = paired_gain(own, others, names if datasets else ())
    low, high = (gain and gain.interval) or (None, None)
    return {"gain": gain and gain.top1, "low": low, "high": high}


def _speed(result: Predictions) -> dict[str, Any]:
    images = int(result.rows["seen"].sum())
    seconds = float(result.steps["seconds"].mean()) * len(result.steps)  # some steps are timed
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
    every = pd.MultiIndex.from_product([segments["corruption"].unique(), adapters])
    every.names = ["corruption", "adapter"]
    values = segments.astype(dict.fromkeys([*METRICS, "peak_memory_gb"], float))
    table = values.groupby(every.names)[METRICS].mean().reindex(every)
    means = table.loc[[*averaged]].groupby("adapter").mean().reindex(adapters)
    gains = [_gain([p for p in pairs if p[:2] == (adapter, name)]) for name, adapter in every]
    table = table.join(pd.DataFrame(gains, every, dtype=float))
    own = [pair for pair in pairs if pair[1] in averaged]
    gains = [_gain([pair for pair in own if pair[0] == name], datasets) for name in adapters]
    means = means.join(pd.DataFrame(gains, adapters, dtype=float))
    for frame in (table, means):
        frame["significance"] = 1 * (frame["low"] > 0) - 1 * (frame["high"] < 0)
    means["peak_memory_gb"] = values.groupby("adapter")["peak_memory_gb"].max()
    values = values[values["corruption"].isin(averaged)]
    tops = values.groupby(["adapter", "seed", "corruption"])["top1"].mean()
    means["spread"] = tops.groupby(["adapter", "seed"]).mean().groupby("adapter").std()
    means["images_per_second"] = 1 / means["seconds_per_image"]
    return table, means


def _classes(counts: pd.Series, names: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Accuracy by adapter, dataset and class, and the most frequent confusion."""
    key = ["adapter", "dataset", "label"]
    pooled = counts.groupby([*key, "prediction"], sort=False).sum().reset_index(name="images")
    total = pooled.groupby(key, sort=False)["images"].sum()
    total = total.sort_index(level="label", sort_remaining=False)
    hit = pooled["label"] == pooled["prediction"]
    right = pooled[hit].set_index(key)["images"].reindex(total.index, fill_value=0)
    wrong = pooled[~hit & (pooled["prediction"] >= 0)]  # -1: no finite prediction
    wrong = wrong.sort_values(["images", "prediction"], ascending=[False, True])
    wrong = wrong.groupby(key)[["prediction", "images"]].first().reindex(total.index)

    def named(numbers: pd.Index | pd.Series) -> pd.Series:
        pairs = zip(total.index.get_level_values("dataset"), numbers, strict=True)
        texts = [None if math.isnan(n) else names[dataset][int(n)] for dataset, n in pairs]
        return pd.Series(texts, total.index, dtype=object)

    columns = {
        "class": named(total.index.get_level_values("label")),
        "images": total,
        "accuracy": right / total,
        "mistaken_for": named(wrong["prediction"]),
        "mistaken_share": wrong["images"] / total,
    }
    return pd.DataFrame(columns).reset_index()


def _corruption_errors(segments: pd.DataFrame, results: Sequence[Predictions]) -> pd.Series:
    """Mean corruption error by adapter; missing but for all of ImageNet-C."""
    for result in results:
        layout = result.settings.get("streams", {}).get("layout")
        if layout != "imagenet-c" or len(result.rows) != IMAGENET_C_IMAGES * len(result.domains):
            return pd.Series(dtype=float)
    tops = segments.groupby(["adapter", "corruption", "severity"])["top1"].mean().unstack()
    errors = 1 - tops.reindex(columns=range(1, 6)).mean(axis=1, skipna=False).unstack()
    errors = errors.reindex(columns=[*metrics.ALEXNET_ERRORS]).dropna()
    return errors.apply(lambda row: metrics.mean_corruption_error(row.to_dict()), axis=1)
