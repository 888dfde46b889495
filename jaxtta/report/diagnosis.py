"""Reports of a diagnosis and of a check of target images; their words are in the templates."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from jaxtta.adapters.by_name import SETTINGS
from jaxtta.bootstrap import accuracy_interval
from jaxtta.data import Dataset
from jaxtta.diagnose import Answers, Diagnosis, ModelDiagnosis, TargetCheck, truncate
from jaxtta.images import printable
from jaxtta.io import atomic_write, write_json, write_text
from jaxtta.report.diagnosis_plots import diagnosis_plots, draw_predictions
from jaxtta.report.summary import Summary
from jaxtta.report.text import NONE, aligned, answer, counted, percent, points
from jaxtta.report.write import png, render

UNSURE, THUMBNAIL = 12, 160  # images shown of a model, and pixels of their longer side
LABELS = {
    "detected": "classes detected",
    "most_by_one_direction": "most classes by one direction",
    "linear_cka": "linear CKA",
    "entropy": "mean entropy (nats)",
    "confidence": "mean confidence",
    "squared_mmd": "squared MMD to half the reference",
    "null_quantile": "95 % quantile under the null",
}
Tables = dict[str, pd.DataFrame]
Checked = tuple[TargetCheck, Answers, Summary | None]


def write_diagnosis(
    folder: Path, found: Diagnosis, fractions: Sequence[float], made: dict[str, Any]
) -> None:
    """Print a diagnosis and write its files; `made` has `settings` and `about`."""
    said = sentences("diagnosis.txt.j2", models=found.models, robustness=found.robustness)
    tables, drawn = diagnosis_tables(found), diagnosis_plots(found, fractions)
    write_json(folder / "result.json", dataclasses.asdict(found) | made)
    _write(folder, "Diagnosis", found.models, made, said, tables=tables, plots=drawn, strips={})


def write_check(
    folder: Path,
    title: str,
    found: Mapping[str, Checked],
    images: Dataset,
    names: Sequence[str],
    made: dict[str, Any],
) -> None:
    """Print a check of images with these names, by each model, and write its files."""
    content, tables, drawn, strips = {}, {}, {}, {}
    for model, (check, answers, trial) in found.items():
        ending = f"-{model}" if len(found) > 1 else ""
        tables |= check_tables(model, check, trial)
        drawn[f"predictions{ending}"] = draw_predictions(check, answers)
        columns = {
            "file": [printable(names[number]) for number in answers.numbers],
            "class": [printable(check.classes[label]) for label in answers.labels],
            "confidence": answers.confidences,
            "entropy": answers.entropies,
            "distance": answers.distances,
        }
        table, file = pd.DataFrame(columns), f"images{ending}.csv".replace("/", "-")
        write_text(folder / file, table.to_csv(index=False, float_format="%.4f"))
        strip = strips.setdefault(f"Images that {model} is least sure of, from {file}", [])
        for place in answers.least_sure(UNSURE):
            row, small = table.iloc[place], Image.fromarray(images[int(answers.numbers[place])])
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            caption = f"{row['file']}: {row['class']} {percent(row['confidence'], 0)} %"
            strip.append((caption, np.asarray(small)))
        rows = json.loads(trial.segments.to_json(orient="records") or "") if trial else []
        content[model] = dataclasses.asdict(check) | {"trial": rows}
    write_json(folder / "result.json", {"models": content} | made)
    models, said = {name: check for name, (check, *_) in found.items()}, check_sentences(found)
    trials = [result for _, _, trial in found.values() if trial for result in trial.results]
    tried = {result.adapter: result.settings["adapter"] for result in trials}
    made = made | {"settings": made["settings"] | {"adapter": tried}}
    _write(folder, title, models, made, said, tables=tables, plots=drawn, strips=strips)


def _write(
    folder: Path,
    title: str,
    models: Mapping[str, ModelDiagnosis | TargetCheck],
    made: Mapping[str, Any],
    said: list[str],
    **shown: Any,
) -> None:
    title = f"{title}: {', '.join(models)}"
    blocks = [
        "\n".join(aligned([[name, *table.columns], *table.itertuples(name=None)]))
        for name, table in shown["tables"].items()
    ]
    print("\n\n".join([title, *blocks, *said]))
    write_text(folder / "table.txt", "\n\n".join(blocks) + "\n")
    for name, figure in shown["plots"].items():
        with atomic_write(folder / f"{name.replace('/', '-')}.png") as temporary:
            temporary.write_bytes(png(figure))
    prepared = "; ".join(f"{name}: {model.preprocessing}" for name, model in models.items())
    about = [made["about"] | {"preprocessing": prepared}]
    how = {"abouts": about, "settings": [made["settings"]], "sentences": said, "title": title}
    write_text(folder / "report.html", render("diagnosis.html.j2", **how, **shown))
    print(f"\nresults: {folder / 'report.html'}")


def check_sentences(found: Mapping[str, Checked]) -> list[str]:
    """What to expect of each model on the images, and what was not measured."""
    trials = [trial for _, _, trial in found.values() if trial]
    tried = {name.partition(":")[0] for trial in trials for name in trial.adapters}
    untried = [name for name in SETTINGS if name not in tried]
    return sentences("target.txt.j2", found=found, tried=tried, untried=untried)


def sentences(template: str, **found: Any) -> list[str]:
    """Fill in a template of sentences; each paragraph is one item."""
    words = {"listed": truncate, "counted": counted, "bounded": bounded, "answer": answer}
    paragraphs = render(template, **words, **found).split("\n\n")
    return [" ".join(text.split()) for text in paragraphs if text.strip()]


def bounded(share: float, bounds: Sequence[float], sign: str = "") -> str:
    """Format a share and its interval in per cent, or a gain in points."""
    return f"{points(share, sign)} [{', '.join(points(bound, sign) for bound in bounds)}]"


def fields(found: Any, *omitted: str) -> dict[str, str]:
    """The fields of a dataclass as rows of a table, without those omitted."""
    shown = {name: entry(x) for name, x in vars(found).items() if name not in omitted}
    return {LABELS.get(name) or name.replace("_", " "): text for name, text in shown.items()}


def entry(value: Any) -> str:
    """Format a number, a pair or a list for a table."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    if isinstance(value, tuple):
        return f"{entry(value[0])} ({entry(value[1])})"
    if isinstance(value, list):
        return truncate([*map(entry, value)])
    return NONE if value is None else str(value)


