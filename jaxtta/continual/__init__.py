"""Learning task after task without losing what was known before."""

from jaxtta.continual.gram import (
    batch_gram,
    combine_grams,
    kernel_inputs,
    null_space_projector,
    null_space_projectors,
    task_grams,
)
from jaxtta.continual.protection import output_basis

__all__ = [
    "batch_gram",
    "combine_grams",
    "kernel_inputs",
    "null_space_projector",
    "null_space_projectors",
    "output_basis",
    "task_grams",
]
