r"""Train a model on one task after another: what does it learn, and what does it forget?

    jaxtta continual --output runs/continual

trains the bundled demo model on textile defects, then on scikit-learn's digits, then on the digits'
negatives rotated by 90°, and measures CIFAR-10 accuracy after each task: on the five classes of the
reference images, and on the five others. All methods, three seeds, and all of CIFAR-10:

    jaxtta continual --output runs/cifar10 --seeds 1 2 3 \
        --reference folder=CIFAR10/train --retention folder=CIFAR10/test --reference-classes 5 \
        --methods fine-tuning distillation projection-before projection-after gnsp gnsp-after \
        wise-ft

experiments/gnsp_mtil.py is for the eleven MTIL sets. Your own task is NAME=FOLDER, a folder with
train/<class>/… and test/<class>/…. A run that was stopped resumes after the last finished task.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from jaxtta import assets, data, evaluate, io, metrics, models
from jaxtta.cli.options import group
from jaxtta.continual import VARIANTS, TrainingConfig
from jaxtta.evaluate.continual import WISE, WISE_TRAINING, Experiment, TaskData, run_sequence

MTIL_ORDERS = {
    "order-1": "fgvc-aircraft caltech101 cifar100 dtd eurosat oxford-flowers food101 mnist "
    "oxford-pets stanford-cars sun397",
    "order-2": "stanford-cars food101 mnist oxford-pets oxford-flowers sun397 fgvc-aircraft "
    "caltech101 dtd eurosat cifar100",
}
SMALL = ("textile", "digits", "turned-digits")
TEMPLATES = dict.fromkeys(SMALL[1:], "a photo of the digit {}.") | {
    "textile": "a photo of a textile with {}.",
    "mnist": 'a photo of the number: "{}".',  # CLIP's own prompt
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
METHODS = (*VARIANTS, WISE)
TUNING = 5  # every fifth training and retention image is for --validate


@group
class Options:
    """Train on one task after another."""

    output: Path  # folder for the results, or its URL (gs://, s3://)
    # in training order: order-1 or order-2 (the MTIL sets), names of MTIL sets, textile, digits,
    # turned-digits, or NAME=FOLDER
    tasks: tuple[str, ...] = ("textile", "digits", "turned-digits")
    data: str = "."  # folder that contains the MTIL sets
    model: str = str(assets.MODEL)  # a CLIP checkpoint's folder or hub id (default: the demo model)
    # fine-tuning, distillation (and alignment), projection-before, projection-after (of the
    # optimiser), gnsp, gnsp-after, wise-ft (fine-tuned and initial weights averaged)
    methods: tuple[str, ...] = ("fine-tuning", "gnsp")
    # reference images, as LAYOUT=FOLDER (captioned "a photo of a {class}.") or captions=FOLDER with
    # a captions.csv of columns file and caption (default: bundled images of five classes)
    reference: str | None = None
    reference_classes: int | None = None  # in the reference set (default: all; five of the bundled)
    # other images, given likewise, that measure retention, modality gap and retrieval (default:
    # bundled images with the bundled reference; with another, none, and the reference measures gap
    # and retrieval); if both have the same classes, those in the reference set and the others are
    # reported separately
    retention: str | None = None
    # to choose settings, measure on a fifth of the training images, held out from training, and on
    # the fifth of the retention images that is never used otherwise
    validate: bool = False
    seeds: tuple[int, ...] = (1,)  # of the order, the crops and the reference; each is a run
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig()
    trust_data: bool = False  # take earlier results without checking that the images are unchanged


def run(options: Options) -> None:
    """Run every method and report."""
    evaluate.require_distinct(methods=options.methods, seeds=options.seeds)
    if unknown := sorted({*options.methods} - {*METHODS}):
        raise ValueError(f"unknown method {unknown[0]!r}, expected one of {', '.join(METHODS)}")
    loaded = models.load_clip(options.model)
    names = [name for text in options.tasks for name in MTIL_ORDERS.get(text, "").split() or [text]]
    tasks = [open_task(name, options.data, options.validate) for name in names]
    retention, reference = open_reference(options)
    sets, content = (*tasks, *retention, reference), None
    if not options.trust_data:
        content = {each.name: [data.content_of(part) for part in each[2:] if part] for each in sets}
    experiments = [
        Experiment(*loaded, tasks, retention, reference, options.training, seed, content)
        for seed in options.seeds
    ]
    found, failed = [], []
    while experiments:  # each seed's reference images are freed
        experiment = experiments.pop(0)
        for name in dict.fromkeys(WISE_TRAINING if m == WISE else m for m in options.methods):
            try:
                found.append(run_sequence(experiment, name, options.output, model=options.model))
            except FloatingPointError as error:
                failed.append(str(error))
    if found:
        rows = pd.concat([each[each.method == m] for m in options.methods for each in found])
        named = rows, [task.name for task in tasks], [task.name for task in retention]
        text, where = table(*named), " on validation images" if options.validate else ""
        heading = f"accuracy in %{where} after the last task, mean over {rows.seed.nunique()} seeds"
        io.write_text(options.output / "table.txt", text + "\n")
        io.write_text(options.output / "results.csv", rows.to_csv(index=False))
        means = rows.pivot_table("value", "step", ["set", "method"])
        names = means.columns.unique(0)
        figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
            means[name].plot(ax=axes, title=name, xticks=means.index, legend=name == names[0])
        figure.savefig(options.output / "curves.png", dpi=150)
        print(f"{heading}\n\n{text}\n\nresults: {options.output}")
    if failed:
        raise FloatingPointError("; ".join(failed))


def open_task(name: str, root: str = ".", validate: bool = False) -> TaskData:
    """Open a task; with `validate`, part of the training images replaces the test images."""
    own, equals, folder = name.partition("=")
    if name in SMALL:
        images = textile() if name == "textile" else digits(turned=name == "turned-digits")
        tested = every_nth(images.labels, 4)
        train, test = (data.Subset(images, mask) for mask in (~tested, tested))
    elif not equals and name not in MTIL_ORDERS["order-1"].split():
        known = ", ".join((*MTIL_ORDERS, *MTIL_ORDERS["order-1"].split(), *SMALL))
        raise ValueError(f"unknown task {name!r}, expected NAME=FOLDER or one of {known}")
    else:
        layout = "tfds" if name in ("cifar100", "mnist") else "folder" if equals else name
        place = name if layout == "tfds" else root
        with io.error_context(f"the task {own}"):
            train, test = (
                data.open_dataset(layout, f"{folder}/{split}" if equals else place, split=split)
                for split in ("train", "test")
            )
    if train.class_names != test.class_names:
        odd = ", ".join(sorted({*train.class_names} ^ {*test.class_names}))
        raise ValueError(f"the task {own}: training and test classes or their order differ: {odd}")
    if validate:
        tuning = every_nth(train.labels, TUNING)
        train, test = (data.Subset(train, mask) for mask in (~tuning, tuning))
    return TaskData(own, TEMPLATES.get(name, *data.templates_for(name)), train, test)


def digits(turned: bool = False) -> data.ArrayDataset:
    """scikit-learn's digits, or their negatives rotated by 90°."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = (np.asarray(pixels).reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    if turned:
        grey = np.rot90(255 - grey, axes=(1, 2))
    images = np.repeat(grey[..., None], 3, axis=-1)
    return data.ArrayDataset(images, np.asarray(labels, np.int32), DIGITS, "digit")


