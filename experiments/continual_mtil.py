r"""Train a model on one task after another: what does it learn, and what does it forget?

    python experiments/continual_mtil.py --output runs/continual

trains the bundled demo model on textile defects, then on scikit-learn's digits, then on the digits'
negatives rotated by 90°, and measures CIFAR-10 accuracy after each task: on the five classes of the
reference images, and on the five others. One table compares plain fine-tuning and GNSP. All
methods, three seeds, and all of CIFAR-10:

    python experiments/continual_mtil.py --output runs/cifar10 --seeds 1 2 3 \
        --reference folder=CIFAR10/train --kept folder=CIFAR10/test --reference-classes 5 \
        --methods fine-tuning distillation projection-before projection-after gnsp gnsp-after \
        wise-ft

With --validate, and another --output, the same on validation images, to choose ρ, learning rate and
iterations. The eleven MTIL sets in the paper's order and with the paper's settings, from the
folders that prompt-learning benchmarks use (CIFAR-100 and MNIST from tensorflow-datasets), with
ImageNet images as reference:

    python experiments/continual_mtil.py --model openai/clip-vit-base-patch16 --data DATA \
        --tasks order-1 --reference imagenet=IMAGENET/train --output runs/mtil \
        --methods fine-tuning gnsp gnsp-after --first-task all --no-task-zero \
        --iterations 1000 --warmup 100 --learning-rate 1e-5

Your own task is NAME=FOLDER, with FOLDER/train/<class>/… and FOLDER/test/<class>/…. An interrupted
run resumes after the last finished task.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtta.data.memory import Part, every
from matplotlib.figure import Figure

import jaxtta
from jaxtta import assets, cli, data, evaluate, io, report
from jaxtta.data.tasks import ORDERS, TaskData, in_memory, open_task
from jaxtta.evaluate.continual import FIGURES
from jaxtta.models.preprocess import Preprocessing

TUNING = 5  # every fifth training and retention image is for --validate


@dataclasses.dataclass(frozen=True)
class Options:
    """Train on one task after another."""

    output: Path
    """Folder for the results; created if missing."""
    tasks: tuple[str, ...] = ("textile", "digits", "turned-digits")
    """Tasks in training order: order-1 or order-2 (the MTIL sets), names of MTIL sets, textile,
    digits, turned-digits, or NAME=FOLDER."""
    data: str | None = None
    """Folder that contains the MTIL sets."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP checkpoint (default: the bundled demo model)."""
    methods: tuple[str, ...] = ("fine-tuning", "gnsp")
    """fine-tuning, distillation (and alignment), projection-before, projection-after (of the
    optimiser), gnsp, gnsp-after, wise-ft (fine-tuned and initial weights averaged)."""
    reference: str | None = None
    """Reference images, as LAYOUT=FOLDER (captioned "a photo of a {class}.") or captions=FOLDER
    (with a captions.csv of columns file and caption). Default: bundled images of five CIFAR-10
    classes."""
    reference_classes: int | None = None
    """Number of classes in the reference set. Default: all; five of the bundled images."""
    kept: str | None = None
    """Images that measure retention, as LAYOUT=FOLDER or captions=FOLDER, different from the
    reference. If both have the same classes, classes in the reference set and the others are
    reported separately. A fifth of the images is used by --validate only. Modality gap and
    retrieval are measured on them, or on the reference if there are none. Default: none; bundled
    images with the bundled reference."""
    validate: bool = False
    """Measure on a fifth of each task's training images, held out from training, and on the
    validation part of the retention images, to choose settings."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the order, the crops and the reference; one run per seed."""
    course: Annotated[evaluate.Course, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: evaluate.Course(workers=1)
    )
    """Training settings."""
    debug: bool = False
    """Show tracebacks."""


