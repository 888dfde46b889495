r"""Train a model on one task after another: what does it learn, and what does it forget?

    jaxtta continual --output runs/continual

trains the bundled demo model on textile defects, then on scikit-learn's digits, then on the digits'
negatives rotated by 90°, and measures CIFAR-10 accuracy after each task: on the five classes of the
reference images, and on the five others. One table compares plain fine-tuning and GNSP. All
methods, three seeds, and all of CIFAR-10:

    jaxtta continual --output runs/cifar10 --seeds 1 2 3 \
        --reference folder=CIFAR10/train --retention folder=CIFAR10/test --reference-classes 5 \
        --methods fine-tuning distillation projection-before projection-after gnsp gnsp-after \
        wise-ft

With --validate, and another --output, the same on validation images, to choose ρ, learning rate and
iterations. The eleven MTIL sets in the paper's order and with the paper's settings, from the
folders that prompt-learning benchmarks use (CIFAR-100 and MNIST from tensorflow-datasets), with
ImageNet images as reference:

    jaxtta continual --model openai/clip-vit-base-patch16 --data DATA --tasks order-1 \
        --reference imagenet=IMAGENET/train --methods fine-tuning gnsp gnsp-after \
        --first-task all --no-task-zero --iterations 1000 --warmup 100 --learning-rate 1e-5 \
        --workers 8 --output runs/mtil

Your own task is NAME=FOLDER, with FOLDER/train/<class>/… and FOLDER/test/<class>/…. A run that was
stopped resumes after the last finished task.
"""

import functools
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from jaxtta import assets, data, evaluate, io, metrics, models
from jaxtta.cli.options import group
from jaxtta.continual import VARIANTS, TrainingConfig
from jaxtta.data.tasks import MTIL_ORDERS, TaskData, every_nth, open_task
from jaxtta.evaluate.continual import WISE, WISE_TRAINING, Experiment, run_sequence

TUNING = 5  # every fifth training and retention image is for --validate
METHODS = (*VARIANTS, WISE)


@group
class Options:
    """Train on one task after another.

    Attributes:
        output: folder for the results.
        tasks: tasks in training order: order-1 or order-2 (the MTIL sets), names of MTIL sets,
            textile, digits, turned-digits, or NAME=FOLDER.
        data: folder that contains the MTIL sets.
        model: folder or hub id of a CLIP checkpoint (default: the bundled demo model).
        methods: fine-tuning, distillation (and alignment), projection-before, projection-after (of
            the optimiser), gnsp, gnsp-after, wise-ft (fine-tuned and initial weights averaged).
        reference: reference images, as LAYOUT=FOLDER (captioned "a photo of a {class}.") or
            captions=FOLDER (with a captions.csv of columns file and caption). Default: bundled
            images of five CIFAR-10 classes.
        reference_classes: number of classes in the reference set (default: all; five of the bundled
            images).
        retention: images that measure retention, as LAYOUT=FOLDER or captions=FOLDER, different
            from the reference. If both have the same classes, classes in the reference set and the
            others are reported separately. A fifth of the images is used by --validate only.
            Modality gap and retrieval are measured on them, or on the reference if there are none.
            Default: none; bundled images with the bundled reference.
        validate: measure on a fifth of each task's training images, held out from training, and on
            the validation part of the retention images, to choose settings.
        seeds: seeds of the order, the crops and the reference; one run per seed.
        training: training settings.
        trust_data: take earlier results without checking that the images are unchanged.
        debug: show tracebacks.
    """

    output: Path
    tasks: tuple[str, ...] = ("textile", "digits", "turned-digits")
    data: str | None = None
    model: str = str(assets.MODEL)
    methods: tuple[str, ...] = ("fine-tuning", "gnsp")
    reference: str | None = None
    reference_classes: int | None = None
    retention: str | None = None
    validate: bool = False
    seeds: tuple[int, ...] = (1,)
    training: Annotated[TrainingConfig, tyro.conf.arg(name="")] = TrainingConfig()
    trust_data: bool = False
    debug: bool = False


