"""A summary in words: two sentences, a text table, notes and warnings."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from jaxtta.corruptions import CLEAN
from jaxtta.images import printable
from jaxtta.report.render import NONE
from jaxtta.report.summary import Summary

NAMED = 5  # number of images or streams listed in a warning
MEASURES = {
    "corruption_error": ("mean corruption error (%)", 100, 2),
    "mean_per_class_recall": ("mean per-class recall (%)", 100, 2),
    "ece": ("expected calibration error (%)", 100, 2),
    "nll": ("negative log-likelihood (nats)", 1, 3),
    "brier": ("Brier score", 1, 3),
    "seconds_per_image": ("seconds per image", 1, 4),
    "images_per_second": ("images per second", 1, 1),
    "peak_memory_gb": ("peak memory (GB)", 1, 2),
}
"""Columns of the means beside accuracy: name, factor and decimals."""


def answer(summary: Summary) -> str:
    """Summarise in two sentences which adapter is best, and where each helps or harms."""
    means, count = summary.means, len(summary.averaged)
    base: Any = summary.baseline
    known = means["top1"].dropna()
    if known.empty:
        return "No images were processed."
    noun = summary.noun if count == 1 else f"{summary.noun}s"
    where = f"On {summary.averaged[0].replace('_', ' ')} images"
    where = f"Averaged over {count} {noun}" if count > 1 else where
    if not summary.compared:
        rest = "No other adapter was run" if base else "There is no baseline to compare with"
        return f"{where}, {known.idxmax()} has an accuracy of {points(known.max())} %. {rest}."
    best: Any = means["gain"].idxmax()
    share = f"{points(means['top1'][base])} %"
    top, entry = points(means["top1"][best]), means.loc[best]
    gain = f"{points(entry['gain'], '+')} points {interval(entry)}"
    said = {
        1: f"{best} is best with {top} %, {gain} over {base}'s {share}",
        0: f"no adapter is clearly better than {base} with {share}: the highest, {best}, has "
        f"{top} %, {gain}, which is not significant",
        -1: f"every adapter is worse than {base} with {share}: the nearest, {best}, has {top} %, "
        f"{gain}",
    }[means["significance"][best]]
    counts = []
    for adapter in summary.compared:
        found = summary.table["significance"].xs(adapter, level="adapter")
        own, clean = found[[*summary.averaged]], found.get(CLEAN)
        text = f"{adapter} better on {(own > 0).sum()} and worse on {(own < 0).sum()}"
        if CLEAN not in summary.averaged and clean:
            text += f" (clean images: {'better' if clean > 0 else 'worse'})"
        counts.append(text)
    differences = f"Significant differences from {base} on {count} {noun}: {', '.join(counts)}"
    return f"{where}, {said}. {differences}."


def entries(summaries: Sequence[Summary]) -> list[tuple[str, list[Any]]]:
    """Rows of the tables, then of the means, by all adapters; NaN where there is no result."""
    every = dict.fromkeys(name for each in summaries for name in each.corruptions)
    columns = [(each, adapter) for each in summaries for adapter in each.adapters]
    tables = [each.table.xs(a, level="adapter").reindex([*every]) for each, a in columns]
    rows: list[tuple[str, list[Any]]] = [(name, [t.loc[name] for t in tables]) for name in every]
    means = [each.means.loc[adapter] for each, adapter in columns]
    return [*rows, ("mean", means)]


def text_table(summaries: Summary | Mapping[str, Summary]) -> str:
    """Format accuracies in per cent, gains in points; several summaries, by heading, in columns."""
    if isinstance(summaries, Summary):
        summaries = {"": summaries}
    several = [*summaries.values()]
    heads = [[name] + [""] * (len(each.adapters) - 1) for name, each in summaries.items()]
    rows = [["", *itertools.chain(*heads)]] if len(several) > 1 else []
    rows.append([several[0].noun, *(name for each in several for name in each.adapters)])
    rules = [len(rows)]
    rows += [[name, *map(_entry, found)] for name, found in entries(several)]
    rules += [len(rows), len(rows) + 2]
    lines = aligned(rows + [[name, *texts] for name, texts in measures(several)])
    rule = "-" * max(map(len, lines))
    for place in rules:
        lines.insert(place, rule)
    lines += notes(*several)
    if any("] !" in line for line in lines):
        lines.append("! Significantly worse than the baseline: the gain's interval is below 0.")
    return "\n".join(lines)


def _entry(entry: pd.Series) -> str:
    text = points(entry["top1"])
    if not pd.isna(entry["gain"]):
        text += f" {points(entry['gain'], '+')} {interval(entry)}"
    return f"{text} !" if entry["significance"] < 0 else text


def interval(entry: pd.Series) -> str:
    """Format a gain's interval in points."""
    return f"[{points(entry['low'], '+')}, {points(entry['high'], '+')}]"