def textile() -> data.Dataset:
    """Simulated textile images with a global, a local or no defect."""
    from conformal_clip_data import textile_simulated_root

    classes = "a large defect", "a small defect", "no defect"
    return data.open_dataset("folder", textile_simulated_root(), classes)


def every_nth(labels: np.ndarray, nth: int) -> np.ndarray:
    """Select the first of every `nth` images, class by class: (images,) bool."""
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[::nth]] = True
    return chosen


def open_reference(options: Options) -> tuple[list[TaskData], TaskData]:
    """The retention sets and the reference images."""
    if options.retention and options.retention == options.reference:
        raise ValueError(f"--retention is the same as --reference ({options.retention})")
    images, template = open_layout(options.reference or f"folder={assets.IMAGES}")
    count = options.reference_classes or (len(images.class_names) if options.reference else 5)
    if not 1 < count <= len(images.class_names):
        most = len(images.class_names)
        raise ValueError(f"--reference-classes is {count}, expected 2 to {most}")
    shown, measured, caption = images.labels < count, None, template
    if options.retention:
        measured, caption = open_layout(options.retention)
    elif not options.reference:  # a quarter of the reference's classes, all of the others
        unused = every_nth(images.labels, 4) | ~shown
        shown, measured = ~unused, data.Subset(images, unused)
    reference = TaskData("reference", template, None, data.Subset(images, shown))
    if measured is None:
        return [], reference
    masks = {"retention": every_nth(measured.labels, TUNING) == options.validate}
    if tuple(measured.class_names) == tuple(images.class_names):
        chosen, inside = masks.pop("retention"), measured.labels < count
        masks |= {"retention-inside": chosen & inside, "retention-outside": chosen & ~inside}
    return [
        TaskData(name, caption, None, data.Subset(measured, mask))
        for name, mask in masks.items()
        if mask.any()
    ], reference


