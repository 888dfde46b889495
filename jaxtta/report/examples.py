"""Examples of TNT: images whose prediction it fixed or broke."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxtta.adapters import AdapterConfig, AdapterSpec, TNTConfig, tnt_config_of, tnt_image
from jaxtta.data import Batches, class_names_of, labels_of, pad_to_canvas
from jaxtta.data.datasets import read
from jaxtta.evaluate.predictions import Predictions
from jaxtta.models import CLIP, Params, Task
from jaxtta.report.plots import COLOURS, GREY, finish, label
from jaxtta.report.summary import BASELINE

SHOWN = 5  # number of classes with bars


class Example(NamedTuple):
    """One image: the plain view, the noise map and its bound, and class probabilities.

    Images are (size, size, 3) with values in [0, 1]; probabilities are (classes,).
    """

    title: str
    class_names: tuple[str, ...]
    label: int
    epsilon: float
    plain: np.ndarray
    noise: np.ndarray
    before: np.ndarray
    after: np.ndarray


def check_examples(adapters: Sequence[AdapterSpec], config: AdapterConfig) -> None:
    """Raise a ValueError if a sweep of these adapters cannot have examples."""
    tnt = next((spec for spec in adapters if spec.name == "tnt"), None)
    if tnt is None or BASELINE not in (spec.text for spec in adapters):
        raise ValueError(f"--save-examples compares tnt with {BASELINE}: run both")
    if tnt_config_of(tnt, config).online:
        raise ValueError("--save-examples shows noise maps of single images, omit --tnt.online")


def find_examples(
    results: Sequence[Predictions],
    adapter: str,
    batches: Batches,
    count: int,
    model: CLIP,
    params: Params,
    task: Task,
    config: TNTConfig,
) -> list[Example]:
    """Recompute the noise maps of at most `count` images whose prediction differs from zero-shot.

    About half are fixed and half broken, from all streams in turn. `adapter` is TNT's name in the
    sweep and `config` its settings, not online; `batches` are the sweep's, with a canvas.
    """
    if batches.canvas is None:
        raise ValueError("examples need batches with a canvas")
    classes = model.init_context(params, task)
    tune = jax.jit(lambda *arguments: tnt_image(model, *arguments, config=config))
    probabilities = jax.jit(lambda *inputs: jax.nn.softmax(model(*inputs).logits)[0])
    names, labels = class_names_of(batches.benchmark), labels_of(batches.benchmark)
    examples = []
    for number, index in _changed(results, adapter, batches)[:count]:
        stream = batches.streams[number]
        segment, image = stream.items[index].tolist()
        domain = stream.segments[segment]
        original = read(batches.benchmark[domain], image, stream.seed, batches.preprocess)[1]
        # The same key as in the sweep: from the image's index in its stream.
        key = jax.random.fold_in(jax.random.key(stream.seed), index)
        views, tuned = tune(params, classes, key, *pad_to_canvas(original, batches.canvas))
        before = probabilities(params, classes, views[:1])
        found = views[0], tuned.noise, before, np.exp(tuned.log_probabilities)
        examples.append(
            Example(str(domain), names, int(labels[image]), config.epsilon, *map(np.asarray, found))
        )
    return examples


def _changed(
    results: Sequence[Predictions], adapter: str, batches: Batches
) -> list[tuple[int, int]]:
    """Stream and index in it of changed images, from fixed and broken ones and segments in turn."""
    found = {(r.adapter, r.stream, r.seed): r.top1 for r in results}
    fixed, broken = [], []
    for number, stream in enumerate(batches.streams):
        was, now = (found.get((name, stream.name, stream.seed)) for name in (BASELINE, adapter))
        if was is None or now is None:
            continue
        for segment in range(len(stream.segments)):
            own = stream.items[:, 0] == segment
            for kind, changed in ((fixed, now & ~was), (broken, was & ~now)):
                kind.append([(number, index) for index in np.flatnonzero(own & changed).tolist()])

    def in_turn(lists: Sequence[list[tuple[int, int]]]) -> list[tuple[int, int]]:
        rows = itertools.zip_longest(*lists)
        return [item for row in rows for item in row if item is not None]

    return in_turn([in_turn(fixed), in_turn(broken)])


def draw_examples(examples: Sequence[Example]) -> Figure:
    """Draw each example in a row, with the most probable classes."""
    figure = Figure(figsize=(9, 2.1 * len(examples) + 0.4), layout="constrained")
    grid = figure.subplots(len(examples), 4, squeeze=False, width_ratios=(1, 1, 1, 1.6))
    heads = ("plain view", "noise", "plain view + noise", "probability")
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=10)
    for row, example in zip(grid, examples, strict=True):
        stretched = 0.5 + example.noise / (2 * example.epsilon)
        shown = (example.plain, stretched, example.plain + example.noise)
        for axes, image in zip(row, shown, strict=False):
            axes.imshow(image.clip(0, 1))
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(label(example.title), fontsize=9)
        row[1].set_xlabel(f"±{255 * example.epsilon:.3g}/255", fontsize=8)
        likeliest = np.argsort(-np.maximum(example.before, example.after))[:SHOWN]
        if example.label not in likeliest:
            likeliest[-1] = example.label
        places = np.arange(len(likeliest))
        bars = (("before", example.before, -0.2, GREY), ("after", example.after, 0.2, COLOURS[0]))
        for name, values, offset, colour in bars:
            row[3].barh(places + offset, values[likeliest], 0.38, color=colour, label=name)
        row[3].set_yticks(places, [label(example.class_names[c]) for c in likeliest], fontsize=8)
        for tick, number in zip(row[3].get_yticklabels(), likeliest, strict=True):
            tick.set_fontweight("bold" if number == example.label else "normal")
        row[3].set(xlim=(0, 1), ylim=(len(likeliest) - 0.4, -0.6))
        finish(row[3], "", "", grid="x", legend=False)
    grid[0, 3].legend(fontsize=8, frameon=False)
    return figure
