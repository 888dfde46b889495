"""T3A: test-time templates; class prototypes of the surest images, in the place of the classifier.

The classifier's rows and all images so far are supports of the class that they are predicted as; of
each class the K of lowest entropy count. With z an image's feature and S_k class k's supports,

    logits_k = s · z·c_k,   c_k = norm(Σ_{x ∈ S_k} norm(x)),   s = exp(logit_scale).

A batch joins before it is predicted. One forward pass an image.

References:
    Iwasawa and Matsuo, NeurIPS 2021, https://openreview.net/forum?id=e_yvNqkJKAW
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtta.adapters import settings
from jaxtta.adapters.base import Adapter, Array
from jaxtta.adapters.on_features import (
    FeatureMethod,
    class_embeddings,
    on_features,
    unit,
)
from jaxtta.losses import entropy
from jaxtta.models import Classifier, Outputs, Task
from jaxtta.models.checks import require_model


class T3ASupports(NamedTuple):
    """The surest images of each class; the classifier's rows join when they are used.

    Attributes:
        features: (classes, K, projection), of unit norm.
        entropy: (classes, K) in nats, infinite where there is none.
    """

    features: Array
    entropy: Array


def t3a_supports(
    classes: int, projection: int, size: int = 20, dtype: Any = jnp.float32
) -> T3ASupports:
    """No supports yet, with room for `size` a class."""
    features = jnp.zeros((classes, size, projection), dtype)
    return T3ASupports(features, jnp.full((classes, size), jnp.inf, dtype))


def t3a_logits(
    supports: T3ASupports, features: Array, logits: Array, rows: Array, mask: Array
) -> tuple[T3ASupports, Array, Array]:
    """Let a batch join the supports, and predict it.

    Args:
        supports: before the batch.
        features: (batch, projection), of unit norm.
        logits: (batch, classes) of the classifier.
        rows: (classes, projection), the classifier's rows: for CLIP the class embeddings times s.
        mask: (batch,) bool, false for padding, which does not join.

    Returns:
        The supports after the batch, the logits z·c (batch, classes), which are cosines where
        features have unit norm, and how many supports each class has, rows included (classes,).
    """
    supports = _join(supports, features, logits, mask)
    # The K surest of all are among the K surest images and the rows: no need to remember those.
    scores = jnp.matmul(rows, rows.T, precision="highest")
    used = _join(supports, unit(rows), scores, jnp.ones(len(rows), bool))
    there = jnp.isfinite(used.entropy)
    centroids = unit(jnp.where(there[..., None], used.features, 0).sum(1))
    return supports, jnp.matmul(features, centroids.T, precision="highest"), there.sum(-1)


def _join(supports: T3ASupports, features: Array, logits: Array, mask: Array) -> T3ASupports:
    """The surest of the supports and of the newcomers, for each class."""
    classes, size = supports.entropy.shape
    own = (logits.argmax(-1) == jnp.arange(classes)[:, None]) & mask  # (classes, batch)
    newcomers = jnp.where(own, entropy(logits).astype(supports.entropy.dtype), jnp.inf)
    lowest, places = jax.lax.top_k(-jnp.concatenate([supports.entropy, newcomers], axis=1), size)
    old = jnp.take_along_axis(supports.features, jnp.minimum(places, size - 1)[..., None], axis=1)
    new = features[jnp.maximum(places - size, 0)]
    kept = jnp.where((places < size)[..., None], old, new.astype(old.dtype))
    return T3ASupports(kept, -lowest)


def t3a(
    model: Classifier,
    task: Task | None,
    *,
    supports: int = 20,
    on: Adapter | None = None,
) -> Adapter:
    """Classify by prototypes of the surest images of each class.

    Args:
        model: a classifier with class embeddings and cosine logits, as CLIP.
        task: the classes.
        supports: K, how many a class has at most. "All" is a number no smaller than the images of
            the stream, which are kept.
        on: the adapter whose features and logits are used; None for the model as it is.

    Returns:
        The adapter.

    Raises:
        TypeError: if the model is not a classifier, the task not a `Task` or `on` no adapter.
        ValueError: if there are no supports, the model needs a task and there is none, or it has no
            cosine logits or, in `init`, no class embeddings.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.t3a(model, task, supports=20)
        >>> int(adapter.init(params).seen)
        0
    """
    require_model(model)
    settings.at_least(1, supports=supports)
    scale_of: Any = getattr(model, "logit_scale", None)
    if scale_of is None:
        raise ValueError("T3A needs a model with cosine logits; this one has no logit_scale")

    def init(outputs: Outputs) -> T3ASupports:
        classes, projection = class_embeddings(outputs, "T3A").shape
        return t3a_supports(classes, projection, supports, outputs.embeddings.dtype)

    def apply(
        params: Any, memory: T3ASupports, outputs: Outputs, mask: Array
    ) -> tuple[T3ASupports, Array]:
        scale, texts = scale_of(params), class_embeddings(outputs, "T3A")
        features, own = outputs.embeddings, outputs.logits
        memory, cosines, _ = t3a_logits(memory, features, own, scale * texts, mask)
        return memory, scale * cosines

    return on_features(model, task, FeatureMethod(init, apply), on)
