"""Examples of TNT: images whose prediction it fixed or broke."""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    texts = [spec.text for spec in adapters]
    if not tnt or BASELINE not in texts or tnt_config_of(tnt, config).online:
        raise ValueError(f"--save-examples needs {BASELINE} and tnt of single images, not online")


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
    """Recompute at most `count` noise maps of images that TNT, named `adapter`, fixed or broke."""
    top1 = {(r.adapter, r.stream, r.seed): r.top1 for r in results}
    rows = []
    for number, stream in enumerate(batches.streams):
        was, now = (top1.get((name, stream.name, stream.seed)) for name in (BASELINE, adapter))
        if was is not None and now is not None:
            rows += [(was[n], number, stream.items[n, 0], n) for n in np.flatnonzero(was != now)]
    changed = pd.DataFrame(rows, columns=["broken", "stream", "segment", "place"])
    for group in (["broken", "stream", "segment"], ["broken"]):  # segments, then kinds, in turn
        changed["turn"] = changed.groupby(group).cumcount()
        changed = changed.sort_values(["turn", "broken", "stream", "segment"])
    classes = model.init_context(params, task)
    tune = jax.jit(lambda *arguments: tnt_image(model, *arguments, config=config))
    probabilities = jax.jit(lambda *inputs: jax.nn.softmax(model(*inputs).logits)[0])
    names, labels = class_names_of(batches.benchmark), labels_of(batches.benchmark)
    examples = []
    for number, index in changed[["stream", "place"]].to_numpy(int)[:count].tolist():
        stream = batches.streams[number]
        segment, image = stream.items[index].tolist()
        domain = stream.segments[segment]
        original = read(batches.benchmark[domain], image, stream.seed, batches.preprocess)[1]
        # The same key as in the sweep: from the image's index in its stream.
        key = jax.random.fold_in(jax.random.key(stream.seed), index)
        padding: Any = original, batches.canvas
        views, tuned = tune(params, classes, key, *pad_to_canvas(*padding))
        before = probabilities(params, classes, views[:1])
        found = views[0], tuned.noise, before, np.exp(tuned.log_probabilities)
        about = str(domain), names, int(labels[image]), config.epsilon
        examples.append(Example(*about, *map(np.asarray, found)))
    return examples


def draw_examples(examples: Sequence[Example]) -> Figure:
    """Draw each example in a row, with the most probable classes."""
    figure = Figure(figsize=(9, 2.1 * len(examples) + 0.4), layout="constrained")
    grid = figure.subplots(len(examples), 2, squeeze=False, width_ratios=(3, 1.6))
    for (images, bars), example in zip(grid, examples, strict=True):
        stretched = 0.5 + example.noise / (2 * example.epsilon)
        shown = example.plain, stretched, example.plain + example.noise
        images.imshow(np.hstack(shown).clip(0, 1))
        images.set(xticks=[], yticks=[], ylabel=label(example.title))
        values = pd.DataFrame({"before": example.before, "after": example.after})
        likeliest = {*values.max(axis=1).nlargest(5).index, example.label}
        names = {n: "→ " * (n == example.label) + label(example.class_names[n]) for n in likeliest}
        values.loc[[*names]].rename(names).plot.barh(ax=bars, color=[GREY, COLOURS[0]], fontsize=8)
        bars.set(xlim=(0, 1))
        finish(bars, "probability", "", grid="x")
    return figure
