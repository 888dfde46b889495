"""HTML report of a sweep: one self-contained page without scripts."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from jaxtta.evaluate.results import Cell
from jaxtta.io import write_text
from jaxtta.report import plots
from jaxtta.report import summary as report
from jaxtta.report.summary import BASELINE, NONE, Entry, Summary

SMALL = 128  # pixels per side: smaller samples are enlarged without smoothing
MANY = 4  # adapters: with more, intervals are placed below the gains
TALL = 500  # CSS pixels: taller plots get more height on a phone
NAMED = 5  # number of images or streams listed in a warning
CAPTIONS = {
    "accuracy": (
        "Accuracy by {noun}",
        "Top-1 accuracy. A black whisker is the 95 % interval of the gain over {baseline}: if "
        "it crosses the height of the grey bar, the difference is not significant.",
    ),
    "running": (
        "Accuracy along the stream",
        "Cumulative accuracy over all images so far; it fluctuates for the first images. "
        "A steadily falling gain means that the adapter is diverging.",
    ),
    "severity": (
        "Accuracy by severity",
        "Top-1 accuracy by severity of the corruption.",
    ),
    "reliability": (
        "Reliability",
        "Accuracy of predictions by confidence; darker bars have more images. Below the dashed "
        "line a model is overconfident. All images are pooled.",
    ),
    "examples": (
        "Noise maps of single images",
        "Images whose prediction TNT fixed or broke: the plain view, the added noise (scaled to "
        "black and white at its bounds), their sum, and the most probable classes before and "
        "after. The true class is bold.",
    ),
}
STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #59626d; --line: #d5dae0;
  --paper: #fff; --card: #f4f6f8; --good: #00578a; --bad: #a63f00; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e8eb; --soft: #a3adb8; --line: #3b434c;
  --paper: #14171a; --card: #1f2429; --good: #74c0f2; --bad: #ff9d66; --warn: #40350f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.answer { font-size: 1.15rem; padding: .9rem 1.1rem; background: var(--card); max-width: none;
  border-left: .3rem solid var(--good); border-radius: .3rem; }
.warning { padding: .6rem 1.1rem; background: var(--warn); border-radius: .3rem; margin: 1rem 0; }
.warning p { max-width: none; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: baseline; white-space: nowrap; }
thead th { vertical-align: bottom; }
tbody th { font-weight: normal; position: sticky; left: 0; background: var(--paper); }
tr.mean > * { font-weight: 600; border-top: 2px solid var(--ink); }
.swatch { display: inline-block; width: .75em; height: .75em; border-radius: .15em;
  margin-right: .4em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.gain { color: var(--soft); } .better { color: var(--good); } .worse { color: var(--bad); }
.better, .worse { font-weight: 600; }
.interval { color: var(--soft); font-size: .82em; font-weight: normal; }
figure { margin: .6rem 0; }
.plot { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
.samples { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
.samples figure { margin: 0; }
.samples img { width: 100%; display: block; border-radius: .3rem; }
.samples .small { image-rendering: pixelated; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .5rem .8rem; margin: .4rem 0;
  background: var(--card); border-radius: .3rem; font-size: .9rem; }
figcaption { font-size: .9rem; color: var(--soft); overflow-wrap: anywhere; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: bold; margin: 2.2rem 0 .5rem; }
details td { white-space: pre-wrap; overflow-wrap: anywhere; }
.many .interval { display: block; }
@media screen and (max-width: 40rem) { .interval { display: block; }
  .plot { max-width: none; width: auto; height: 19rem; } .plot.tall { height: 30rem; } }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  figure, tr, .answer { break-inside: avoid; } h2 { break-after: avoid; }
  .wide { overflow: visible; } details::details-content { content-visibility: visible; } }
"""


def write_report(
    cells: Sequence[Cell],
    path: str | Path,
    samples: Mapping[str, np.ndarray],
    title: str,
    baseline: str = BASELINE,
    examples: Figure | None = None,
) -> None:
    """Write the report of a sweep.

    Args:
        cells: the cells of one sweep.
        path: the HTML file, written atomically.
        samples: an image of each corruption by its name, (height, width, 3) uint8; may be empty.
        title: the title.
        baseline: the adapter that gains are relative to, if it was run.
        examples: examples of TNT on single images, from `draw_examples`.
    """
    write_text(path, render(cells, samples, title, baseline, examples))


