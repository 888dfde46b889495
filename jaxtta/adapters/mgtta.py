"""MGTTA: confident predictions from features distributed as the source's are.

With m_l, s_l the mean and standard deviation over the batch of the class token after layer l, and
M_l, S_l those of clean source images, the image tower's normalisation layers take one step per
batch, made by a learned optimiser, on

    L = mean_i H(p_i) + weight/64 · Σ_l (‖s_l − S_l‖² + ‖m_l − M_l‖²).

References:
    Deng et al., AAAI 2025, https://arxiv.org/abs/2412.16901
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

from jaxtta.adapters.base import Adapter, Array, Objective, ObjectiveValue
from jaxtta.adapters.online import online
from jaxtta.losses import entropy, masked_mean
from jaxtta.models import Batch, Classifier, FeatureStatistics, Task, as_batch, context_of
from jaxtta.models.checks import require_model
from jaxtta.models.feature_statistics import require_statistics
from jaxtta.optim import MGGParams, meta_gradient_generator
from jaxtta.tree import Trainable, merge, normalisation_parameters

SCALE = 64  # what the reference implementation divides the weight by, whatever the batch size
PAPER_LEARNING_RATE = 1e-3


class MGTTAContext(NamedTuple):
    """What the objective needs beside parameters and batch.

    Attributes:
        classes: the model's own context.
        mean: (layers, width) of the source features.
        std: (layers, width), unbiased.
    """

    classes: Any
    mean: Array | np.ndarray
    std: Array


def feature_discrepancy(
    features: Array, mask: Array | np.ndarray, mean: Array | np.ndarray, std: Array
) -> Array:
    """Squared distance of a batch's feature statistics from given ones.

    Args:
        features: (batch, …).
        mask: (batch,) bool, false for padding.
        mean: (…), to compare with.
        std: (…), unbiased.

    Returns:
        A scalar, summed over all features; 0 below two valid images, and so is its gradient.
    """
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    rows, count = mask.reshape(-1, *(1,) * mean.ndim), mask.sum()
    own_mean = jnp.where(rows, features, 0).sum(0) / jnp.maximum(count, 1)
    squares = (jnp.where(rows, features - own_mean, 0) ** 2).sum(0)
    varies = squares > 0  # the root of 0 has no derivative
    own_std = jnp.sqrt(jnp.where(varies, squares, 1) / jnp.maximum(count - 1, 1))
    own_std = jnp.where(varies, own_std, 0)
    distance = ((own_std - std) ** 2 + (own_mean - mean) ** 2).sum()
    return jnp.where(count > 1, distance, 0)


def check_statistics(mean: Any, shape: tuple[int, ...] | None) -> None:
    """Raise a ValueError for source statistics (layers, width) of a model with other features."""
    if shape is None:
        raise ValueError(
            "MGTTA needs layer features, which this model lacks (ResNets and SigLIP have none)"
        )
    if mean.shape != shape:
        raise ValueError(f"source statistics have shape {mean.shape}, this model needs {shape}")


def mgtta_objective(model: Classifier, weight: float = 0.4) -> Objective:
    """Minimise entropy + weight/64 · the discrepancy of feature statistics from the source's.

    Args:
        model: any classifier with layer features; the context is an `MGTTAContext`.
        weight: of the discrepancy; 0.4 in the paper, and 0.2 for ImageNet-R.

    Returns:
        The objective; it raises a ValueError if the statistics are another model's.
    """

    def objective(params: Any, context: MGTTAContext, batch: Batch) -> ObjectiveValue:
        if not isinstance(context, MGTTAContext):
            given = type(context).__name__
            raise TypeError(
                f"the state's context is a {given}, not MGTTA's: it is another adapter's"
            )
        outputs = model(params, context.classes, batch)
        features = outputs.layer_features
        check_statistics(context.mean, None if features is None else features.shape[1:])
        assert features is not None  # checked above; for the type checker
        distance = feature_discrepancy(features, batch.mask, context.mean, context.std)
        metrics = {
            "entropy": masked_mean(entropy(outputs.logits), batch.mask),
            "discrepancy": weight / SCALE * distance,
        }
        return metrics["entropy"] + metrics["discrepancy"], (outputs, metrics)

    return objective


def mgtta(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation,
    trainable: Trainable | None = None,
    statistics: FeatureStatistics,
    weight: float = 0.4,
) -> Adapter:
    """Minimise entropy and the discrepancy from clean images' features.

    Args:
        model: any classifier with layer features.
        task: the classes; None for a model that has its own.
        optimizer: an optax transformation; in the paper a meta gradient generator trained for this
            model, with a learning rate of 1e-3.
        trainable: which parameters to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`.
        statistics: of clean images' features, from `jaxtta.models.feature_statistics`.
        weight: of the discrepancy.

    Returns:
        The adapter.

    Raises:
        TypeError: as `tent`, or if the statistics are not `FeatureStatistics`.
        ValueError: for statistics of another model or that are not finite, a weight below 0, a
            model without layer features, or one that needs a task and has none.

    Examples:
        >>> statistics = jaxtta.models.feature_statistics(model, params, [images])  # clean images
        >>> phi, _ = jaxtta.optim.load_mgg(jaxtta.assets.PHI)  # other names: see `jaxtta.load`
        >>> optimizer = jaxtta.optim.meta_gradient_generator(phi, 1e-3)
        >>> adapter = jaxtta.adapters.mgtta(model, task, optimizer=optimizer, statistics=statistics)
    """
    if optimizer is None:
        raise ValueError("MGTTA needs an optimizer: a meta gradient generator for this model")
    if not weight >= 0:
        raise ValueError(f"weight is {weight}, expected at least 0")
    require_model(model)
    require_statistics(statistics)
    check_statistics(statistics.mean, model.feature_shape)
    if trainable is None:
        trainable = normalisation_parameters("image")
    classes = context_of(model, task, trainable)

    def context(params: Any) -> MGTTAContext:
        return MGTTAContext(classes(params), statistics.mean, statistics.std)

    return online(mgtta_objective(model, weight), context, trainable, optimizer)


def mgtta_training(
    model: Classifier,
    task: Task | None,
    params: Any,
    statistics: FeatureStatistics,
    trainable: Trainable,
    weight: float = 0.4,
    learning_rate: float = PAPER_LEARNING_RATE,
) -> tuple[Callable[..., Array], Callable[..., Adapter], tuple[Any, MGTTAContext]]:
    """What `jaxtta.optim.pretrain` needs to train a generator for a model.

    Args:
        model: any classifier with layer features.
        task: the classes; None for a model that has its own.
        params: the model's parameters.
        statistics: of clean images' features.
        trainable: which parameters are adapted, a predicate on paths.
        weight: of the discrepancy.
        learning_rate: of the adapter that is validated.

    Returns:
        `loss_of(frozen, adapted, images)`, the objective; `adapter_of(frozen, phi)`, MGTTA with a
        generator of these weights; and the `frozen` arrays: parameters and context.
    """
    objective = mgtta_objective(model, weight)
    classes = context_of(model, task, trainable)(params)

    def loss_of(frozen: Any, adapted: Any, images: Array) -> Array:
        params, context = frozen
        return objective(merge(params, adapted), context, as_batch(images))[0]

    def adapter_of(frozen: Any, phi: MGGParams) -> Adapter:
        generator = meta_gradient_generator(phi, learning_rate)
        return online(objective, lambda _: frozen[1], trainable, generator)

    return loss_of, adapter_of, (params, MGTTAContext(classes, statistics.mean, statistics.std))
