"""Reports of a diagnosis and of a check of target images; their words are in the templates."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from jaxtta.data import ImageFolder
from jaxtta.diagnose import Answers, Diagnosis, TargetCheck, truncate
from jaxtta.images import printable
from jaxtta.io import atomic_write, write_json, write_text
from jaxtta.report.plots import GREY, finish, label, styles
from jaxtta.report.summary import Summary
from jaxtta.report.text import NONE, aligned, answer, counted, percent, points
from jaxtta.report.write import png, render

Tables = dict[str, pd.DataFrame]
Checked = tuple[TargetCheck, Answers, Summary | None]


def write_diagnosis(
    folder: Path, found: Diagnosis, fractions: Sequence[float], made: dict[str, Any]
) -> None:
    """Print a diagnosis and write its files; `made` has `settings` and `about`."""
    said = sentences("diagnosis.txt.j2", models=found.models, robustness=found.robustness)
    prepared = [f"{name}: {model.preprocessing}" for name, model in found.models.items()]
    made["about"]["preprocessing"] = "; ".join(prepared)
    title, content = f"Diagnosis: {', '.join(found.models)}", dataclasses.asdict(found)
    plots = diagnosis_plots(found, fractions)
    _write(folder, title, content | made, said, diagnosis_tables(found), plots=plots)


def write_check(
    folder: Path, model: str, found: Checked, images: ImageFolder, made: dict[str, Any]
) -> None:
    """Print a model's check of images, with a trial of adapters if there was one; write files."""
    check, answers, trial = found
    columns = {
        "file": [printable(images.paths[number]) for number in answers.numbers],
        "class": [printable(check.classes[label]) for label in answers.labels],
        "confidence": answers.confidences,
        "entropy": answers.entropies,
        "distance": answers.distances,
    }
    table, shown = pd.DataFrame(columns), []
    write_text(folder / "images.csv", table.to_csv(index=False, float_format="%.4f"))
    for place in answers.least_sure(12):
        row, small = table.iloc[place], Image.fromarray(images[int(answers.numbers[place])])
        small.thumbnail((160, 160))
        caption = f"{row['file']}: {row['class']} {percent(row['confidence'], 0)} %"
        shown.append((caption, np.asarray(small)))
    rows = json.loads(trial.segments.to_json(orient="records") or "") if trial else []
    tried = {each.adapter: each.settings["adapter"] for each in trial.results} if trial else {}
    made["settings"] |= {"adapter": tried}
    made["about"]["preprocessing"] = check.preprocessing
    content = {"models": {model: dataclasses.asdict(check) | {"trial": rows}}} | made
    title, tables = f"Check of {images.root.resolve().name}: {model}", check_tables(check, trial)
    said = sentences("target.txt.j2", name=model, check=check, trial=trial)
    drawn = {"predictions": draw_predictions(check, answers)}
    _write(folder, title, content, said, tables, plots=drawn, unsure=shown)


def _write(
    folder: Path, title: str, content: dict[str, Any], said: list[str], tables: Tables, **shown: Any
) -> None:
    write_json(folder / "result.json", content)
    blocks = [
        "\n".join(aligned([[name, *table.columns], *table.itertuples(name=None)]))
        for name, table in tables.items()
    ]
    print("\n\n".join([title, *blocks, *said]))
    write_text(folder / "table.txt", "\n\n".join(blocks) + "\n")
    for name, figure in shown.get("plots", {}).items():
        with atomic_write(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png(figure))
    told = {"title": title, "sentences": said, "tables": tables, "abouts": [content["about"]]}
    page = render("diagnosis.html.j2", settings=[content["settings"]], **told, **shown)
    write_text(folder / "report.html", page)
    print(f"\nresults: {folder / 'report.html'}")


def sentences(template: str, **found: Any) -> list[str]:
    """Fill in a template of sentences; each paragraph is one item."""
    words = {"listed": truncate, "counted": counted, "bounded": bounded, "answer": answer}
    paragraphs = render(template, **words, **found).split("\n\n")
    return [" ".join(text.split()) for text in paragraphs if text.strip()]


def bounded(share: float, low: float, high: float) -> str:
    """Format a share and its interval in per cent."""
    return f"{points(share)} [{points(low)}, {points(high)}]"