def render(
    cells: Sequence[Cell],
    samples: Mapping[str, np.ndarray],
    title: str,
    baseline: str = BASELINE,
    examples: Figure | None = None,
) -> str:
    """The report as HTML; see `write_report`."""
    summary = report.summarise(cells, baseline)
    colours = {name: colour for name, (colour, _) in plots.styles(cells, baseline).items()}
    drawn = plots.figures(cells, baseline=baseline)
    name = summary.baseline or "the baseline"
    if examples is not None:
        drawn["examples"] = examples
    shown = {}
    for key, figure in drawn.items():
        words = [text.format(baseline=name, noun=summary.noun) for text in CAPTIONS[key]]
        shown[key] = plot(words[0], words[1], figure, headed=key != "reliability")
    body = [
        f'<p class="answer">{escape(report.answer_from(summary))}</p>',
        _warnings(cells),
        "<h2>Accuracy</h2>",
        _accuracy(cells, summary, colours),
        *(shown[key] for key in ("accuracy", "running", "severity") if key in shown),
        strip("Sample images", [(_plain(name), image) for name, image in samples.items()]),
        shown.get("examples", ""),
        "<h2>Calibration</h2>",
        _calibration(cells, summary, colours),
        shown.get("reliability", ""),
        "<h2>Speed and memory</h2>",
        _speed(cells, summary, colours),
        how_to_repeat(cells),
        settings_list(cells),
    ]
    return document(title, body)


def document(title: str, body: Iterable[str]) -> str:
    """A complete HTML page.

    Args:
        title: the title.
        body: its parts as HTML; empty ones are skipped.

    Returns:
        HTML.
    """
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            *filter(None, body),
            "</body>\n</html>\n",
        ]
    )


def _accuracy(cells: Sequence[Cell], summary: Summary, colours: Mapping[str, str]) -> str:
    rows = [
        (_plain(name), [_entry(summary.entries[name, a]) for a in summary.adapters])
        for name in summary.corruptions
    ]
    means = ("mean", [_entry(summary.means[a]) for a in summary.adapters])
    errors = {adapter: report.corruption_error(cells, adapter) for adapter in summary.adapters}
    last: list[tuple[str, list[str]]] = [means]
    if any(error is not None for error in errors.values()):
        last.append(("mean corruption error (%)", [_number(e) for e in errors.values()]))
    notes = []
    if summary.rivals:
        notes.append(
            f"Top-1 accuracy in per cent, and the gain over {summary.baseline} in points with its "
            "95 % interval. ▲ and ▼ mark gains whose interval is above or below 0; about one in "
            "twenty such intervals misses the true gain."
        )
    else:
        notes.append("Top-1 accuracy in per cent.")
    shown, count = report.severities(cells), len(report.seeds(cells))
    if len(shown) > 1:
        notes.append(
            f"Each {summary.noun} is the mean over severities {', '.join(map(str, shown))}."
        )
    if len(summary.averaged) < len(summary.corruptions):
        notes.append("The mean excludes clean images.")
    if count > 1:
        found = ((a, report.spread(cells, a)) for a in summary.adapters)
        spreads = ", ".join(f"{a} {_number(s)}" for a, s in found)
        notes.append(f"Mean over {count} seeds; standard deviation over seeds: {spreads}.")
    return _table(summary.noun, summary, colours, rows, last) + _note(" ".join(notes))


def _entry(entry: Entry) -> str:
    text = _number(entry.top1)
    if entry.gain is None:
        return text
    kind, mark = {1: (" better", "▲ "), 0: ("", ""), -1: (" worse", "▼ ")}[entry.verdict]
    low, high = entry.interval or (None, None)
    return (
        f'{text} <span class="gain{kind}">{mark}{_number(entry.gain, "+.2f")}</span> '
        f'<span class="interval">[{_number(low, "+.2f")}, {_number(high, "+.2f")}]</span>'
    )


