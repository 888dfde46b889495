"""Plots of a sweep: matplotlib figures, without pyplot and its global state."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxtta.images import printable
from jaxtta.report.summary import BASELINE, Summary, with_means

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe and Ito's
GREY = "#767676"
DASHES, MARKERS = ("-", "--", ":", "-."), "osD^"  # of adapters of the same colour
BINS, LONGEST = 15, 32  # of confidence, characters of a name


def styles(names: Iterable[str], baseline: str | None = BASELINE) -> dict[str, dict[str, Any]]:
    """Colour, linestyle, marker and label of each adapter."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names):
        turn, place = divmod(len(found) - (baseline in found), len(COLOURS))
        turn, colour = (0, GREY) if name == baseline else (turn % len(DASHES), COLOURS[place])
        found[name] = {"color": colour, "linestyle": DASHES[turn], "marker": MARKERS[turn]}
        found[name]["label"] = label(name)
    return found


def dots(*summaries: Summary) -> Figure:
    """Draw gains over the baseline with their 95 % intervals."""
    table = 100 * with_means(*summaries)
    names, adapters = map(table.index.unique, table.index.names)
    looks, shown = styles(adapters), [name for each in summaries for name in each.compared]
    places = np.arange(len(names)) + 0.4 * (names == "mean")
    figure = Figure((8, len(names) * (0.26 + 0.1 * len(shown)) + 1.4), layout="constrained")
    axes = figure.subplots()
    for number, adapter in enumerate(shown):
        own = table.xs(adapter, level="adapter")
        errors = own["gain"] - own["low"], own["high"] - own["gain"]
        offset = (number - (len(shown) - 1) / 2) * 0.72 / len(shown)
        look = looks[adapter] | {"linestyle": "none", "xerr": errors}
        axes.errorbar(own["gain"], places + offset, **look)
    for edge in places[1:] - 0.5:
        axes.axhline(edge, color="0.9", linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=1.5)
    axes.set(yticks=places, yticklabels=map(label, names), ylim=(len(names), -0.6))
    finish(axes, f"gain over {label(BASELINE)} (points)", "", grid="x", legend=False)
    return _with_legend(figure)


