"""Reports of a diagnosis or a field check: sentences, tables, plots and an HTML page."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from jaxtta import data, diagnose
from jaxtta.evaluate.factory import ADAPTERS
from jaxtta.evaluate.figures import EQUAL, NEIGHBOUR, SHOWN, Answers, Found
from jaxtta.images import printable
from jaxtta.io import atomic_write, write_csv, write_text
from jaxtta.report import html as page
from jaxtta.report import plots
from jaxtta.report.plots import COLOURS, GREY
from jaxtta.report.summary import NONE, aligned

Table = tuple[str, list[str], list[tuple[str, list[str]]]]
"""Heading, column headings and rows."""


class Report(NamedTuple):
    """The content of a report.

    Attributes:
        said: sentences.
        tables: tables in order.
        figures: heading, caption and plot, by file name.
        strips: heading, images with captions, and note.
        answers: rows of per-image answers, by file name.
    """

    said: list[str]
    tables: list[Table]
    figures: dict[str, tuple[str, str, Figure]]
    strips: list[tuple[str, list[tuple[str, np.ndarray]], str]]
    answers: dict[str, list[dict[str, str]]]


def diagnosis_report(found: Found, fractions: Sequence[float]) -> Report:
    """Make the report of a diagnosis.

    Args:
        found: metrics of models and of pairs of models, and effective robustness, from
            diagnose_model.py.
        fractions: the fractions of the head's directions that were kept.

    Returns:
        The report.
    """
    results, robustness = found["models"], found["robustness"]
    return Report(
        summary(results, robustness),
        diagnosis_tables(results, found["pairs"], robustness),
        diagnosis_figures(results, robustness, fractions),
        [],
        {},
    )


def field_report(
    results: Found,
    images: data.ImageFolder,
    answers: Mapping[str, Answers],
    entropies: Mapping[str, np.ndarray],
    tried: Mapping[str, str],
    trial: Sequence[str],
) -> Report:
    """Make the report of a field check.

    Args:
        results: metrics by model, from diagnose_model.py.
        images: the images that were checked.
        answers: by model, what it says of every image.
        entropies: by model, (reference images,) entropies of its predictions there in nats.
        tried: by model, the summary sentence of the trial of adapters.
        trial: the adapters in the trial.

    Returns:
        The report.
    """
    report = Report([], [], {}, [], {})
    for name, found in results.items():
        report.said.extend(expectations(name, found))
        if "trial" in found:
            steps = page.counted(found["steps"], "step")
            steps += f" of {page.counted(found['trial_batch'], 'image')}"
            report.said.append(f"Trial of adapters, {steps}: {tried[name]} {CAUTION}")
        report.tables.extend(field_tables(name, found))
        of_model = f"-{name}" if len(results) > 1 else ""
        both = {"field": answers[name].entropies, "reference": entropies[name]}
        figure = draw_predictions(found, both)
        report.figures[f"predictions{of_model}"] = (f"Predictions of {name}", PREDICTIONS, figure)
        rows = answer_rows(images, answers[name])
        report.answers[f"images{of_model}"] = rows
        shown = least_sure(images, answers[name], rows)
        note = LEAST_SURE.format(file=f"images{of_model}.csv".replace("/", "-"))
        report.strips.append((f"Images that {name} is least sure of", shown, note))
    had_trial = any("trial" in found for found in results.values())
    report.said.append(unmeasured(trial if had_trial else ()))
    return report


def answer_rows(images: data.ImageFolder, answers: Answers) -> list[dict[str, str]]:
    """Per-image answers as text: file (from the folder), class, confidence, entropy, distance."""
    names = images.class_names
    return [
        {
            "file": printable(images.files[number].relative_to(images.root)),
            "class": printable(names[label]),
            "confidence": f"{confidence:.4f}",
            "entropy": f"{entropy:.4f}",
            "distance": f"{distance:.4f}",
        }
        for number, label, confidence, entropy, distance in zip(*answers, strict=True)
    ]


def least_sure(
    images: data.ImageFolder, answers: Answers, rows: Sequence[dict[str, str]]
) -> list[tuple[str, np.ndarray]]:
    """Small copies of the images with the highest entropies, with captions."""
    shown = []
    for place in answers.least_sure(UNSURE):
        small, row = images.open(int(answers.numbers[place])).convert("RGB"), rows[place]
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        said = f"{row['class']} {per_cent(float(answers.confidences[place]), '.0f')} %"
        shown.append((f"{row['file']}: {said}", np.asarray(small)))
    return shown


# --- words ---

UNSURE, THUMBNAIL = 12, 160  # images in the strip of a model, and pixels of their longer side
LEAST_SURE = (
    "The highest entropies first, each with the class that the model predicts and its probability. "
    "{file} has the answers to all images: confidence is that probability, entropy in nats, and "
    "distance the Euclidean distance of the features, of unit norm, from those of the "
    f"{NEIGHBOUR}th nearest image of the reference."
)
CHANCE = 0.05  # significance level
CAUTION = (
    "Predictions are made before the update. The best adapter was selected on the images that its "
    "gain is measured on, so expect a smaller gain on other images; other orders and batch sizes "
    "may change it too."
)


def per_cent(value: float | None, digits: str = ".2f") -> str:
    """Format a fraction in per cent."""
    return NONE if value is None else format(round(100 * value, 9) + 0, digits).replace("-", "−")


def bounded(value: float, bounds: Sequence[float] | None, digits: str = ".2f") -> str:
    """Format a fraction and its interval in per cent."""
    return f"{per_cent(value, digits)} [{', '.join(per_cent(b, digits) for b in bounds or ())}]"


def some(items: Sequence[Any], count: int = 5) -> str:
    """List the first items, and their number if there are more."""
    more = f" … ({len(items)})" if len(items) > count else ""
    return ", ".join(map(str, items[:count])) + more or "none"


def left_out(sets: Sequence[Found]) -> list[str]:
    """A sentence about unreadable images, if there are any."""
    lost = [name for figures in sets for name in figures["lost"]]
    images = page.counted(len(lost), "image")
    return [f"{images} could not be read: {some(lost)}."] if lost else []


def summary(results: Found, robustness: Found) -> list[str]:
    """Sentences that summarise a diagnosis."""
    said = []
    for name, found in results.items():
        (base, first), *shifts = found["sets"].items()
        text = f"{name} has an accuracy of {per_cent(first['accuracy'])} % on {base}"
        if shifts:
            worst, figures = min(shifts, key=lambda item: item[1]["accuracy"])
            if len(shifts) > 1:
                text += f", {per_cent(found['shifted_accuracy'])} % on the mean of {len(shifts)} "
                text += "shifted sets"
            text += f" and {per_cent(figures['accuracy'])} % on the worst shift, {worst}"
        axes, directions = found["outlier_axes"], len(found["importance"])
        stick = f"the outlier dimensions are {some(axes)}" if axes else "no outlier dimensions"
        least = {None: "none keeps", 1: "only all keep"}.get(
            found["enough"], f"{per_cent(found['enough'], 'g')} % is the smallest that keeps"
        )
        said.append(
            f"{text}. The kurtosis of its features is {first['kurtosis']:.2f} (Gaussian: 3); "
            f"{stick}. Of the fractions tried of the head's "
            f"{directions} directions, {least} its accuracy on {base} within "
            f"{per_cent(EQUAL, 'g')} point."
        )
        said += left_out([*found["sets"].values()])
    if "reason" in robustness:
        said.append(f"Effective robustness was not computed: {robustness['reason']}.")
    said.append(
        "Not measured: other shifts and severities, calibration, and whether any of these metrics "
        "predicts accuracy on other images."
    )
    return said


def expectations(name: str, found: Found) -> list[str]:
    """What to expect of a model on the images of the field check."""
    field, reference, classes = found["field"], found["reference"], found["classes"]
    place, p = f"the reference, {reference['name']}", f"p = {field['p_value']:.3f}"
    if field["p_value"] > CHANCE:
        apart = f"do not differ significantly from {place} ({p}), which is no proof of equality"
    else:
        times = field["discrepancy"] / field["chance"]
        apart = (
            f"differ from {place} ({p}; squared MMD {times:.1f} times the 95 % quantile under the "
            "null hypothesis): accuracies known for the reference may not hold here"
        )
    commonest = int(np.argmax(field["predicted"]))
    never = [c for c, share in zip(classes, field["predicted"], strict=True) if not share]
    text = f"For {name} these images {apart}. It predicts “{classes[commonest]}” for "
    text += f"{per_cent(field['predicted'][commonest], '.0f')} % of them"
    text += f", never {some([f'“{c}”' for c in never])}" if never else ""
    guess, sure = (per_cent(x, ".0f") for x in (1 / len(classes), field["confidence"]))
    said = [f"{text}, with a mean confidence of {sure} % (guessing: {guess} %)."]
    said += left_out([field, reference])
    if "accuracy" in found:
        (low, high), most = found["interval"], max(found["labelled"])
        than = "better" if low > most else "worse" if high < most else "not clearly better"
        said.append(
            f"Unadapted it has an accuracy of {bounded(found['accuracy'], found['interval'])} % on "
            f"{page.counted(found['labels'], 'labelled image')}, {than} than the majority-class "
            f"baseline ({per_cent(most)} %)."
        )
    return said


def unmeasured(trial: Sequence[str]) -> str:
    """What a field check does not measure; without labels no adapters are tried."""
    missing = ["whether later images will look like these", "other prompts"]
    if trial:
        tried = {name.partition("@")[0] for name in trial}
        others = [name for name in ADAPTERS if name not in tried]
        missing.append("other learning rates")
        missing += [f"the adapters {', '.join(others)}"] if others else []
    else:
        missing.insert(0, "accuracy, and whether an adapter helps (both need labels)")
    return f"Not measured: {'; '.join(missing)}."


# --- tables and plots ---


def diagnosis_tables(results: Found, pairs: list[Found], robustness: Found) -> list[Table]:
    """Metrics by model and by pair of models."""
    values = robustness.get("values", {})
    columns = []
    for name, found in results.items():
        sets, shifted = found["sets"], found["shifted_accuracy"] is not None
        rows = {
            f"accuracy on {s} (%)": bounded(x["accuracy"], x["interval"]) for s, x in sets.items()
        }
        if shifted:
            rows["mean of shifted sets (%)"] = per_cent(found["shifted_accuracy"])
            rows["effective robustness (points)"] = per_cent(values.get(name), "+.2f")
        rows[f"kurtosis on {next(iter(sets))}"] = f"{found['base_kurtosis']:.2f}"
        if shifted:
            rows["kurtosis, mean of shifted sets"] = f"{found['shifted_kurtosis']:.2f}"
        columns.append(
            rows
            | {
                "outlier axes": some(found["outlier_axes"]),
                "directions of the head": str(len(found["importance"])),
                "spread of their importance": f"{found['spread']:.2f}",
                "top direction": ", ".join(
                    f"{axis} ({weight:+.2f})".replace("-", "−")
                    for axis, weight in found["top_direction"]
                ),
                "top direction on outlier axes (chance)": NONE
                if found["overlap"] is None
                else f"{found['overlap'][0]:.2f} ({found['chance_overlap']:.3f})",
                "directions needed (%)": per_cent(found["enough"], "g"),
                "modality gap": f"{found['modality_gap']:.3f}",
                "classes detected": f"{len(found['encoded'])} of {len(found['concepts'])}",
                "most classes by one direction": str(found["most_concepts_per_direction"]),
            }
        )
    tables = [("Models", [*results], by_row(columns))]
    if pairs:
        columns = [
            {
                "linear CKA": f"{pair['cka']:.3f}",
                "classes both detect": str(len(pair["shared"])),
                "only the first": some(pair["unique"][0]),
                "only the second": some(pair["unique"][1]),
            }
            for pair in pairs
        ]
        heads = [" / ".join(pair["models"]) for pair in pairs]
        tables.append(("Pairs of models", heads, by_row(columns)))
    return tables


def by_row(columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Transpose columns with the same keys to rows."""
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def field_tables(name: str, found: Found) -> list[Table]:
    """Distribution shift, predictions and the trial of adapters."""
    field, reference = found["field"], found["reference"]
    uniform = np.log(len(found["classes"]))
    columns = [
        {
            "images": str(each["images"]),
            "squared MMD to half the reference": f"{each['discrepancy']:.4f}".replace("-", "−"),
            "95 % quantile under the null": f"{each['chance']:.4f}",
            "p-value": f"{each['p_value']:.3f}",
            "kurtosis": f"{each['kurtosis']:.2f}",
            "outlier axes": some(each["outlier_axes"]),
            "mean entropy (nats)": f"{each['entropy']:.3f} of {uniform:.3f}",
            "mean confidence (%)": per_cent(each["confidence"]),
        }
        for each in (field, reference)
    ]
    tables = [(f"Images in {name}'s embedding space", ["field", "reference"], by_row(columns))]
    shares = {"predicted (%)": field["predicted"]}
    if "labelled" in found:
        shares |= {"labelled (%)": found["labelled"], "recall (%)": found["recall"]}
    shares["predicted on the reference (%)"] = reference["predicted"]
    rows = [
        (found["classes"][label], [per_cent(column[label]) for column in shares.values()])
        for label in commonest_first(found)
    ]
    tables.append((f"Classes by {name}", [*shares], rows))
    rows = [
        (" / ".join(pair["classes"]), [per_cent(pair["share"]), per_cent(pair["margin"])])
        for pair in found["confused"]
    ]
    heads = ["top two for (%)", "mean difference (points)"]
    tables.append((f"Classes that {name} confuses", heads, rows))
    rows = []
    for cell in found.get("trial", ()):
        gain = cell["gain"]
        gained = bounded(gain["top1"], gain["interval"], "+.2f") if gain else NONE
        right = bounded(cell["top1"], cell["interval"])
        rows.append((cell["adapter"], [right, gained, per_cent(cell["ece"])]))
    heads = ["accuracy (%)", "gain (points)", "calibration error (%)"]
    return [*tables, (f"Trial of adapters with {name}", heads, rows)] if rows else tables


