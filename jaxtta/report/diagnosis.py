"""Reports of a diagnosis and of a check of target images; their words are in the templates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from PIL import Image

from jaxtta.diagnose import Answers, Diagnosis, TargetCheck, truncate
from jaxtta.evaluate import ADAPTERS
from jaxtta.images import printable
from jaxtta.io import atomic_write, write_json, write_text
from jaxtta.report import plots
from jaxtta.report.plots import COLOURS, DASHES, GREY
from jaxtta.report.render import NONE, number, percent, render, signed
from jaxtta.report.summary import aligned

UNSURE, THUMBNAIL = 12, 160  # images shown of a model, and pixels of their longer side


class Report(NamedTuple):
    """Sentences, tables by heading, plots, answers to each image, and images by heading."""

    sentences: list[str]
    tables: dict[str, pd.DataFrame]
    plots: dict[str, Figure]
    answers: dict[str, pd.DataFrame]
    strips: dict[str, list[tuple[str, np.ndarray]]]


def diagnosis_report(found: Diagnosis, fractions: Sequence[float]) -> Report:
    """The report of a diagnosis with these fractions of the head's directions."""
    said = sentences("diagnosis.txt.j2", models=found.models, robustness=found.robustness)
    return Report(said, diagnosis_tables(found), diagnosis_plots(found, fractions), {}, {})


def check_report(
    checks: Mapping[str, TargetCheck],
    answers: Mapping[str, Answers],
    images: Sequence[np.ndarray],
    names: Sequence[str],
) -> Report:
    """The report of each model's check of images with these names."""
    trials = [check.trial.adapters for check in checks.values() if check.trial]
    tried = {each.adapter.partition(":")[0] for trial in trials for each in trial}
    untried = [name for name in ADAPTERS if name not in tried]
    said = sentences("target.txt.j2", checks=checks, tried=tried, untried=untried)
    report = Report(said, {}, {}, {}, {})
    for model, check in checks.items():
        ending, own = f"-{model}" if len(checks) > 1 else "", answers[model]
        report.tables.update(check_tables(model, check))
        report.plots[f"predictions{ending}"] = draw_predictions(check, own)
        rows = report.answers[f"images{ending}"] = pd.DataFrame(
            {
                "file": [printable(names[number]) for number in own.numbers],
                "class": [printable(check.classes[label]) for label in own.labels],
                "confidence": own.confidences,
                "entropy": own.entropies,
                "distance": own.distances,
            }
        )
        shown = report.strips.setdefault(f"Images that {model} is least sure of", [])
        for place in own.least_sure(UNSURE):
            file, label, confidence, *_ = rows.iloc[place]
            small = Image.fromarray(images[own.numbers[place]])
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            shown.append((f"{file}: {label} {percent(confidence, 0)} %", np.asarray(small)))
    return report


