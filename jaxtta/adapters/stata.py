"""StatA: Gaussian classes fitted to a batch and anchored in the text, without labels or training.

Images are assigned to classes as `transductive` says, z. With t_k the class embeddings, n_k the
images most likely of class k, β_k = n_k/(α + n_k), and m_k, s_k mean and spread of its images,

    μ_k = norm(β_k norm(m_k) + (1 − β_k) t_k),   σ²_k = β_k s_k + (1 − β_k)(σ²_0 + (t_k − μ_k)²),

σ²_0 the spread of all images around the texts. A class without images keeps its text, which makes
the method safe where few of the classes come. One forward pass an image.

References:
    Zanella et al., CVPR 2025, https://arxiv.org/abs/2501.03729
"""

from functools import partial

import jax
import jax.numpy as jnp

from jaxtta.adapters import settings
from jaxtta.adapters.base import Adapter, Array, dot
from jaxtta.adapters.on_features import unit
from jaxtta.adapters.transductive import (
    LEAST_VARIANCE,
    Fit,
    fit_classes,
    probabilities,
    shares,
    spread,
    transductive,
)
from jaxtta.models import Classifier, Task


def stata_fit(
    features: Array,
    texts: Array,
    logits: Array,
    mask: Array,
    *,
    alpha: float = 1.0,
    laplacian: float = 1.0,
    neighbours: int = 3,
    iterations: int = 10,
    inner_iterations: int = 5,
    soft_beta: bool = False,
) -> Fit:
    """Fit anchored Gaussians to a batch; settings as of `stata`.

    Args:
        features: (batch, projection), of unit norm; padding in zeros.
        texts: (classes, projection), class embeddings of unit norm.
        logits: (batch, classes), of ŷ.
        mask: (batch,) bool, false for padding.
        alpha: α.
        laplacian: λ.
        neighbours: of each image.
        iterations: updates of the Gaussians.
        inner_iterations: updates of z after each, and before the first.
        soft_beta: whether n_k is Σ z.

    Returns:
        The fit.
    """
    prior = jax.nn.log_softmax(logits)
    variance = spread(probabilities(prior, mask), features, texts)

    def gaussians(log_z: Array) -> tuple[Array, Array, Array]:
        hard = (log_z.argmax(-1)[:, None] == jnp.arange(len(texts))) & mask[:, None]
        counts = (probabilities(log_z, mask) if soft_beta else hard.astype(prior.dtype)).sum(0)
        weights = counts / (alpha + counts)
        own, beta = shares(log_z, mask), weights[:, None]
        mean = dot(own, features)
        means = unit(beta * unit(mean) + (1 - beta) * texts)
        around = jnp.maximum(dot(own, features**2) - 2 * means * mean + means**2, 0)
        variances = beta * around + (1 - beta) * (variance + (texts - means) ** 2)
        return means, jnp.maximum(variances, LEAST_VARIANCE), weights

    start = texts, jnp.broadcast_to(variance, texts.shape), jnp.zeros(len(texts), prior.dtype)
    options = laplacian, neighbours, iterations, inner_iterations
    return fit_classes(features, prior, mask, start, gaussians, *options)


def stata(
    model: Classifier,
    task: Task | None,
    *,
    alpha: float = 1.0,
    laplacian: float = 1.0,
    neighbours: int = 3,
    iterations: int = 10,
    inner_iterations: int = 5,
    soft_beta: bool = False,
    scale: float | None = None,
    on: Adapter | None = None,
) -> Adapter:
    """Assign a batch's images to Gaussian classes that are anchored in the text.

    Each batch is fitted anew. It may have one image, which has no neighbours.

    Args:
        model: a classifier with class embeddings.
        task: the classes; None for a model that has its own.
        alpha: how many images of a class weigh as much as its text.
        laplacian: λ, weight of the neighbours' assignments.
        neighbours: of each image.
        iterations: updates of the Gaussians.
        inner_iterations: updates of the assignments after each, and before the first.
        soft_beta: whether n_k is Σ z, not the number of images that are most likely of class k.
        scale: of the cosines in ŷ's logits; None for the model's own logits. The reference
            implementation's 100 is CLIP's own scale.
        on: the adapter whose features and logits are used; None for the model as it is.

    Returns:
        The adapter; its logits are log-probabilities.

    Raises:
        TypeError: if the model is not a classifier, the task not a `Task` or `on` no adapter.
        ValueError: if a setting is out of range, the model needs a task and there is none, or, in
            `init`, it has no class embeddings.

    Examples:
        With `model` and `task` of `jaxtta.load`'s example, for batches of 64 to 1,000 images:

        >>> adapter = jaxtta.adapters.stata(model, task)
    """
    settings.positive(alpha=alpha)
    fit = partial(stata_fit, alpha=alpha, soft_beta=soft_beta)
    options = laplacian, neighbours, iterations, inner_iterations
    return transductive("StatA", model, task, fit, scale, on, *options)