def commonest_first(found: Found) -> list[int]:
    """The classes by how often they are predicted."""
    return np.argsort(-np.asarray(found["field"]["predicted"]), kind="stable")[:SHOWN].tolist()


CAPTIONS = {
    "kurtosis": (
        "Activation kurtosis",
        "Mean over images of the fourth standardised moment of their features' entries. Dashed: "
        "3, the value for Gaussian entries. Outlier dimensions increase it.",
    ),
    "importance": (
        "Importance of the head's directions",
        "Singular value times mean |cosine| with the features of the base set, over its mean.",
    ),
    "pruning": (
        "Accuracy by fraction of directions kept",
        "Top-1 accuracy with only the head's most important directions, ranked on the base set; at "
        "least one. Lines: base set; dots: mean of the shifted sets, each with its own head.",
    ),
    "robustness": (
        "Effective robustness",
        "Both axes have a logit scale. The line is fitted to the reference models in grey; the "
        "height above it is the effective robustness.",
    ),
}
PREDICTIONS = (
    "Left: entropy of each image's prediction, with the same prompts for the reference. Right: "
    "how often each class is predicted."
)


def diagnosis_figures(results: Found, robustness: Found, fractions: Sequence[float]) -> Found:
    """The plots of a diagnosis, with headings and captions."""
    sets, order = [*next(iter(results.values()))["sets"]], np.argsort(fractions)
    wide = np.clip(0.4 * len(sets) * len(results) + 2, 6, 12)
    drawn = {
        name: Figure(figsize=(width, 4.2), layout="constrained")
        for name, width in (("kurtosis", wide), ("importance", 6), ("pruning", 6))
    }
    kurtosis, importance, pruning = (figure.subplots() for figure in drawn.values())
    places, width = np.arange(len(sets)), 0.8 / len(results)
    styles = plots.styles([{"adapter": name} for name in results], "")
    for number, (name, found) in enumerate(results.items()):
        colour, dashes = styles[name]
        look: dict[str, Any] = {"color": colour, "linestyle": dashes, "label": plots.label(name)}
        offset = (number - (len(results) - 1) / 2) * width
        heights = [found["sets"][each]["kurtosis"] for each in sets]
        kurtosis.bar(places + offset, heights, width, color=colour, label=plots.label(name))
        spectrum = np.asarray(found["importance"])
        importance.plot(1 + np.arange(len(spectrum)), spectrum / spectrum.mean(), **look)
        kept = 100 * np.asarray(fractions)[order]
        pruning.plot(kept, 100 * np.asarray(found["base_pruned"])[order], **look)
        if found["shifted_pruned"] is not None:
            pruning.plot(kept, 100 * np.asarray(found["shifted_pruned"])[order], ".", color=colour)
    for axes, level in ((kurtosis, 3), (importance, 1)):
        axes.axhline(level, color="black", linestyle="--", linewidth=1)
    kurtosis.set_xticks(places, map(plots.label, sets), rotation=40, ha="right")
    kurtosis.margins(y=0.15)
    pruning.set_ylim(0, 100)
    plots.finish(kurtosis, "", "kurtosis of the features")
    plots.finish(importance, "rank of the direction", "importance / mean")
    plots.finish(pruning, "directions kept (%)", "top-1 accuracy (%)")
    if "line" in robustness:
        drawn["robustness"] = draw_robustness(results, robustness, styles)
    return {name: (*CAPTIONS[name], figure) for name, figure in drawn.items()}


