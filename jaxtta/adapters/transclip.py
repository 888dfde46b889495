"""TransCLIP: Gaussian classes fitted to a whole set of images, without labels or training.

Images are assigned to classes as `transductive` says, z; with f their unit features,

    μ_k = norm(Σ_i z_ik f_i),   σ² = mean_i Σ_k z_ik (f_i − μ_k)²,

one σ² for all classes. The means begin at the surest eight images of each class. Nothing holds
a class that does not occur: for small batches with few of the classes see `stata`. One forward pass
an image.

References:
    Zanella et al., NeurIPS 2024, https://arxiv.org/abs/2406.01837
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from jaxtta.adapters.base import Adapter, Array, dot
from jaxtta.adapters.on_features import unit
from jaxtta.adapters.transductive import (
    Fit,
    fit_classes,
    probabilities,
    shares,
    spread,
    transductive,
)
from jaxtta.models import Classifier, Task

SUREST = 8
"""Images of a class that its mean begins with."""


def transclip_fit(
    features: Array,
    texts: Array,
    logits: Array,
    mask: Array,
    *,
    laplacian: float = 1.0,
    neighbours: int = 3,
    iterations: int = 10,
    inner_iterations: int = 5,
    start: Literal["images", "text"] = "images",
) -> Fit:
    """Fit Gaussians to a batch; settings as of `transclip`.

    Args:
        features: (batch, projection), of unit norm; padding in zeros.
        texts: (classes, projection), class embeddings of unit norm.
        logits: (batch, classes), of ŷ.
        mask: (batch,) bool, false for padding.
        laplacian: λ.
        neighbours: of each image.
        iterations: updates of the Gaussians.
        inner_iterations: updates of z after each, and before the first.
        start: of the means.

    Returns:
        The fit.
    """
    prior = jax.nn.log_softmax(logits)
    means, ones = texts, jnp.ones(len(texts), prior.dtype)
    if start == "images":
        ranked = jnp.where(mask, prior.T, -jnp.finfo(prior.dtype).max)
        surest, places = jax.lax.top_k(ranked, min(SUREST, len(features)))
        means = unit((jax.nn.softmax(surest)[..., None] * features[places]).sum(1))

    def gaussians(log_z: Array) -> tuple[Array, Array, Array]:
        means = unit(dot(shares(log_z, mask), features))
        return means, spread(probabilities(log_z, mask), features, means), ones

    first = means, jnp.full(texts.shape[1:], 1 / texts.shape[1], prior.dtype), ones
    options = laplacian, neighbours, iterations, inner_iterations
    return fit_classes(features, prior, mask, first, gaussians, *options)


def transclip(
    model: Classifier,
    task: Task | None,
    *,
    laplacian: float = 1.0,
    neighbours: int = 3,
    iterations: int = 10,
    inner_iterations: int = 5,
    start: Literal["images", "text"] = "images",
    scale: float | None = None,
    on: Adapter | None = None,
) -> Adapter:
    """Assign a batch's images to Gaussian classes.

    Each batch is fitted anew. Below eight images, the means begin at those that there are.

    Args:
        model: a classifier with class embeddings.
        task: the classes; None for a model that has its own.
        laplacian: λ, weight of the neighbours' assignments.
        neighbours: of each image.
        iterations: updates of the Gaussians.
        inner_iterations: updates of the assignments after each, and before the first.
        start: of the means: images, the surest of each class; or text, the class embeddings.
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
        With `model` and `task` of `jaxtta.load`'s example; one batch has all images:

        >>> adapter = jaxtta.adapters.transclip(model, task, laplacian=1.0)
    """
    if start not in ("images", "text"):
        raise ValueError(f"start is {start!r}, expected images or text")
    fit = partial(transclip_fit, start=start)
    options = laplacian, neighbours, iterations, inner_iterations
    return transductive("TransCLIP", model, task, fit, scale, on, *options)
