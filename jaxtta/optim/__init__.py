"""Optax transformations: a learnt optimiser, and projections that keep what was learnt before."""

from jaxtta.optim.meta_gradient import (
    MetaGradientState,
    Phi,
    check_phi,
    init_meta_gradient_generator,
    load_phi,
    meta_gradient_generator,
    save_phi,
)
from jaxtta.optim.meta_training import MetaState, begin_epoch, init_meta_training, meta_step
from jaxtta.optim.null_space import Projector, null_space_projection, orthogonal_to

__all__ = [
    "MetaGradientState",
    "MetaState",
    "Phi",
    "Projector",
    "begin_epoch",
    "check_phi",
    "init_meta_gradient_generator",
    "init_meta_training",
    "load_phi",
    "meta_gradient_generator",
    "meta_step",
    "null_space_projection",
    "orthogonal_to",
    "save_phi",
]
