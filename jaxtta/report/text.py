"""A summary in words: two sentences, a text table, notes and warnings."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from jaxtta.data.corruptions import CLEAN
from jaxtta.images import printable
from jaxtta.report.summary import Summary

NONE = "–"
NAMED = 5  # number of images, streams or batches listed in a warning
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
    means, base = summary.means, summary.baseline
    known = means["top1"].dropna()
    if known.empty:
        return "No images were processed."
    count, first = len(summary.averaged), summary.averaged[0].replace("_", " ")
    where = f"Averaged over {count} {summary.noun}s" if count > 1 else f"On {first} images"
    if not summary.compared:
        rest = "No other adapter was run" if base else "There is no baseline to compare with"
        return f"{where}, {known.idxmax()} has an accuracy of {100 * known.max():.2f} %. {rest}."
    best = means["gain"].idxmax()
    entry, share = means.loc[best], f"{base} with {points(means['top1'][base])} %"
    gain = f"{points(entry['gain'], '+')} points {interval(entry)}"
    has = f"{best}, has {points(entry['top1'])} %, {gain}"
    if entry["significance"] > 0:
        said = f"{best} is best with {points(entry['top1'])} %, {gain} over {base}'s "
        said += f"{points(means['top1'][base])} %"
    elif entry["significance"] == 0:
        said = f"no adapter is clearly better than {share}: the highest, {has}, which is not "
        said += "significant"
    else:
        said = f"every adapter is worse than {share}: the nearest, {has}"
    counts = ", ".join(_counts(summary, name) for name in summary.compared)
    noun = summary.noun if count == 1 else f"{summary.noun}s"
    return f"{where}, {said}. Significant differences from {base} on {count} {noun}: {counts}."


def _counts(summary: Summary, adapter: str) -> str:
    found = summary.table["significance"].xs(adapter, level="adapter")
    own = found[[*summary.averaged]]
    text = f"{adapter} better on {(own > 0).sum()} and worse on {(own < 0).sum()}"
    if CLEAN not in summary.averaged and found.get(CLEAN):
        text += f" (clean images: {'better' if found[CLEAN] > 0 else 'worse'})"
    return text


def entries(summaries: Iterable[Summary]) -> list[tuple[str, list[pd.Series | None]]]:
    """Rows of the table and of the means, by the adapters of all summaries; None where missing."""
    summaries = [*summaries]
    rows: list[tuple[str, list[pd.Series | None]]] = []
    for name in dict.fromkeys(name for each in summaries for name in each.corruptions):
        found = [
            each.table.loc[(name, adapter)] if name in each.corruptions else None
            for each in summaries
            for adapter in each.adapters
        ]
        rows.append((name, found))
    return [*rows, ("mean", [each.means.loc[a] for each in summaries for a in each.adapters])]


def text_table(summaries: Summary | Mapping[str, Summary]) -> str:
    """Format accuracies in per cent, gains and their intervals in points.

    Args:
        summaries: one, or several by heading to be put side by side.
    """
    several = {"": summaries} if isinstance(summaries, Summary) else summaries
    heads = [[name, *[""] * (len(each.adapters) - 1)] for name, each in several.items()]
    rows = [["", *itertools.chain(*heads)]] if len(several) > 1 else []
    noun = next(iter(several.values())).noun
    rows.append([noun, *(name for each in several.values() for name in each.adapters)])
    rules = [len(rows)]
    rows += [[name, *map(_entry, found)] for name, found in entries(several.values())]
    rules += [len(rows), len(rows) + 2]
    rows += [[name, *texts] for name, texts in measures(several.values())]
    lines = aligned(rows)
    rule = "-" * max(map(len, lines))
    for place in rules:
        lines.insert(place, rule)
    lines += dict.fromkeys(note for each in several.values() for note in notes(each))
    if any((frame["significance"] < 0).any() for s in several.values() for frame in s[1:3]):
        lines.append("! Significantly worse than the baseline: the gain's interval is below 0.")
    return "\n".join(lines)


def _entry(entry: pd.Series | None) -> str:
    if entry is None:
        return NONE
    text = points(entry["top1"])
    if not pd.isna(entry["gain"]):
        text += f" {points(entry['gain'], '+')} {interval(entry)}"
    return f"{text} !" if entry["significance"] < 0 else text


def points(share: float, sign: str = "") -> str:
    """Format a share in per cent, or a difference in points."""
    return NONE if pd.isna(share) else f"{100 * share:{sign}.2f}"


def interval(entry: pd.Series) -> str:
    """Format a gain's interval."""
    return f"[{points(entry['low'], '+')}, {points(entry['high'], '+')}]"


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
    """The classes with the lowest mean accuracy: name and texts by adapter."""
    groups = summary.classes.groupby(["dataset", "label"], sort=False)
    rows = []
    for (dataset, label), _ in groups["accuracy"].mean().nsmallest(count).items():
        own = groups.get_group((dataset, label)).set_index("adapter").reindex(summary.adapters)
        texts = [
            f"{points(line['accuracy'])}, {line['mistaken_for']} {points(line['mistaken_share'])}"
            if line["mistaken_share"] > 0
            else points(line["accuracy"])
            for _, line in own.iterrows()
        ]
        name = own["class"].dropna().iloc[0]
        rows.append((f"{dataset}: {name}" if dataset else name, texts))
    return rows


def notes(summary: Summary) -> list[str]:
    """Sentences that tell what the table's means are over."""
    said, seeds = [], summary.segments["seed"].nunique()
    if len(summary.severities) > 1:
        shown = ", ".join(map(str, summary.severities))
        said.append(f"Each {summary.noun} is the mean over severities {shown}.")
    if len(summary.averaged) < len(summary.corruptions):
        said.append("The mean excludes clean images.")
    if seeds > 1:
        texts = ", ".join(f"{name} {points(x)}" for name, x in summary.means["spread"].items())
        said.append(f"Mean over {seeds} seeds; standard deviation over seeds: {texts}.")
    return said


def warnings(summary: Summary) -> list[str]:
    """Sentences about unreadable images, skipped steps and predictions that are not finite."""
    said = []
    if lost := sorted({name for result in summary.results for name in result.unreadable}):
        said.append(f"{counted(len(lost), 'image')} could not be read: {some(lost)}.")
    for adapter in summary.adapters:
        own = [result for result in summary.results if result.adapter == adapter]
        where = {
            f"{r.stream} (seed {r.seed}, batches {some([*r.steps.index[r.steps['skipped']]])})": n
            for r in own
            if (n := int(r.steps["skipped"].sum()))
        }
        if where:
            steps = counted(sum(where.values()), "step")
            said.append(
                f"{adapter}: {steps} skipped because the loss or the update was not finite, on "
                f"{some([*where])}."
            )
        of_adapter = summary.segments["adapter"] == adapter
        if mute := summary.segments["without_prediction"][of_adapter].sum():
            said.append(f"{adapter}: without a finite prediction, counted as wrong: {mute}.")
    return said


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def some(items: Sequence[object], shown: int = NAMED) -> str:
    """List the first items, and how many more there are."""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(map(str, items[:shown])) + more
