"""What a sweep's cells say: the answer in words, a table to read, a CSV to go on with.

    print(answer(cells))
    print(table(cells))
    summary_csv(cells, folder / "summary.csv")

A corruption's figure is the mean over its severities and seeds. The mean row is the mean over
corruptions; clean images have a row of their own and are left out of it, as in the literature.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtta.data.corruptions import CLEAN
from jaxtta.evaluate.record import Figures, gain
from jaxtta.evaluate.results import Cell
from jaxtta.evaluate.run import BASELINE
from jaxtta.io import atomic_write
from jaxtta.metrics import ALEXNET_ERRORS, mean_corruption_error

NONE = "–"
DATASETS = "datasets"
"""The setting of cells whose segments are whole datasets."""


class Entry(NamedTuple):
    """One adapter on one corruption, or on the mean of them.

    Attributes:
        top1: accuracy in per cent.
        gain: points over the baseline, on the images that both saw; None for the baseline.
        interval: the gain's 95 % interval.
    """

    top1: float | None
    gain: float | None = None
    interval: tuple[float, float] | None = None

    @property
    def verdict(self) -> int:
        """1 if the whole interval lies above 0, -1 if below, and 0 if chance may explain it."""
        if self.interval is None:
            return 0
        return int(self.interval[0] > 0) - int(self.interval[1] < 0)


class Summary(NamedTuple):
    """Accuracies and gains of all adapters.

    Attributes:
        adapters: names, in the cells' order.
        corruptions: names, in the cells' order.
        averaged: those of them that the mean is over.
        baseline: the adapter that gains are counted from; None if it was not run.
        entries: by corruption and adapter.
        means: by adapter.
        noun: what the rows are: "corruption" or "dataset".
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
        """The adapters that have a gain over the baseline."""
        return tuple(name for name in self.adapters if self.means[name].gain is not None)


