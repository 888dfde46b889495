"""What a sweep's rows say: a table to read and a plot to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtta.sweep.run import Row

BASELINE = "zero_shot"


def table(rows: Sequence[Row], baseline: str = BASELINE) -> str:
    """Lay out accuracies by corruption and adapter, with gains over the baseline.

    Args:
        rows: from `run`.
        baseline: the adapter that gains are counted from, if it is there.

    Returns:
        Lines of text; accuracies in per cent, gains in points.
    """
    adapters, corruptions, accuracy = _grid(rows)
    width = max(map(len, [*corruptions, "mean"]))
    cells = [f"{'corruption':<{width}}", *(f"{name:>16}" for name in adapters)]
    lines = ["  ".join(cells), "-" * len("  ".join(cells))]
    base = adapters.index(baseline) if baseline in adapters else None
    means = np.nanmean(accuracy, axis=0, keepdims=True)
    for name, values in zip([*corruptions, "mean"], [*accuracy, *means], strict=True):
        if name == "mean":
            lines.append(lines[1])
        texts = []
        for column, value in enumerate(values):
            gain = "" if base is None or column == base else f" ({value - values[base]:+.2f})"
            texts.append(f"{f'{value:.2f}{gain}':>16}")
        lines.append("  ".join([f"{name:<{width}}", *texts]))
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw accuracy per corruption and adapter as bars.

    Args:
        rows: from `run`.
        path: of the PNG.
        title: stands above it.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state

    adapters, corruptions, accuracy = _grid(rows)
    names = [name.replace("_", " ") for name in corruptions]
    if len(names) > 1:
        names.append("mean")
        accuracy = np.concatenate([accuracy, np.nanmean(accuracy, axis=0, keepdims=True)])
    figure = Figure(figsize=(max(6.0, 0.75 * len(names)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(adapters)
    places = np.arange(len(names))
    for column, adapter in enumerate(adapters):
        offset = (column - (len(adapters) - 1) / 2) * width
        axes.bar(places + offset, accuracy[:, column], width, label=adapter, color=f"C{column}")
    axes.set_xticks(places, names, rotation=40, ha="right")
    if len(names) > 1:
        axes.axvline(len(names) - 1.5, color="0.6", linewidth=1)
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(adapters), frameon=False)
    figure.savefig(path, dpi=150)


def _grid(rows: Sequence[Row]) -> tuple[list[str], list[str], np.ndarray]:
    """Adapters, corruptions and accuracies in per cent (corruptions, adapters)."""
    adapters = list(dict.fromkeys(row["adapter"] for row in rows))
    corruptions = list(dict.fromkeys(row["corruption"] for row in rows))
    accuracy = np.full((len(corruptions), len(adapters)), np.nan)
    for row in rows:
        place = corruptions.index(row["corruption"]), adapters.index(row["adapter"])
        accuracy[place] = np.nan if row["top1"] is None else 100 * row["top1"]
    return adapters, corruptions, accuracy
