"""Writing the outputs of a sweep: table, plots, report and CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxtta.data import Batches, UnreadableImageError
from jaxtta.evaluate.results import Cell
from jaxtta.io import atomic_write, write_text
from jaxtta.report.examples import Example, draw_examples
from jaxtta.report.html import write_report
from jaxtta.report.plots import save_all
from jaxtta.report.summary import answer, summary_csv, table

TRIES = 20  # number of images tried for the samples


def conclude(
    cells: Sequence[Cell],
    folder: Path,
    title: str,
    samples: Mapping[str, np.ndarray],
    examples: Sequence[Example] = (),
) -> None:
    """Print the table and write report, plots and summary.

    Args:
        cells: the sweep's cells.
        folder: the output folder.
        title: the title.
        samples: an image of each corruption by its name, uint8.
        examples: examples of TNT on single images.
    """
    text, figure = table(cells), draw_examples(examples)
    write_text(folder / "table.txt", text + "\n")
    summary_csv(cells, folder / "summary.csv")
    save_all(cells, folder, title)
    if figure is not None:
        with atomic_write(folder / "examples.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    write_report(cells, folder / "report.html", samples, title, examples=figure)
    print(f"top-1 accuracy in %, and gain over zero_shot in points; {title}\n\n{text}\n")
    print(answer(cells))
    _say_what_was_skipped(cells)
    print(f"results: {folder / 'report.html'}")


def samples_of(batches: Batches) -> dict[str, np.ndarray]:
    """The same image under every corruption, at the highest severity.

    Args:
        batches: the streams.

    Returns:
        (size, size, 3) uint8 by the domain's name; empty if none of the first images can be read.
    """
    stream, shown = batches.streams[0], {}
    domains = sorted({d for s in batches.streams for d in s.segments}, key=lambda d: d.severity)
    strongest = {domain.corruption: domain for domain in domains}
    order = dict.fromkeys(d.corruption for s in batches.streams for d in s.segments)
    for image in stream.items[:TRIES, 1].tolist():
        try:
            for domain in map(strongest.__getitem__, order):
                shown[str(domain)] = batches.source.read(domain, image, stream.seed)
            return shown
        except UnreadableImageError:
            shown = {}
    return shown


def _say_what_was_skipped(cells: Sequence[Cell]) -> None:
    """Print the unreadable images and the skipped steps."""
    lost = sorted({name for c in cells for s in c["segments"] for name in s["unreadable"]})
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        print(f"{len(lost)} images could not be read: {', '.join(lost[:5])}{more}")
    for cell in cells:
        if cell["skipped_steps"]:
            print(
                f"{cell['adapter']} on {cell['stream']}: {len(cell['skipped_steps'])} steps "
                f"skipped, their loss or update not finite: batches {cell['skipped_steps']}"
            )
