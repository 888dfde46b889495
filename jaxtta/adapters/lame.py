"""LAME: Laplacian adjusted maximum-likelihood estimation; labels that agree with the neighbours'.

The model stays as it is; a batch's predictions p are moved towards those of similar images. From
z = p, until the energy E stops changing, at most 100 times, with W the affinities of the images,

    z_i ← softmax(log p_i + Σ_j W_ij z_j),   E = Σ_i z_i·(log z_i − log p_i − Σ_j W_ij z_j).

It helps where neighbours share a class, as in streams sorted by class, and collapses elsewhere. One
forward pass an image, and the product of W and z at every iteration.

References:
    Boudiaf et al., CVPR 2022, https://arxiv.org/abs/2201.05718
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxtta.adapters import settings
from jaxtta.adapters.base import Adapter, Array
from jaxtta.adapters.on_features import FeatureMethod, nearest, on_features
from jaxtta.models import Classifier, Outputs, Task

Affinity = Literal["knn_symmetric", "knn", "rbf", "linear"]
AFFINITIES = ("knn_symmetric", "knn", "rbf", "linear")


def lame_affinity(
    features: Array, mask: Array, affinity: Affinity = "knn_symmetric", neighbours: int = 5
) -> Array:
    """How similar the images of a batch are.

    Args:
        features: (batch, projection), of unit norm; padding in zeros.
        mask: (batch,) bool, false for padding, which has no affinity to anything.
        affinity: knn, 1 for the nearest neighbours of an image; knn_symmetric, the mean of that and
            its transpose; rbf, exp(−d²/2σ²), with σ the mean distance to the `neighbours`-th
            nearest image, each the nearest to itself; linear, the cosines.
        neighbours: how many.

    Returns:
        (batch, batch), the affinities W.

    Examples:
        >>> features = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # of unit norm
        >>> jaxtta.adapters.lame_affinity(features, jnp.ones(3, bool), "knn", neighbours=1).tolist()
        [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    chosen, cosines = nearest(features, mask, neighbours)
    pairs = mask & mask[:, None]
    if affinity == "linear":
        return jnp.where(pairs, cosines, 0)
    if affinity != "rbf":
        graph = chosen.astype(features.dtype)
        return graph if affinity == "knn" else (graph + graph.T) / 2
    itself = jnp.eye(len(features), dtype=bool)
    squares = jnp.where(itself, 0, jnp.maximum(2 - 2 * cosines, 0))
    count = mask.sum()
    ordered = jnp.sort(jnp.where(pairs, squares, jnp.inf), axis=-1)
    place = jnp.maximum(jnp.minimum(neighbours, count) - 1, 0)
    radii = jnp.where(mask, jnp.sqrt(ordered[:, place]), 0)
    sigma = radii.sum() / jnp.maximum(count, 1)
    # σ is 0 where all images are the same: every affinity is 1 then.
    exponent = squares / (2 * jnp.where(sigma > 0, sigma, 1) ** 2)
    return jnp.where(pairs, jnp.exp(-exponent), 0)


def lame_log_probabilities(
    logits: Array, affinities: Array, mask: Array, iterations: int = 100
) -> Array:
    """Let the images of a batch agree with those that they are similar to.

    Args:
        logits: (batch, classes).
        affinities: (batch, batch), as from `lame_affinity`.
        mask: (batch,) bool, false for padding.
        iterations: at most; it ends when the energy changes by less than 1e-8 of itself.

    Returns:
        (batch, classes), the logarithms of z.
    """
    prior = jnp.log(jax.nn.softmax(logits) + 1e-10)
    first = jax.nn.log_softmax(prior)

    def energy(log_z: Array, agreement: Array) -> Array:
        terms = (jnp.exp(log_z) * (log_z - prior - agreement)).sum(-1)
        return jnp.where(mask, terms, 0).sum()

    def goes_on(carry: tuple[Array, Array, Array, Array]) -> Array:
        number, _, now, before = carry
        still = jnp.abs(now - before) <= 1e-8 * jnp.abs(before)
        return (number < iterations) & ~((number > 2) & still)

    def update(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        number, log_z, now, _ = carry
        z = jnp.where(mask[:, None], jnp.exp(log_z), 0)
        agreement = jnp.matmul(affinities, z, precision="highest")
        log_z = jax.nn.log_softmax(prior + agreement)
        return number + 1, log_z, energy(log_z, agreement), now

    unknown = jnp.asarray(jnp.inf, first.dtype)
    return jax.lax.while_loop(goes_on, update, (jnp.int32(0), first, unknown, unknown))[1]


def lame(
    model: Classifier,
    task: Task | None,
    *,
    affinity: Affinity = "knn_symmetric",
    neighbours: int = 5,
    iterations: int = 100,
    on: Adapter | None = None,
) -> Adapter:
    """Let the predictions of similar images in a batch agree.

    Nothing is remembered. A batch of one image has no neighbours, and keeps its prediction.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        affinity: which images are similar, see `lame_affinity`; the paper's kNN graph, or rbf, the
            default of other comparisons.
        neighbours: of the graph, or where rbf measures its width.
        iterations: at most.
        on: the adapter whose features and logits are used; None for the model as it is.

    Returns:
        The adapter; its logits are log-probabilities.

    Raises:
        TypeError: if the model is not a classifier, the task not a `Task` or `on` no adapter.
        ValueError: if a setting is out of range, or the model needs a task and there is none.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.lame(model, task, neighbours=3)
        >>> state, prediction = jax.jit(adapter.step)(params, adapter.init(params), images)
        >>> tent = jaxtta.adapters.tent(model, task)
        >>> adapter = jaxtta.adapters.lame(model, task, on=tent)  # of TENT's predictions
    """
    if affinity not in AFFINITIES:
        raise ValueError(f"affinity is {affinity!r}, expected one of {', '.join(AFFINITIES)}")
    settings.at_least(1, neighbours=neighbours, iterations=iterations)

    def apply(params: Any, memory: Any, outputs: Outputs, mask: Array) -> tuple[Any, Array]:
        del params
        affinities = lame_affinity(outputs.embeddings, mask, affinity, neighbours)
        return memory, lame_log_probabilities(outputs.logits, affinities, mask, iterations)

    return on_features(model, task, FeatureMethod(lambda outputs: (), apply), on)
