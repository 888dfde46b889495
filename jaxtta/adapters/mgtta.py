"""MGTTA: normalisation parameters adapted towards the source's feature statistics."""

from typing import Literal

import jax
import optax

from jaxtta import assets, objectives
from jaxtta.adapters.base import Adapter, Preset
from jaxtta.adapters.online import online
from jaxtta.models import CLIP, FeatureStatistics, ImageClassifier, Params, Task, feature_shape
from jaxtta.objectives import MGTTAContext
from jaxtta.optim import load_mgg, meta_gradient_generator
from jaxtta.tree import normalisation_parameters

PUBLISHED_RATE = 1e-3
MGTTA_PRESETS = {"imagenet-c": Preset(lambda: shipped_generator(PUBLISHED_RATE), 64)}
"""The published rate and batch size, with the shipped weights, which are the embedded model's."""


def shipped_generator(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """The meta gradient generator with the weights in `jaxtta.assets.PHI`."""
    return meta_gradient_generator(load_mgg(assets.PHI)[0], learning_rate)


def mgtta(
    model: CLIP | ImageClassifier,
    task: Task | None,
    statistics: FeatureStatistics,
    optimizer: optax.GradientTransformation | None = None,
    weight: float = 0.4,
    tower: Literal["image", "both"] = "image",
) -> Adapter:
    """Minimise entropy and the discrepancy from clean images' features.

    Args:
        model: the model.
        task: the classes; None for a classifier, which has its own.
        statistics: of clean images' features, from `jaxtta.models.feature_statistics`.
        optimizer: an optax transformation; None for `MGTTA_PRESETS["imagenet-c"]`. Weights for
            another model come from `experiments/pretrain_mgg.py`.
        weight: of the discrepancy.
        tower: "image", or "both" to adapt the texts too, encoded anew at every step then.

    Returns:
        The adapter.

    Raises:
        ValueError: if the tower is another, or the statistics are another model's.

    References:
        https://arxiv.org/abs/2412.16901
    """
    if tower not in ("image", "both"):
        raise ValueError(f"tower is {tower!r}, expected image or both")
    objectives.check_statistics(statistics.mean, feature_shape(model))
    prompts = None if task is None else model.prompts(task)

    def context(params: Params) -> MGTTAContext:
        classes = prompts
        if task is not None and tower == "image":
            classes = jax.jit(model.class_embeddings)(params, prompts)
        return MGTTAContext(classes, statistics.mean, statistics.std)

    trainable = normalisation_parameters(tower)
    optimizer = optimizer or MGTTA_PRESETS["imagenet-c"].optimizer()
    return online(objectives.mgtta(model, weight), context, trainable, optimizer)
