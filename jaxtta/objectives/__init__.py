"""Objectives: pure functions `objective(params, context, batch) -> (loss, (logits, metrics))`."""

from jaxtta.objectives.base import Batch, Classifier, Metrics, Objective, as_batch
from jaxtta.objectives.batclip import batclip
from jaxtta.objectives.entropy import entropy_minimisation

__all__ = [
    "Batch",
    "Classifier",
    "Metrics",
    "Objective",
    "as_batch",
    "batclip",
    "entropy_minimisation",
]
