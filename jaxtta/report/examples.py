"""Examples of TNT: images whose prediction it fixed or broke."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
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
    """One image (size, size, 3) with values in [0, 1], its noise, and probabilities (classes,)."""

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
    for number, index in _changed(results, adapter, batches)[:count].tolist():
        stream = batches.streams[number]
        segment, image = stream.items[index].tolist()
        domain = stream.segments[segment]
        original = read(batches.benchmark[domain], image, stream.seed, batches.preprocess)[1]
        # The same key as in the sweep: from the image's index in its stream.
        key = jax.random.fold_in(jax.random.key(stream.seed), index)
        views, tuned = tune(params, classes, key, *pad_to_canvas(original, batches.canvas))
        before = probabilities(params, classes, views[:1])
        found = views[0], tuned.noise, before, np.exp(tuned.log_probabilities)
        about = str(domain), names, int(labels[image]), config.epsilon
        examples.append(Example(*about, *map(np.asarray, found)))
    return examples


def _changed(results: Sequence[Predictions], adapter: str, batches: Batches) -> np.ndarray:
    """Stream and index in it of changed images: fixed and broken, and segments, in turn."""
    top1 = {(r.adapter, r.stream, r.seed): r.top1 for r in results}
    parts = [pd.DataFrame(columns=["broken", "stream", "segment", "index"])]
    for number, stream in enumerate(batches.streams):
        was, now = (top1.get((name, stream.name, stream.seed)) for name in (BASELINE, adapter))
        if was is not None and now is not None:
            index = np.flatnonzero(was != now)
            columns = {"broken": was[index], "stream": number, "segment": stream.items[index, 0]}
            parts.append(pd.DataFrame(columns | {"index": index}))
    found = pd.concat(parts)
    found["turn"] = found.groupby(["broken", "stream", "segment"]).cumcount()
    found = found.sort_values(["turn", "stream", "segment"])
    found["turn"] = found.groupby("broken").cumcount()
    return found.sort_values(["turn", "broken"])[["stream", "index"]].to_numpy(int)


def draw_examples(examples: Sequence[Example]) -> Figure:
    """Draw each example in a row, with the most probable classes."""
    figure = Figure(figsize=(9, 2.1 * len(examples) + 0.4), layout="constrained")
    grid = figure.subplots(len(examples), 4, squeeze=False, width_ratios=(1, 1, 1, 1.6))
    heads = ("plain view", "noise", "plain view + noise", "probability")
    for axes, head in zip(grid[0], heads, strict=True):
        axes.set_title(head, fontsize=10)
    for (*images, bars), example in zip(grid, examples, strict=True):
        stretched = 0.5 + example.noise / (2 * example.epsilon)
        shown = (example.plain, stretched, example.plain + example.noise)
        for axes, image in zip(images, shown, strict=True):
            axes.imshow(image.clip(0, 1))
            axes.set(xticks=[], yticks=[])
        images[0].set_ylabel(label(example.title), fontsize=9)
        images[1].set_xlabel(f"±{255 * example.epsilon:.3g}/255", fontsize=8)
        values = pd.DataFrame({"before": example.before, "after": example.after})
        likeliest = values.max(axis=1).nlargest(SHOWN).index.to_numpy()
        likeliest[-1] = example.label if example.label not in likeliest else likeliest[-1]
        values.loc[likeliest].plot.barh(
            ax=bars, width=0.76, color=[GREY, COLOURS[0]], legend=bars is grid[0, 3], fontsize=8
        )
        bars.set_yticklabels([label(example.class_names[number]) for number in likeliest])
        for tick, number in zip(bars.get_yticklabels(), likeliest, strict=True):
            tick.set_fontweight("bold" if number == example.label else "normal")
        bars.set(xlim=(0, 1), ylim=(len(likeliest) - 0.4, -0.6))
        finish(bars, "", "", grid="x", legend=False)
    return figure