def main(options: Options) -> None:
    """Run every method and report."""
    check(options)
    model, params = jaxtta.models.load_clip(options.model)
    tasks = open_tasks(options, model)
    kept, reference = open_reference(options, model)
    *both, reference = in_memory([*tasks, *kept, reference])
    tasks, kept = both[: len(tasks)], both[len(tasks) :]
    notes = {"model": options.model, "validate": options.validate}
    bench = evaluate.Bench(
        options.course, model, params, tasks, kept, reference, options.output, notes
    )
    results, failed = evaluate.teach(bench, options.methods, options.seeds)
    if results:
        write_results(options, [task.name for task in tasks], [task.name for task in kept], results)
    if failed:
        raise FloatingPointError("; ".join(failed))


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    evaluate.require_distinct(tasks=options.tasks, methods=options.methods, seeds=options.seeds)
    evaluate.require_at_least(seeds=(min(options.seeds), 0))
    evaluate.check_course(options.course)
    if options.kept and options.kept == options.reference:
        raise ValueError(f"--kept is the same as --reference ({options.kept})")
    evaluate.check_methods(options.methods)


# --- images ---


def task_names(options: Options) -> list[str]:
    """The tasks one by one."""
    return [name for given in options.tasks for name in ORDERS.get(given, (given,))]


def open_tasks(options: Options, model: jaxtta.models.CLIP) -> list[TaskData]:
    """Open the tasks; with --validate, part of the training images replaces the test images."""
    tasks = [open_task(name, options.data, model.preprocessing) for name in task_names(options)]
    if not options.validate:
        return tasks
    masks = [every(task.train.labels, TUNING) for task in tasks]
    return [
        task._replace(
            train=Part(task.train, np.flatnonzero(~mask)),
            test=Part(task.train, np.flatnonzero(mask)),
        )
        for task, mask in zip(tasks, masks, strict=True)
    ]


def open_reference(options: Options, model: jaxtta.models.CLIP) -> tuple[list[TaskData], TaskData]:
    """The retention sets and the reference images."""
    prepare, bundled = model.preprocessing, options.reference is None
    given = f"folder={assets.IMAGES}" if bundled else options.reference
    source, template = open_layout("--reference", given, prepare)
    names, labels = source.class_names, source.labels
    count = options.reference_classes
    if count is None:
        count = 5 if bundled else len(names)
    if not 1 < count <= len(names):
        raise ValueError(f"--reference-classes is {count}, expected 2 to {len(names)}")
    shown, kept = labels < count, None
    if options.kept:
        kept, kept_template = open_layout("--kept", options.kept, prepare)
    elif bundled:  # a quarter of the reference's classes, all of the others
        measured = every(labels, 4) | ~shown
        shown = ~measured
        kept, kept_template = Part(source, np.flatnonzero(measured)), template
    reference = TaskData("reference", template, None, Part(source, np.flatnonzero(shown)))
    if kept is None:
        return [], reference
    kept = Part(kept, np.flatnonzero(every(kept.labels, TUNING) == options.validate))
    masks = {"kept": kept.labels >= 0}
    if tuple(kept.class_names) == tuple(names):
        masks = {"kept-inside": kept.labels < count, "kept-outside": kept.labels >= count}
    return [
        TaskData(name, kept_template, None, Part(kept, np.flatnonzero(mask)))
        for name, mask in masks.items()
        if mask.any()
    ], reference


def open_layout(option: str, text: str, prepare: Preprocessing) -> tuple[data.Source, str]:
    """Open LAYOUT=FOLDER: the images and the template of their captions."""
    layout, equals, root = text.partition("=")
    if not equals:
        raise ValueError(f"{option} is {text!r}, expected LAYOUT=FOLDER, such as folder=DATA/train")
    if layout == "captions":
        return data.CorruptedOnTheFly(data.captioned_folder(root), prepare), "{}"
    return data.open_source(layout, root, prepare), "a photo of a {}."


# --- report ---


