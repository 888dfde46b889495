"""Learning task after task without losing what was known before."""

from jaxtta.continual.gram import (
    Grams,
    batch_gram,
    check_rho,
    check_tower,
    combine_grams,
    kernel_inputs,
    null_space_projector,
    null_space_projectors,
    task_grams,
)
from jaxtta.continual.protection import output_basis
from jaxtta.continual.trainer import (
    METHODS,
    Examples,
    Method,
    Pairs,
    TrainState,
    all_but_logit_scale,
    average_weights,
    continual_loss,
    gnsp_kernels,
    task_optimizer,
    train_step,
)

__all__ = [
    "METHODS",
    "Examples",
    "Grams",
    "Method",
    "Pairs",
    "TrainState",
    "all_but_logit_scale",
    "average_weights",
    "batch_gram",
    "check_rho",
    "check_tower",
    "combine_grams",
    "continual_loss",
    "gnsp_kernels",
    "kernel_inputs",
    "null_space_projector",
    "null_space_projectors",
    "output_basis",
    "task_grams",
    "task_optimizer",
    "train_step",
]