def summarise(cells: Sequence[Cell], baseline: str = BASELINE) -> Summary:
    """Average the cells by corruption and adapter, and count gains from the baseline.

    Args:
        cells: of one sweep.
        baseline: the adapter that gains are counted from, if it is there.

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
    """The corruptions that means are over: all but the clean images, if there are others."""
    corruptions = _corruptions(cells)
    return tuple(name for name in corruptions if name != CLEAN) or corruptions


def _pairs(cells: Sequence[Cell], adapter: str, baseline: str) -> list[tuple[Figures, Figures]]:
    """An adapter's segments beside the baseline's of the same stream and seed."""
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
    """Each image is drawn with all its domains and seeds, so the interval is a joint one."""
    found = gain(*zip(*pairs, strict=True), independent=datasets) if pairs else None
    points = None if top1 is None else 100 * top1
    if found is None:
        return Entry(points)
    bounds = found["interval"]
    return Entry(points, 100 * found["top1"], bounds and (100 * bounds[0], 100 * bounds[1]))


def average(
    cells: Iterable[Cell], adapter: str, figure: str, corruptions: Iterable[str]
) -> float | None:
    """One figure of an adapter, averaged within each corruption and then over them.

    Args:
        cells: of one sweep.
        adapter: whose.
        figure: a segment's key: `top1`, `ece`, `nll` …
        corruptions: over which.

    Returns:
        The mean of what is known; None if nothing is.
    """
    segments = [s for cell in cells if cell["adapter"] == adapter for s in cell["segments"]]
    return _mean(
        _mean(s[figure] for s in segments if s["corruption"] == name) for name in corruptions
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else None


def severities(cells: Iterable[Cell]) -> list[int]:
    """The severities that the cells show, weakest first; without those that have none."""
    return sorted({s["severity"] for cell in cells for s in cell["segments"]} - {0})


def seeds(cells: Iterable[Cell]) -> list[int]:
    """The seeds that the cells come from."""
    return sorted({cell["seed"] for cell in cells})


def spread(cells: Sequence[Cell], adapter: str) -> float | None:
    """Standard deviation over seeds of an adapter's mean accuracy.

    Args:
        cells: of one sweep.
        adapter: whose.

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
        cells: of one sweep.
        adapter: whose.

    Returns:
        The mean corruption error; None unless the images are ImageNet-C's and every one of its
        corruptions was run at severities 1 to 5.
    """
    cells = [cell for cell in cells if cell["adapter"] == adapter]
    if any(cell.get("settings", {}).get("layout") != "imagenet-c" for cell in cells):
        return None
    found: dict[tuple[str, int], list[float | None]] = {}
    for segment in (s for cell in cells for s in cell["segments"]):
        found.setdefault((segment["corruption"], segment["severity"]), []).append(segment["top1"])
    errors = {}
    for name in ALEXNET_ERRORS:
        accuracies = [_mean(found.get((name, severity), [])) for severity in range(1, 6)]
        if None in accuracies:
            return None
        errors[name] = 1 - sum(accuracies) / len(accuracies)
    return 100 * mean_corruption_error(errors)


def answer(cells: Sequence[Cell], baseline: str = BASELINE) -> str:
    """Say in two sentences which adapter is best, and where each helps or harms.

    Args:
        cells: of one sweep.
        baseline: the adapter that gains are counted from, if it is there.

    Returns:
        Plain text.
    """
    return answer_from(summarise(cells, baseline))


def answer_from(summary: Summary) -> str:
    """The same from a summary that is there already."""
    measured = [name for name in summary.adapters if summary.means[name].top1 is not None]
    if not measured:
        return "No image has been seen."
    count, first = len(summary.averaged), summary.averaged[0].replace("_", " ")
    where = f"Averaged over {count} {summary.noun}s" if count > 1 else f"On {first} images"
    if summary.baseline is None or not summary.rivals:
        best = max(measured, key=lambda name: summary.means[name].top1)
        missing = summary.baseline is None
        rest = "It is not compared with unadapted predictions" if missing else "Nothing else ran"
        return f"{where}, {best} gets {summary.means[best].top1:.2f} % right. {rest}."
    best = max(summary.rivals, key=lambda name: summary.means[name].gain)
    entry, base = summary.means[best], summary.baseline
    share = summary.means[base].top1
    figures = f"{entry.gain:+.2f} points {_bounds(entry)}"
    if entry.verdict > 0:
        said = (
            f"{best} is best: it gets {entry.top1:.2f} % right, {figures} over {base}'s "
            f"{share:.2f} %"
        )
    elif entry.verdict == 0:
        said = (
            f"no adapter is clearly better than {base} with {share:.2f} %: the highest, {best}, "
            f"gets {entry.top1:.2f} %, {figures}, which chance may explain"
        )
    else:
        said = (
            f"every adapter is worse than {base} with {share:.2f} %: the nearest, {best}, gets "
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
    """Lay out accuracies by corruption and adapter, with gains over the baseline.

    Args:
        cells: of one sweep.
        baseline: the adapter that gains are counted from, if it is there.

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
    """Lines of text with a table's columns below each other.

    Args:
        rows: of cells, as many in each.

    Returns:
        A line for each row.
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
        lines.append("the mean is over the corruptions, without clean images")
    if any(e.verdict < 0 for e in (*summary.entries.values(), *summary.means.values())):
        lines.append(
            f"! significantly worse than {summary.baseline}: the gain's whole 95 % interval lies "
            "below 0"
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
    """Write one line an adapter, stream, seed and segment, with all figures that are scalars.

    Args:
        cells: of one sweep.
        path: of the CSV file, written whole; accuracies and gains in [0, 1], unknown ones empty.
        baseline: the adapter that gains are counted from, if it is there.
    """
    path = Path(path)
    bases = {(c["stream"], c["seed"]): c["segments"] for c in cells if c["adapter"] == baseline}
    lines = []
    for cell in cells:
        own = cell["adapter"] == baseline
        others = [] if own else bases.get((cell["stream"], cell["seed"]), [])
        for number, segment in enumerate(cell["segments"]):
            # A cell finished before its baseline did knows no gain: count it now.
            found = segment["gain"]
            if found is None and others:
                found = gain([segment], [others[number]])
            lines.append(_line(cell, number, segment, found))
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else [])
        writer.writeheader()
        writer.writerows(lines)


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