def run(options: Options) -> None:
    """Run every method and report."""
    check(options)
    loaded = models.load_clip(options.model)
    tasks, (retention, reference) = open_tasks(options), open_reference(options)
    stored = {
        task.name: [data.content_of(images) for images in task[2:] if images is not None]
        for task in (*tasks, *retention, reference)
        if not options.trust_data
    }
    sets = *loaded, tasks, retention, reference
    prepare = functools.partial(Experiment, *sets, options.training, stored=stored)
    for seed in options.seeds:
        prepare(seed=seed)  # all are checked before training
    found, failed = [], []
    for seed in options.seeds:
        experiment = prepare(seed=seed)
        for name in dict.fromkeys(WISE_TRAINING if m == WISE else m for m in options.methods):
            try:
                found.append(run_sequence(experiment, name, options.output, model=options.model))
            except FloatingPointError as error:
                failed.append(str(error))
    if found:
        rows = pd.concat(found)
        rows = pd.concat([rows[rows.method == name] for name in options.methods])
        names = [task.name for task in tasks], [task.name for task in retention]
        write_report(options, rows, *names)
    if failed:
        raise FloatingPointError("; ".join(failed))


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    evaluate.require_distinct(tasks=options.tasks, methods=options.methods, seeds=options.seeds)
    evaluate.require_at_least(seeds=(min(options.seeds), 0))
    if options.retention and options.retention == options.reference:
        raise ValueError(f"--retention is the same as --reference ({options.retention})")
    for name in options.methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}, expected one of {', '.join(METHODS)}")


def open_tasks(options: Options) -> list[TaskData]:
    """Open the tasks; with --validate, part of the training images replaces the test images."""
    names = [name for given in options.tasks for name in MTIL_ORDERS.get(given, (given,))]
    tasks = [open_task(name, options.data) for name in names]
    for number, task in enumerate(tasks):
        if options.validate:
            tuning = every_nth(task.train.labels, TUNING)
            parts = (data.Subset(task.train, np.flatnonzero(mask)) for mask in (~tuning, tuning))
            tasks[number] = TaskData(task.name, task.template, *parts)
    return tasks


def open_reference(options: Options) -> tuple[list[TaskData], TaskData]:
    """The retention sets and the reference images."""
    bundled = options.reference is None
    given = f"folder={assets.IMAGES}" if bundled else options.reference
    images, template = open_layout("--reference", given)
    count = options.reference_classes
    if count is None:
        count = 5 if bundled else len(images.class_names)
    if not 1 < count <= len(images.class_names):
        expected = f"expected 2 to {len(images.class_names)}"
        raise ValueError(f"--reference-classes is {count}, {expected}")
    shown, retention = images.labels < count, None
    if options.retention:
        retention = open_layout("--retention", options.retention)
    elif bundled:  # a quarter of the reference's classes, all of the others
        measured = every_nth(images.labels, 4) | ~shown
        shown &= ~measured
        retention = data.Subset(images, np.flatnonzero(measured)), template
    reference = TaskData("reference", template, None, data.Subset(images, np.flatnonzero(shown)))
    if retention is None:
        return [], reference
    kept, template = retention
    kept = data.Subset(kept, np.flatnonzero(every_nth(kept.labels, TUNING) == options.validate))
    masks = {"retention": kept.labels >= 0}
    if tuple(kept.class_names) == tuple(images.class_names):
        inside = kept.labels < count
        masks = {"retention-inside": inside, "retention-outside": ~inside}
    return [
        TaskData(name, template, None, data.Subset(kept, np.flatnonzero(mask)))
        for name, mask in masks.items()
        if mask.any()
    ], reference


def open_layout(option: str, text: str) -> tuple[data.Dataset, str]:
    """Open LAYOUT=FOLDER: the images and the template of their captions."""
    layout, equals, root = text.partition("=")
    if not equals:
        raise ValueError(f"{option} is {text!r}, expected LAYOUT=FOLDER, such as folder=DATA/train")
    if layout == "captions":
        return data.captioned_folder(root), "{}"
    return data.open_dataset(layout, root), "a photo of a {}."


def write_report(
    options: Options, rows: pd.DataFrame, tasks: list[str], retention: list[str]
) -> None:
    """Print the table and draw the accuracy on every task; all results are in results.csv."""
    text = table(rows, tasks, retention)
    io.write_text(options.output / "table.txt", text + "\n")
    io.write_text(options.output / "results.csv", rows.to_csv(index=False))
    where = " on validation images" if options.validate else ""
    print(f"accuracy in %{where} after the last task, mean over {rows.seed.nunique()} seeds")
    print(f"\n{text}\n")
    heat_maps(rows, tasks, retention).savefig(options.output / "matrix.png", dpi=150)
    curves(rows, tasks, retention).savefig(options.output / "curves.png", dpi=150)
    print(f"results: {options.output}")


