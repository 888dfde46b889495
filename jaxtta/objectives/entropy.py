"""Entropy minimisation, the objective of TENT."""

from typing import Any

import jax

from jaxtta import losses
from jaxtta.objectives.base import Batch, Classifier, Metrics, Objective, forward


def entropy_minimisation(model: Classifier) -> Objective:
    """Minimise the mean entropy of the predictions.

    Args:
        model: anything with a `forward`; its `classes` are the context.

    Returns:
        The objective.

    References:
        Tent: fully test-time adaptation by entropy minimization,
        https://arxiv.org/abs/2006.10726
    """

    def objective(
        params: Any, context: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        logits = forward(model, params, context, batch).logits
        loss = losses.masked_mean(losses.entropy(logits), batch.mask)
        return loss, (logits, {"entropy": loss})

    return objective
