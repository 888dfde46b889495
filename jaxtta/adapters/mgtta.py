"""MGTTA: normalisation parameters adapted towards the source's feature statistics."""

import jax
import optax

from jaxtta import objectives
from jaxtta.adapters.base import Adapter
from jaxtta.adapters.online import online
from jaxtta.clip import CLIP, FeatureStatistics, Params, Task
from jaxtta.objectives import MGTTAContext
from jaxtta.tree import normalisation_parameters


def mgtta(
    model: CLIP,
    task: Task,
    statistics: FeatureStatistics,
    optimizer: optax.GradientTransformation,
    weight: float = 0.4,
    tower: str = "image",
) -> Adapter:
    """Minimise entropy and the discrepancy from clean pictures' features.

    Args:
        model: the model.
        task: the classes.
        statistics: of clean pictures' features, from `jaxtta.clip.feature_statistics`.
        optimizer: an optax transformation; published with `jaxtta.optim.meta_gradient_generator`.
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
    return online(objectives.mgtta(model, weight), context, trainable, optimizer)