def write_results(
    options: Options, tasks: list[str], kept: list[str], results: list[dict[str, Any]]
) -> None:
    """Print the table and draw the accuracy on every task."""
    text = table(tasks, kept, results)
    io.write_text(options.output / "table.txt", text + "\n")
    where = " on validation images" if options.validate else ""
    seeds = len({run["seed"] for run in results})
    print(f"accuracy in %{where} after the last task, mean over {seeds} seeds\n\n{text}\n")
    heat_maps(tasks, kept, results).savefig(options.output / "matrix.png", dpi=150)
    curves(tasks, kept, results).savefig(options.output / "curves.png", dpi=150)
    print(f"results: {options.output}")


def by_method(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of the seeds of each method."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def table(tasks: list[str], kept: list[str], results: list[dict[str, Any]]) -> str:
    """Table of methods by tasks and retention sets, after the last task.

    "last" is the mean over the tasks, "average" their mean over all steps. The kept share is
    (method − fine-tuning) / (start − fine-tuning), if fine-tuning was run.
    """
    groups = by_method(results)
    ends = {name: {run["seed"]: run["rows"][-1] for run in runs} for name, runs in groups.items()}
    start = {run["seed"]: run["rows"][0] for run in results}
    worst = ends.get("fine-tuning")
    whole = ["average", *(["transfer"] if len(tasks) > 1 else [])]
    head = ["method", *tasks, "last", *whole, *kept]
    lines = [[*head, *(f"share of {name}" for name in kept if worst), *FIGURES]]
    for method, found in {"before": start, **ends}.items():
        rows, runs = list(found.values()), groups.get(method)
        columns = [[row[name] for row in rows] for name in tasks]
        cells = [spread(column) for column in (*columns, np.mean(columns, 0))]
        cells += [spread([run[name] for run in runs]) if runs else "–" for name in whole]
        cells += [spread([row[name] for row in rows]) for name in kept]
        cells += [kept_share(name, start, found, worst) for name in kept if worst]
        cells.append(f"{np.mean([row['modality gap'] for row in rows]):.3f}")
        cells += [spread([row[name] for row in rows]) for name in FIGURES[1:]]
        lines.append([method, *cells])
    return "\n".join(report.aligned(lines))


def kept_share(name: str, start: dict[int, Any], own: dict[int, Any], worst: dict[int, Any]) -> str:
    """Share of the accuracy lost by fine-tuning that a method keeps, over the common seeds."""
    seeds = own.keys() & worst.keys()
    if not seeds:
        return "–"
    first, mine, low = (np.mean([rows[s][name] for s in seeds]) for rows in (start, own, worst))
    return f"{(mine - low) / (first - low):.2f}" if first != low else "–"


def spread(values: Sequence[float]) -> str:
    """Mean in per cent, and the standard deviation over seeds."""
    mean = f"{100 * np.mean(values):.2f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def heat_maps(tasks: list[str], kept: list[str], results: list[dict[str, Any]]) -> Figure:
    """Accuracy on every task before the first and after each, one heat map per method."""
    groups, columns = by_method(results), [*tasks, *kept]
    size = (1.6 + 0.75 * len(columns)) * len(groups), 1.6 + 0.45 * (len(tasks) + 1)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (method, runs) in zip(grid, groups.items(), strict=True):
        matrix = 100 * np.mean(
            [[[row[name] for name in columns] for row in run["rows"]] for run in runs], 0
        )
        axes.imshow(matrix, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value < 55 else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(method, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(tasks) + 1), ["before", *tasks], fontsize=8)
    grid[0].set_ylabel("after")
    return figure


def curves(tasks: list[str], kept: list[str], results: list[dict[str, Any]]) -> Figure:
    """Accuracy on the retention sets and the modality gap, over the tasks."""
    names = [*(kept or tasks[:1]), "modality gap"]
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(grid, names, strict=True):
        scale = 1 if name == "modality gap" else 100
        for method, runs in by_method(results).items():
            mean = scale * np.mean([[row[name] for row in run["rows"]] for run in runs], 0)
            axes.plot(range(len(mean)), mean, marker=".", label=method)
        axes.set_title(f"{name}{'' if scale == 1 else ' (%)'}", fontsize=10)
        axes.set_xticks(range(len(tasks) + 1), ["before", *tasks], rotation=40, ha="right")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
