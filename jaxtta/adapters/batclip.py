"""BATCLIP: both towers' normalisation parameters adapted online."""

import optax

from jaxtta import objectives
from jaxtta.adapters.base import Adapter, Preset
from jaxtta.adapters.online import online
from jaxtta.models import CLIP, Task
from jaxtta.tree import normalisation_parameters


def adam_l2(learning_rate: float, weight_decay: float = 1e-2) -> optax.GradientTransformation:
    """Adam whose weight decay is L2 in the gradient, not decoupled.

    Args:
        learning_rate: step size.
        weight_decay: coefficient of the parameter in the gradient.

    Returns:
        The transformation.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))


BATCLIP_PRESETS = {
    "cifar10-c": Preset(lambda: optax.adamw(1e-3, weight_decay=1e-2), 200),
    "cifar100-c": Preset(lambda: adam_l2(5e-4), 200),
    "imagenet-c": Preset(lambda: optax.adamw(5e-4, weight_decay=1e-2), 64),
}
"""The published settings for ViT-B/16 and ViT-B/32, severity 5."""


def batclip(
    model: CLIP, task: Task, optimizer: optax.GradientTransformation | None = None
) -> Adapter:
    """Adapt the LayerNorms of both towers; the text is encoded anew at every step.

    Of a ResNet, the affine parameters of its batch norms, with each batch's own statistics.

    Args:
        model: the model.
        task: the classes.
        optimizer: an optax transformation; None for `BATCLIP_PRESETS["imagenet-c"]`.

    Returns:
        The adapter.

    References:
        https://arxiv.org/abs/2412.02837
    """
    model = model.with_batch_statistics()
    prompts = model.prompts(task)
    return online(
        objectives.batclip(model),
        lambda params: prompts,
        normalisation_parameters(tower="both"),
        optimizer or BATCLIP_PRESETS["imagenet-c"].optimizer(),
    )
