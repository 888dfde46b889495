"""MGTTA: normalisation parameters adapted towards the source's feature statistics."""

import jax
import optax

from jaxtta import assets, objectives
from jaxtta.adapters.base import Adapter, Preset
from jaxtta.adapters.online import online
from jaxtta.clip import CLIP, FeatureStatistics, Params, Task
from jaxtta.objectives import MGTTAContext
from jaxtta.optim import load_phi, meta_gradient_generator
from jaxtta.tree import normalisation_parameters

MGTTA_PRESETS = {"imagenet-c": Preset(lambda: shipped_generator(1e-3), 64)}
"""The published settings, severity 5, with weights trained on the embedded model."""


def shipped_generator(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """The meta gradient generator with the weights in `jaxtta.assets.PHI`."""
    return meta_gradient_generator(load_phi(assets.PHI)[0], learning_rate)


def mgtta(
    model: CLIP,
    task: Task,
    statistics: FeatureStatistics,
    optimizer: optax.GradientTransformation | None = None,
    weight: float = 0.4,
    tower: str = "image",
) -> Adapter:
    """Minimise entropy and the discrepancy from clean pictures' features.

    Args:
        model: the model.
        task: the classes.
        statistics: of clean pictures' features, from `jaxtta.clip.feature_statistics`.
        optimizer: an optax transformation; None for `MGTTA_PRESETS["imagenet-c"]`. Weights for
            another model come from `experiments/pretrain_mgg.py`.
        weight: of the discrepancy.
        tower: "image", or "both" to adapt the texts too, encoded anew at every step then.

    Returns:
        The adapter.

    References:
        https://arxiv.org/abs/2412.16901
    """
    prompts, encode = model.prompts(task), jax.jit(model.class_embeddings)

    def context(params: Params) -> MGTTAContext:
        classes = prompts if tower == "both" else encode(params, prompts)
        return MGTTAContext(classes, statistics.mean, statistics.std)

    trainable = normalisation_parameters(tower)
    optimizer = optimizer or MGTTA_PRESETS["imagenet-c"].optimizer()
    return online(objectives.mgtta(model, weight), context, trainable, optimizer)
