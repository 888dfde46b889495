"""Continual learning: training on a sequence of tasks without forgetting earlier knowledge."""

from jaxtta.continual.gnsp import (
    VARIANTS,
    GNSPConfig,
    ReferenceBatch,
    TaskBatch,
    TrainState,
    continual_loss,
    everything_but_logit_scale,
    gnsp_kernels,
    task_optimizer,
    train_step,
    wise_ft,
)
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
from jaxtta.continual.orthogonal_gradients import output_gradient_basis
from jaxtta.continual.training import TrainingConfig

__all__ = [
    "VARIANTS",
    "GNSPConfig",
    "Grams",
    "ReferenceBatch",
    "TaskBatch",
    "TrainState",
    "TrainingConfig",
    "batch_gram",
    "check_rho",
    "check_tower",
    "combine_grams",
    "continual_loss",
    "everything_but_logit_scale",
    "gnsp_kernels",
    "kernel_inputs",
    "null_space_projector",
    "null_space_projectors",
    "output_gradient_basis",
    "task_grams",
    "task_optimizer",
    "train_step",
    "wise_ft",
]
