"""MGTTA's objective: sure predictions from features distributed as clean images' are."""

from typing import Any, NamedTuple

import jax

from jaxtta import losses
from jaxtta.objectives.base import Batch, Classifier, Metrics, Objective

SCALE = 64
"""What the published code divides the weight by, whatever the batch size."""


class MGTTAContext(NamedTuple):
    """What the objective needs beside parameters and batch.

    Attributes:
        classes: what the model's `forward` takes for its classes.
        mean: (layers, width) of the source features.
        std: (layers, width), unbiased.
    """

    classes: Any
    mean: jax.Array
    std: jax.Array


def mgtta(model: Classifier, weight: float = 0.4) -> Objective:
    """Minimise entropy + weight/64 · the discrepancy of feature statistics from the source's.

    Args:
        model: anything with a `forward` that returns layer features; the context is an
            `MGTTAContext`.
        weight: of the discrepancy; published as 0.4, and 0.2 for ImageNet-R.

    Returns:
        The objective.

    References:
        https://arxiv.org/abs/2412.16901
    """

    def objective(
        params: Any, context: MGTTAContext, batch: Batch
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        out = model.forward(params, context.classes, batch.images)
        check_statistics(context.mean, out.layer_features.shape[1:])
        distance = losses.feature_discrepancy(
            out.layer_features, batch.mask, context.mean, context.std
        )
        metrics = {
            "entropy": losses.masked_mean(losses.entropy(out.logits), batch.mask),
            "discrepancy": weight / SCALE * distance,
        }
        return metrics["entropy"] + metrics["discrepancy"], (out.logits, metrics)

    return objective


def check_statistics(mean: jax.Array, shape: tuple[int, ...]) -> None:
    """Raise a ValueError for statistics of a model with other features.

    Args:
        mean: (layers, width) of the source features.
        shape: the model's (layers, width).
    """
    if mean.shape != shape:
        raise ValueError(
            f"source statistics of shape {mean.shape}, expected {shape} for this model"
        )
