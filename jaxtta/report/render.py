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


def render(template: str, **context: Any) -> str:
    """Fill in a template; all text in it is escaped.

    Pages need `title` and `sentences`, and may have `warnings`, `abouts` and `settings` (mappings,
    one per result) and `optimizers` (text by adapter).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda x: printable(x) if isinstance(x, str) and not hasattr(x, "__html__") else x,
    )
    for function in (number, percent, data_uri, flatten):
        environment.filters[function.__name__] = function
    environment.filters["plain"] = lambda name: name.replace("_", " ")
    return environment.get_template(template).render(context)


def number(value: Any, digits: int = 2) -> str:
    """Format a number; a dash if it is missing."""
    missing = value is None or pd.isna(value)
    return NONE if missing else f"{value:,.{digits}f}".replace("-", "−")


def percent(value: Any, digits: int = 2) -> str:
    """Format a fraction in per cent."""
    return number(None if value is None else 100 * value, digits)


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
        Image.fromarray(np.asarray(picture, np.uint8)).save(file, "PNG")
    # It needs no escaping, which takes long for so much text.
    return Markup("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())


def flatten(mappings: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """All values of each setting as text; one within another is named "outer: inner"."""
    columns = pd.json_normalize([*mappings], sep=": ").astype(object).items()
    return {str(name): " / ".join(map(str, dict.fromkeys(x.dropna()))) for name, x in columns}
