"""Examples of TNT: images whose prediction it fixed or broke."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxtta.adapters import TNTConfig, tnt_image
from jaxtta.data import Batches, on_canvas
from jaxtta.evaluate.factory import is_tnt
from jaxtta.evaluate.record import outcomes
from jaxtta.evaluate.results import Cell
from jaxtta.evaluate.run import BASELINE
from jaxtta.models import CLIP, Params, Task
from jaxtta.report import plots
from jaxtta.report.plots import COLOURS, GREY

SHOWN = 5  # number of classes with bars


class Example(NamedTuple):
    """One image.

    Attributes:
        title: its domain.
        class_names: names of the classes.
        label: its class index.
        plain: (size, size, 3) in [0, 1], the plain view.
        noise: (size, size, 3), the optimised noise map.
        epsilon: the map's bound.
        before: (classes,) zero-shot probabilities of the plain view.
        after: (classes,) probabilities of the ensemble.
    """

    title: str
    class_names: tuple[str, ...]
    label: int
    plain: np.ndarray
    noise: np.ndarray
    epsilon: float
    before: np.ndarray
    after: np.ndarray


def check_examples(adapters: Sequence[str], tuning: TNTConfig) -> None:
    """Raise a ValueError if a sweep of these adapters cannot have examples."""
    if not any(map(is_tnt, adapters)) or BASELINE not in adapters:
        raise ValueError(f"--save-examples compares tnt with {BASELINE}: run both")
    if tuning.online:
        raise ValueError("--save-examples shows noise maps of single images, omit --tnt.online")


class _Place(NamedTuple):
    stream: int
    index: int


def find_examples(
    cells: Sequence[Cell],
    adapter: str,
    batches: Batches,
    count: int,
    model: CLIP,
    params: Params,
    task: Task,
    tuning: TNTConfig,
) -> list[Example]:
    """Recompute the noise maps of images whose prediction differs from zero-shot.

    Args:
        cells: the cells of a sweep with zero-shot and the adapter.
        adapter: TNT's name in the sweep.
        batches: the sweep's streams.
        count: number of images, about half fixed and half broken, from all streams in turn.
        model: the model.
        params: its parameters.
        task: the classes.
        tuning: TNT's settings in the sweep; `online` must be false.

    Returns:
        At most `count` examples.

    Raises:
        ValueError: if the batches have no canvas.
    """
    canvas = batches.canvas
    if canvas is None:
        raise ValueError("examples need batches with a canvas")
    classes = model.init_context(params, task)
    # The same key as in the sweep: from the image's index in its stream.
    tune = jax.jit(
        lambda params, classes, *image: tnt_image(model, params, classes, *image, config=tuning)
    )

    @jax.jit
    def before(params: Params, classes: jax.Array, view: jax.Array) -> jax.Array:
        return jax.nn.softmax(model(params, classes, view[None]).logits)[0]

    examples = []
    for place in _changed(cells, adapter, batches, count):
        stream = batches.streams[place.stream]
        segment, number = stream.items[place.index].tolist()
        domain = stream.segments[segment]
        original = batches.source.read_both(domain, number, stream.seed)[1]
        image, size = on_canvas(original, canvas)
        key = jax.random.fold_in(jax.random.key(stream.seed), place.index)
        views, tuned = tune(params, classes, key, image, size)
        examples.append(
            Example(
                str(domain).replace("_", " "),
                tuple(batches.source.class_names),
                int(batches.source.labels[number]),
                np.asarray(views[0]),
                np.asarray(tuned.noise),
                tuning.epsilon,
                np.asarray(before(params, classes, views[0])),
                np.exp(tuned.log_probabilities),
            )
        )
    return examples


def _changed(cells: Sequence[Cell], adapter: str, batches: Batches, count: int) -> list[_Place]:
    """Alternate between fixed and broken images."""
    kinds: list[list[Iterator[_Place]]] = [[], []]
    for number, stream in enumerate(batches.streams):
        pair = [
            cell
            for name in (BASELINE, adapter)
            for cell in cells
            if (cell["adapter"], cell["stream"], cell["seed"]) == (name, stream.name, stream.seed)
        ]
        if len(pair) < 2:
            continue
        for segment, figures in enumerate(zip(*(cell["segments"] for cell in pair), strict=True)):
            (_, was), (_, now) = map(outcomes, figures)
            for kind, changed in zip(kinds, (now & ~was, was & ~now), strict=True):
                places = np.flatnonzero(
                    (stream.items[:, 0] == segment) & changed[stream.items[:, 1]]
                )
                kind.append(iter([_Place(number, index) for index in places.tolist()]))
    return list(itertools.islice(_in_turn([_in_turn(kind) for kind in kinds]), count))


def _in_turn(iterators: Sequence[Iterator[_Place]]) -> Iterator[_Place]:
    """Round-robin."""
    waiting = list(iterators)
    while waiting:
        for iterator in list(waiting):
            try:
                yield next(iterator)
            except StopIteration:
                waiting.remove(iterator)


def draw_examples(examples: Sequence[Example]) -> Figure | None:
    """Draw examples, one per row.

    Args:
        examples: the examples.

    Returns:
        Plain view, noise, their sum, and the most probable classes before and after; None without
        examples.
    """
    if not examples:
        return None
    figure = Figure(figsize=(9, 2.1 * len(examples) + 0.4), layout="constrained")
    grid = figure.subplots(len(examples), 4, squeeze=False, width_ratios=(1, 1, 1, 1.6))
    heads = ("plain view", "noise", "plain view + noise", "probability")
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=10)
    for row, example in zip(grid, examples, strict=True):
        stretched = 0.5 + example.noise / (2 * example.epsilon)
        for axes, image in zip(
            row, (example.plain, stretched, example.plain + example.noise), strict=False
        ):
            axes.imshow(image.clip(0, 1))
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_ylabel(example.title, fontsize=9)
        row[1].set_xlabel(f"±{255 * example.epsilon:.3g}/255", fontsize=8)
        _bars(row[3], example)
    grid[0, 3].legend(fontsize=8, frameon=False)
    return figure


def _bars(axes: Axes, example: Example) -> None:
    likeliest = np.argsort(-np.maximum(example.before, example.after))[:SHOWN]
    if example.label not in likeliest:
        likeliest[-1] = example.label
    places = np.arange(len(likeliest))
    for shift, probabilities, colour, label in (
        (-0.2, example.before, GREY, "before"),
        (0.2, example.after, COLOURS[0], "after"),
    ):
        axes.barh(places + shift, probabilities[likeliest], 0.38, color=colour, label=label)
    axes.set_yticks(places, [plots.label(example.class_names[c]) for c in likeliest], fontsize=8)
    for tick, number in zip(axes.get_yticklabels(), likeliest, strict=True):
        tick.set_fontweight("bold" if number == example.label else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
