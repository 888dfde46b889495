"""TENT: entropy minimisation over the image tower's normalisation parameters."""

import jax
import optax

from jaxtta import objectives
from jaxtta.adapters.base import Adapter, Preset
from jaxtta.adapters.online import online
from jaxtta.models import CLIP, Task
from jaxtta.tree import normalisation_parameters

TENT_PRESETS = {
    "cifar10-c": Preset(lambda: optax.sgd(1e-3, momentum=0.9), 200),
    "cifar100-c": Preset(lambda: optax.sgd(1e-3, momentum=0.9), 200),
    "imagenet-c": Preset(lambda: optax.sgd(2.5e-4, momentum=0.9, nesterov=True), 64),
}
"""ImageNet-C as in BATCLIP's published code; the others as in the embedded model's reference."""


def tent(model: CLIP, task: Task, optimizer: optax.GradientTransformation | None = None) -> Adapter:
    """Minimise prediction entropy; the text tower is frozen and encoded once.

    A ResNet's batch norms take each batch's own statistics.

    Args:
        model: the model.
        task: the classes.
        optimizer: an optax transformation; None for `TENT_PRESETS["imagenet-c"]`.

    Returns:
        The adapter.

    References:
        https://arxiv.org/abs/2006.10726
    """
    model = model.with_batch_statistics()
    prompts, encode = model.prompts(task), jax.jit(model.class_embeddings)
    return online(
        objectives.entropy_minimisation(model),
        lambda params: encode(params, prompts),
        normalisation_parameters(tower="image"),
        optimizer or TENT_PRESETS["imagenet-c"].optimizer(),
    )