def draw_robustness(results: Found, robustness: Found, styles: Found) -> Figure:
    """Draw shifted accuracy over base accuracy, with the reference line."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes, points = figure.subplots(), np.asarray(robustness["points"])
    pairs = [(found["base_accuracy"], found["shifted_accuracy"]) for found in results.values()]
    axes.plot(*points.T, "o", color=GREY, markersize=9, alpha=0.5, label="reference")
    bases = np.concatenate([points, pairs])[:, 0]
    ends = np.linspace(bases.min(), bases.max(), 50)
    axes.plot(ends, diagnose.LogitLinearBaseline(**robustness["line"]).predict(ends), color=GREY)
    for name, pair in zip(results, pairs, strict=True):
        axes.plot(*pair, "D", color=styles[name][0], markersize=5, label=plots.label(name))
    axes.set(xscale="logit", yscale="logit")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(PercentFormatter(1))
        axis.set_minor_locator(NullLocator())
    plots.finish(axes, "accuracy on the base set", "mean on shifted sets", grid="both")
    return figure


def draw_predictions(found: Found, entropies: dict[str, np.ndarray]) -> Figure:
    """Draw entropies and how often each class is predicted."""
    figure, shown = Figure(figsize=(9, 4.2), layout="constrained"), commonest_first(found)
    left, right = figure.subplots(1, 2)
    bins = np.linspace(0, np.log(len(found["classes"])), 31)
    for (key, values), colour in zip(entropies.items(), (COLOURS[0], GREY), strict=True):
        weights = np.full(len(values), 100 / len(values))
        values = np.clip(values, bins[0], bins[-1])  # rounding may exceed the range
        left.hist(values, bins, weights=weights, color=colour, alpha=0.6, label=key)
    columns = {"predicted": found["field"]["predicted"]}
    columns |= {"labelled": found["labelled"]} if "labelled" in found else {}
    width = 0.8 / len(columns)
    for number, (label, values) in enumerate(columns.items()):
        places = np.arange(len(shown)) + (number - (len(columns) - 1) / 2) * width
        heights = 100 * np.asarray(values)[shown]
        right.barh(places, heights, width, color=COLOURS[number], label=label)
    right.set_yticks(range(len(shown)), [plots.label(found["classes"][label]) for label in shown])
    right.invert_yaxis()
    plots.finish(left, "entropy of a prediction (nats)", "images (%)")
    plots.finish(right, "images (%)", "", grid="x")
    return figure


# --- files ---


def write_diagnosis(folder: Path, title: str, report: Report, found: Found) -> None:
    """Print sentences and tables, and write table, plots and HTML page to a folder.

    Args:
        folder: an existing folder.
        title: the title.
        report: the content.
        found: has the settings, versions and device.
    """
    text = "\n\n".join(as_text(*table) for table in report.tables)
    write_text(folder / "table.txt", text + "\n")
    print("\n\n".join([title, text, *report.said]))
    body = ['<div class="answer">', *(f"<p>{escape(text)}</p>" for text in report.said), "</div>"]
    body += [page.plain_table(*table) for table in report.tables]
    for name, (heading, caption, figure) in report.figures.items():
        with atomic_write(folder / f"{name.replace('/', '-')}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        body.append(page.plot(heading, caption, figure))
    body += [page.strip(*strip) for strip in report.strips]
    for name, rows in report.answers.items():
        write_csv(folder / f"{name.replace('/', '-')}.csv", rows)
    tried = [cell for each in found["models"].values() for cell in each.get("trial", ())]
    end = [page.how_to_repeat([found, *tried]), page.settings_list([found])]
    text = page.document(title, [*body, *end])
    write_text(folder / "report.html", text)
    print(f"\nresults: {folder / 'report.html'}")


def as_text(heading: str, heads: list[str], rows: list[tuple[str, list[str]]]) -> str:
    """Format a table as aligned text."""
    lines = [[heading, *heads], *([name, *texts] for name, texts in rows)]
    rule = ["-" * max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(aligned([lines[0], rule, *lines[1:]]))
