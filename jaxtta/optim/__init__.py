"""Optimisers: optax transformations for gradients that were computed without labels."""

from jaxtta.optim.meta_gradient import (
    MetaGradientState,
    check_phi,
    init_meta_gradient_generator,
    load_phi,
    meta_gradient_generator,
    save_phi,
)

__all__ = [
    "MetaGradientState",
    "check_phi",
    "init_meta_gradient_generator",
    "load_phi",
    "meta_gradient_generator",
    "save_phi",
]
