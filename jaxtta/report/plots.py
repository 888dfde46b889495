"""Plots of a sweep: matplotlib figures, without pyplot and its global state.

An adapter has the same colour in all plots (Okabe and Ito's colour-blind palette); the baseline is
grey.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxtta.data.corruptions import CLEAN
from jaxtta.evaluate.results import Cell
from jaxtta.images import printable
from jaxtta.io import atomic_write
from jaxtta.report.summary import BASELINE, average, averaged_corruptions, severities, summarise

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
GREY = "#767676"
Grid = Literal["both", "x", "y"]
DASHES = ("-", "--", ":", "-.")


def styles(cells: Sequence[Cell], baseline: str = BASELINE) -> dict[str, tuple[str, str]]:
    """Colour and dashes of each adapter; dashes distinguish adapters of the same colour."""
    names = dict.fromkeys(cell["adapter"] for cell in cells)
    styles = {baseline: (GREY, "-")} if baseline in names else {}
    for number, name in enumerate(name for name in names if name != baseline):
        turn, place = divmod(number, len(COLOURS))
        styles[name] = COLOURS[place], DASHES[turn % len(DASHES)]
    return {name: styles[name] for name in names}


def bars(cells: Sequence[Cell], title: str = "", baseline: str = BASELINE) -> Figure:
    """Draw accuracy per corruption and adapter, with the mean at the end.

    Args:
        cells: the cells of one sweep.
        title: the title.
        baseline: the adapter that gains are relative to; whiskers are the gain's 95 % interval.

    Returns:
        The figure.
    """
    summary = summarise(cells, baseline)
    columns = [
        (label(name), {a: summary.entries[name, a] for a in summary.adapters})
        for name in summary.corruptions
    ]
    if len(columns) > 1:
        columns.append(("mean", summary.means))
    count = len(summary.adapters)
    figure = Figure(
        figsize=(np.clip((0.25 + 0.14 * count) * len(columns) + 1, 6, 12), 4.2),
        layout="constrained",
    )
    axes = figure.subplots()
    places, width = np.arange(len(columns)), 0.8 / count
    lowest = 0.0
    for number, (adapter, (colour, dashes)) in enumerate(styles(cells, baseline).items()):
        offset = (number - (count - 1) / 2) * width
        entries = [column[adapter] for _, column in columns]
        heights = [math.nan if e.top1 is None else e.top1 for e in entries]
        axes.bar(
            places + offset,
            heights,
            width,
            label=label(adapter),
            color=colour,
            hatch=None if dashes == "-" else "//",
        )
        for place, height, entry in zip(places + offset, heights, entries, strict=True):
            if entry.interval is not None and entry.gain is not None:
                ends = [height - entry.gain + bound for bound in entry.interval]
                axes.plot([place, place], ends, color="black", linewidth=0.9)
                lowest = min(lowest, *ends)
    axes.set_xticks(places, [name for name, _ in columns], rotation=40, ha="right")
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(bottom=lowest)
    if len(columns) > 1:
        axes.axvline(len(columns) - 1.5, color="0.6", linewidth=1)
    axes.set_ylabel("top-1 accuracy (%)")
    _finish(figure, [axes], title)
    return figure


def running(cells: Sequence[Cell], title: str = "", baseline: str = BASELINE) -> Figure:
    """Draw cumulative accuracy along the stream, and below it the cumulative gain.

    Streams of one segment are averaged; each longer stream has its own panels with marked segments.

    Args:
        cells: the cells of one sweep.
        title: the title.
        baseline: the adapter that gains are relative to, if it was run.

    Returns:
        The figure.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        name = cell["stream"] if len(cell["segments"]) > 1 else ""
        groups.setdefault(name, []).append(cell)
    adapters = {cell["adapter"] for cell in cells}
    kinds = 2 if baseline in adapters and len(adapters) > 1 else 1
    figure = Figure(figsize=(9, (1.2 + 2.5 * kinds) * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups) * kinds, squeeze=False)[:, 0].reshape(-1, kinds)
    for panels, (name, members) in zip(grid, groups.items(), strict=True):
        curves = _mean_curves(members)
        base = curves.get(baseline)
        for adapter, (colour, dashes) in styles(cells, baseline).items():
            if adapter not in curves:
                continue
            places, heights = curves[adapter]
            look = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
            panels[0].plot(places, heights, label=label(adapter), **look)
            if kinds > 1 and base is not None:
                panels[1].plot(places, heights - base[1], **look)
        panels[0].set_ylabel("accuracy so far (%)")
        if kinds > 1:
            panels[1].set_ylabel(f"gain over {label(baseline)}\n(points)")
        for axes in panels:
            _fit(axes)
            _mark_segments(axes, members[0], named=axes is panels[0])
        panels[-1].set_xlabel("images seen since the start of the stream")
        if len(groups) > 1:
            panels[0].set_title(label(name), loc="left", fontsize=10)
    _finish(figure, list(grid.flat), title)
    return figure


