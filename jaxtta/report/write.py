"""Writing the report of a sweep, and of several side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jaxtta.data import Batches, Domain, UnreadableImageError
from jaxtta.data.datasets import read
from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.store import load_predictions
from jaxtta.images import printable
from jaxtta.io import atomic_write, write_text
from jaxtta.report import plots, text
from jaxtta.report.examples import Example, draw_examples
from jaxtta.report.render import png, render
from jaxtta.report.summary import BASELINE, Summary, summarise

TRIES = 20  # number of images tried for the samples


def write_report(
    results: Sequence[Predictions],
    folder: str | Path,
    title: str,
    samples: Mapping[str, np.ndarray] | None = None,
    examples: Sequence[Example] = (),
) -> Summary:
    """Print the table, and write table, CSV files, plots and page of a sweep.

    `samples` are an image of each domain by its name, (height, width, 3) uint8.
    """
    summary = summarise(results)
    drawn = plots.figures(summary)
    if examples:
        drawn["examples"] = draw_examples(examples)
    frames = {"summary": summary.segments, "classes": summary.classes}
    _write({"": summary}, Path(folder), title, frames, drawn, samples or {})
    return summary


def compare(folders: Sequence[str | Path], output: str | Path = "comparison") -> None:
    """Put sweeps side by side, each with gains over its own zero-shot.

    Raises:
        ValueError: if a folder is given twice.
    """
    names = [printable(Path(folder).resolve().name) for folder in folders]
    if len(set(names)) < len(names):
        names = [printable(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ValueError(f"{max(names, key=names.count)}: is given twice")
    summaries = {n: summarise(load_predictions(f)) for n, f in zip(names, folders, strict=True)}
    table = pd.concat({name: each.table for name, each in summaries.items()}, names=["folder"])
    drawn = {"gain": plots.dots(summaries)}
    _write(summaries, Path(output), ", ".join(names), {"summary": table.reset_index()}, drawn, {})


def _write(
    summaries: Mapping[str, Summary],
    folder: Path,
    title: str,
    frames: Mapping[str, pd.DataFrame],
    drawn: Mapping[str, Figure],
    samples: Mapping[str, np.ndarray],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table, title = text.text_table(summaries), printable(title)
    write_text(folder / "table.txt", table + "\n")
    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    for name, figure in drawn.items():
        with atomic_write(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png(figure))
    several = [(f"{name}: " if name else "", each) for name, each in summaries.items()]
    said = [name + text.answer(each) for name, each in several]
    warned = [printable(name + line) for name, each in several for line in text.warnings(each)]
    results = [result for _, each in several for result in each.results]
    adapters = [name for _, each in several for name in each.adapters]
    page = render(
        "sweep.html.j2",
        title=title,
        sentences=said,
        warnings=warned,
        abouts=[result.about for result in results],
        settings=[result.settings for result in results],
        optimizers={n + r.adapter: optimizer_of(r) for n, each in several for r in each.results},
        summaries=summaries,
        groups={n: len(each.adapters) for n, each in summaries.items() if n},
        adapters=adapters,
        rows=text.entries([*summaries.values()]),
        measures=text.measures(summaries.values()),
        worst=[] if len(several) > 1 else text.worst_classes(several[0][1]),
        notes=text.notes(*summaries.values()),
        colours={name: look["color"] for name, look in plots.styles(adapters).items()},
        plots=drawn,
        samples=[(name.replace("_", " "), image) for name, image in samples.items()],
    )
    write_text(folder / "report.html", page)
    over = f", and gain over {BASELINE} in points" if several[0][1].compared else ""
    print(f"top-1 accuracy in %{over}; {title}\n\n{table}\n")
    print(*said, *warned, printable(f"results: {folder / 'report.html'}"), sep="\n")


def optimizer_of(result: Predictions) -> str:
    """An adapter's optimiser and learning rate, for the page."""
    adapter = result.settings.get("adapter", {})
    if tnt := adapter.get("tnt"):
        steps = text.counted(tnt["steps"], "step")
        return f"{steps} on each image's noise map at {tnt['learning_rate']}"
    return adapter.get("optimizer", "none")


def samples_of(batches: Batches) -> dict[str, np.ndarray]:
    """The same image under every corruption, at the highest severity, by the domain's name.

    It is (size, size, 3) uint8. The result is empty if none of the first images can be read.
    """
    stream = batches.streams[0]
    strongest: dict[str, Domain] = {}
    for domain in (domain for each in batches.streams for domain in each.segments):
        known = strongest.setdefault(domain.corruption, domain)
        strongest[domain.corruption] = max(known, domain)
    for image in stream.items[:TRIES, 1].tolist():
        try:
            return {
                str(domain): read(
                    batches.benchmark[domain], image, stream.seed, batches.preprocess
                )[0]
                for domain in strongest.values()
            }
        except UnreadableImageError:
            continue
    return {}
