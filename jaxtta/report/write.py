"""Writing the report of a sweep, and of several side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jaxtta.data import Batches, UnreadableImageError
from jaxtta.data.datasets import read
from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.store import load_predictions
from jaxtta.io import atomic_write, write_text
from jaxtta.report import plots, text
from jaxtta.report.examples import Example, draw_examples
from jaxtta.report.render import png, render
from jaxtta.report.summary import Summary, summarise

TRIES = 20  # number of images tried for the samples


def write_report(
    results: Sequence[Predictions],
    folder: str | Path,
    title: str,
    samples: Mapping[str, np.ndarray] | None = None,
    examples: Sequence[Example] = (),
) -> Summary:
    """Print the table, and write table, CSV files, plots and page of a sweep.

    Args:
        results: of the sweep.
        folder: the output folder.
        title: the title.
        samples: an image of each domain by its name, (height, width, 3) uint8.
        examples: examples of TNT on single images.
    """
    summary, folder = summarise(results), Path(folder)
    drawn, figure = plots.figures(summary), draw_examples(examples)
    drawn |= {} if figure is None else {"examples": figure}
    write_text(folder / "summary.csv", summary.segments.to_csv(index=False))
    write_text(folder / "classes.csv", summary.classes.to_csv(index=False))
    _write({"": summary}, folder, title, drawn, samples or {})
    return summary


def compare(folders: Sequence[str | Path], output: str | Path = "comparison") -> None:
    """Put sweeps side by side, each with gains over its own zero-shot.

    Args:
        folders: with the sweeps' results.
        output: folder for table, CSV file, plot and page.
    """
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [*map(str, folders)]
    loaded = [summarise(load_predictions(folder)) for folder in folders]
    summaries, output = dict(zip(names, loaded, strict=True)), Path(output)
    output.mkdir(parents=True, exist_ok=True)
    tables = pd.concat([each.table for each in loaded], keys=names, names=["folder"])
    write_text(output / "summary.csv", tables.to_csv())
    _write(summaries, output, ", ".join(names), {"gain": plots.dots(summaries)}, {})


def _write(
    summaries: Mapping[str, Summary],
    folder: Path,
    title: str,
    drawn: Mapping[str, Figure],
    samples: Mapping[str, np.ndarray],
) -> None:
    table = text.text_table(summaries)
    write_text(folder / "table.txt", table + "\n")
    for name, figure in drawn.items():
        with atomic_write(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png(figure))
    several = [(f"{name}: " if name else "", each) for name, each in summaries.items()]
    said = [name + text.answer(each) for name, each in several]
    warned = [name + line for name, each in several for line in text.warnings(each)]
    results = [result for _, each in several for result in each.results]
    adapters = [name for _, each in several for name in each.adapters]
    page = render(
        "sweep.html.j2",
        title=title,
        sentences=said,
        warnings=warned,
        abouts=[result.about for result in results],
        settings=[result.settings for result in results],
        optimizers={result.adapter: optimizer_of(result) for result in results},
        summaries=summaries,
        adapters=adapters,
        rows=text.entries(summaries.values()),
        measures=text.measures(summaries.values()),
        worst=[] if len(several) > 1 else text.worst_classes(several[0][1]),
        notes=dict.fromkeys(note for _, each in several for note in text.notes(each)),
        colours={name: look["color"] for name, look in plots.styles(adapters).items()},
        plots=drawn,
        samples=[(name.replace("_", " "), image) for name, image in samples.items()],
    )
    write_text(folder / "report.html", page)
    print(f"top-1 accuracy in %, and gain over zero_shot in points; {title}\n\n{table}\n")
    print(*said, *warned, f"results: {folder / 'report.html'}", sep="\n")


def optimizer_of(result: Predictions) -> str:
    """An adapter's optimiser and learning rate, for the page."""
    adapter = result.settings.get("adapter", {})
    if tnt := adapter.get("tnt"):
        steps = text.counted(tnt["steps"], "step")
        return f"{steps} on each image's noise map at {tnt['learning_rate']}"
    return adapter.get("optimizer", "none")


def samples_of(batches: Batches) -> dict[str, np.ndarray]:
    """The same image under every corruption, at the highest severity.

    Args:
        batches: the streams.

    Returns:
        (size, size, 3) uint8 by the domain's name; empty if none of the first images can be read.
    """
    stream = batches.streams[0]
    domains = {domain for each in batches.streams for domain in each.segments}
    strongest = {domain.corruption: domain for domain in sorted(domains, key=lambda d: d[::-1])}
    for image in stream.items[:TRIES, 1].tolist():
        try:
            return {
                str(domain): read(dataset, image, stream.seed, batches.preprocess)[0]
                for domain in strongest.values()
                if (dataset := batches.benchmark[domain])
            }
        except UnreadableImageError:
            continue
    return {}
