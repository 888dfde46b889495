"""Learning-rate selection on held-out corruptions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtta.adapters import Adapter
from jaxtta.data import VALIDATION, Batches
from jaxtta.evaluate.results import Results
from jaxtta.evaluate.run import run


class Choice(NamedTuple):
    """A selected learning rate.

    Attributes:
        rate: the selected learning rate.
        accuracies: mean top-1 accuracy by rate, in [0, 1].
        chosen_on: the corruptions and the number of images of each.
    """

    rate: float
    accuracies: dict[float, float]
    chosen_on: str


def rate_names(name: str, rates: Sequence[float]) -> dict[str, float]:
    """An adapter's names with each of the rates, in ascending order: tent@0.0001."""
    return {f"{name}@{rate!r}": rate for rate in sorted(set(rates))}


def choose_learning_rate(
    name: str,
    make: Callable[[float], Adapter],
    rates: Sequence[float],
    params: Any,
    batches: Batches,
    results: Results,
    **options: Any,
) -> Choice:
    """Select the rate with the highest mean accuracy on the four validation corruptions.

    The selection uses the labels of these images. If they are also the test images, it is
    independent of the test corruptions but not of the images.

    Args:
        name: the adapter's name, for files and the progress bar.
        make: returns the adapter for a rate.
        rates: the candidates.
        params: the frozen parameters.
        batches: streams of validation corruptions.
        results: the folder for these runs; existing results are reused.
        options: for `run`.

    Returns:
        The selection; the smaller rate in case of ties.

    Raises:
        ValueError: if a stream has other than validation corruptions.
    """
    shown = {domain.corruption for stream in batches.streams for domain in stream.segments}
    if odd := sorted(shown - set(VALIDATION)):
        raise ValueError(f"learning rates are selected on {', '.join(VALIDATION)}, not on {odd[0]}")
    names = rate_names(name, rates)
    adapters = {label: make(rate) for label, rate in names.items()}
    top1: dict[str, list[float]] = {label: [] for label in names}
    for cell in run(adapters, params, batches, results, **options):
        top1[cell["adapter"]] += [segment["top1"] for segment in cell["segments"]]
    accuracies = {rate: float(np.mean(top1[label])) for label, rate in names.items()}
    images = len(np.unique(batches.streams[0].items[:, 1]))
    return Choice(
        max(accuracies, key=accuracies.__getitem__),
        accuracies,
        f"{', '.join(sorted(shown))}; {images} images each",
    )