def _calibration(cells: Sequence[Cell], summary: Summary, colours: Mapping[str, str]) -> str:
    kinds = {"ece": ("expected calibration error (%)", 100, ".2f")}
    kinds |= {"nll": ("negative log-likelihood (nats)", 1, ".3f")}
    kinds |= {"brier": ("Brier score", 1, ".3f")}
    rows = []
    for key, (label, scale, digits) in kinds.items():
        found = [report.average(cells, a, key, summary.averaged) for a in summary.adapters]
        rows.append((label, [_number(None if x is None else scale * x, digits) for x in found]))
    note = f"Means over the {summary.noun}s. Lower is better in every row."
    return _table("", summary, colours, rows) + _note(note)


def _speed(cells: Sequence[Cell], summary: Summary, colours: Mapping[str, str]) -> str:
    speeds, memories = [], []
    for adapter in summary.adapters:
        own = [cell for cell in cells if cell["adapter"] == adapter]
        timed = [cell for cell in own if cell["images_per_second"]]
        seconds = sum(cell["images"] / cell["images_per_second"] for cell in timed)
        images = sum(cell["images"] for cell in timed)
        speeds.append(_number(images / seconds if seconds else None, ",.1f"))
        known = [cell["peak_memory_gb"] for cell in own if cell.get("peak_memory_gb")]
        memories.append(_number(max(known, default=None)))
    rows = [("images per second", speeds), ("peak memory (GB)", memories)]
    note = (
        "Speed includes the steps, not the reading of images. Memory is the peak of the whole "
        "run, so adapters in the same run have the same value."
    )
    return _table("", summary, colours, rows) + _note(note)


def _table(
    corner: str,
    summary: Summary,
    colours: Mapping[str, str],
    rows: Iterable[tuple[str, list[str]]],
    last: Iterable[tuple[str, list[str]]] = (),
) -> str:
    """Make a table; row names are escaped, cells may contain HTML."""
    heads = [
        f'<th scope="col"><span class="swatch" style="background:{colours[a]}"></span>'
        f"{escape(a)}</th>"
        for a in summary.adapters
    ]
    lines = [f'<tr><th scope="col">{corner}</th>{"".join(heads)}</tr></thead><tbody>']
    for kind, group in (("", rows), (' class="mean"', last)):
        for name, texts in group:
            columns = "".join(f"<td>{text}</td>" for text in texts)
            lines.append(f'<tr{kind}><th scope="row">{escape(name)}</th>{columns}</tr>')
    kind = "wide many" if len(heads) > MANY else "wide"
    body = "\n".join(lines)
    return f'<div class="{kind}"><table><thead>{body}</tbody></table></div>'