def open_layout(text: str) -> tuple[data.Dataset, str]:
    """Open LAYOUT=FOLDER: the images and the template of their captions."""
    layout, _, root = text.partition("=")
    if layout == "captions":
        return data.captioned_folder(root), "{}"
    return data.open_dataset(layout, root), "a photo of a {}."


def table(rows: pd.DataFrame, tasks: list[str], retention: list[str]) -> str:
    """Table of methods by tasks and retention sets, after the last task.

    "last" is the mean over the tasks, "average" their mean over all steps. The kept share is
    (method − fine-tuning) / (start − fine-tuning), if fine-tuning was run, over the common seeds.
    """
    values = rows.pivot(index=["method", "seed", "step"], columns="set", values="value")
    start = values.xs(0, level="step").groupby(level=1).first()
    ends = pd.concat([pd.concat({"before": start}), values.xs(len(tasks), level="step")])
    ends["last"] = ends[tasks].mean(axis=1)
    for run, steps in values[tasks].groupby(level=[0, 1]):
        matrix = steps.to_numpy()[1:]
        ends.loc[run, ["average", "transfer"]] = metrics.average(matrix), metrics.transfer(matrix)
    groups = (100 * ends).groupby(level=0)
    means, deviations = groups.mean(), groups.std()
    shares = [f"share of {name}" for name in retention if WISE_TRAINING in means.index]
    if shares:
        worst = ends.loc[WISE_TRAINING].reindex(ends.index, level=1)
        kept, lost = ends - worst, ends.loc["before"].reindex(ends.index, level=1) - worst
        kept, lost = (part[retention].groupby(level=0).mean() for part in (kept, lost))
        means[shares] = kept / lost
    text = means.map("{:.2f}".format)
    text[deviations.columns] += deviations.map(" ± {:.2f}".format)
    text = text.replace(" ± nan", "", regex=True).replace("^(nan|-?inf)$", "–", regex=True)
    text[metrics.ALIGNMENT[0]] = (means[metrics.ALIGNMENT[0]] / 100).map("{:.3f}".format)
    columns = [*tasks, "last", "average", "transfer", *retention, *shares, *metrics.ALIGNMENT]
    text = text.loc[["before", *rows.method.unique()], columns]
    return text.rename_axis(index=None, columns="method").to_string()
