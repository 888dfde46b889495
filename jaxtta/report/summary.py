"""Summaries of a sweep: a sentence, a text table and a CSV file.

    print(answer(cells))
    print(table(cells))
    summary_csv(cells, folder / "summary.csv")

A corruption's accuracy is the mean over its severities and seeds. The mean row is the mean over
corruptions; it excludes clean images, which have a separate row, as is usual in the literature.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtta.data.corruptions import CLEAN
from jaxtta.evaluate.record import Figures, gain
from jaxtta.evaluate.results import Cell
from jaxtta.evaluate.run import BASELINE
from jaxtta.io import write_csv
from jaxtta.metrics import ALEXNET_ERRORS, mean_corruption_error

NONE = "–"
DATASETS = "datasets"
"""The setting of cells whose segments are datasets."""


class Entry(NamedTuple):
    """One adapter on one corruption, or averaged over corruptions.

    Attributes:
        top1: accuracy in per cent.
        gain: gain over the baseline in points, on common images; None for the baseline.
        interval: the gain's 95 % interval.
    """

    top1: float | None
    gain: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def verdict(self) -> int:
        """1 for a significant gain, -1 for a significant loss, 0 if not significant."""
        if self.interval is None:
            return 0
        return int(self.interval[0] > 0) - int(self.interval[1] < 0)


class Summary(NamedTuple):
    """Accuracies and gains of all adapters.

    Attributes:
        adapters: names, in the order of the cells.
        corruptions: names, in the order of the cells.
        averaged: the corruptions included in the mean.
        baseline: the adapter that gains are relative to; None if it was not run.
        entries: entries by corruption and adapter.
        means: averaged entries by adapter.
        noun: what a row is: "corruption" or "dataset".
    """

    adapters: tuple[str, ...]
    corruptions: tuple[str, ...]
    averaged: tuple[str, ...]
    baseline: str | None
    entries: dict[tuple[str, str], Entry]
    means: dict[str, Entry]
    noun: str = "corruption"

    @property
    def rivals(self) -> tuple[str, ...]:
        """The adapters compared with the baseline."""
        return tuple(name for name in self.adapters if self.means[name].gain is not None)


def summarise(cells: Sequence[Cell], baseline: str = BASELINE) -> Summary:
    """Average the cells by corruption and adapter, and compute gains over the baseline.

    Args:
        cells: the cells of one sweep.
        baseline: the adapter that gains are relative to, if it was run.

    Returns:
        All accuracies and gains.
    """
    adapters = tuple(dict.fromkeys(cell["adapter"] for cell in cells))
    corruptions = _corruptions(cells)
    averaged = averaged_corruptions(cells)
    entries, means = {}, {}
    datasets = {cell["setting"] for cell in cells} == {DATASETS}
    for adapter in adapters:
        pairs = [] if adapter == baseline else _pairs(cells, adapter, baseline)
        for name in corruptions:
            top1 = average(cells, adapter, "top1", [name])
            own = [pair for pair in pairs if pair[0]["corruption"] == name]
            entries[name, adapter] = _entry(top1, own)
        own = [pair for pair in pairs if pair[0]["corruption"] in averaged]
        means[adapter] = _entry(average(cells, adapter, "top1", averaged), own, datasets)
    return Summary(
        adapters,
        corruptions,
        averaged,
        baseline if baseline in adapters else None,
        entries,
        means,
        "dataset" if datasets else "corruption",
    )


def _corruptions(cells: Iterable[Cell]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s["corruption"] for cell in cells for s in cell["segments"]))


def averaged_corruptions(cells: Sequence[Cell]) -> tuple[str, ...]:
    """The corruptions in the mean: all except clean images, unless there are no others."""
    corruptions = _corruptions(cells)
    return tuple(name for name in corruptions if name != CLEAN) or corruptions


def _pairs(cells: Sequence[Cell], adapter: str, baseline: str) -> list[tuple[Figures, Figures]]:
    """Pairs of an adapter's and the baseline's segments of the same stream and seed."""
    bases = {(c["stream"], c["seed"]): c["segments"] for c in cells if c["adapter"] == baseline}
    return [
        pair
        for cell in cells
        if cell["adapter"] == adapter and (cell["stream"], cell["seed"]) in bases
        for pair in zip(cell["segments"], bases[cell["stream"], cell["seed"]], strict=True)
    ]


def _entry(
    top1: float | None, pairs: Sequence[tuple[Figures, Figures]], datasets: bool = False
) -> Entry:
    """Make an entry; an image is resampled with all its domains and seeds jointly."""
    found = gain(*zip(*pairs, strict=True), independent=datasets) if pairs else None
    points = None if top1 is None else 100 * top1
    if found is None:
        return Entry(points)
    bounds = found["interval"]
    return Entry(points, 100 * found["top1"], bounds and (100 * bounds[0], 100 * bounds[1]))


def average(
    cells: Iterable[Cell], adapter: str, figure: str, corruptions: Iterable[str]
) -> float | None:
    """One metric of an adapter, averaged within each corruption and then over corruptions.

    Args:
        cells: the cells of one sweep.
        adapter: the adapter's name.
        figure: the metric's key in a segment: `top1`, `ece`, `nll` …
        corruptions: the corruptions to average over.

    Returns:
        The mean of the known values; None if there are none.
    """
    segments = [s for cell in cells if cell["adapter"] == adapter for s in cell["segments"]]
    return _mean(
        _mean(s[figure] for s in segments if s["corruption"] == name) for name in corruptions
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def severities(cells: Iterable[Cell]) -> list[int]:
    """The severities of the cells in ascending order, without 0."""
    return sorted({s["severity"] for cell in cells for s in cell["segments"]} - {0})


def seeds(cells: Iterable[Cell]) -> list[int]:
    """The seeds of the cells."""
    return sorted({cell["seed"] for cell in cells})


def spread(cells: Sequence[Cell], adapter: str) -> float | None:
    """Standard deviation over seeds of an adapter's mean accuracy.

    Args:
        cells: the cells of one sweep.
        adapter: the adapter's name.

    Returns:
        Points; None for fewer than two seeds.
    """
    corruptions = averaged_corruptions(cells)
    means = [
        average([c for c in cells if c["seed"] == seed], adapter, "top1", corruptions)
        for seed in seeds(cells)
    ]
    known = [100 * value for value in means if value is not None]
    return float(np.std(known, ddof=1)) if len(known) > 1 else None


def corruption_error(cells: Sequence[Cell], adapter: str) -> float | None:
    """An adapter's mean corruption error relative to AlexNet, in per cent.

    Args:
        cells: the cells of one sweep.
        adapter: the adapter's name.

    Returns:
        The mean corruption error; None unless the images are ImageNet-C's 50,000, as AlexNet's
        are, and every one of its corruptions was run at severities 1 to 5.
    """
    cells = [cell for cell in cells if cell["adapter"] == adapter]
    for settings in (cell.get("settings", {}) for cell in cells):
        whole = settings.get("images", "").startswith("50000,") and settings.get("limit") is None
        if settings.get("layout") != "imagenet-c" or not whole:
            return None
    found: dict[tuple[str, int], list[float | None]] = {}
    for segment in (s for cell in cells for s in cell["segments"]):
        found.setdefault((segment["corruption"], segment["severity"]), []).append(segment["top1"])
    errors = {}
    for name in ALEXNET_ERRORS:
        accuracies = [_mean(found.get((name, severity), [])) for severity in range(1, 6)]
        known = [accuracy for accuracy in accuracies if accuracy is not None]
        if len(known) < len(accuracies):
            return None
        errors[name] = 1 - sum(known) / len(known)
    return 100 * mean_corruption_error(errors)


def answer(cells: Sequence[Cell], baseline: str = BASELINE) -> str:
    """Summarise in two sentences which adapter is best, and where each helps or harms.

    Args:
        cells: the cells of one sweep.
        baseline: the adapter that gains are relative to, if it was run.

    Returns:
        Plain text.
    """
    return answer_from(summarise(cells, baseline))


def answer_from(summary: Summary) -> str:
    """The same from a Summary."""
    accuracies = [(name, summary.means[name].top1) for name in summary.adapters]
    measured = {name: top1 for name, top1 in accuracies if top1 is not None}
    if not measured:
        return "No images were processed."
    count, first = len(summary.averaged), summary.averaged[0].replace("_", " ")
    where = f"Averaged over {count} {summary.noun}s" if count > 1 else f"On {first} images"
    if summary.baseline is None or not summary.rivals:
        best = max(measured, key=measured.__getitem__)
        missing = summary.baseline is None
        rest = "There is no baseline to compare with" if missing else "No other adapter was run"
        return f"{where}, {best} has an accuracy of {summary.means[best].top1:.2f} %. {rest}."
    best = max(summary.rivals, key=lambda name: summary.means[name].gain or 0.0)
    entry, base = summary.means[best], summary.baseline
    share = summary.means[base].top1
    figures = f"{entry.gain:+.2f} points {_bounds(entry)}"
    if entry.verdict > 0:
        said = f"{best} is best with {entry.top1:.2f} %, {figures} over {base}'s {share:.2f} %"
    elif entry.verdict == 0:
        said = (
            f"no adapter is clearly better than {base} with {share:.2f} %: the highest, {best}, "
            f"has {entry.top1:.2f} %, {figures}, which is not significant"
        )
    else:
        said = (
            f"every adapter is worse than {base} with {share:.2f} %: the nearest, {best}, has "
            f"{entry.top1:.2f} %, {figures}"
        )
    counts = ", ".join(_counts(summary, name) for name in summary.rivals)
    noun = summary.noun if count == 1 else f"{summary.noun}s"
    return f"{where}, {said}. Significant differences from {base} on {count} {noun}: {counts}."


def _counts(summary: Summary, adapter: str) -> str:
    verdicts = [summary.entries[name, adapter].verdict for name in summary.averaged]
    text = f"{adapter} better on {verdicts.count(1)} and worse on {verdicts.count(-1)}"
    clean = summary.entries.get((CLEAN, adapter))
    if CLEAN not in summary.averaged and clean is not None and clean.verdict:
        text += f" (clean images: {'better' if clean.verdict > 0 else 'worse'})"
    return text


def table(cells: Sequence[Cell], baseline: str = BASELINE) -> str:
    """Format accuracies by corruption and adapter, with gains over the baseline.

    Args:
        cells: the cells of one sweep.
        baseline: the adapter that gains are relative to, if it was run.

    Returns:
        Lines of text; accuracies in per cent, gains and their 95 % intervals in points.
    """
    summary = summarise(cells, baseline)
    rows = [(summary.noun, list(summary.adapters))]
    for name in summary.corruptions:
        rows.append((name, [_text(summary.entries[name, a]) for a in summary.adapters]))
    rows.append(("mean", [_text(summary.means[a]) for a in summary.adapters]))
    errors = {adapter: corruption_error(cells, adapter) for adapter in summary.adapters}
    if any(error is not None for error in errors.values()):
        texts = [NONE if e is None else f"{e:.2f}" for e in errors.values()]
        rows.append(("mean corruption error", texts))
    lines = aligned([name, *texts] for name, texts in rows)
    rule = "-" * max(map(len, lines))
    lines.insert(1, rule)
    lines.insert(2 + len(summary.corruptions), rule)
    return "\n".join([*_heading(cells), *lines, *_foot(cells, summary)])


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Format rows as text with aligned columns.

    Args:
        rows: rows with the same number of cells.

    Returns:
        One line per row.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _heading(cells: Sequence[Cell]) -> list[str]:
    shown = severities(cells)
    if len(shown) < 2:
        return []
    return [f"each corruption is the mean over severities {', '.join(map(str, shown))}", ""]


def _foot(cells: Sequence[Cell], summary: Summary) -> list[str]:
    lines = []
    if len(seeds(cells)) > 1:
        found = {adapter: spread(cells, adapter) for adapter in summary.adapters}
        texts = [f"{a} {NONE if s is None else f'{s:.2f}'}" for a, s in found.items()]
        count = len(seeds(cells))
        lines.append(f"standard deviation of the mean over {count} seeds: {', '.join(texts)}")
    if len(summary.averaged) < len(summary.corruptions):
        lines.append("the mean excludes clean images")
    if any(e.verdict < 0 for e in (*summary.entries.values(), *summary.means.values())):
        lines.append(
            f"! significantly worse than {summary.baseline}: the gain's 95 % interval is below 0"
        )
    return lines


def _text(entry: Entry) -> str:
    text = NONE if entry.top1 is None else f"{entry.top1:5.2f}"
    if entry.gain is not None:
        text += f" {entry.gain:+.2f} {_bounds(entry)}"
    return text + (" !" if entry.verdict < 0 else "")


def _bounds(entry: Entry) -> str:
    return f"[{NONE}]" if entry.interval is None else "[{:+.2f}, {:+.2f}]".format(*entry.interval)


def summary_csv(cells: Sequence[Cell], path: str | Path, baseline: str = BASELINE) -> None:
    """Write one line per adapter, stream, seed and segment, with all scalar metrics.

    Args:
        cells: the cells of one sweep.
        path: the CSV file, written atomically; accuracies and gains in [0, 1], empty if unknown.
        baseline: the adapter that gains are relative to, if it was run.
    """
    path = Path(path)
    bases = {(c["stream"], c["seed"]): c["segments"] for c in cells if c["adapter"] == baseline}
    lines = []
    for cell in cells:
        own = cell["adapter"] == baseline
        others = [] if own else bases.get((cell["stream"], cell["seed"]), [])
        for number, segment in enumerate(cell["segments"]):
            # A cell finished before its baseline has no gain: compute it now.
            found = segment["gain"]
            if found is None and others:
                found = gain([segment], [others[number]])
            lines.append(_line(cell, number, segment, found))
    write_csv(path, lines)


def _line(cell: Cell, number: int, segment: Figures, found: Figures | None) -> dict[str, Any]:
    line = {name: cell[name] for name in ("adapter", "stream", "seed", "setting")}
    line["segment"] = number
    line |= {name: segment[name] for name in ("corruption", "severity", "images")}
    for name in ("top1", "top5", "nll", "brier"):
        line |= _bounded(name, segment[name], segment["intervals"][name])
    line["ece"] = segment["ece"]
    found = found or {"top1": None, "interval": None}
    line |= _bounded("gain", found["top1"], found["interval"])
    return line | {
        "without_prediction": segment["without_prediction"],
        "unreadable": len(segment.get("unreadable", ())),
        "skipped_steps": len(cell["skipped_steps"]),
        "images_per_second": cell["images_per_second"],
        "peak_memory_gb": cell.get("peak_memory_gb"),
    }


def _bounded(
    name: str, value: float | None, bounds: Sequence[float] | None
) -> dict[str, float | None]:
    low, high = bounds or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}
