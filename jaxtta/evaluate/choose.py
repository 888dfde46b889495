"""Choosing a learning rate where it is fair: on corruptions that are no part of a result."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtta.adapters import Adapter
from jaxtta.data import VALIDATION, Batches
from jaxtta.evaluate.results import Results
from jaxtta.evaluate.run import run


class Choice(NamedTuple):
    """A learning rate and what it was chosen on.

    Attributes:
        rate: the chosen one.
        accuracies: mean top-1 accuracy by rate, in [0, 1].
        chosen_on: the corruptions, and how many images of each.
    """

    rate: float
    accuracies: dict[float, float]
    chosen_on: str


def choose_learning_rate(
    name: str,
    make: Callable[[float], Adapter],
    rates: Sequence[float],
    params: Any,
    batches: Batches,
    results: Results,
    **options: Any,
) -> Choice:
    """Take the rate with the highest mean accuracy on the four validation corruptions.

    The labels of these images are used. Where they are the images that are tested too, the
    choice is blind to the test corruptions but not to the images.

    Args:
        name: of the adapter, for the files and the progress bar.
        make: makes the adapter for a rate.
        rates: to choose from.
        params: the frozen parameters.
        batches: streams of validation corruptions.
        results: the folder for these runs; what is in it is not computed again.
        options: for `run`.

    Returns:
        The choice; of equal rates the smaller.

    Raises:
        ValueError: if a stream shows anything but validation corruptions.
    """
    shown = {domain.corruption for stream in batches.streams for domain in stream.segments}
    if odd := sorted(shown - set(VALIDATION)):
        raise ValueError(f"a learning rate is chosen on {', '.join(VALIDATION)}, not {odd[0]}")
    names = {f"{name}@{rate!r}": rate for rate in sorted(set(rates))}
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
