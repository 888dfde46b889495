"""The tables of a sweep, made once; text, CSV, plots and pages show them.

A corruption's accuracy is the mean over its severities and seeds. Means over corruptions leave out
clean images, which have a row of their own, as is usual in the literature.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jaxtta import metrics
from jaxtta.corruptions import CLEAN
from jaxtta.evaluate.predictions import Predictions, mean_intervals, paired_gain
from jaxtta.evaluate.store import differences
from jaxtta.images import printable

BASELINE = "zero_shot"
DATASETS = "datasets"  # the setting of results whose domains are datasets of their own
IMAGENET_C_IMAGES = 50_000  # of each domain; AlexNet's errors are of all of them
METRICS = ["top1", "mean_per_class_recall", "ece", "nll", "brier", "seconds_per_image"]
CLASS = ["adapter", "dataset", "label", "class"]
Pair = tuple[pd.DataFrame, pd.DataFrame, str]  # rows of an adapter and the baseline, dataset
_key = operator.attrgetter("adapter", "stream", "seed")


class Summary(NamedTuple):
    """What reports of a sweep show; shares and gains in [-1, 1], NaN where unknown."""

    segments: pd.DataFrame  # `summary.csv`
    # by corruption and adapter: means, gain, low, high, significance (1, 0, -1)
    table: pd.DataFrame
    means: pd.DataFrame  # by adapter, over corruptions; spread: standard deviation over seeds
    classes: pd.DataFrame  # `classes.csv`, of all images in the means
    results: Sequence[Predictions]
    averaged: list[str]  # the corruptions in the means: all but clean, if there are others
    baseline: str | None  # None if it was not run
    noun: str  # what a row of the table is: "corruption" or "dataset"

    @property
    def adapters(self) -> list[str]:
        """Names, in the order of the results."""
        return [*self.means.index]

    @property
    def compared(self) -> list[str]:
        """The adapters that have a gain over the baseline."""
        return [*self.means.index[self.means["gain"].notna()]]


def summarise(results: Sequence[Predictions], baseline: str = BASELINE) -> Summary:
    """Compute all tables of one sweep, with gains over `baseline` if it was run."""
    _require_one_sweep(results)
    clean = functools.cache(printable)  # many results have the same class names
    frames = {(*_key(r), n): r.segment(n) for r in results for n in range(len(r.domains))}
    lines, pairs, counts = [], [], []
    for result in results:
        classes = dict(enumerate(map(clean, result.class_names)))
        for number, (corruption, severity) in enumerate(result.domains):
            rows = frames[(*_key(result), number)]
            other = frames.get((baseline, result.stream, result.seed, number))
            known = other is not None and result.adapter != baseline
            name = {"adapter": result.adapter, "corruption": clean(corruption)}
            dataset = name["corruption"] if result.setting == DATASETS else ""
            pairs.append((rows, other, dataset) if known else None)
            line = {"adapter": result.adapter, "stream": clean(result.stream), "seed": result.seed}
            line |= {"setting": result.setting, "segment": number, **name, "severity": severity}
            lines.append(line | _metrics(result, rows, _gain(pairs[-1:])))
            found = rows[rows["seen"]].value_counts(["label", "prediction"])
            found = found.reset_index(name="images").assign(**name, dataset=dataset)
            found["class"] = found["label"].map(classes).astype("str")
            found["mistaken_for"] = found["prediction"].map(classes).astype("str")
            counts.append(found)
    segments, counts = pd.DataFrame(lines), pd.concat(counts)
    averaged = [name for name in segments["corruption"].unique() if name != CLEAN] or [CLEAN]
    table, means = _tables(segments, pairs, averaged)
    means["corruption_error"] = _corruption_errors(segments, results)
    return Summary(
        segments.rename(columns={"low": "gain_low", "high": "gain_high"}),
        table,
        means,
        _classes(counts[counts["corruption"].isin(averaged)]),
        results,
        averaged,
        baseline if baseline in means.index else None,
        "dataset" if results[0].setting == DATASETS else "corruption",
    )


def with_means(*summaries: Summary) -> pd.DataFrame:
    """The tables of summaries with other adapters, and "mean"; NaN where there is no result."""
    tables = [each.table for each in summaries]
    tables += [pd.concat({"mean": each.means}, names=tables[0].index.names) for each in summaries]
    table = pd.concat(tables)
    return table.reindex(pd.MultiIndex.from_product([*map(table.index.unique, table.index.names)]))


def _require_one_sweep(results: Sequence[Predictions]) -> None:
    """Files of several sweeps may be below one folder; their rows must not be paired."""
    if not results:
        raise ValueError("there are no results to report")
    first, keys = {}, set()
    for result in results:
        model, data, streams = (result.settings.get(n, {}) for n in ("model", "data", "streams"))
        data = {} if result.setting == DATASETS else data  # datasets have images of their own
        shared = {"setting": result.setting, "weights": model.get("weights"), **data, **streams}
        shared |= {"domains": [], "images": ""}
        said = differences(first := first or shared, shared).replace("this run", "another")
        if _key(result) in keys:
            said = f"{result.adapter} on {result.stream} with seed {result.seed} twice"
        if said:
            raise ValueError(f"these are results of several sweeps, give one's folder: {said}")
        keys.add(_key(result))


def _metrics(result: Predictions, rows: pd.DataFrame, gain: dict[str, Any]) -> dict[str, Any]:
    """All metrics of one segment, and the speed."""
    seen = rows[rows["seen"]]
    finite = seen[np.isfinite(seen["nll"])]  # an image with NaN logits counts as wrong
    line: dict[str, Any] = {"images": len(seen)}
    for name, bounds in mean_intervals(rows).items():
        line[name] = (seen if name.startswith("top") else finite)[name].astype(float).mean()
        line[f"{name}_low"], line[f"{name}_high"] = bounds or (None, None)
    scores = (finite[name].to_numpy() for name in ("confidence", "top1"))
    images = result.rows["seen"].sum()
    seconds = result.steps["seconds"].mean() * len(result.steps)  # some steps are timed
    return line | {
        "ece": float(metrics.expected_calibration_error(*scores)) if len(finite) else None,
        "mean_per_class_recall": seen.groupby("label")["top1"].mean().mean(),
        "without_prediction": len(seen) - len(finite),
        "unreadable": len(rows) - len(seen),
        **gain,
        "skipped_steps": result.steps["skipped"].sum(),
        "images_per_second": round(images / seconds, 2) if images and seconds else None,
        "seconds_per_image": seconds / images if images and seconds else None,
        "peak_memory_gb": result.peak_memory_gb or None,
    }


def _gain(pairs: Sequence[Pair | None]) -> dict[str, float | None]:
    """The gain over several segments; an image is resampled with all that show it."""
    known = [pair for pair in pairs if pair]
    gain = paired_gain(*zip(*known, strict=True)) if known else None
    low, high = (gain and gain.interval) or (None, None)
    return {"gain": gain and gain.top1, "low": low, "high": high}


def _tables(
    segments: pd.DataFrame, pairs: Sequence[Pair | None], averaged: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The table by corruption and adapter, and the means by adapter."""

    def with_gains(means: pd.DataFrame, lines: pd.DataFrame) -> pd.DataFrame:
        groups = lines.groupby([*means.index.names])
        own = groups.apply(lambda group: [pairs[number] for number in group.index])
        means = means.join(pd.DataFrame([*map(_gain, own)], own.index, dtype=float))
        return means.assign(significance=1 * (means["low"] > 0) - 1 * (means["high"] < 0))

    values = segments.astype(dict.fromkeys([*METRICS, "peak_memory_gb"], float))
    table = with_gains(
        values.groupby(["corruption", "adapter"], sort=False)[METRICS].mean(), values
    )
    memory = values.groupby("adapter", sort=False)["peak_memory_gb"].max()
    values = values[values["corruption"].isin(averaged)]
    means = table.loc[averaged, METRICS].groupby("adapter").mean().reindex(memory.index)
    means = with_gains(means, values).assign(peak_memory_gb=memory)
    tops = values.groupby(["adapter", "seed", "corruption"])["top1"].mean()
    means["spread"] = tops.groupby(["adapter", "seed"]).mean().groupby("adapter").std()
    return table, means


