"""Reports of a diagnosis and of a check of target images; their words are in the templates."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from jaxtta.bootstrap import accuracy_interval
from jaxtta.diagnose import Answers, Diagnosis, TargetCheck, truncate
from jaxtta.evaluate import ADAPTERS
from jaxtta.images import printable
from jaxtta.io import atomic_write, write_json, write_text
from jaxtta.report.diagnosis_plots import diagnosis_plots, draw_predictions
from jaxtta.report.render import NONE, number, percent, render, signed
from jaxtta.report.summary import Summary, answer

UNSURE, THUMBNAIL = 12, 160  # images shown of a model, and pixels of their longer side
Tables = dict[str, pd.DataFrame]


def write_diagnosis(
    folder: Path, found: Diagnosis, fractions: Sequence[float], **about: dict[str, Any]
) -> None:
    """Print a diagnosis with these fractions of the head's directions, and write its files.

    Args:
        folder: an existing folder.
        found: the diagnosis.
        fractions: of the head's directions that were kept.
        **about: the `settings`, and `about` what made it, for `result.json` and the page.
    """
    said = sentences("diagnosis.txt.j2", models=found.models, robustness=found.robustness)
    title = f"Diagnosis: {', '.join(found.models)}"
    drawn = diagnosis_plots(found, fractions)
    write_json(folder / "result.json", dataclasses.asdict(found) | about)
    _write(folder, title, said, diagnosis_tables(found), drawn, {}, about)


def write_check(
    folder: Path,
    title: str,
    found: Mapping[str, tuple[TargetCheck, Answers, Summary | None]],
    images: Sequence[np.ndarray],
    names: Sequence[str],
    **about: dict[str, Any],
) -> None:
    """Print a check of target images, and write its files.

    Args:
        folder: an existing folder.
        title: the title.
        found: by model: the check, the answers and the trial of adapters.
        images: the target images.
        names: of the images.
        **about: the `settings`, and `about` what made it, for `result.json` and the page.
    """
    models, tables, drawn, strips = {}, {}, {}, {}
    for model, (check, answers, trial) in found.items():
        ending = f"-{model}" if len(found) > 1 else ""
        tables |= check_tables(model, check, trial)
        drawn[f"predictions{ending}"] = draw_predictions(check, answers)
        table = answers_table(check, answers, names)
        file = f"images{ending}.csv".replace("/", "-")
        write_text(folder / file, table.to_csv(index=False, float_format="%.4f"))
        strip = strips.setdefault(f"Images that {model} is least sure of, from {file}", [])
        for place in answers.least_sure(UNSURE):
            row, small = table.iloc[place], Image.fromarray(images[answers.numbers[place]])
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            caption = f"{row['file']}: {row['class']} {percent(row['confidence'], 0)} %"
            strip.append((caption, np.asarray(small)))
        rows = [] if trial is None else json.loads(trial.segments.to_json(orient="records"))
        models[model] = dataclasses.asdict(check) | {"trial": rows}
    trials = [trial for _, _, trial in found.values() if trial is not None]
    tried = {name.partition(":")[0] for trial in trials for name in trial.adapters}
    untried = [name for name in ADAPTERS if name not in tried]
    words = {"found": found, "tried": tried, "untried": untried, "answer": answer}
    write_json(folder / "result.json", {"models": models} | about)
    _write(folder, title, sentences("target.txt.j2", **words), tables, drawn, strips, about)


def _write(
    folder: Path,
    title: str,
    said: list[str],
    tables: Tables,
    drawn: dict[str, Figure],
    strips: dict[str, list[tuple[str, np.ndarray]]],
    about: Mapping[str, Any],
) -> None:
    text = "\n\n".join(f"{name}\n{table.to_string()}" for name, table in tables.items())
    print("\n\n".join([title, text, *said]))
    write_text(folder / "table.txt", text + "\n")
    for name, figure in drawn.items():
        with atomic_write(folder / f"{name.replace('/', '-')}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    shown = {"tables": tables, "plots": drawn, "strips": strips, "sentences": said}
    made = {"settings": [about["settings"]], "abouts": [about["about"]]}
    write_text(folder / "report.html", render("diagnosis.html.j2", title=title, **shown, **made))
    print(f"\nresults: {folder / 'report.html'}")


def sentences(template: str, **found: Any) -> list[str]:
    """Fill in a template of sentences; each paragraph is one item."""
    paragraphs = render(template, listed=truncate, bounded=bounded, **found).split("\n\n")
    return [" ".join(text.split()) for text in paragraphs if text.strip()]


def bounded(share: float, bounds: Sequence[float], sign: str = "") -> str:
    """Format a share and its interval in per cent."""
    return "{} [{}, {}]".format(*(number(100 * value, sign=sign) for value in (share, *bounds)))


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


def diagnosis_tables(found: Diagnosis) -> Tables:
    """Metrics by model and by pair of models, as text."""
    models = {}
    for name, model in found.models.items():
        rows = {}
        for key, each in model.sets.items():
            rows[f"accuracy on {key} (%)"] = bounded(each.accuracy, each.interval)
            rows[f"kurtosis on {key}"] = entry(each.kurtosis)
        if model.shifted:
            gained = found.robustness.values.get(name)
            rows["mean accuracy on shifted sets (%)"] = percent(model.shifted.accuracy)
            rows["effective robustness (points)"] = signed(gained and 100 * gained)
            rows["mean kurtosis on shifted sets"] = entry(model.shifted.kurtosis)
        rows["sufficient fraction of directions"] = entry(model.sufficient_fraction)
        models[name] = rows | fields(model.base)
    tables = {"Models": pd.DataFrame(models)}
    pairs = {" / ".join(pair.models): fields(pair, "models") for pair in found.pairs}
    return tables | ({"Pairs of models": pd.DataFrame(pairs)} if pairs else {})


def check_tables(model: str, check: TargetCheck, trial: Summary | None) -> Tables:
    """Distribution shift, predictions and the trial of adapters, as text."""
    sets = {"target": check.target, "reference": check.reference}
    shares = {"predicted (%)": check.target.predicted}
    if check.labelled:
        shares |= {"labelled (%)": check.labelled.shares, "recall (%)": check.labelled.recall}
    shares["predicted on the reference (%)"] = check.reference.predicted
    classes = pd.DataFrame(shares, check.classes).iloc[check.commonest()]
    confused = {" / ".join(pair.classes): (pair.share, pair.margin) for pair in check.confused}
    heads = ["top two for (%)", "mean difference (points)"]
    tables = {
        f"Images in {model}'s embedding space": pd.DataFrame(
            {name: fields(each, "predicted") for name, each in sets.items()}
        ),
        f"Classes by {model}": classes.map(percent),
        f"Classes that {model} confuses": pd.DataFrame(confused, heads).map(percent).T,
    }
    if trial:
        seen = {each.adapter: each.top1[each.rows["seen"]] for each in trial.results}
        rows = {
            name: (
                bounded(right.mean(), accuracy_interval(right)),
                _gain(trial.means.loc[name]),
                percent(trial.means["ece"][name]),
            )
            for name, right in seen.items()
        }
        heads = ["accuracy (%)", "gain (points)", "calibration error (%)"]
        tables[f"Trial of adapters with {model}"] = pd.DataFrame(rows, heads).T
    return tables
