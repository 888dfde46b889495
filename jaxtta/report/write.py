"""Writing the reports of a sweep, and of several side by side."""

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
from jaxtta.report import plots
from jaxtta.report.examples import Example, draw_examples
from jaxtta.report.render import render
from jaxtta.report.summary import Summary, summarise
from jaxtta.report.text import answer, entries, measures, notes, text_table, warnings, worst_classes

TRIES = 20  # number of images tried for the samples


def write_report(
    results: Sequence[Predictions],
    folder: str | Path,
    title: str,
    samples: Mapping[str, np.ndarray] | None = None,
    examples: Sequence[Example] = (),
) -> Summary:
    """Print the table, and write it, CSV files, plots and the page.

    Args:
        results: of one sweep.
        folder: the output folder.
        title: the title.
        samples: an image of each domain by its name, (height, width, 3) uint8.
        examples: examples of TNT on single images.

    Returns:
        The summary.
    """
    summary = summarise(results)
    drawn = plots.figures(summary)
    if (figure := draw_examples(examples)) is not None:
        drawn["examples"] = figure
    for name in ("segments", "classes"):
        file = "summary" if name == "segments" else name
        write_text(Path(folder) / f"{file}.csv", getattr(summary, name).to_csv(index=False))
    _write({"": summary}, Path(folder), title, drawn, samples or {})
    return summary


def compare(folders: Sequence[str | Path], output: str | Path = "comparison") -> None:
    """Put sweeps side by side, each with gains over its own zero-shot.

    Args:
        folders: of the sweeps' results.
        output: folder for table, plot and page.
    """
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [*map(str, folders)]
    loaded = map(load_predictions, folders)
    summaries = {name: summarise(found) for name, found in zip(names, loaded, strict=True)}
    table = pd.concat(
        {name: summary.table for name, summary in summaries.items()}, names=["folder"]
    )
    Path(output).mkdir(parents=True, exist_ok=True)
    write_text(Path(output) / "summary.csv", table.to_csv())
    _write(summaries, Path(output), ", ".join(summaries), {"gain": plots.dots(summaries)}, {})


def _write(
    summaries: Mapping[str, Summary],
    folder: Path,
    title: str,
    drawn: Mapping[str, Figure],
    samples: Mapping[str, np.ndarray],
) -> None:
    """Print table, answers and warnings, and write table, plots and page."""
    text = text_table(summaries)
    write_text(folder / "table.txt", text + "\n")
    for name, figure in drawn.items():
        with atomic_write(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    several = {"": ""} if len(summaries) == 1 else {name: f"{name}: " for name in summaries}
    said = [several[name] + answer(each) for name, each in summaries.items()]
    warned = [several[name] + line for name, each in summaries.items() for line in warnings(each)]
    every = [result for summary in summaries.values() for result in summary.results]
    page = render(
        "sweep.html.j2",
        title=title,
        sentences=said,
        warnings=warned,
        abouts=[result.about for result in every],
        settings=[result.settings for result in every],
        optimizers={result.adapter: _optimizer(result) for result in every},
        summaries=summaries,
        adapters=[name for each in summaries.values() for name in each.adapters],
        rows=entries(summaries.values()),
        measures=measures(summaries.values()),
        worst=[] if len(summaries) > 1 else worst_classes(summaries[""]),
        notes=dict.fromkeys(note for each in summaries.values() for note in notes(each)),
        colours={
            name: style["color"]
            for name, style in plots.styles(
                name for each in summaries.values() for name in each.adapters
            ).items()
        },
        plots=drawn,
        samples=[*samples.items()],
    )
    write_text(folder / "report.html", page)
    print(f"top-1 accuracy in %, and gain over zero_shot in points; {title}\n\n{text}\n")
    print(*said, *warned, sep="\n")
    print(f"results: {folder / 'report.html'}")


def _optimizer(result: Predictions) -> str:
    adapter = result.settings.get("adapter", {})
    if tnt := adapter.get("tnt"):
        steps = f"{tnt['steps']} step{'s' * (tnt['steps'] != 1)}"
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
    domains = sorted({d for s in batches.streams for d in s.segments}, key=lambda d: d.severity)
    strongest = {domain.corruption: domain for domain in domains}
    order = dict.fromkeys(d.corruption for s in batches.streams for d in s.segments)
    for image in stream.items[:TRIES, 1].tolist():
        try:
            return {
                str(domain): read(
                    batches.benchmark[domain], image, stream.seed, batches.preprocess
                )[0]
                for domain in map(strongest.__getitem__, order)
            }
        except UnreadableImageError:
            continue
    return {}
