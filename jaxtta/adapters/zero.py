"""ZERO: the most confident views of an image vote for its class.

Of N views the ⌊0.3 N⌋ of lowest entropy are kept, and each votes for its most probable class:

    votes_c = Σ_{n kept} 1[argmax p_n = c],    prediction = argmax votes.

Where classes tie, the views that follow in order of entropy are asked: the first whose class is
one of the tied ones gives it one vote more. If there is none, the surest view that did not vote
decides, by its logits. With a `temperature` the votes are softmax(cosines/temperature) and are
added up; the published run, in half precision, has in effect 2⁻¹⁰.

Cost per image: 64 image passes forward, none backward (N forward passes, counted in the program).

References:
    Farina et al. 2024, https://arxiv.org/abs/2405.18330
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxtta.adapters import image_views, settings
from jaxtta.adapters.base import Adapter, Array, cuts_views
from jaxtta.adapters.of_views import Predict, of_views
from jaxtta.models import Classifier, Task, as_batch

HALF_PRECISION = 2.0**-10
"""Half precision's epsilon: the temperature of the votes in the published run."""
LEAST_SHARE = 1e-10  # of the votes, so that a class without any has a logarithm


def zero_votes(logits: Array, fraction: float = 0.3) -> Array:
    """Count the votes of one image's most confident views.

    Args:
        logits: (N, classes) of its views.
        fraction: share of the views that vote, those of lowest entropy.

    Returns:
        (classes,) votes, with one more for the class that broke a tie.

    Examples:
        >>> logits = jnp.array([[9.0, 0.0], [8.0, 0.0], [0.0, 0.1], [0.0, 0.2]])  # of four views
        >>> jaxtta.adapters.zero_votes(logits, fraction=0.5).argmax().item()  # the two surest
        0

    References:
        Farina et al. 2024, https://arxiv.org/abs/2405.18330
    """
    count, classes = logits.shape
    kept = image_views.share_of(fraction, count)
    order = image_views.most_confident(logits)
    choices = jax.nn.one_hot(logits.argmax(-1)[order], classes, dtype=logits.dtype)
    votes = choices[:kept].sum(0)
    tied = votes == votes.max()
    helps = choices * tied  # rows of the views that are for a tied class
    rest = helps[kept:].any(-1)
    first = (rest & (jnp.cumsum(rest) == 1))[:, None]
    # No view to ask: the surest of the others has to prefer one of the tied classes.
    last_resort = jnp.where(tied, logits[order[kept % count]], -jnp.inf)
    last_resort = jax.nn.one_hot(last_resort.argmax(), classes, dtype=logits.dtype)
    decided = jnp.where(rest.any(), (helps[kept:] * first).sum(0), last_resort)
    return votes + jnp.where(tied.sum() > 1, decided, 0)


def zero_soft_votes(
    logits: Array, scale: Array | float, temperature: float, fraction: float = 0.3
) -> Array:
    """Add up the softmax of the cosines of one image's most confident views.

    Args:
        logits: (N, classes) of its views.
        scale: () the model's factor on the cosines.
        temperature: that the cosines are divided by.
        fraction: share of the views that vote, those of lowest entropy.

    Returns:
        (classes,) logarithm of the votes, whose sum is the number of views that vote.
    """
    kept = image_views.share_of(fraction, len(logits))
    chosen = logits[image_views.most_confident(logits, kept)]
    votes = image_views.mean_log_probability(chosen / scale / temperature)
    return votes + math.log(kept)


@cuts_views
def zero(
    model: Classifier,
    task: Task | None,
    *,
    temperature: float | None = None,
    fraction: float = 0.3,
    views: int = 64,
    scale: tuple[float, float] = (0.08, 1.0),
    views_per_chunk: int = 8,
) -> Adapter:
    """Let each image's most confident views vote; nothing is trained or carried.

    Args:
        model: any classifier whose images do not mix; for a temperature, one with cosine logits.
        task: the classes; None for a model that has its own.
        temperature: of the votes, on the cosines (`HALF_PRECISION` in the published run); None
            for one whole vote a view, as in the paper.
        fraction: share of the views that vote, those of lowest entropy.
        views: N, the views of an image; the first is the plain preprocessing.
        scale: least and greatest share of a random crop's area.
        views_per_chunk: views that are encoded at once; fewer need less memory.

    Returns:
        The adapter; its logits are the logarithms of the shares of the votes.

    Raises:
        TypeError: if the model is not a classifier, or the task not one that it takes.
        ValueError: if a setting makes no sense, or the model lacks what the method needs.

    Examples:
        With `model` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.zero(model, task, views=16)

    References:
        Farina et al. 2024, https://arxiv.org/abs/2405.18330
    """
    settings.fraction(fraction=fraction)
    settings.positive_or_none(temperature=temperature)
    if temperature is not None:
        image_views.require_cosines(model, "ZERO with a temperature")

    def encode(params: Any, context: Any, images: Array) -> Array:
        return model(params, context, as_batch(images)).logits

    def prepare(params: Any, context: Any) -> Predict:
        def predict(logits: Array) -> tuple[Array, dict[str, Array]]:
            if temperature is not None:
                factor = cast(Any, model).logit_scale(params)
                votes = zero_soft_votes(logits, factor, temperature, fraction)
                return jax.nn.log_softmax(votes), {}
            votes = zero_votes(logits, fraction)
            # Votes are whole numbers even for a picture of NaN.
            votes = jnp.where(jnp.isfinite(logits).all(), votes, jnp.nan)
            return jnp.log(jnp.maximum(votes / votes.sum(), LEAST_SHARE)), {}

        return predict

    how = {"views": views, "scale": scale, "views_per_chunk": views_per_chunk}
    return of_views(model, task, encode, prepare, method="ZERO", **how)