def table(rows: pd.DataFrame, tasks: list[str], retention: list[str]) -> str:
    """Table of methods by tasks and retention sets, after the last task.

    "last" is the mean over the tasks, "average" their mean over all steps. The kept share is
    (method − fine-tuning) / (start − fine-tuning), if fine-tuning was run.
    """
    start = rows[rows.step == 0].drop_duplicates(["seed", "set"]).assign(method="before")
    ends = pd.concat([start, rows[rows.step == len(tasks)]])
    order = ends.method.unique()
    ends = ends.pivot(index=["method", "seed"], columns="set", values="value")
    ends["last"] = ends[tasks].mean(axis=1)
    for run, steps in rows[rows.step > 0].groupby(["method", "seed"]):
        matrix = steps.pivot(index="step", columns="set", values="value")[tasks].to_numpy()
        ends.loc[run, "average"] = metrics.average(matrix)
        ends.loc[run, "transfer"] = metrics.transfer(matrix) if len(tasks) > 1 else np.nan
    whole = ["last", "average", *(["transfer"] if len(tasks) > 1 else [])]
    columns = {
        name: [spread(ends.loc[method, name]) for method in order]
        for name in (*tasks, *whole, *retention)
    }
    for name in retention if WISE_TRAINING in order else ():
        columns[f"share of {name}"] = [kept_share(ends[name], method) for method in order]
    gap, *recalls = metrics.ALIGNMENT
    columns[gap] = [f"{ends.loc[method, gap].mean():.3f}" for method in order]
    columns |= {name: [spread(ends.loc[method, name]) for method in order] for name in recalls}
    return pd.DataFrame(columns, order).rename_axis(columns="method").to_string()


def kept_share(accuracy: pd.Series, method: str) -> str:
    """Share of the accuracy lost by fine-tuning that a method keeps, over the common seeds."""
    seeds = accuracy[method].index.intersection(accuracy[WISE_TRAINING].index)
    means = [accuracy[name][seeds].mean() for name in ("before", method, WISE_TRAINING)]
    first, own, worst = means
    return f"{(own - worst) / (first - worst):.2f}" if len(seeds) and first != worst else "–"


def spread(values: pd.Series) -> str:
    """Mean in per cent, and the standard deviation over seeds; a dash for unknown values."""
    if values.isna().any():
        return "–"
    mean = f"{100 * values.mean():.2f}"
    return f"{mean} ± {100 * values.std():.2f}" if len(values) > 1 else mean


def heat_maps(rows: pd.DataFrame, tasks: list[str], retention: list[str]) -> Figure:
    """Accuracy on every task before the first and after each, one heat map per method."""
    columns, methods = [*tasks, *retention], rows.method.unique()
    size = (1.6 + 0.75 * len(columns)) * len(methods), 1.6 + 0.45 * (len(tasks) + 1)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(methods), squeeze=False)[0]
    for axes, method in zip(grid, methods, strict=True):
        runs = rows[rows.method == method]
        matrix = 100 * runs.pivot_table("value", "step", "set")[columns].to_numpy()
        axes.imshow(matrix, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value < 55 else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(method, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(tasks) + 1), ["before", *tasks], fontsize=8)
    grid[0].set_ylabel("after")
    return figure


def curves(rows: pd.DataFrame, tasks: list[str], retention: list[str]) -> Figure:
    """Accuracy on the retention sets and the modality gap, over the tasks."""
    gap, methods = metrics.ALIGNMENT[0], rows.method.unique()
    names = [*(retention or tasks[:1]), gap]
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(grid, names, strict=True):
        means = rows[rows.set == name].pivot_table("value", "step", "method")[methods]
        scale = 1 if name == gap else 100
        axes.plot(means.index, scale * means.to_numpy(), marker=".", label=methods)
        axes.set_title(name if name == gap else f"{name} (%)", fontsize=10)
        axes.set_xticks(range(len(tasks) + 1), ["before", *tasks], rotation=40, ha="right")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(frameon=False, fontsize=8)
    return figure
