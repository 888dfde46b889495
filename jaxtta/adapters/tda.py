"""TDA: a training-free dynamic adapter; caches of sure images' features and of unsure ones'.

A positive cache keeps, for each class, the images predicted as it with the lowest entropy, and a
negative one those that are neither sure nor lost. With f an image's unit feature, l its logits, and
f_j, p_j features and probabilities in a cache,

    logits = l + α⁺ Σ_{j ∈ pos} exp(−β⁺(1 − f·f_j)) onehot(argmax p_j)
               − α⁻ Σ_{j ∈ neg} exp(−β⁻(1 − f·f_j)) 1[0.03 < p_j < 1].

An image enters before it is predicted, where there is room or in the place of a less sure one; so
the order of the stream matters. One forward pass an image.

References:
    Karmanov et al., CVPR 2024, https://arxiv.org/abs/2403.18293
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.adapters import settings
from jaxtta.adapters.base import Adapter, Array
from jaxtta.adapters.on_features import FeatureMethod, on_features, scaled_logits
from jaxtta.adapters.tda_cache import Caches, TDACache, enter, tda_caches
from jaxtta.models import Classifier, Outputs, Task

TDA_PRESETS = {
    name: {"alpha": alpha, "beta": beta}
    for name, alpha, beta in (
        *(("imagenet", 2.0, 5.0), ("imagenet-a", 2.0, 5.0), ("imagenet-v2", 1.0, 8.0)),
        *(("imagenet-r", 1.0, 8.0), ("imagenet-sketch", 2.363, 7.45), ("caltech101", 5.0, 5.0)),
        *(("dtd", 2.0, 3.0), ("eurosat", 4.0, 8.0), ("fgvc-aircraft", 2.0, 2.0)),
        *(("food101", 1.0, 1.0), ("flowers102", 1.0, 5.0), ("oxford-pets", 2.0, 7.0)),
        *(("stanford-cars", 1.0, 7.0), ("sun397", 2.0, 3.0), ("ucf101", 3.0, 8.0)),
    )
}
"""α⁺ and β⁺ of the reference implementation (kdiAAA/TDA @e697fb0), chosen with labels there. Its
runs on ImageNet-A, V2, R and Sketch average the surest of 64 views of an image; here it is one."""


def tda_logits(
    caches: Caches,
    features: Array,
    logits: Array,
    mask: Array,
    *,
    alpha: float = 2.0,
    beta: float = 5.0,
    negative_alpha: float = 0.117,
    negative_beta: float = 1.0,
    entropy_range: tuple[float, float] = (0.2, 0.5),
    probability_range: tuple[float, float] = (0.03, 1.0),
    probabilities: Array | None = None,
) -> tuple[Caches, Array]:
    """Let images enter the caches, and predict each, one after another.

    Args:
        caches: before the first image.
        features: (batch, projection), of unit norm, or means of unit features of an image's views.
        logits: (batch, classes).
        mask: (batch,) bool, false for padding, which does not enter.
        alpha: α⁺, and so on as in `tda`.
        beta: β⁺.
        negative_alpha: α⁻.
        negative_beta: β⁻.
        entropy_range: of the images that enter the negative cache.
        probability_range: of the classes that they speak against.
        probabilities: (batch, classes), where they are not the logits' own, as of means over views.

    Returns:
        The caches after the last image, and the logits (batch, classes).
    """
    probabilities = jax.nn.softmax(logits) if probabilities is None else probabilities
    unsure = jax.scipy.special.entr(probabilities).sum(-1)
    (low, high), (rare, sure) = entropy_range, probability_range
    share = unsure / np.log2(logits.shape[-1])  # nats over bits, as the ranges were chosen
    candidates = mask & (low < share) & (share < high)

    def near(cache: TDACache, feature: Array, sharpness: float) -> Array:
        cosines = jnp.matmul(cache.features, feature, precision="highest")
        return jnp.where(jnp.isfinite(cache.entropy), jnp.exp(sharpness * (cosines - 1)), 0)

    def one(caches: Caches, row: tuple[Array, ...]) -> tuple[Caches, Array]:
        feature, own, p, unsure, valid, candidate = row
        label, (positive, negative) = own.argmax(), caches
        positive = enter(positive, label, TDACache(feature, unsure), valid)
        negative = enter(negative, label, TDACache(feature, unsure, p), candidate)
        speaks = (rare < negative.probabilities) & (negative.probabilities < sure)
        against = near(negative, feature, negative_beta)[..., None] * speaks
        own = own + alpha * near(positive, feature, beta).sum(-1)
        return (positive, negative), own - negative_alpha * against.sum((0, 1))

    return jax.lax.scan(one, caches, (features, logits, probabilities, unsure, mask, candidates))


def tda(
    model: Classifier,
    task: Task | None,
    *,
    alpha: float = 2.0,
    beta: float = 5.0,
    size: int = 3,
    negative_alpha: float = 0.117,
    negative_beta: float = 1.0,
    negative_size: int = 2,
    entropy_range: tuple[float, float] = (0.2, 0.5),
    probability_range: tuple[float, float] = (0.03, 1.0),
    scale: float | None = None,
    on: Adapter | None = None,
) -> Adapter:
    """Correct each image's logits by those of the images that came before.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        alpha: α⁺, weight of the positive cache; this and β⁺ are ImageNet's, see `TDA_PRESETS`.
        beta: β⁺, sharpness of its affinity.
        size: images a class of it.
        negative_alpha: α⁻, weight of the negative cache.
        negative_beta: β⁻.
        negative_size: images a class of it.
        entropy_range: entropies, as parts of log₂ of the number of classes, in nats (so at most
            0.693), between which an image enters the negative cache.
        probability_range: probabilities between which it speaks against a class.
        scale: of the cosines in the logits; None for the model's own logits. The reference
            implementation's 100 is CLIP's own scale.
        on: the adapter whose features and logits are used; None for the model as it is.

    Returns:
        The adapter.

    Raises:
        TypeError: if the model is not a classifier, the task not a `Task` or `on` no adapter.
        ValueError: if a setting is out of range, or the model needs a task and there is none.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.tda(model, task, **jaxtta.adapters.TDA_PRESETS["imagenet"])
        >>> state, prediction = jax.jit(adapter.step)(params, adapter.init(params), images)
        >>> prediction.logits.shape
        (8, 10)
    """
    weights = {"alpha": alpha, "beta": beta}
    weights |= {"negative_alpha": negative_alpha, "negative_beta": negative_beta}
    settings.at_least(0, **weights)
    settings.at_least(1, size=size, negative_size=negative_size)
    settings.positive_or_none(scale=scale)
    ranges = {"entropy_range": entropy_range, "probability_range": probability_range}
    settings.in_order(**ranges)
    predict = partial(tda_logits, **weights, **ranges)

    def init(outputs: Outputs) -> Caches:
        sizes = outputs.logits.shape[-1], outputs.embeddings.shape[-1]
        return tda_caches(*sizes, size, negative_size, outputs.embeddings.dtype)

    def apply(params: Any, caches: Caches, outputs: Outputs, mask: Array) -> tuple[Caches, Array]:
        del params
        logits = scaled_logits(outputs, scale, "TDA with a scale")
        return predict(caches, outputs.embeddings, logits, mask)

    return on_features(model, task, FeatureMethod(init, apply), on)
