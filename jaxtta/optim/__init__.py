"""Optax transformations: a learned optimiser, and projections for continual learning."""

from jaxtta.optim.checks import require_optimizer
from jaxtta.optim.meta_gradient import (
    MetaGradientState,
    MGGParams,
    check_mgg_params,
    init_meta_gradient_generator,
    load_mgg,
    meta_gradient_generator,
    save_mgg,
)
from jaxtta.optim.meta_training import MetaState, begin_epoch, init_meta_training, meta_step
from jaxtta.optim.null_space import Projector, null_space_projection, project_out
from jaxtta.optim.pretrain import EpochMetrics, best_epoch, make_judge, make_train_epoch, pretrain

__all__ = [
    "EpochMetrics",
    "MGGParams",
    "MetaGradientState",
    "MetaState",
    "Projector",
    "begin_epoch",
    "best_epoch",
    "check_mgg_params",
    "init_meta_gradient_generator",
    "init_meta_training",
    "load_mgg",
    "make_judge",
    "make_train_epoch",
    "meta_gradient_generator",
    "meta_step",
    "null_space_projection",
    "pretrain",
    "project_out",
    "require_optimizer",
    "save_mgg",
]
