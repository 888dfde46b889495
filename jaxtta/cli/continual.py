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
iterations. experiments/gnsp_mtil.py has the command for the eleven MTIL sets. Your own task is
NAME=FOLDER, with FOLDER/train/<class>/… and FOLDER/test/<class>/…. A run that was stopped resumes
after the last finished task.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

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


@dataclasses.dataclass(frozen=True)
class TrainingOptions(TrainingConfig):
    """Training."""

    def __post_init__(self) -> None:
        """Validate the settings; messages name the options."""
        try:
            super().__post_init__()
        except ValueError as error:
            name, _, rest = str(error).partition(" ")
            raise ValueError(f"--{name.replace('_', '-')} {rest}") from error


@group
class Options:
    """Train on one task after another.

    Attributes:
        output: folder for the results.
        tasks: in training order: order-1 or order-2 (the MTIL sets), names of MTIL sets, textile,
            digits, turned-digits, or NAME=FOLDER.
        data: folder that contains the MTIL sets.
        model: folder or hub id of a CLIP checkpoint (default: the bundled demo model).
        methods: fine-tuning, distillation (and alignment), projection-before, projection-after (of
            the optimiser), gnsp, gnsp-after, wise-ft (fine-tuned and initial weights averaged).
        reference: reference images, as LAYOUT=FOLDER (captioned "a photo of a {class}.") or
            captions=FOLDER, with a captions.csv of columns file and caption (default: bundled
            images of five CIFAR-10 classes).
        reference_classes: number of classes in the reference set (default: all; five of the bundled
            images).
        retention: other images, given likewise, that measure retention, modality gap and retrieval
            (default: bundled images with the bundled reference; with another, none, and the
            reference measures gap and retrieval). If both have the same classes, those in the
            reference set and the others are reported separately. A fifth of the images is used by
            --validate only.
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
    training: Annotated[TrainingOptions, tyro.conf.arg(name="")] = TrainingOptions()
    trust_data: bool = False
    debug: bool = False


def run(options: Options) -> None:
    """Run every method and report."""
    check(options)
    loaded = models.load_clip(options.model)
    tasks, (retention, reference) = open_tasks(options), open_reference(options)
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
        rows = pd.concat(found)
        rows = pd.concat([rows.query("method == @name") for name in options.methods])
        named = rows, [task.name for task in tasks], [task.name for task in retention]
        where = " on validation images" if options.validate else ""
        heading = f"accuracy in %{where} after the last task, mean over {rows.seed.nunique()} seeds"
        text = table(*named)
        io.write_text(options.output / "table.txt", text + "\n")
        io.write_text(options.output / "results.csv", rows.to_csv(index=False))
        for name, figure in zip(("matrix", "curves"), draw(*named), strict=True):
            figure.savefig(options.output / f"{name}.png", dpi=150)
        print(f"{heading}\n\n{text}\n\nresults: {options.output}")
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
        if options.validate and task.train is not None:
            tuning = every_nth(task.train.labels, TUNING)
            parts = (data.Subset(task.train, np.flatnonzero(mask)) for mask in (~tuning, tuning))
            tasks[number] = TaskData(task.name, task.template, *parts)
    return tasks


def open_reference(options: Options) -> tuple[list[TaskData], TaskData]:
    """The retention sets and the reference images."""
    bundled = options.reference is None
    given = options.reference or f"folder={assets.IMAGES}"
    images, template = open_layout("--reference", given)
    count = options.reference_classes
    if count is None:
        count = 5 if bundled else len(images.class_names)
    most = len(images.class_names)
    if not 1 < count <= most:
        raise ValueError(f"--reference-classes is {count}, expected 2 to {most}")
    shown, measured = images.labels < count, None
    if options.retention:
        measured, caption = open_layout("--retention", options.retention)
    elif bundled:  # a quarter of the reference's classes, all of the others
        unused = every_nth(images.labels, 4) | ~shown
        shown, measured, caption = ~unused, data.Subset(images, np.flatnonzero(unused)), template
    reference = TaskData("reference", template, None, data.Subset(images, np.flatnonzero(shown)))
    if measured is None:
        return [], reference
    chosen = every_nth(measured.labels, TUNING) == options.validate
    masks = {"retention": chosen}
    if tuple(measured.class_names) == tuple(images.class_names):
        inside = measured.labels < count
        masks = {"retention-inside": chosen & inside, "retention-outside": chosen & ~inside}
    return [
        TaskData(name, caption, None, data.Subset(measured, np.flatnonzero(mask)))
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


def table(rows: pd.DataFrame, tasks: list[str], retention: list[str]) -> str:
    """Table of methods by tasks and retention sets, after the last task.

    "last" is the mean over the tasks, "average" their mean over all steps. The kept share is
    (method − fine-tuning) / (start − fine-tuning), if fine-tuning was run, over the common seeds.
    """
    start = rows.query("step == 0").drop_duplicates(["seed", "set"]).assign(method="before")
    ends = pd.concat([start, rows[rows.step == len(tasks)]])
    methods, gap = ends.method.unique(), metrics.ALIGNMENT[0]
    ends = 100 * ends.pivot(index=["method", "seed"], columns="set", values="value")
    ends["last"] = ends[tasks].mean(axis=1)
    for run, steps in rows[rows.step > 0].groupby(["method", "seed"]):
        matrix = steps.pivot(index="step", columns="set", values="value")[tasks].to_numpy()
        ends.loc[run, "average"] = 100 * metrics.average(matrix)
        ends.loc[run, "transfer"] = 100 * metrics.transfer(matrix)
    means, deviations = (getattr(ends.groupby(level=0), how)() for how in ("mean", "std"))
    text = means.map("{:.2f}".format) + deviations.map(" ± {:.2f}".format)
    text = text.map(lambda cell: cell.removesuffix(" ± nan").replace("nan", "–"))
    text[gap] = (means[gap] / 100).map("{:.3f}".format)
    shares = [f"share of {name}" for name in retention if WISE_TRAINING in methods]
    for method in methods if shares else ():
        seeds = ends.loc[method].index.intersection(ends.loc[WISE_TRAINING].index)
        first, own, worst = (
            ends.loc[name].loc[seeds, retention].mean()
            for name in ("before", method, WISE_TRAINING)
        )
        kept: Any = (own - worst) / (first - worst)
        kept = kept.map("{:.2f}".format)
        text.loc[method, shares] = kept.replace(["nan", "inf", "-inf"], "–").to_numpy()
    columns = [*tasks, "last", "average", *(["transfer"] if len(tasks) > 1 else [])]
    columns += [*retention, *shares, *metrics.ALIGNMENT]
    return text.loc[methods, columns].rename_axis(index=None, columns="method").to_string()


def draw(rows: pd.DataFrame, tasks: list[str], retention: list[str]) -> tuple[Figure, Figure]:
    """Heat maps of the accuracy before the first task and after each, and curves over the tasks."""
    methods, gap, size = rows.method.unique(), metrics.ALIGNMENT[0], len(tasks) + 1
    columns, names = [*tasks, *retention], [*(retention or tasks[:1]), gap]
    width, height = (1.6 + 0.75 * len(columns)) * len(methods), 1.6 + 0.45 * size
    maps = Figure(figsize=(width, height), layout="constrained")
    curves = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    grid = maps.subplots(1, len(methods), squeeze=False)[0]
    for axes, method in zip(grid, methods, strict=True):
        runs = rows[rows.method == method]
        matrix = 100 * runs.pivot_table("value", "step", "set")[columns].to_numpy()
        axes.imshow(matrix, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value < 55 else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(method, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(size), ["before", *tasks], fontsize=8)
    grid[0].set_ylabel("after")
    grid = curves.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(grid, names, strict=True):
        means = rows[rows.set == name].pivot_table("value", "step", "method")[methods].to_numpy()
        axes.plot(means if name == gap else 100 * means, marker=".", label=methods)
        axes.set_title(name if name == gap else f"{name} (%)", fontsize=10)
        axes.set_xticks(range(size), ["before", *tasks], rotation=40, ha="right")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(frameon=False, fontsize=8)
    return maps, curves
