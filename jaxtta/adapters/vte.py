"""VTE: the mean embedding of an image's most confident views, against the mean of its templates.

Of N views the ⌊0.1 N⌋ of lowest entropy are kept; with f̂ their unit embeddings, t̂_c the normalised
mean of the class's unit text embeddings over the prompt templates, and s the model's scale,

    logits_c = s · mean_{n kept} f̂_n · t̂_c.

The mean is not normalised again: an image whose views agree gets larger logits. With one template
the class embedding is that template's.

Cost per image: 64 image passes forward, none backward (N forward passes, counted in the program).

References:
    Döbler et al. 2024, https://arxiv.org/abs/2405.14977
"""

from typing import Any, cast

import jax.numpy as jnp

from jaxtta.adapters import image_views, settings
from jaxtta.adapters.base import Adapter, Array, cuts_views
from jaxtta.adapters.of_views import Predict, of_views, unit_embeddings
from jaxtta.models import Classifier, Task


def vte_logits(
    embeddings: Array, classes: Array, scale: Array | float, fraction: float = 0.1
) -> Array:
    """Predict one image from the mean embedding of its most confident views.

    Args:
        embeddings: (N, projection), unit embeddings of its views.
        classes: (classes, projection), unit embeddings of the classes.
        scale: () the model's factor on the cosines.
        fraction: share of the views that are averaged, those of lowest entropy.

    Returns:
        (classes,) logits.

    Examples:
        >>> views, classes = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.eye(2)  # of unit norm
        >>> jaxtta.adapters.vte_logits(views, classes, scale=10.0).tolist()
        [10.0, 0.0]

    References:
        Döbler et al. 2024, https://arxiv.org/abs/2405.14977
    """
    scale = jnp.asarray(scale, embeddings.dtype)
    logits = image_views.cosine_logits(scale, embeddings, classes)
    kept = image_views.share_of(fraction, len(logits))
    return logits[image_views.most_confident(logits, kept)].mean(0)  # linear in the embeddings


@cuts_views
def vte(
    model: Classifier,
    task: Task | None,
    *,
    fraction: float = 0.1,
    views: int = 64,
    scale: tuple[float, float] = (0.08, 1.0),
    views_per_chunk: int = 8,
) -> Adapter:
    """Average each image's most confident views; nothing is trained or carried.

    Args:
        model: a model with cosine logits whose images do not mix, as CLIP.
        task: the classes, best with several templates.
        fraction: share of the views that are averaged, those of lowest entropy.
        views: N, the views of an image; the first is the plain preprocessing.
        scale: least and greatest share of a random crop's area.
        views_per_chunk: views that are encoded at once; fewer need less memory.

    Returns:
        The adapter.

    Raises:
        TypeError: if the model is not a classifier, or the task not one that it takes.
        ValueError: if a setting makes no sense, or the model lacks what the method needs.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.vte(model, task, views=8)
        >>> state, prediction = jax.jit(adapter.step)(params, adapter.init(params), images)
        >>> prediction.logits.shape
        (8, 10)

    References:
        Döbler et al. 2024, https://arxiv.org/abs/2405.14977
    """
    image_views.require_cosines(model, "VTE")
    settings.fraction(fraction=fraction)

    def prepare(params: Any, classes: Array) -> Predict:
        factor = cast(Any, model).logit_scale(params)
        return lambda embeddings: (vte_logits(embeddings, classes, factor, fraction), {})

    encode = unit_embeddings(model, "VTE")
    how = {"views": views, "scale": scale, "views_per_chunk": views_per_chunk}
    return of_views(model, task, encode, prepare, method="VTE", **how)
