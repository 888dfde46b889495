"""Objectives: pure functions `objective(params, context, batch) -> (loss, (logits, metrics))`."""

from jaxtta.objectives.base import Batch, Classifier, Metrics, Objective, as_batch
from jaxtta.objectives.batclip import batclip
from jaxtta.objectives.entropy import entropy_minimisation
from jaxtta.objectives.mgtta import MGTTAContext, check_statistics, mgtta

__all__ = [
    "Batch",
    "Classifier",
    "MGTTAContext",
    "Metrics",
    "Objective",
    "as_batch",
    "batclip",
    "check_statistics",
    "entropy_minimisation",
    "mgtta",
]