def _fit(axes: Axes) -> None:
    """Scale the y axis without the first images, where accuracy fluctuates strongly."""
    lines = [np.asarray(line.get_ydata()) for line in axes.lines]
    late = [values[len(values) // 10 :] for values in lines]
    if late:
        low, high = min(map(np.min, late)), max(map(np.max, late))
        margin = 0.08 * (high - low) + 0.3
        axes.set_ylim(low - margin, high + margin)


def _mean_curves(cells: Sequence[Cell]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Each adapter's average curve, on a common grid of image counts."""
    curves: dict[str, list[np.ndarray]] = {}
    for cell in cells:
        if cell["running"]:
            curves.setdefault(cell["adapter"], []).append(np.asarray(cell["running"], float))
    if not curves:
        return {}
    every = [curve for own in curves.values() for curve in own]
    # Streams with unreadable images are shorter.
    start, stop = max(c[0, 0] for c in every), min(c[-1, 0] for c in every)
    places = np.linspace(start, max(start, stop), 200)
    return {
        name: (places, 100 * np.mean([np.interp(places, *curve.T) for curve in own], axis=0))
        for name, own in curves.items()
    }


def _mark_segments(axes: Axes, cell: Cell, *, named: bool) -> None:
    # The segments of a mixed stream are interleaved.
    if cell["setting"] == "mixed" or len(cell["segments"]) == 1:
        return
    edges, names = [0], []
    for segment in cell["segments"]:
        if names and names[-1] == segment["corruption"]:  # gradual: the next severity
            edges[-1] += segment["images"]
        else:
            names.append(segment["corruption"])
            edges.append(edges[-1] + segment["images"])
    for edge in edges[1:-1]:
        axes.axvline(edge, color="0.75", linewidth=0.8, zorder=0)
    axes.set_xlim(0, max(edges[-1], 1))
    if not named:
        return
    top = axes.secondary_xaxis("top")
    middles = (np.asarray(edges[1:]) + edges[:-1]) / 2
    top.set_xticks(middles, map(label, names), rotation=40, ha="left", fontsize=8)
    top.tick_params(length=0)


def reliability(cells: Sequence[Cell], title: str = "", baseline: str = BASELINE) -> Figure:
    """Draw reliability diagrams, one panel per adapter.

    Args:
        cells: the cells of one sweep; all their images are pooled.
        title: the title.
        baseline: the adapter drawn in grey.

    Returns:
        The figure.
    """
    styled = styles(cells, baseline)
    columns = min(len(styled), 4)
    rows = math.ceil(len(styled) / columns)
    figure = Figure(figsize=(2.6 * columns + 0.6, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (adapter, (colour, _)) in zip(panels.flat, styled.items(), strict=False):
        count, confidence, right = _pooled_bins(cells, adapter)
        width = 1 / len(count)
        centres = (np.arange(len(count)) + 0.5) * width
        # Bar height is accuracy; opacity is the number of images.
        strength = 0.15 + 0.85 * np.sqrt(count / max(count.max(), 1))
        for centre, height, alpha in zip(centres, right, strength, strict=True):
            axes.bar(centre, height, 0.92 * width, color=colour, alpha=alpha)
        axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
        filled = count > 0
        axes.plot(confidence[filled], right[filled], ".", color="black", markersize=4)
        ece = average(cells, adapter, "ece", averaged_corruptions(cells))
        text = "" if ece is None else f"\nmean ECE {100 * ece:.1f} %"
        axes.set_title(label(adapter) + text, fontsize=10)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", box_aspect=1)
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy")
    for axes in panels.flat[len(styled) :]:
        axes.set_visible(False)
    _finish(figure, list(panels.flat), title, legend=False)
    return figure


def _pooled_bins(cells: Sequence[Cell], adapter: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    bins = [
        [segment["reliability"][name] for name in ("count", "confidence", "accuracy")]
        for cell in cells
        if cell["adapter"] == adapter
        for segment in cell["segments"]
    ]
    counts, confidences, rights = np.asarray(bins, float).swapaxes(0, 1)
    total = counts.sum(0)
    share = np.maximum(total, 1)
    return total, (counts * confidences).sum(0) / share, (counts * rights).sum(0) / share


def severity_curves(
    cells: Sequence[Cell], title: str = "", baseline: str = BASELINE
) -> Figure | None:
    """Draw accuracy over severity, for each corruption and their mean.

    Args:
        cells: the cells of one sweep.
        title: the title.
        baseline: the adapter drawn in grey.

    Returns:
        The figure; None for fewer than two severities.
    """
    shown = severities(cells)
    if len(shown) < 2:
        return None
    names = [name for name in averaged_corruptions(cells) if name != CLEAN]
    panels = {"mean": names} | {name: [name] for name in names if len(names) > 1}
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(2.4 * columns + 1.2, 2.3 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    at = {severity: _at_severity(cells, severity) for severity in shown}
    for axes, (panel, members) in zip(grid.flat, panels.items(), strict=False):
        for adapter, (colour, dashes) in styles(cells, baseline).items():
            values = [average(at[severity], adapter, "top1", members) for severity in shown]
            heights = [math.nan if value is None else 100 * value for value in values]
            axes.plot(
                *(shown, heights),
                color=colour,
                linestyle=dashes,
                marker="o",
                markersize=3,
                label=label(adapter),
            )
        only = len(panels) == 1
        axes.set_title(label(names[0] if only else panel), fontsize=9)
        axes.title.set_fontweight("bold" if panel == "mean" and not only else "normal")
        axes.set_xticks(shown)
        axes.set_xlabel("severity", fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel("top-1 accuracy (%)", fontsize=10)
    _finish(figure, list(grid.flat), title)
    return figure


def _at_severity(cells: Sequence[Cell], severity: int) -> list[Cell]:
    return [
        {**cell, "segments": [s for s in cell["segments"] if s["severity"] == severity]}
        for cell in cells
    ]


def figures(cells: Sequence[Cell], title: str = "", baseline: str = BASELINE) -> dict[str, Figure]:
    """Draw all figures that apply to the cells.

    Args:
        cells: the cells of one sweep.
        title: the title of each figure.
        baseline: the adapter that gains are relative to.

    Returns:
        The figures by name: accuracy, running, reliability, and severity if there are several.
    """
    if not cells:
        return {}
    drawn = {
        "accuracy": bars(cells, title, baseline),
        "running": running(cells, title, baseline),
        "reliability": reliability(cells, title, baseline),
        "severity": severity_curves(cells, title, baseline),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save_all(
    cells: Sequence[Cell], folder: str | Path, title: str = "", baseline: str = BASELINE
) -> list[Path]:
    """Draw all figures into a folder.

    Args:
        cells: the cells of one sweep.
        folder: for the PNGs; created if missing.
        title: the title of each figure.
        baseline: the adapter that gains are relative to.

    Returns:
        The files written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(cells, title, baseline).items():
        paths.append(folder / f"{name}.png")
        with atomic_write(paths[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    return paths


def label(name: str) -> str:
    """Format a name for matplotlib; escapes `$` and what cannot be printed."""
    return printable(name).replace("_", " ").replace("$", r"\$")


def finish(axes: Axes, x: str, y: str, *, grid: Grid = "y") -> None:
    """Set axis labels, and a legend if there are several entries."""
    axes.set(xlabel=x, ylabel=y)
    _tidy(axes, grid)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)


def _tidy(axes: Axes, grid: Grid = "y") -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, panels: Sequence[Axes], title: str, legend: bool = True) -> None:
    for axes in panels:
        _tidy(axes)
    if title:
        figure.suptitle(printable(title).replace("$", r"\$"), fontsize=11)
    if legend:
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            columns = min(len(labels), 6)
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