def write(folder: Path, title: str, report: Report, found: Mapping[str, Any]) -> None:
    """Print a report, and write its files to an existing folder; `found` is for result.json."""
    text = "\n\n".join(as_text(*table) for table in report.tables.items())
    print("\n\n".join([title, text, *report.sentences]))
    write_text(folder / "table.txt", text + "\n")
    write_json(folder / "result.json", found)
    for name, figure in report.plots.items():
        with atomic_write(folder / f"{name.replace('/', '-')}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    for name, rows in report.answers.items():
        text = rows.to_csv(index=False, float_format="%.4f")
        write_text(folder / f"{name.replace('/', '-')}.csv", text)
    made = {"settings": [found["settings"]], "abouts": [found["about"]]}
    page = render("diagnosis.html.j2", title=title, **report._asdict(), **made)
    write_text(folder / "report.html", page)
    print(f"\nresults: {folder / 'report.html'}")


def sentences(template: str, **found: Any) -> list[str]:
    """Fill in a template of sentences; a paragraph is one item."""
    paragraphs = render(template, listed=truncate, bounded=bounded, **found).split("\n\n")
    return [" ".join(text.split()) for text in paragraphs if text.strip()]


def bounded(share: float, bounds: Sequence[float], sign: str = "") -> str:
    """Format a share and its interval in per cent."""
    return "{} [{}, {}]".format(*(number(100 * value, sign=sign) for value in (share, *bounds)))


def as_text(heading: str, table: pd.DataFrame) -> str:
    """Format a table as aligned text."""
    lines = [[heading, *table.columns], *table.itertuples(name=None)]
    rule = ["-" * max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(aligned([lines[0], rule, *lines[1:]]))


def fields(found: Any, *omitted: str) -> dict[str, str]:
    """The fields of a dataclass as rows of a table, without those omitted."""
    items = vars(found).items()
    return {name.replace("_", " "): entry(x) for name, x in items if name not in omitted}


def entry(value: Any) -> str:
    """Format a number, a pair or a list for a table."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, tuple):
        return f"{entry(value[0])} ({entry(value[1])})"
    return truncate(map(entry, value)) if isinstance(value, list) else str(value or NONE)


# --- tables and plots ---


def diagnosis_tables(found: Diagnosis) -> dict[str, pd.DataFrame]:
    """Metrics by model and by pair of models, as text."""
    models = {}
    for name, model in found.models.items():
        rows, shifted = {}, model.shifted
        for key, each in model.sets.items():
            rows[f"accuracy on {key} (%)"] = bounded(each.accuracy, each.interval)
            rows[f"kurtosis on {key}"] = entry(each.kurtosis)
        if shifted:
            gained = found.robustness.values.get(name)
            rows["mean accuracy on shifted sets (%)"] = percent(shifted.accuracy)
            rows["effective robustness (points)"] = signed(gained and 100 * gained)
            rows["mean kurtosis on shifted sets"] = entry(shifted.kurtosis)
        rows["sufficient fraction of directions"] = entry(model.sufficient_fraction)
        models[name] = rows | fields(model.base)
    tables = {"Models": pd.DataFrame(models)}
    pairs = {" / ".join(pair.models): fields(pair, "models") for pair in found.pairs}
    return tables | ({"Pairs of models": pd.DataFrame(pairs)} if pairs else {})


def check_tables(model: str, check: TargetCheck) -> dict[str, pd.DataFrame]:
    """Distribution shift, predictions and the trial of adapters, as text."""
    sets = {"target": check.target, "reference": check.reference}
    shares = {"predicted (%)": check.target.predicted}
    if check.labelled:
        shares |= {"labelled (%)": check.labelled.shares, "recall (%)": check.labelled.recall}
    shares["predicted on the reference (%)"] = check.reference.predicted
    confused = {
        " / ".join(pair.classes): (percent(pair.share), percent(pair.margin))
        for pair in check.confused
    }
    heads = ["top two for (%)", "mean difference (points)"]
    tables = {
        f"Images in {model}'s embedding space": pd.DataFrame(
            {name: fields(each, "predicted") for name, each in sets.items()}
        ),
        f"Classes by {model}": pd.DataFrame(shares, check.classes)
        .iloc[check.commonest()]
        .map(percent),
        f"Classes that {model} confuses": pd.DataFrame.from_dict(confused, "index", columns=heads),
    }
    if check.trial:
        rows = {
            each.adapter: (
                bounded(each.accuracy, each.interval),
                bounded(each.gain, each.gain_interval, "+") if each.gain_interval else NONE,
                percent(each.calibration_error),
            )
            for each in check.trial.adapters
        }
        heads = ["accuracy (%)", "gain (points)", "calibration error (%)"]
        tables[f"Trial of adapters with {model}"] = pd.DataFrame.from_dict(
            rows, "index", columns=heads
        )
    return tables


def diagnosis_plots(found: Diagnosis, fractions: Sequence[float]) -> dict[str, Figure]:
    """The plots of a diagnosis."""
    names = ["kurtosis", "importance", "pruning", "robustness"][: 4 if found.robustness.line else 3]
    drawn = {name: Figure(figsize=(7, 4.4), layout="constrained") for name in names}
    bars, spectrum, pruning, *robustness = (figure.subplots() for figure in drawn.values())
    models = {plots.label(name): model for name, model in found.models.items()}
    colours = [COLOURS[n % len(COLOURS)] for n in range(len(models))]
    dashes = [DASHES[n // len(COLOURS) % len(DASHES)] for n in range(len(models))]
    kurtosis = {n: {s: x.kurtosis for s, x in m.sets.items()} for n, m in models.items()}
    kurtosis = pd.DataFrame(kurtosis).rename(index=plots.label)
    kurtosis.plot.bar(ax=bars, width=0.8, color=colours, rot=40, legend=False)
    bars.axhline(3, color="black", linestyle="--", linewidth=1)
    plots.finish(bars, "", "kurtosis of the features")

    lines = {"color": colours, "style": dashes, "legend": False}
    importance = pd.DataFrame({n: pd.Series(m.base.importance) for n, m in models.items()})
    importance.index += 1
    (importance / importance.mean()).plot(ax=spectrum, **lines)
    spectrum.axhline(1, color="black", linestyle="--", linewidth=1)
    plots.finish(spectrum, "rank of the direction", "importance / mean")

    kept = 100 * np.asarray(fractions)
    base = pd.DataFrame({n: m.sets[m.base_name].pruned for n, m in models.items()}, kept)
    (100 * base).sort_index().plot(ax=pruning, **lines)
    for colour, model in zip(colours, models.values(), strict=True):
        if model.shifted:
            pruning.plot(kept, 100 * np.asarray(model.shifted.pruned), ".", color=colour)
    pruning.set_ylim(0, 100)
    plots.finish(pruning, "directions kept (%)", "top-1 accuracy (%)")

    for axes in robustness:
        points = np.asarray(found.robustness.points)
        axes.plot(*points.T, "o", color=GREY, markersize=9, alpha=0.5, label="reference")
        pairs = {n: (m.base_accuracy, m.shifted.accuracy) for n, m in models.items()}
        bases = [*points[:, 0], *(base for base, _ in pairs.values())]
        ends = np.linspace(min(bases), max(bases), 50)
        axes.plot(ends, found.robustness.line.predict(ends), color=GREY)
        for colour, (name, pair) in zip(colours, pairs.items(), strict=True):
            axes.plot(*pair, "D", color=colour, markersize=5, label=name)
        axes.set(xscale="logit", yscale="logit")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6))
            axis.set_major_formatter(PercentFormatter(1))
            axis.set_minor_locator(NullLocator())
        plots.finish(axes, "accuracy on the base set", "mean on shifted sets", grid="both")
    return drawn


def draw_predictions(check: TargetCheck, answers: Answers) -> Figure:
    """Draw entropies, and how often each class is predicted."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.linspace(0, np.log(len(check.classes)), 31)
    sets = {"target": answers.entropies, "reference": answers.reference_entropies}
    for (key, values), colour in zip(sets.items(), (COLOURS[0], GREY), strict=True):
        weights = np.full(len(values), 100 / len(values))
        values = np.clip(values, bins[0], bins[-1])  # rounding may exceed the range
        left.hist(values, bins, weights=weights, color=colour, alpha=0.6, label=key)
    shares = {"predicted": check.target.predicted}
    shares |= {"labelled": check.labelled.shares} if check.labelled else {}
    frame = 100 * pd.DataFrame(shares, map(plots.label, check.classes)).iloc[check.commonest()]
    frame.plot.barh(ax=right, width=0.8, color=COLOURS[:2], legend=False)
    right.invert_yaxis()
    plots.finish(left, "entropy of a prediction (nats)", "images (%)")
    plots.finish(right, "images (%)", "", grid="x")
    return figure
