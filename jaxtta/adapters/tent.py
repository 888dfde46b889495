"""TENT: entropy minimisation over the image tower's normalisation parameters."""

import jax
import optax

from jaxtta import objectives
from jaxtta.adapters.base import Adapter
from jaxtta.adapters.online import online
from jaxtta.clip import CLIP, Task
from jaxtta.tree import normalisation_parameters

PRESETS = {
    "imagenet-c": lambda: optax.sgd(2.5e-4, momentum=0.9, nesterov=True),
    "cifar10-c": lambda: optax.sgd(1e-3, momentum=0.9),
}
"""Optimisers by benchmark: ImageNet-C as in BATCLIP's published code, CIFAR-10-C as in the
reference accuracies of the embedded model."""


def tent(
    model: CLIP, task: Task, optimizer: optax.GradientTransformation | None = None
) -> Adapter:
    """Minimise prediction entropy; the text tower is frozen and encoded once.

    Args:
        model: the model.
        task: the classes.
        optimizer: an optax transformation; None for `PRESETS["imagenet-c"]`.

    Returns:
        The adapter.

    References:
        https://arxiv.org/abs/2006.10726
    """
    prompts = model.prompts(task)
    return online(
        objectives.entropy_minimisation(model),
        lambda params: jax.jit(model.class_embeddings)(params, prompts),
        normalisation_parameters(tower="image"),
        optimizer or PRESETS["imagenet-c"](),
    )
