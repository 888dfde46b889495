"""A summary in words: two sentences, tables of texts, notes and warnings."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from jaxtta.diagnose import truncate
from jaxtta.images import printable
from jaxtta.report.summary import Summary, with_means

NONE = "–"
MEASURES = {  # columns of the means beside accuracy: name, factor and format
    "corruption_error": ("mean corruption error (%)", 100, "{:.2f}"),
    "spread": ("standard deviation over seeds (points)", 100, "{:.2f}"),
    "mean_per_class_recall": ("mean per-class recall (%)", 100, "{:.2f}"),
    "ece": ("expected calibration error (%)", 100, "{:.2f}"),
    "nll": ("negative log-likelihood (nats)", 1, "{:.3f}"),
    "brier": ("Brier score", 1, "{:.3f}"),
    "seconds_per_image": ("seconds per image", 1, "{:.4f}"),
    "peak_memory_gb": ("peak memory (GB)", 1, "{:.2f}"),
}


def answer(summary: Summary) -> str:
    """Summarise in two sentences which adapter is best, and where each helps or harms."""
    means, base, count = summary.means, summary.baseline, len(summary.averaged)
    known = means["top1"].dropna()
    if known.empty:
        return "No images were processed."
    over = counted(count, summary.noun)
    where = f"Averaged over {over}" if count > 1 else f"On {summary.averaged[0]} images"
    if not summary.compared:
        return f"{where}, {known.idxmax()} is best with {points(known.max())} %. No gain is known."
    entry = means.T[best := str(means["gain"].idxmax())]
    verdict = {
        1: f"{best} is best",
        0: f"no adapter is clearly better than {base}: the highest is {best}",
        -1: f"every adapter is worse than {base}: the nearest is {best}",
    }[entry["significance"]]
    verdict += f" with {points(entry['top1'])} %, {gained(entry)} points"
    signs = summary.table["significance"].unstack("adapter").loc[summary.averaged]
    better, worse = (signs > 0).sum(), (signs < 0).sum()
    each = [f"{x} better on {better[x]} and worse on {worse[x]}" for x in summary.compared]
    differences = f"Significant differences from {base} on {over}: {', '.join(each)}"
    return f"{where}, {verdict} over {base}'s {points(means['top1'].get(base))} %. {differences}."


def accuracies(*summaries: Summary) -> pd.DataFrame:
    """By corruption (or "mean") and adapter: accuracy, gain with interval, and "better" or so."""
    words, table = {1: "better", -1: "worse"}, with_means(*summaries)
    texts = [
        (points(entry["top1"]), gained(entry), words.get(entry["significance"], ""))
        for _, entry in table.iterrows()
    ]
    return pd.Series(texts, table.index).unstack(sort=False)


def gained(entry: pd.Series) -> str:
    """Format a gain and its interval in points; empty if there is none."""
    gain, low, high = (points(entry[name], "+") for name in ("gain", "low", "high"))
    return "" if pd.isna(entry["gain"]) else f"{gain} [{low}, {high}]"


def text_table(*summaries: Summary) -> str:
    """Format accuracies in per cent and gains in points, of summaries with other adapters."""
    cells = accuracies(*summaries)
    texts = cells.map(lambda cell: " ".join(cell[:2]).strip() + " !" * (cell[2] == "worse"))
    rows = [*texts.itertuples(name=None), *measures(*summaries).itertuples(name=None)]
    lines = aligned([(summaries[0].noun, *texts.columns), *rows])
    for place in (1, len(texts) + 1, len(texts) + 3):
        lines.insert(place, "-" * max(map(len, lines)))
    lines += notes(*summaries)
    if any("] !" in line for line in lines):
        lines.append("! Significantly worse than the baseline: the gain's interval is below 0.")
    return "\n".join(lines)


def percent(share: Any, digits: int = 2, sign: str = "") -> str:
    """Format a share in per cent; a dash if it is missing."""
    return NONE if share is None or pd.isna(share) else f"{100 * share:{sign}.{digits}f}"


def points(share: Any, sign: str = "") -> str:
    """Format a share in per cent, or a difference in points."""
    return percent(share, sign=sign)


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Format rows with the same number of cells as lines with aligned columns."""
    rows = [[*map(printable, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def measures(*summaries: Summary) -> pd.DataFrame:
    """Texts of recall, calibration, speed and memory, where known, by name and adapter."""
    means = pd.concat([each.means for each in summaries]).dropna(axis=1, how="all")
    rows = {
        name: (factor * means[column]).map(form.format).replace("nan", NONE)
        for column, (name, factor, form) in MEASURES.items()
        if column in means
    }
    return pd.DataFrame(rows, means.index).T


def worst_classes(summary: Summary, count: int = 10) -> pd.DataFrame:
    """The classes with the lowest mean accuracy: accuracy and confusion by class and adapter."""
    classes = summary.classes.copy()
    classes["name"] = (classes["dataset"] + ": " + classes["class"]).str.removeprefix(": ")
    columns = ["accuracy", "mistaken_for", "mistaken_share"]
    classes["text"] = [
        points(accuracy) + f" ({name}: {points(share)})" * (share > 0)
        for accuracy, name, share in classes[columns].to_numpy()
    ]
    worst = classes.groupby(["name", "label"])["accuracy"].mean().nsmallest(count).index
    texts = classes.pivot(index=["name", "label"], columns="adapter", values="text")
    return texts.loc[worst].droplevel("label").reindex(columns=summary.adapters).fillna(NONE)


def notes(*summaries: Summary) -> list[str]:
    """Sentences that tell what the table's means are over."""
    said = {}
    for each in summaries:
        levels = ", ".join(map(str, sorted({*each.segments["severity"]} - {0})))
        over = counted(len(each.averaged), each.noun)
        said[f"The mean is over {over}{f' at severity {levels}' if levels else ''}."] = None
    if len({frozenset(each.averaged) for each in summaries}) > 1:
        said[f"The means are over different {summaries[0].noun}s, do not compare them."] = None
    return [*said]


def warnings(summary: Summary) -> list[str]:
    """Sentences about what is missing, skipped or not finite."""
    said, lines = [], summary.segments
    lines = lines.assign(run=lines["stream"] + " (seed " + lines["seed"].astype("str") + ")")
    if lost := sorted({name for result in summary.results for name in result.unreadable}):
        said.append(f"{counted(len(lost), 'image')} could not be read: {truncate(lost)}.")
    for adapter, own in lines.groupby("adapter", sort=False):
        if lacking := sorted({*lines["run"]} - {*own["run"]}):
            said.append(f"{adapter}: no results on {truncate(lacking)}, unlike other adapters.")
        if skipped := own.groupby("run")["skipped_steps"].first().sum():
            said.append(f"{adapter}: {counted(int(skipped), 'step')} skipped, as not finite.")
        if mute := own["without_prediction"].sum():
            said.append(f"{adapter}: without a finite prediction, counted as wrong: {mute}.")
    return said
