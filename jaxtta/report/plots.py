"""Plots of a sweep: matplotlib figures, without pyplot and its global state.

An adapter has one colour in all plots (Okabe and Ito's palette); the baseline is grey.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxtta.corruptions import CLEAN
from jaxtta.evaluate.predictions import Predictions
from jaxtta.images import printable
from jaxtta.report.summary import BASELINE, Summary

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
GREY = "#767676"
DASHES, MARKERS = ("-", "--", ":", "-."), "osD^"  # of adapters of the same colour
POINTS, BINS, LONGEST = 200, 15, 32  # of a curve, of confidence, characters of a name


def styles(names: Iterable[str], baseline: str | None = BASELINE) -> dict[str, dict[str, Any]]:
    """Colour, linestyle, marker and label of each adapter."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names):
        turn, place = divmod(len(found) - (baseline in found), len(COLOURS))
        turn, colour = (0, GREY) if name == baseline else (turn % len(DASHES), COLOURS[place])
        found[name] = {"color": colour, "linestyle": DASHES[turn], "marker": MARKERS[turn]}
        found[name]["label"] = label(name)
    return found


def dots(summaries: Mapping[str, Summary]) -> Figure:
    """Draw gains over the baseline with their 95 % intervals, or accuracies without a baseline.

    Summaries, by heading, have a panel each, with a row per corruption and a dot per adapter.
    """
    gains = any(each.compared for each in summaries.values())
    names = [*dict.fromkeys(name for each in summaries.values() for name in each.corruptions)]
    looks = styles(name for each in summaries.values() for name in each.adapters)
    height = (len(names) + 1) * (0.16 + 0.1 * len(looks)) + 1.4
    figure = Figure(figsize=(1.8 + max(5.2, 3.2 * len(summaries)), height), layout="constrained")
    panels = figure.subplots(1, len(summaries), squeeze=False, sharex=True, sharey=True)[0]
    places = np.array([*range(len(names)), len(names) + 0.4])
    for axes, (heading, summary) in zip(panels, summaries.items(), strict=True):
        shown = summary.compared if gains else summary.adapters
        for number, adapter in enumerate(shown):
            own = summary.table.xs(adapter, level="adapter").reindex(names)
            own = 100 * pd.concat([own, summary.means.loc[[adapter]]])
            values = own["gain" if gains else "top1"]
            errors = [values - own["low"], own["high"] - values] if gains else None
            offset = (number - (len(shown) - 1) / 2) * 0.72 / len(shown)
            look = looks[adapter] | {"linestyle": "none", "markersize": 5}
            axes.errorbar(values, places + offset, xerr=errors, **look)
        for edge in places[1:-1] - 0.5:
            axes.axhline(edge, color="0.9", linewidth=0.8)
        axes.axhline(len(names) - 0.3, color="0.3", linewidth=1)
        over = f"gain over {label(summary.baseline or BASELINE)} (points)"
        finish(axes, over if gains else "top-1 accuracy (%)", "", grid="x", legend=False)
        if gains:
            axes.axvline(0, color=GREY, linewidth=1.5)
        axes.set_title(label(heading), fontsize=10)
    texts, base = [*map(label, names), "mean"], summaries[next(iter(summaries))]
    if gains and len(summaries) == 1 and base.baseline:
        tops = [*base.table["top1"].xs(base.baseline, level="adapter")]
        tops.append(base.means["top1"][base.baseline])
        texts = [f"{text} ({100 * top:.1f} %)" for text, top in zip(texts, tops, strict=True)]
    panels[0].set_yticks(places, texts)
    panels[0].get_yticklabels()[-1].set_fontweight("bold")
    panels[0].set_ylim(len(names) + 1, -0.6)
    return _with_legend(figure, panels)