def diagnosis_tables(found: Diagnosis) -> Tables:
    """Metrics by model and by pair of models, as text."""
    models = {}
    for name, model in found.models.items():
        rows = {}
        for key, each in model.sets.items():
            rows[f"accuracy on {key} (%)"] = bounded(each.accuracy, each.interval)
            rows[f"kurtosis on {key}"] = entry(each.kurtosis)
        if model.shifted:
            rows["mean accuracy on shifted sets (%)"] = percent(model.shifted.accuracy)
            robust = found.robustness.values.get(name, np.nan)
            rows["effective robustness (points)"] = points(robust, "+")
            rows["mean kurtosis on shifted sets"] = entry(model.shifted.kurtosis)
        rows["sufficient fraction of directions"] = entry(model.sufficient_fraction)
        models[name] = rows | fields(model.base)
    tables = {"Models": pd.DataFrame(models)}
    pairs = {" / ".join(pair.models): fields(pair, "models") for pair in found.pairs}
    return tables | ({"Pairs of models": pd.DataFrame(pairs)} if pairs else {})


def check_tables(model: str, check: TargetCheck, trial: Summary | None) -> Tables:
    """Distribution shift, predictions and the trial of adapters, as text."""
    sets = {"target": check.target, "reference": check.reference}
    spaces = {name: fields(each, "predicted") for name, each in sets.items()}
    shares = {"predicted (%)": check.target.predicted}
    if check.labelled:
        shares |= {"labelled (%)": check.labelled.shares, "recall (%)": check.labelled.recall}
    shares["on the reference (%)"] = check.reference.predicted
    classes = pd.DataFrame(shares, check.classes).iloc[check.commonest()]
    confused = {" / ".join(pair.classes): (pair.share, pair.margin) for pair in check.confused}
    heads = ["top two for (%)", "mean difference (points)"]
    tables = {
        f"Images in {model}'s embedding space": pd.DataFrame(spaces),
        f"Classes by {model}": classes.map(percent),
        f"Classes that {model} confuses": pd.DataFrame(confused, heads).map(percent).T,
    }
    if trial:
        means = trial.means.to_dict("index")
        heads, rows = ["accuracy (%)", "gain (points)", "calibration error (%)"], {}
        for result in trial.results:
            right, mean = result.top1[result.rows["seen"]], means[result.adapter]
            gained = bounded(mean["gain"], (mean["low"], mean["high"]), "+")
            gained = gained if result.adapter in trial.compared else NONE
            top = bounded(right.mean(), accuracy_interval(right))
            rows[result.adapter] = top, gained, percent(mean["ece"])
        tables[f"Trial of adapters with {model}"] = pd.DataFrame(rows, heads).T
    return tables