def running(summary: Summary) -> Figure:
    """Draw cumulative accuracy along the streams, averaged, and below it the cumulative gain."""
    curves: dict[str, list[pd.Series]] = {}
    for result in summary.results:
        right = pd.Series(result.top1[result.rows["seen"]], dtype=float)
        curves.setdefault(result.adapter, []).append(100 * right.expanding().mean())
    found = {name: pd.concat(own, axis=1).dropna(axis=1, how="all") for name, own in curves.items()}
    tops = pd.DataFrame({name: own.mean(axis=1, skipna=False) for name, own in found.items()})
    frames = {"accuracy so far (%)": tops}
    if summary.compared:
        over = f"gain over {label(summary.baseline or '')}\n(points)"
        frames[over] = tops.sub(tops[summary.baseline], axis=0)
    figure = Figure(figsize=(9, 1.2 + 2.5 * len(frames)), layout="constrained")
    panels = figure.subplots(len(frames), squeeze=False, sharex=True)[:, 0]
    for axes, (name, frame) in zip(panels, frames.items(), strict=True):
        for adapter, look in styles(summary.adapters, summary.baseline).items():
            axes.plot(1 + frame.index, frame[adapter], **look | {"marker": "", "linewidth": 1.8})
        late = frame[len(frame) // 10 :].stack()  # the first images fluctuate strongly
        axes.set_ylim(late.min() - 1, late.max() + 1)
        finish(axes, "", name, grid="both", legend=False)
    panels[-1].set_xlabel("images seen since the start of the stream, or where a corruption ends")
    first = summary.results[0]
    if first.setting != "mixed" and len(first.domains) > 1:  # mixed ones are interleaved
        ends = first.rows.groupby("segment")["seen"].sum().cumsum()
        names = [label(corruption) for corruption, _ in first.domains]
        ends = dict(zip(names, ends, strict=True))  # gradual: of all severities
        panels[-1].set_xticks([*ends.values()], [*ends], rotation=40, ha="right", fontsize=8)
    return _with_legend(figure)


def reliability(summary: Summary) -> Figure:
    """Draw reliability diagrams of all images, one panel per adapter."""
    looks = styles(summary.adapters, summary.baseline)
    figure, panels = _grid(len(looks), 2.6, 3.2)
    for axes, (adapter, look) in zip(panels, looks.items(), strict=True):
        own = [r.rows.assign(right=r.top1) for r in summary.results if r.adapter == adapter]
        rows = pd.concat([rows[rows["seen"] & np.isfinite(rows["nll"])] for rows in own])
        which = np.ceil(BINS * rows["confidence"]).clip(1, BINS)
        bins = rows.groupby(which)
        sure, right, images = bins["confidence"].mean(), bins["right"].mean(), bins.size()
        # Bar height is accuracy; opacity is the number of images.
        colours = [(look["color"], x) for x in 0.15 + 0.85 * np.sqrt(images / images.max())]
        axes.bar((right.index - 0.5) / BINS, right, 0.92 / BINS, color=colours)
        axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
        axes.plot(sure, right, "k.", markersize=4)
        title = f"{look['label']}\nmean ECE {100 * summary.means['ece'][adapter]:.1f} %"
        axes.set_title(title, fontsize=10)
        finish(axes, "confidence", "", legend=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    figure.supylabel("accuracy", fontsize=10)
    return figure


def severity(summary: Summary) -> Figure:
    """Draw accuracy over severity, for the mean and for each corruption."""
    looks = styles(summary.adapters, summary.baseline)
    tops = 100 * summary.segments.pivot_table("top1", ["corruption", "severity"], "adapter")
    tops = tops.reindex(columns=[*looks]).loc[summary.averaged]
    means = {"mean": tops.groupby("severity").mean()}
    panels = means | {name: tops.loc[name] for name in summary.averaged}
    figure, grid = _grid(len(panels), 2.4, 2.3)
    for axes, (name, values) in zip(grid, panels.items(), strict=True):
        for adapter, look in looks.items():
            axes.plot(values[adapter], **look, markersize=3)
        axes.set_title(label(name), fontsize=9)
        finish(axes, "severity", "", legend=False)
        axes.set(xticks=values.index, ylim=(np.nanmin(tops) - 2, np.nanmax(tops) + 2))
    figure.supylabel("top-1 accuracy (%)", fontsize=10)
    return _with_legend(figure)


def _grid(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    rows, columns = -(-count // 4), min(count, 4)
    figure = Figure((width * columns + 1, height * rows + 0.6), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, n + 1) for n in range(count)]


def figures(summary: Summary) -> dict[str, Figure]:
    """All figures that apply, by name: gain, running, severity, reliability."""
    if summary.means["top1"].isna().all():
        return {}
    drawn = {"gain": dots(summary)} if summary.compared else {}
    if summary.segments.groupby("corruption")["severity"].nunique().max() > 1:
        drawn["severity"] = severity(summary)
    return drawn | {"running": running(summary), "reliability": reliability(summary)}


def label(name: str) -> str:
    """Format a name for matplotlib: short, without formulas and what cannot be printed."""
    name = printable(name).replace("_", " ")
    if len(name) > LONGEST:  # settings are at the end
        name = f"{name[: LONGEST // 2 - 1]}…{name[-LONGEST // 2 :]}"
    return name.replace("$", r"\$")


def finish(axes: Axes, x: str, y: str, *, grid: Any = "y", legend: bool = True) -> None:
    """Set axis labels and grid, and a legend if there are several entries."""
    axes.set(xlabel=x, ylabel=y, axisbelow=True)
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)


def _with_legend(figure: Figure) -> Figure:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    # About ten characters fit on an inch.
    columns = max(1, int(10 * figure.get_figwidth()) // (8 + max(map(len, labels))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
    return figure