def running(summary: Summary) -> Figure:
    """Draw cumulative accuracy along the streams, averaged, and below it the cumulative gain."""
    curves, kinds = _mean_curves(summary.results), 2 if summary.compared else 1
    figure = Figure(figsize=(9, 1.2 + 2.5 * kinds), layout="constrained")
    panels = figure.subplots(kinds, squeeze=False)[:, 0]
    for adapter, look in styles(summary.adapters, summary.baseline).items():
        look |= {"marker": "", "linewidth": 1.8}
        if adapter in curves:
            panels[0].plot(curves[adapter], **look)
        if kinds > 1 and {adapter, summary.baseline} <= {*curves}:
            panels[1].plot(curves[adapter] - curves[summary.baseline], **look)
    for axes in panels:
        if late := [line.get_ydata()[POINTS // 10 :] for line in axes.lines]:
            margin = 0.08 * np.ptp(late) + 0.3  # the first images fluctuate strongly
            axes.set_ylim(np.min(late) - margin, np.max(late) + margin)
        finish(axes, "", f"gain over {label(summary.baseline or '')}\n(points)", legend=False)
        _mark_segments(axes, summary.results[0], named=axes is panels[0])
    panels[0].set_ylabel("accuracy so far (%)")
    panels[-1].set_xlabel("images seen since the start of the stream")
    return _with_legend(figure, panels)


def _mean_curves(results: Iterable[Predictions]) -> pd.DataFrame:
    """Each adapter's average accuracy so far in per cent, by the number of images seen."""
    outcomes = [(r.adapter, r.top1[r.rows["seen"]]) for r in results if r.rows["seen"].any()]
    # Streams with unreadable images are shorter.
    places = np.linspace(1, min((len(right) for _, right in outcomes), default=1), POINTS)
    curves: dict[str, list[np.ndarray]] = {}
    for adapter, right in outcomes:
        count = np.arange(1, len(right) + 1)
        curves.setdefault(adapter, []).append(np.interp(places, count, right.cumsum() / count))
    return pd.DataFrame({k: 100 * np.mean(v, axis=0) for k, v in curves.items()}, index=places)


def _mark_segments(axes: Axes, result: Predictions, *, named: bool) -> None:
    # The segments of a mixed stream are interleaved.
    if result.setting == "mixed" or len(result.domains) == 1:
        return
    names = pd.Series([domain.corruption for domain in result.domains])
    runs = (names != names.shift()).cumsum()  # gradual: a corruption's severities are one run
    images = result.rows.groupby("segment")["seen"].sum().groupby(runs).sum()
    ends = images.cumsum()
    for end in ends[:-1]:
        axes.axvline(end, color="0.75", linewidth=0.8, zorder=0)
    axes.set_xlim(0, max(ends.iloc[-1], 1))
    if named:
        top = axes.secondary_xaxis("top")
        texts = map(label, names.groupby(runs).first())
        top.set_xticks(ends - images / 2, texts, rotation=40, ha="left", fontsize=8)
        top.tick_params(length=0)


def reliability(summary: Summary) -> Figure:
    """Draw reliability diagrams of all images, one panel per adapter."""
    looks = styles(summary.adapters, summary.baseline)
    figure, panels = _grid(len(looks), 2.6, 3.2)
    for axes, (adapter, look) in zip(panels, looks.items(), strict=True):
        own = [r.rows.assign(right=r.top1) for r in summary.results if r.adapter == adapter]
        rows = pd.concat([rows[rows["seen"] & np.isfinite(rows["nll"])] for rows in own])
        which = np.ceil(BINS * rows["confidence"]).clip(1, BINS).astype(int).to_numpy() - 1
        columns = (None, rows["confidence"], rows["right"])
        count, sure, right = (np.bincount(which, column, BINS) for column in columns)
        many = np.maximum(count, 1)
        # Bar height is accuracy; opacity is the number of images.
        strength = 0.15 + 0.85 * np.sqrt(count / many.max())
        for number, (height, alpha) in enumerate(zip(right / many, strength, strict=True)):
            place = (number + 0.5) / BINS
            axes.bar(place, height, 0.92 / BINS, color=look["color"], alpha=alpha)
        axes.plot([0, 1], [0, 1], color="black", linewidth=1, linestyle="--")
        axes.plot(*(x[count > 0] / count[count > 0] for x in (sure, right)), "k.", markersize=4)
        axes.set_title(f"{look['label']}\nmean ECE {100 * summary.means['ece'][adapter]:.1f} %")
        axes.title.set_fontsize(10)
        finish(axes, "confidence", "", legend=False)
        axes.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
    figure.supylabel("accuracy", fontsize=10)
    return figure


def severity(summary: Summary) -> Figure:
    """Draw accuracy over severity, for each corruption and their mean."""
    names = [name for name in summary.averaged if name != CLEAN]
    own = summary.segments[summary.segments["corruption"].isin(names)]
    tops = own.pivot_table("top1", ["corruption", "severity"], "adapter")
    panels: dict[str, Any] = {}
    if len(names) > 1:
        panels["mean"] = tops.groupby("severity").mean()
    panels |= {name: tops.loc[name] for name in names}
    figure, grid = _grid(len(panels), 2.4, 2.3)
    for axes, (name, values) in zip(grid, panels.items(), strict=True):
        for adapter, look in styles(summary.adapters, summary.baseline).items():
            axes.plot(100 * values.reindex(columns=[adapter])[adapter], **look, markersize=3)
        axes.set_title(label(name), fontsize=9, fontweight="bold" if axes is grid[0] else "normal")
        finish(axes, "severity", "", legend=False)
        axes.set_xticks(summary.severities)
    figure.supylabel("top-1 accuracy (%)", fontsize=10)
    return _with_legend(figure, grid)


def _grid(count: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    columns = min(count, 4)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns + 1, height * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, [*panels[:count]]


def figures(summary: Summary) -> dict[str, Figure]:
    """All figures that apply, by name: gain (or accuracy), running, severity, reliability."""
    first = "gain" if summary.compared else "accuracy"
    drawn = {first: dots({"": summary}), "running": running(summary)}
    drawn |= {"severity": severity(summary)} if len(summary.severities) > 1 else {}
    return drawn | {"reliability": reliability(summary)}


def label(name: str) -> str:
    """Format a name for matplotlib: short, without formulas and what cannot be printed."""
    name = printable(name).replace("_", " ")
    if len(name) > LONGEST:  # settings are at the end
        name = f"{name[: LONGEST // 2 - 1]}…{name[-LONGEST // 2 :]}"
    return name.replace("$", r"\$")


def finish(
    axes: Axes, x: str, y: str, *, grid: Literal["both", "x", "y"] = "y", legend: bool = True
) -> None:
    """Set axis labels and grid, and a legend if there are several entries."""
    axes.set(xlabel=x, ylabel=y)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend and len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=8)


def _with_legend(figure: Figure, panels: Iterable[Axes]) -> Figure:
    found = {}
    for axes in panels:
        found |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    # About ten characters fit on an inch.
    fitting = int(10 * figure.get_figwidth()) // (8 + max(map(len, found), default=1))
    columns = max(1, min(fitting, len(found)))
    figure.legend(found.values(), found, loc="outside upper left", ncols=columns, frameon=False)
    return figure