def entry(value: Any) -> str:
    """Format a number, a pair or a list for a table."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, tuple):
        return f"{entry(value[0])} ({entry(value[1])})"
    if isinstance(value, list):
        return truncate([*map(entry, value)])
    return NONE if value is None else str(value)


def described(columns: dict[str, Any], *omitted: str) -> pd.DataFrame:
    """Fields by name as a table of text."""
    table = pd.DataFrame(columns).drop([*omitted]).map(entry)
    return table.rename(index=lambda name: name.replace("_", " "))


def diagnosis_tables(found: Diagnosis) -> Tables:
    """Metrics by model and by pair of models, as text."""
    models = {}
    for name, model in found.models.items():
        rows = {}
        for key, each in model.sets.items():
            rows[f"accuracy on {key} (%)"] = bounded(each.accuracy, *each.interval)
            rows[f"kurtosis on {key}"] = each.kurtosis
        if model.shifted:
            rows["mean accuracy on shifted sets (%)"] = percent(model.shifted.accuracy)
            robust = found.robustness.values.get(name, np.nan)
            rows["effective robustness (points)"] = points(robust, "+")
            rows["mean kurtosis on shifted sets"] = model.shifted.kurtosis
        rows["sufficient fraction of directions"] = model.sufficient_fraction
        models[name] = rows | vars(model.base)
    pairs = {" / ".join(pair.models): vars(pair) for pair in found.pairs}
    tables = {"Models": described(models)}
    return tables | ({"Pairs of models": described(pairs, "models")} if pairs else {})


def check_tables(check: TargetCheck, trial: Summary | None) -> Tables:
    """Distribution shift, predictions and the trial of adapters, as text."""
    spaces = {"target": vars(check.target), "reference": vars(check.reference)}
    shares = {"predicted (%)": check.target.predicted}
    if check.labelled:
        shares |= {"labelled (%)": check.labelled.shares, "recall (%)": check.labelled.recall}
    shares["on the reference (%)"] = check.reference.predicted
    classes = pd.DataFrame(shares, check.classes).iloc[check.commonest()]
    confused = {" / ".join(pair.classes): (pair.share, pair.margin) for pair in check.confused}
    heads = ["top two for (%)", "mean difference (points)"]
    tables = {
        "Images in the embedding space": described(spaces, "predicted"),
        "Classes": classes.map(percent),
        "Classes that are confused": pd.DataFrame(confused, heads).map(percent).T,
    }
    if trial:
        columns = ["top1", "top1_low", "top1_high", "gain", "gain_low", "gain_high", "ece"]
        tables["Trial of adapters (%)"] = trial.segments.set_index("adapter")[columns].map(percent)
    return tables


def diagnosis_plots(found: Diagnosis, fractions: Sequence[float]) -> dict[str, Figure]:
    """The plots of a diagnosis with these fractions of the head's directions."""
    names, line = ("kurtosis", "importance", "pruning", "robustness"), found.robustness.line
    drawn = {name: Figure(figsize=(7, 4.4), layout="constrained") for name in names}
    kurtosis, importance, pruning, robustness = (figure.subplots() for figure in drawn.values())
    bars = {
        label(name): {label(key): each.kurtosis for key, each in model.sets.items()}
        for name, model in found.models.items()
    }
    pd.DataFrame(bars).plot.bar(ax=kurtosis, width=0.8, rot=40)
    kurtosis.axhline(3, color="black", linestyle="--", linewidth=1)
    finish(kurtosis, "", "kurtosis of the features")
    for name, look in styles(found.models, None).items():
        model, colour = found.models[name], look["color"]
        spectrum, base = np.asarray(model.base.importance), model.sets[model.base_name]
        importance.plot(1 + np.arange(len(spectrum)), spectrum / spectrum.mean(), **look, ms=1)
        pruning.plot(pd.Series(base.pruned, [*fractions]).sort_index(), **look)
        if model.shifted:
            pruning.plot(fractions, model.shifted.pruned, "x", color=colour)
            robustness.plot(model.base_accuracy, model.shifted.accuracy, **look)
    importance.axhline(1, color="black", linestyle="--", linewidth=1)
    finish(importance, "rank of the direction", "importance / mean")
    finish(pruning, "share of directions kept", "top-1 accuracy")
    if line is None:
        del drawn["robustness"]
        return drawn
    robustness.plot(*np.transpose(found.robustness.points), "o", color=GREY, label="reference")
    bases = np.concatenate([each.get_xdata() for each in robustness.lines])
    ends = np.linspace(bases.min(), bases.max(), 50)
    robustness.plot(ends, line.predict(ends), color=GREY)
    finish(robustness, "accuracy on the base set", "mean on shifted sets", grid="both")
    return drawn


def draw_predictions(check: TargetCheck, answers: Answers) -> Figure:
    """Draw entropies, and how often each class is predicted."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins = np.linspace(0, np.log(len(check.classes)), 31)
    for name, values in (("target", answers.entropies), ("reference", answers.reference_entropies)):
        weights = np.full(len(values), 100 / len(values))
        left.hist(np.clip(values, 0, bins[-1]), bins, weights=weights, alpha=0.6, label=name)
    shares = {"predicted": check.target.predicted}
    shares |= {"labelled": check.labelled.shares} if check.labelled else {}
    frame = 100 * pd.DataFrame(shares, [*map(label, check.classes)]).iloc[check.commonest()]
    frame.plot.barh(ax=right, width=0.8, legend=False)
    right.invert_yaxis()
    finish(left, "entropy of a prediction (nats)", "images (%)")
    finish(right, "images (%)", "", grid="x")
    return figure
