"""MTA: a robust mean of an image's views, found by mean shift with a weight for each view.

With f̂_n and p_n the unit embeddings and probabilities of N views, W_nm = p_n·p_m, and h_n² half the
mean squared distance from f̂_n to its ⌊0.3 (N − 1)⌋ nearest other views, the mode m (at first the
plain view) and the weights y (at first 1/N) are improved five times in turn:

    K_n = exp(−‖f̂_n − m‖²/2h_n²),   y ← softmax((K + λ_q W y)/λ_y)      up to five times,
    m ← norm(Σ_n K_n(m) y_n f̂_n)                                         up to five times,

each until the change is below 1e-6. The logits are s · m·t̂. All loops run through; what has
stopped is kept.

Cost per image: 64 image passes forward, none backward (N forward passes, counted in the program).

References:
    Zanella and Ben Ayed 2024, https://arxiv.org/abs/2405.02266
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxtta.adapters import image_views, settings
from jaxtta.adapters.base import Adapter, Array, cuts_views
from jaxtta.adapters.of_views import Predict, of_views, unit_embeddings
from jaxtta.models import Classifier, Task, l2_normalize

ROUNDS, INNER, SMALL_CHANGE, NEIGHBOURS = 5, 5, 1e-6, 0.3
LEAST_BANDWIDTH = 1e-4  # of views that are all the same: their distances are rounding


class MTAOutput(NamedTuple):
    """The result for one image.

    Attributes:
        mode: (projection,), the robust mean, of unit norm.
        weights: (N,), how much each view belongs to it; their sum is 1.
        bandwidth: (N,), h, of each view.
        affinity: (N, N), W.
        logits: (classes,).
    """

    mode: Array
    weights: Array
    bandwidth: Array
    affinity: Array
    logits: Array


def mean_shift(
    embeddings: Array,
    classes: Array,
    scale: Array | float,
    lambda_q: float = 4.0,
    lambda_y: float = 0.2,
) -> MTAOutput:
    """Find the mode of one image's views.

    Args:
        embeddings: (N, projection), unit embeddings of its views, the plain one first.
        classes: (classes, projection), unit embeddings of the classes.
        scale: () the model's factor on the cosines.
        lambda_q: how much views of the same prediction hold together.
        lambda_y: of the entropy of the weights; the smaller, the fewer views count.

    Returns:
        The mode, the weights, and the prediction.

    References:
        Zanella and Ben Ayed 2024, https://arxiv.org/abs/2405.02266
    """
    count, dtype = len(embeddings), embeddings.dtype
    scale = jnp.asarray(scale, dtype)
    probabilities = jax.nn.softmax(image_views.cosine_logits(scale, embeddings, classes))
    affinity = jnp.matmul(probabilities, probabilities.T, precision="highest")
    # Differences, since 2 − 2cos of views that are nearly the same is rounding.
    distances = ((embeddings[:, None] - embeddings) ** 2).sum(-1)
    nearest = jnp.sort(distances, -1)[:, 1 : 1 + max(int(NEIGHBOURS * (count - 1)), 1)]
    bandwidth = jnp.maximum(jnp.sqrt(nearest.mean(-1) / 2), LEAST_BANDWIDTH)

    def log_kernel(mode: Array) -> Array:
        return -((embeddings - mode) ** 2).sum(-1) / (2 * bandwidth**2)

    def shift(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        mode, weights = state
        near = jnp.exp(log_kernel(mode))

        def reweigh(y: Array) -> Array:
            pull = jnp.matmul(affinity, y, precision="highest")
            return jax.nn.softmax((near + lambda_q * pull) / lambda_y)

        def move(m: Array) -> Array:
            # Only the direction counts: a softmax, since far from all views every kernel is 0.
            pull = jax.nn.softmax(log_kernel(m) + jnp.log(weights))
            return l2_normalize(jnp.matmul(pull, embeddings, precision="highest"))

        weights = _settle(reweigh, weights)
        return (_settle(move, mode), weights), None

    start = embeddings[0], jnp.full(count, 1 / count, dtype)
    (mode, weights), _ = jax.lax.scan(shift, start, length=ROUNDS)
    logits = image_views.cosine_logits(scale, mode, classes)
    return MTAOutput(mode, weights, bandwidth, affinity, logits)


def _settle(update: Callable[[Array], Array], x: Array) -> Array:
    """Repeat an update until the change is small; the last of the repetitions do nothing then."""

    def again(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        x, still = carry
        new = update(x)
        return (jnp.where(still, x, new), still | (jnp.linalg.norm(new - x) < SMALL_CHANGE)), None

    return jax.lax.scan(again, (x, jnp.zeros((), bool)), length=INNER)[0][0]


@cuts_views
def mta(
    model: Classifier,
    task: Task | None,
    *,
    lambda_q: float = 4.0,
    lambda_y: float = 0.2,
    views: int = 64,
    scale: tuple[float, float] = (0.08, 1.0),
    views_per_chunk: int = 8,
) -> Adapter:
    """Predict each image from the mode of its views; nothing is trained or carried.

    Args:
        model: a model with cosine logits whose images do not mix, as CLIP.
        task: the classes.
        lambda_q: how much views of the same prediction hold together.
        lambda_y: of the entropy of the weights; the smaller, the fewer views count.
        views: N, the views of an image, at least two; the first is the plain preprocessing.
        scale: least and greatest share of a random crop's area.
        views_per_chunk: views that are encoded at once; fewer need less memory.

    Returns:
        The adapter.

    Raises:
        TypeError: if the model is not a classifier, or the task not one that it takes.
        ValueError: if a setting makes no sense, or the model lacks what the method needs.

    Examples:
        With `model` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.mta(model, task, views=16)

    References:
        Zanella and Ben Ayed 2024, https://arxiv.org/abs/2405.02266
    """
    image_views.require_cosines(model, "MTA")
    settings.at_least(2, views=views)  # the bandwidth is a distance
    settings.at_least(0, lambda_q=lambda_q)
    settings.positive(lambda_y=lambda_y)

    def prepare(params: Any, classes: Array) -> Predict:
        factor = cast(Any, model).logit_scale(params)
        lambdas = {"lambda_q": lambda_q, "lambda_y": lambda_y}
        return lambda embeddings: (mean_shift(embeddings, classes, factor, **lambdas).logits, {})

    encode = unit_embeddings(model, "MTA")
    how = {"views": views, "scale": scale, "views_per_chunk": views_per_chunk}
    return of_views(model, task, encode, prepare, method="MTA", **how)
