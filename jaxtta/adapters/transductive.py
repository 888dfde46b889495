"""What StatA and TransCLIP share: Gaussian classes fitted to a batch, without labels or training.

With ŷ the model's predictions, f the unit features of the images and W the cosines to each image's
nearest neighbours, the assignments z are updated several times in a row, all images at once, then
the Gaussians of the classes, and so on:

    z_i ∝ ŷ_i · exp(log N(f_i; μ, σ²)/50 + λ/(2·neighbours) · (Wᵀz + Wz)_i).

In memory W has batch × batch entries. Nothing is kept from batch to batch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtta.adapters import settings
from jaxtta.adapters.base import Adapter, Array, dot
from jaxtta.adapters.on_features import (
    FeatureMethod,
    class_embeddings,
    nearest,
    on_features,
    scaled_logits,
)
from jaxtta.models import Classifier, Outputs, Task

LEAST_VARIANCE = 1e-12
"""For images that are all the same; far below the variance of any two pictures."""


class Fit(NamedTuple):
    """What was fitted to a batch.

    Attributes:
        log_z: (batch, classes), log-probabilities of the images' classes.
        means: (classes, projection), of unit norm.
        variances: (classes, projection), or (projection,) where the classes share them.
        weights: (classes,), β: how much each class followed its images in the last update.
    """

    log_z: Array
    means: Array
    variances: Array
    weights: Array


def probabilities(log_z: Array, mask: Array) -> Array:
    """Z (batch, classes), 0 for padding."""
    return jnp.where(mask[:, None], jnp.exp(log_z), 0)


def shares(log_z: Array, mask: Array) -> Array:
    """Each image's share of z in each class, (classes, batch): z/Σz, where Σz may underflow."""
    lowest = -jnp.finfo(log_z.dtype).max
    return jax.nn.softmax(jnp.where(mask[:, None], log_z, lowest), axis=0).T


def spread(z: Array, features: Array, means: Array) -> Array:
    """Mean over all images of Σ_k z_ik (f_i − μ_k)², (projection,)."""
    squares = dot(z.sum(1), features**2) + dot(z.sum(0), means**2)
    squares = squares - 2 * (dot(z.T, features) * means).sum(0)
    return jnp.maximum(squares / jnp.maximum(z.sum(), 1), LEAST_VARIANCE)


def fit_classes(
    features: Array,
    prior: Array,
    mask: Array,
    start: tuple[Array, Array, Array],
    gaussians: Callable[[Array], tuple[Array, Array, Array]],
    laplacian: float,
    neighbours: int,
    iterations: int,
    inner_iterations: int,
) -> Fit:
    """Update assignments and Gaussians in turns.

    Args:
        features: (batch, projection), of unit norm; padding in zeros.
        prior: (batch, classes), log ŷ.
        mask: (batch,) bool, false for padding.
        start: means, variances and weights to begin with.
        gaussians: `gaussians(log_z)` gives the next ones.
        laplacian: λ.
        neighbours: of each image.
        iterations: updates of the Gaussians.
        inner_iterations: updates of z after each, and before the first.

    Returns:
        The fit.
    """
    chosen, cosines = nearest(features, mask, neighbours)
    graph = jnp.where(chosen, cosines, 0)
    graph = laplacian / (2 * neighbours) * (graph + graph.T)
    centre = features.sum(0) / jnp.maximum(mask.sum(), 1)  # differences of smaller numbers
    centred = features - centre

    def assign(log_z: Array, means: Array, variances: Array) -> Array:
        precisions, means = 1 / jnp.atleast_2d(variances), means - centre
        distances = dot(centred**2, precisions.T) - 2 * dot(centred, (means * precisions).T)
        distances = distances + (means**2 * precisions).sum(-1)
        own = prior - (distances - jnp.log(precisions).sum(-1)) / 2 / 50

        def inner(_: int, log_z: Array) -> Array:
            return jax.nn.log_softmax(own + dot(graph, probabilities(log_z, mask)))

        return jax.lax.fori_loop(0, inner_iterations, inner, log_z)

    def update(_: int, fit: Fit) -> Fit:
        means, variances, weights = gaussians(fit.log_z)
        return Fit(assign(fit.log_z, means, variances), means, variances, weights)

    first = Fit(assign(prior, *start[:2]), *start)
    return jax.lax.fori_loop(0, iterations, update, first)


def transductive(
    name: str,
    model: Classifier,
    task: Task | None,
    fit: Callable[..., Fit],
    scale: float | None,
    on: Adapter | None,
    laplacian: float,
    neighbours: int,
    iterations: int,
    inner_iterations: int,
) -> Adapter:
    """Make an adapter that fits every batch.

    Args:
        name: of the method, for errors.
        model: a classifier with class embeddings.
        task: the classes; None for a model that has its own.
        fit: `fit(features, texts, logits, mask, **settings)`, with the last four arguments.
        scale: of the cosines in the logits; None for the model's own logits.
        on: the adapter whose features and logits are used; None for the model as it is.
        laplacian: λ, and so on as of `fit_classes`.
        neighbours: of each image.
        iterations: updates of the Gaussians.
        inner_iterations: updates of z.

    Returns:
        The adapter.

    Raises:
        ValueError: if a setting is out of range.
    """
    loops = {"iterations": iterations, "inner_iterations": inner_iterations}
    settings.at_least(0, laplacian=laplacian)
    settings.positive_or_none(scale=scale)
    settings.at_least(1, neighbours=neighbours, **loops)
    fit = partial(fit, laplacian=laplacian, neighbours=neighbours, **loops)

    def apply(params: Any, memory: Any, outputs: Outputs, mask: Array) -> tuple[Any, Array]:
        del params
        texts, logits = class_embeddings(outputs, name), scaled_logits(outputs, scale, name)
        return memory, fit(outputs.embeddings, texts, logits, mask).log_z

    return on_features(model, task, FeatureMethod(lambda outputs: (), apply), on)