def _classes(counts: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by adapter, dataset and class, and the most frequent confusion."""
    key = [*CLASS, "prediction", "mistaken_for"]
    counts = counts.groupby(key, sort=False, dropna=False)["images"].sum().reset_index()
    groups = counts.groupby(CLASS, sort=False)["images"]
    counts["mistaken_share"] = counts["images"] / groups.transform("sum")
    total = groups.sum().sort_index(level="label", sort_remaining=False)
    hit = counts["label"] == counts["prediction"]
    right = counts[hit].set_index(CLASS)["mistaken_share"].rename("accuracy")
    wrong = counts[~hit & (counts["prediction"] >= 0)]  # -1: no finite prediction
    wrong = wrong.sort_values(["images", "prediction"], ascending=[False, True])
    wrong = wrong.drop_duplicates(CLASS).set_index(CLASS)[["mistaken_for", "mistaken_share"]]
    return total.to_frame().join(right).fillna(0.0).join(wrong).reset_index()


def _corruption_errors(segments: pd.DataFrame, results: Sequence[Predictions]) -> pd.Series:
    """Mean corruption error by adapter; missing but for all of ImageNet-C."""
    layouts = {result.settings.get("streams", {}).get("layout") for result in results}
    whole = segments["images"] + segments["unreadable"] == IMAGENET_C_IMAGES
    lines = segments[whole & (layouts <= {"imagenet-c", "arrayrecord"})]
    tops = lines.groupby(["adapter", "corruption", "severity"])["top1"].mean().unstack()
    errors = 1 - tops.reindex(columns=range(1, 6)).mean(axis=1, skipna=False).unstack()
    alexnet = pd.Series(metrics.ALEXNET_ERRORS)
    return (errors.reindex(columns=alexnet.index) / alexnet).mean(axis=1, skipna=False)
