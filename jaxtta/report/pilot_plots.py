"""Plots of a pilot: both models over the stream, what the guard saw, and how the answers spread."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxtta.adapters.guard import DECISIONS
from jaxtta.deploy.shadow import Trial
from jaxtta.report.plots import COLOURS, GREY, finish, label

PLOTS = ("running", "signals", "confidence", "classes")
NAMES = ("zero-shot", "guarded")
LOOKS = {"zero-shot": GREY, "guarded": COLOURS[0]}
MARKS = {
    "forget": ("began anew", "D", COLOURS[1]),
    "roll_back": ("went back", "v", COLOURS[3]),
    "stop": ("stopped adapting", "X", "black"),
}
"""Decisions of the guard, with words, marker and colour."""
SHOWN = 12  # classes
SIZE = (5.6, 3.3)  # inches of a plot, which a phone shows whole


def plots_of(trial: Trial, class_names: tuple[str, ...]) -> dict[str, Figure]:
    """All plots that apply, by name."""
    drawn = {"confidence": draw_confidence(trial), "classes": draw_classes(trial, class_names)}
    if trial.shadow.served is None:
        return drawn
    return {"running": draw_running(trial), "signals": draw_signals(trial)} | drawn


def draw_running(trial: Trial) -> Figure:
    """Accuracy of both, or their agreement where labels lack, over the last images."""
    shadow = trial.shadow
    count = len(shadow.labels)
    window = int(np.clip(count // 10, min(20, count), 500))
    figure = Figure(SIZE, layout="constrained")
    axes = figure.subplots()
    if shadow.labelled == "all":
        lines = dict(zip(NAMES, shadow.right().T, strict=True))
        what = "right"
    else:
        lines, what = {"guarded": ~shadow.differ}, "same label"
    for name, values in lines.items():
        means = 100 * pd.Series(values, dtype=float).rolling(window).mean()
        named = name if shadow.labelled == "all" else None
        axes.plot(1 + means.index, means, color=LOOKS[name], label=named, linewidth=1.8)
    mark(axes, trial)
    finish(axes, "images seen", f"{what}, of the last {window} (%)", grid="both", legend=False)
    legend(figure, axes)
    return figure


def mark(axes: Axes, trial: Trial) -> None:
    """Mark the guard's decisions at the lower edge."""
    ends, kinds = trial.steps["images"].cumsum(), trial.steps["decision"].astype(int)
    for name, (words, marker, colour) in MARKS.items():
        places = ends[kinds == DECISIONS.index(name)]
        if len(places):
            at = axes.get_xaxis_transform()
            points = {"transform": at, "clip_on": False, "zorder": 3, "linestyle": "none"}
            look = {"marker": marker, "color": colour, "markersize": 7, "label": words}
            axes.plot(places, np.full(len(places), 0.02), **points, **look)


def draw_signals(trial: Trial) -> Figure:
    """The adapted model's share in the answers, and the guard's signals."""
    wanted = {
        "share": "share of the\nadapted model",
        "narrowing": "narrowing\n(nats)",
        "environment": "change of the\nimages (z)",
        "disagreement": "disagreement",
    }
    names = [name for name in wanted if name in trial.steps]
    figure = Figure((SIZE[0], 0.9 + 1.15 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    ends = trial.steps["images"].cumsum()
    for axes, name in zip(panels, names, strict=True):
        axes.plot(ends, trial.steps[name], color=COLOURS[0], linewidth=1.4)
        axes.margins(y=0.15)
        if name in ("share", "disagreement"):
            axes.set_ylim(-0.05, max(0.6, 1.1 * trial.steps[name].max()))
        finish(axes, "", wanted[name], grid="both", legend=False)
        axes.yaxis.label.set_size(8)
    mark(panels[0], trial)
    panels[-1].set_xlabel("images seen")
    figure.align_ylabels(panels)
    legend(figure, panels[0])
    return figure


def draw_confidence(trial: Trial) -> Figure:
    """How sure both models are."""
    figure = Figure(SIZE, layout="constrained")
    axes, bins = figure.subplots(), np.linspace(0, 1, 21).tolist()
    for name, answers in zip(NAMES, (trial.shadow.reference, trial.shadow.served), strict=True):
        if answers is not None:
            sure = np.minimum(answers.max(1), 1)
            look = {"weights": np.full(len(sure), 100 / len(sure)), "color": LOOKS[name]}
            axes.hist(sure, bins, **look, alpha=0.55, label=name)
    axes.axvline(1 / trial.shadow.reference.shape[1], color="black", linestyle="--", linewidth=1)
    finish(axes, "confidence (dashed: guessing)", "images (%)", legend=False)
    legend(figure, axes)
    return figure


def draw_classes(trial: Trial, class_names: tuple[str, ...]) -> Figure:
    """How often both models predict each class, and how often it is the label."""
    shadow, count = trial.shadow, len(class_names)
    given = dict(zip(NAMES, (shadow.reference, shadow.served), strict=True))
    chosen = {name: answers.argmax(1) for name, answers in given.items() if answers is not None}
    if (shadow.labels >= 0).all():
        chosen["labels"] = shadow.labels
    frame = pd.DataFrame(
        {name: 100 * np.bincount(x, minlength=count) / len(x) for name, x in chosen.items()},
        [*map(label, class_names)],
    )
    frame = frame.loc[frame.max(axis=1).sort_values(ascending=False, kind="stable").index[:SHOWN]]
    figure = Figure((SIZE[0], 1.1 + 0.33 * len(frame)), layout="constrained")
    axes = figure.subplots()
    colours: list[Any] = [*LOOKS.values()][: len(given) - (shadow.served is None)]
    colours += [COLOURS[2]] * ("labels" in chosen)
    frame.plot.barh(ax=axes, width=0.8, color=colours, legend=False)
    axes.invert_yaxis()
    finish(axes, "images (%)", "", grid="x", legend=False)
    legend(figure, axes)
    return figure


def legend(figure: Figure, axes: Axes) -> None:
    """A legend above the plot, if there is anything to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 3 if max(map(len, labels)) < 12 else 1
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False)
