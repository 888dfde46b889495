"""HTML pages from the Jinja2 templates in `templates/`: self-contained, without scripts."""

import base64
import functools
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from jaxtta.images import printable

NONE = "–"
REPEATED = ("command", "commit", "preprocessing", "date")  # what `commands` lists


def render(template: str, **context: Any) -> str:
    """Fill in a template; all text in it is escaped.

    Pages need `title` and `sentences`, and may have `warnings`, `abouts` and `settings` (mappings,
    one per result) and `optimizers` (text by adapter).
    """
    return _environment().get_template(template).render(context)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda x: printable(x) if isinstance(x, str) and not hasattr(x, "__html__") else x,
    )
    for function in (number, percent, signed, data_uri, commands, flatten):
        environment.filters[function.__name__] = function
    environment.filters["plain"] = lambda name: name.replace("_", " ")
    return environment


def number(value: Any, digits: int = 2, sign: str = "") -> str:
    """Format a number; a dash if it is missing."""
    missing = value is None or pd.isna(value)
    return NONE if missing else f"{value:{sign},.{digits}f}".replace("-", "−")


def percent(value: Any, digits: int = 2) -> str:
    """Format a fraction in per cent."""
    return number(None if value is None else 100 * value, digits)


def signed(value: Any, digits: int = 2) -> str:
    """Format a difference with its sign."""
    return number(value, digits, "+")


@functools.lru_cache(maxsize=8)  # a figure is drawn once for its file and the page
def png(figure: Figure) -> bytes:
    """Draw a figure."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def data_uri(picture: Figure | np.ndarray) -> Markup:
    """A figure, or an image (height, width, 3) uint8, as a PNG in a data URI."""
    file = io.BytesIO()
    if isinstance(picture, Figure):
        file.write(png(picture))
    else:
        Image.fromarray(np.asarray(picture, np.uint8)).save(file, "PNG", optimize=True)
    # It needs no escaping, which takes long for so much text.
    return Markup("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())


def commands(abouts: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Each command that made results, with a note on date, commit and preprocessing."""
    texts = [[printable(about.get(name) or "") for name in REPEATED] for about in abouts]
    frame = pd.DataFrame(texts, columns=[*REPEATED]).query("command != ''")
    listed = []
    for key, dates in frame.groupby([*REPEATED[:3]], sort=False)["date"]:
        first, last = dates.min()[:16], dates.max()[:16]
        note = (first if first == last else f"{first} to {last}").replace("T", " ")
        note += f", commit {key[1]}" if key[1] else ""
        listed.append((key[0], f"{note}. Preprocessing: {key[2]}" if key[2] else note))
    return listed


def flatten(mappings: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """All values of each setting as text; one within another is named "outer: inner"."""
    found: dict[str, dict[str, None]] = {}
    waiting = [("", mapping) for mapping in mappings]
    for before, mapping in waiting:  # grows
        for name, value in mapping.items():
            if isinstance(value, Mapping):
                waiting.append((f"{before}{name}: ", value))
            elif before or name not in (*REPEATED, "place"):
                found.setdefault(before + name, {})[_listed(value)] = None
    return {name: " / ".join(texts) for name, texts in found.items()}


def _listed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_listed, value)) or NONE
    return NONE if value is None else str(value)