def points(share: Any, sign: str = "") -> str:
    """Format a share in per cent, or a difference in points."""
    return NONE if pd.isna(share) else f"{100 * share:{sign}.2f}"


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Format rows with the same number of cells as lines with aligned columns."""
    rows = [[*map(printable, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def measures(summaries: Iterable[Summary]) -> list[tuple[str, list[str]]]:
    """Name and texts by adapter of recall, calibration, speed and memory, where known."""
    means = pd.concat([each.means for each in summaries])
    return [
        (name, [NONE if pd.isna(x) else f"{factor * x:.{digits}f}" for x in means[column]])
        for column, (name, factor, digits) in MEASURES.items()
        if means[column].notna().any()
    ]


def worst_classes(summary: Summary, count: int = 10) -> list[tuple[str, list[str]]]:
    """The classes with the lowest mean accuracy: name, and accuracy and confusion by adapter."""
    classes = summary.classes.groupby(["dataset", "class", "label"])
    rows = []
    for key in classes["accuracy"].mean().nsmallest(count).index:
        own = classes.get_group(key).set_index("adapter").reindex(summary.adapters)
        texts = []
        for _, entry in own.iterrows():
            known = not pd.isna(entry["mistaken_share"])
            confused = f" ({entry['mistaken_for']}: {points(entry['mistaken_share'])})"
            texts.append(points(entry["accuracy"]) + (confused if known else ""))
        rows.append((f"{key[0]}: {key[1]}" if key[0] else key[1], texts))
    return rows


def notes(*summaries: Summary) -> list[str]:
    """Sentences that tell what the table's means are over."""
    said = []
    for each in summaries:
        if len(each.severities) > 1:
            said.append(f"Each {each.noun} is the mean over severities {some(each.severities)}.")
        if len(each.averaged) < len(each.corruptions):
            said.append("The mean excludes clean images.")
        if (seeds := each.segments["seed"].nunique()) > 1:
            texts = ", ".join(f"{name} {points(x)}" for name, x in each.means["spread"].items())
            said.append(f"Mean over {seeds} seeds; standard deviation over seeds: {texts}.")
    if len({frozenset(each.averaged) for each in summaries}) > 1:
        said.append(f"The means are over different {summaries[0].noun}s, do not compare them.")
    return [*dict.fromkeys(said)]


def warnings(summary: Summary) -> list[str]:
    """Sentences about what is missing, skipped or not finite."""
    said, every = [], {(result.stream, result.seed) for result in summary.results}
    for adapter in summary.adapters:
        own = {(r.stream, r.seed) for r in summary.results if r.adapter == adapter}
        if lacking := [f"{stream} (seed {seed})" for stream, seed in sorted(every - own)]:
            said.append(
                f"{adapter}: no results on {some(lacking)}, which other adapters have; its means "
                "are over fewer streams."
            )
    if lost := sorted({name for result in summary.results for name in result.unreadable}):
        said.append(f"{counted(len(lost), 'image')} could not be read: {some(lost)}.")
    for adapter, own in summary.segments.groupby("adapter", sort=False):
        hit = own[own["skipped_steps"] > 0].drop_duplicates(["stream", "seed"])
        if len(hit):
            steps = counted(int(hit["skipped_steps"].sum()), "step")
            where = [f"{line.stream} (seed {line.seed})" for line in hit.itertuples()]
            said.append(
                f"{adapter}: {steps} skipped because the loss or the update was not finite, on "
                f"{some(where)}."
            )
        if mute := own["without_prediction"].sum():
            said.append(f"{adapter}: without a finite prediction, counted as wrong: {mute}.")
    return said


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def some(items: Sequence[object], shown: int = NAMED) -> str:
    """List the first items, and how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more
