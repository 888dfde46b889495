"""Learning-rate selection on corruptions that are never tested."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtta.adapters.by_name import SETTINGS, parse_adapter
from jaxtta.data import IMAGENET_C_EXTRA
from jaxtta.evaluate.sweep import Spec, sweep
from jaxtta.models import Classifier, Params


class Choice(NamedTuple):
    """A selected learning rate, the mean top-1 accuracy by rate, and what it was chosen on."""

    rate: float
    accuracies: dict[float, float]
    chosen_on: str


def has_rate(text: str) -> bool:
    """Whether a named adapter has a learning rate that its text does not say."""
    spec = parse_adapter(text)
    return "lr" in SETTINGS.get(spec.name, ()) and "lr" not in spec.settings


def with_rate(text: str, rate: float) -> str:
    """An adapter's text with a learning rate: tent:lr=0.0001."""
    return f"{text}{',' if parse_adapter(text).settings else ':'}lr={float(rate)!r}"


def tune_learning_rate(
    adapter: str,
    rates: Sequence[float],
    spec: Spec,
    model: Classifier,
    params: Params,
    folder: str | Path | None = None,
    **options: Any,
) -> Choice:
    """Select the rate with the highest mean accuracy on the four extra corruptions of ImageNet-C.

    The selection uses the labels of these images. If they are also the test images, it is
    independent of the test corruptions but not of the images.

    Args:
        adapter: its text, to which `lr` is added; a function of your own may have that setting too.
        rates: the candidates; of equally good ones the smallest is selected.
        spec: streams of these corruptions only.
        model: this and the others as for `sweep`.
        params: its parameters.
        folder: for these runs.
        options: further ones.
    """
    shown = {domain.corruption for stream in spec.streams for domain in stream.segments}
    if unknown := sorted(shown - set(IMAGENET_C_EXTRA)):
        known = ", ".join(IMAGENET_C_EXTRA)
        raise ValueError(f"learning rates are selected on {known}, not on {unknown[0]}")
    texts = {with_rate(adapter, rate): float(rate) for rate in sorted(set(rates))}
    top1: dict[float, list[float]] = {rate: [] for rate in texts.values()}
    for result in sweep(spec, list(texts), model, params, folder, **options):
        for number in range(len(result.domains)):
            rows = result.segment(number).query("seen")
            top1[texts[result.adapter]].append(float(np.mean(rows["top1"])))
    accuracies = {rate: float(np.mean(values)) for rate, values in top1.items()}
    images = len(np.unique(spec.streams[0].items[:, 1]))
    chosen_on = f"{', '.join(sorted(shown))}; {images} images each"
    return Choice(max(accuracies, key=accuracies.__getitem__), accuracies, chosen_on)
