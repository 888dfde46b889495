"""Writing the report of a sweep, and of several side by side."""

import base64
import contextlib
import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from jaxtta.data import Batches, UnreadableImageError
from jaxtta.data.datasets import read
from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.store import load_predictions
from jaxtta.images import printable
from jaxtta.io import atomic_write, write_text
from jaxtta.report import plots, text
from jaxtta.report.examples import Example, draw_examples
from jaxtta.report.summary import BASELINE, Summary, summarise


def write_report(
    results: Sequence[Predictions],
    folder: str | Path,
    title: str,
    samples: Mapping[str, np.ndarray] | None = None,
    examples: Sequence[Example] = (),
) -> Summary:
    """Print the table, and write table, CSV files, plots and page of a sweep, with uint8 images."""
    summary = summarise(results)
    drawn = {"examples": draw_examples(examples)} if examples else {}
    frames = {"summary": summary.segments, "classes": summary.classes}
    _write([summary], Path(folder), title, frames, drawn | plots.figures(summary), samples or {})
    return summary


def compare(folders: Sequence[str | Path], output: str | Path = "comparison") -> None:
    """Put sweeps side by side, each with gains over its own zero-shot."""
    names = [printable(Path(folder).resolve().name) for folder in folders]
    if len({*names}) < len(names):
        names = [*map(printable, folders)]
    summaries = {}
    for name, folder in zip(names, folders, strict=True):
        results = [replace(r, adapter=f"{name}: {r.adapter}") for r in load_predictions(folder)]
        summaries[name] = summarise(results, f"{name}: {BASELINE}")
    tables = {name: each.table for name, each in summaries.items()}
    frame = pd.concat(tables, names=["folder"]).reset_index()
    pairs = zip(frame["folder"], frame["adapter"], strict=True)
    frame["adapter"] = [adapter.removeprefix(f"{name}: ") for name, adapter in pairs]
    drawn = {"gain": plots.dots(*summaries.values())}
    _write([*summaries.values()], Path(output), ", ".join(names), {"summary": frame}, drawn, {})


def _write(
    summaries: Sequence[Summary], folder: Path, title: str, frames: dict, drawn: dict, samples: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table, title = text.text_table(*summaries), printable(title)
    write_text(folder / "table.txt", table + "\n")
    for name, frame in frames.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    for name, figure in drawn.items():
        with atomic_write(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png(figure))
    said = [text.answer(each) for each in summaries]
    warned = [printable(line) for each in summaries for line in text.warnings(each)]
    results = [result for each in summaries for result in each.results]
    page = render(
        "sweep.html.j2",
        title=title,
        sentences=said,
        warnings=warned,
        abouts=[result.about for result in results],
        settings=[
            r.settings | {"adapter": {r.adapter: r.settings.get("adapter")}} for r in results
        ],
        summaries=summaries,
        text=text,
        plots=drawn,
        samples=samples,
    )
    write_text(folder / "report.html", page)
    print(f"top-1 accuracy in %, gains over {BASELINE} in points; {title}\n\n{table}\n")
    print(*said, *warned, printable(f"results: {folder / 'report.html'}"), sep="\n")


def samples_of(batches: Batches) -> dict[str, np.ndarray]:
    """The first image, if it can be read, under every corruption at its highest severity."""
    stream, images = batches.streams[0], {}
    domains = [domain for each in batches.streams for domain in each.segments]
    domains.sort(key=lambda domain: domain.severity)
    for domain in {domain.corruption: domain for domain in domains}.values():
        with contextlib.suppress(UnreadableImageError):
            inputs = batches.benchmark[domain], stream.items[0, 1], stream.seed, batches.preprocess
            images[str(domain).replace("_", " ")] = read(*inputs)[0]
    return images


def render(template: str, **context: Any) -> str:
    """Fill in a template, such as a self-contained page; all text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda x: printable(x) if isinstance(x, str) and not hasattr(x, "__html__") else x,
    )
    environment.filters |= {"percent": text.percent, "data_uri": data_uri, "flatten": flatten}
    environment.filters["number"] = lambda value, digits=2: f"{value:,.{digits}f}"
    environment.filters["plain"] = lambda name: name.replace("_", " ")
    return environment.get_template(template).render(context)


@functools.lru_cache(maxsize=8)  # a figure is drawn once for its file and the page
def png(figure: Figure) -> bytes:
    """Draw a figure."""
    figure.savefig(file := io.BytesIO(), dpi=150)
    return file.getvalue()


def data_uri(picture: Figure | np.ndarray) -> Markup:
    """A figure, or an image (height, width, 3) uint8, as a PNG in a data URI."""
    if not isinstance(picture, Figure):
        Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
    content = png(picture) if isinstance(picture, Figure) else file.getvalue()
    return Markup("data:image/png;base64," + base64.b64encode(content).decode())


def flatten(mappings: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """All values of each setting as text; one within another is named "outer: inner"."""
    content = json.dumps([*mappings], ensure_ascii=False).encode(errors="replace")  # any file name
    columns = pd.json_normalize(json.loads(content), sep=": ").items()
    return {str(name): " / ".join(dict.fromkeys(map(str, x.dropna()))) for name, x in columns}