def plain_table(heading: str, heads: Sequence[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """A table of plain text with a heading."""
    lines = ["".join(f'<th scope="col">{escape(head)}</th>' for head in ["", *heads])]
    for name, texts in rows:
        columns = "".join(f"<td>{escape(text)}</td>" for text in texts)
        lines.append(f'<th scope="row">{escape(_plain(name))}</th>{columns}')
    top, *rest = (f"<tr>{line}</tr>" for line in lines)
    table = f"<table><thead>{top}</thead><tbody>{''.join(rest)}</tbody></table>"
    return f'<h2>{escape(heading)}</h2><div class="wide">{table}</div>'


def plot(heading: str, caption: str, figure: Figure, *, headed: bool = True) -> str:
    """A figure with its caption and, optionally, its heading."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    heading = escape(heading)
    above = f"<h2>{heading}</h2>\n" if headed else ""
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    kind = "plot tall" if height > TALL else "plot"
    return (
        f'{above}<figure><div class="wide"><img class="{kind}" width="{width}" height="{height}" '
        f'src="{_data_uri(file.getvalue())}" alt="{heading}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def strip(heading: str, images: Sequence[tuple[str, np.ndarray]], note: str = "") -> str:
    """Images with captions beside each other.

    Args:
        heading: the heading.
        images: caption and (height, width, 3) uint8 of each.
        note: a text below the heading.

    Returns:
        HTML; empty without images.
    """
    if not images:
        return ""
    shown = []
    for caption, image in images:
        file = io.BytesIO()
        Image.fromarray(np.asarray(image, np.uint8)).save(file, "PNG", optimize=True)
        kind = ' class="small"' if max(image.shape[:2]) < SMALL else ""
        caption = escape(caption)
        shown.append(
            f'<figure><img{kind} src="{_data_uri(file.getvalue())}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    body = f'<div class="samples">{"".join(shown)}</div>'
    return f"<h2>{escape(heading)}</h2>\n{_note(note) if note else ''}{body}"


def _warnings(cells: Sequence[Cell]) -> str:
    lines = []
    segments = [segment for cell in cells for segment in cell["segments"]]
    lost = sorted({name for segment in segments for name in segment.get("unreadable", ())})
    if lost:
        lines.append(f"{counted(len(lost), 'image')} could not be read: {_some(lost)}.")
    for adapter in dict.fromkeys(cell["adapter"] for cell in cells):
        own = [cell for cell in cells if cell["adapter"] == adapter]
        hit = [f"{c['stream']} (seed {c['seed']})" for c in own if c["skipped_steps"]]
        if hit:
            steps = [step for cell in own for step in cell["skipped_steps"]]
            lines.append(
                f"{adapter}: {counted(len(steps), 'step')} skipped because the loss or the update "
                f"was not finite, on {_some(hit)}."
            )
        mute = sum(s["without_prediction"] for cell in own for s in cell["segments"])
        if mute:
            lines.append(f"{adapter}: without a finite prediction, counted as wrong: {mute}.")
    if not lines:
        return ""
    return f'<div class="warning">{"".join(f"<p>⚠ {escape(line)}</p>" for line in lines)}</div>'


def counted(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def how_to_repeat(cells: Sequence[Cell]) -> str:
    """The command lines that made the results, with date, commit and the adapters' optimisers.

    Args:
        cells: have `about`, and `adapter` and its `settings`.

    Returns:
        HTML; empty if none says its command.
    """
    made: dict[tuple[str, str, str], list[str]] = {}
    for about in (cell.get("about") or {} for cell in cells):
        if "command" in about:
            key = about["command"], about.get("commit", ""), about.get("preprocessing", "")
            made.setdefault(key, []).append(about.get("date", ""))
    if not made:
        return ""
    lines = []
    for (command, commit, preprocessing), dates in made.items():
        first, last = min(dates)[:16], max(dates)[:16]
        when = first if first == last else f"{first} to {last}"
        at = f", commit {commit}" if commit else ""
        after = f". Preprocessing: {preprocessing}" if preprocessing else ""
        note = _note(when.replace("T", " ") + at + after)
        lines.append(f"<pre>{escape(command)}</pre>{note}")
    used = {
        cell["adapter"]: _optimiser(cell.get("settings") or {})
        for cell in cells
        if "adapter" in cell
    }
    if any(used.values()):
        said = "; ".join(f"{name}: {text or 'none'}" for name, text in used.items())
        lines.append(_note(f"Optimisers and learning rates: {said}."))
    return f"<h2>How to repeat this</h2>{''.join(lines)}"


def _optimiser(settings: Mapping[str, Any]) -> str:
    if tnt := settings.get("tnt"):
        steps = f"{tnt['steps']} step{'s' * (tnt['steps'] != 1)}"
        return f"{steps} on each image's noise map at {tnt['learning_rate']}"
    return settings.get("optimizer", "")


def settings_list(cells: Sequence[Cell]) -> str:
    """Settings and versions of cells in a collapsed section.

    Args:
        cells: have `settings` and `about`.

    Returns:
        HTML; empty if there are none.
    """
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        for part in ("settings", "about"):
            for name, value in _flat(cell.get(part) or {}):
                if part == "about" and name in ("command", "date", "commit", "preprocessing"):
                    continue  # in `how_to_repeat`
                found.setdefault(name, {})[_json(value)] = None
    if not found:
        return ""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(_plain(name))}</th><td>{escape(" / ".join(values))}</td></tr>'
        for name, values in found.items()
    )
    return (
        "<details><summary>Settings and versions</summary>"
        f'<div class="wide"><table><tbody>{rows}</tbody></table></div></details>'
    )


def _flat(items: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in items.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}: ")
        else:
            yield before + name, value


def _json(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_json, value)) or NONE
    return value if isinstance(value, str) else NONE if value is None else json.dumps(value)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None, digits: str = ".2f") -> str:
    return NONE if value is None else format(value, digits).replace("-", "−")


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _data_uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
