"""Plots of a diagnosis and of a check of target images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from jaxtta.diagnose import Answers, Diagnosis, LogitLinearBaseline, TargetCheck
from jaxtta.report.plots import COLOURS, GREY, finish, label, styles


def diagnosis_plots(found: Diagnosis, fractions: Sequence[float]) -> dict[str, Figure]:
    """The plots of a diagnosis with these fractions of the head's directions."""
    names = ("kurtosis", "importance", "pruning")
    drawn = {name: Figure(figsize=(7, 4.4), layout="constrained") for name in names}
    kurtosis, importance, pruning = (figure.subplots() for figure in drawn.values())
    looks = {name: dict(look, marker="") for name, look in styles(found.models, None).items()}
    bars = {n: {s: x.kurtosis for s, x in m.sets.items()} for n, m in found.models.items()}
    pd.DataFrame(bars).rename(label, axis=0).rename(label, axis=1).plot.bar(
        ax=kurtosis, width=0.8, rot=40, color=[look["color"] for look in looks.values()]
    )
    for name, model in found.models.items():
        spectrum = np.asarray(model.base.importance)
        importance.plot(1 + np.arange(len(spectrum)), spectrum / spectrum.mean(), **looks[name])
        base = pd.Series(model.sets[model.base_name].pruned, [*fractions]).sort_index()
        pruning.plot(100 * base.index, 100 * base, **looks[name])
        if model.shifted:
            means = 100 * np.array([fractions, model.shifted.pruned])
            pruning.plot(*means, ".", color=looks[name]["color"])
    for axes, level in ((kurtosis, 3), (importance, 1)):
        axes.axhline(level, color="black", linestyle="--", linewidth=1)
    kurtosis.margins(y=0.2)  # for the legend
    pruning.set_ylim(0, 100)
    finish(kurtosis, "", "kurtosis of the features")
    finish(importance, "rank of the direction", "importance / mean")
    finish(pruning, "directions kept (%)", "top-1 accuracy (%)")
    if found.robustness.line:
        pairs = {
            n: (m.base_accuracy, m.shifted.accuracy) for n, m in found.models.items() if m.shifted
        }
        drawn["robustness"] = _draw_robustness(
            pairs, looks, found.robustness.line, found.robustness.points
        )
    return drawn


def _draw_robustness(
    pairs: Mapping[str, tuple[float, float]],
    looks: Mapping[str, dict[str, Any]],
    line: LogitLinearBaseline,
    points: Sequence[tuple[float, float]],
) -> Figure:
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.plot(*np.transpose(points), "o", color=GREY, markersize=9, alpha=0.5, label="reference")
    bases = [base for base, _ in (*points, *pairs.values())]
    ends = np.linspace(min(bases), max(bases), 50)
    axes.plot(ends, line.predict(ends), color=GREY)
    for name, pair in pairs.items():
        axes.plot(*pair, **dict(looks[name], marker="D", markersize=5))
    axes.set(xscale="logit", yscale="logit")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(PercentFormatter(1))
        axis.set_minor_locator(NullLocator())
    finish(axes, "accuracy on the base set", "mean on shifted sets", grid="both")
    return figure


def draw_predictions(check: TargetCheck, answers: Answers) -> Figure:
    """Draw entropies, and how often each class is predicted."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.linspace(0, np.log(len(check.classes)), 31)
    sets = {"target": answers.entropies, "reference": answers.reference_entropies}
    for (name, values), colour in zip(sets.items(), (COLOURS[0], GREY), strict=True):
        weights = np.full(len(values), 100 / len(values))
        values = np.clip(values, bins[0], bins[-1])  # rounding may exceed the range
        left.hist(values, bins, weights=weights, color=colour, alpha=0.6, label=name)
    shares = {"predicted": check.target.predicted}
    shares |= {"labelled": check.labelled.shares} if check.labelled else {}
    frame = 100 * pd.DataFrame(shares, [*map(label, check.classes)]).iloc[check.commonest()]
    frame.plot.barh(ax=right, width=0.8, color=[*COLOURS[: len(shares)]], legend=False)
    right.invert_yaxis()
    finish(left, "entropy of a prediction (nats)", "images (%)")
    finish(right, "images (%)", "", grid="x")
    return figure
