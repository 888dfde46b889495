"""An adapter of any method that predicts one image from its views.

Each image's views are cut and encoded once, without gradient, a few at a time; the images of a
batch come one after another and know nothing of each other. A method says what it keeps of a view
and what it makes of them:

    def prepare(params, classes):  # once a batch
        return lambda embeddings: (model.logit_scale(params) * embeddings.mean(0) @ classes.T, {})

    adapter = of_views(model, task, unit_embeddings(model, "mine"), prepare, views=64)

An image's views are keyed by its number in the stream: they do not depend on its batch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtta import tree
from jaxtta.adapters import settings
from jaxtta.adapters.base import (
    Adapter,
    Array,
    Metrics,
    Prediction,
    State,
    image_check,
    require_state,
)
from jaxtta.adapters.image_views import cut_views, in_chunks, require_one_by_one, require_views
from jaxtta.losses import masked_mean
from jaxtta.models import Batch, Classifier, Task, as_batch, context_of, l2_normalize
from jaxtta.models.checks import require_layout

Encode = Callable[[Any, Any, Array], Any]
"""(params, context, images (views, side, side, 3)) to a tree of arrays (views, …)."""
Predict = Callable[[Any], tuple[Array, Metrics]]
"""What one image's views were encoded to, to logits (classes,) and named scalars."""


class ViewContext(NamedTuple):
    """The context in the state of a method of views.

    Attributes:
        model: the model's own context: class embeddings, or packed prompts.
        key: data of the PRNG key that every image's views are drawn from.
    """

    model: Any
    key: Array


def unit_embeddings(model: Classifier, method: str) -> Encode:
    """Encode views to unit embeddings (views, projection), of a model that has class embeddings.

    Args:
        model: any classifier whose context is its class embeddings; else there is a ValueError.
        method: its name, for the error.
    """

    def encode(params: Any, context: Any, images: Array) -> Array:
        embeddings = model(params, context, as_batch(images)).embeddings
        if jnp.shape(context)[1:] != embeddings.shape[1:]:
            raise ValueError(
                f"{method} needs class embeddings (classes, {embeddings.shape[1]}) as the "
                "model's context"
            )
        return l2_normalize(embeddings)

    return encode


def of_views(
    model: Classifier,
    task: Task | None,
    encode: Encode,
    prepare: Callable[[Any, Any], Predict],
    *,
    method: str = "this method",
    context: Callable[[Any], Any] | None = None,
    views: int = 64,
    scale: tuple[float, float] = (0.08, 1.0),
    views_per_chunk: int = 8,
) -> Adapter:
    """Predict each image from its views; nothing is carried from image to image.

    Args:
        model: any classifier whose images do not mix.
        task: the classes; None for a model that has its own.
        encode: what is kept of the views, `encode(params, context, images)`.
        prepare: `prepare(params, context)`, once a batch, gives `predict(encoded)`, once an image.
            A metric `skipped` says that the image's prediction is not the method's.
        method: its name, for errors.
        context: `context(params)`, evaluated in `init`; None for the model's own.
        views: N, the views of an image.
        scale: least and greatest share of a random crop's area.
        views_per_chunk: views that are encoded at once; fewer need less memory.

    Returns:
        The adapter; its metrics are means over the valid images.

    Raises:
        TypeError: if the model is not a classifier, or the task not one that it takes.
        ValueError: if a setting makes no sense, the model needs a task and there is none, or its
            images mix.
    """
    require_views(model, method)
    settings.at_least(1, views=views, views_per_chunk=views_per_chunk)
    settings.in_order(scale=scale)
    settings.fraction(**{"the least scale": scale[0]})
    own_context = context or context_of(model, task, lambda path: False)
    check_values = image_check()

    def init(params: Any, key: Array | None = None) -> State:
        tree.require_params(params)
        data = jax.random.key_data(jax.random.key(0) if key is None else key)
        # Copies: a donated state must not take a leaf of the parameters, or the key, with it.
        held = jax.tree.map(jnp.copy, ViewContext(own_context(params), data))
        return State({}, (), held, jnp.zeros((), jnp.int32), tree.fingerprint(params))

    def step(params: Any, state: State, batch: Batch | Array) -> tuple[State, Prediction]:
        require_state(State, params, state)
        if not isinstance(state.context, ViewContext):
            raise ValueError("the state's context has no key of views: it is another adapter's")
        batch = as_batch(batch, state.seen)
        require_layout(batch.images)
        require_one_by_one(batch.images, method)
        check_values(batch.images)
        held, key = state.context.model, jax.random.wrap_key_data(state.context.key)
        predict = prepare(params, held)

        def one(row: tuple[Any, ...]) -> tuple[Array, Metrics]:
            image, size, index = row
            cut = cut_views(model, jax.random.fold_in(key, index), image, size, views, scale)
            return predict(in_chunks(lambda x: encode(params, held, x), cut, views_per_chunk))

        logits, metrics = jax.lax.map(one, (batch.images, batch.sizes, batch.index))
        failed = metrics.pop("skipped", False) | ~jnp.isfinite(logits).all(-1)
        metrics = {name: masked_mean(values, batch.mask) for name, values in metrics.items()}
        metrics["skipped"] = (batch.mask & failed).any()
        valid = jnp.where(metrics["skipped"], 0, batch.mask.sum(dtype=jnp.int32))
        return state._replace(seen=state.seen + valid), Prediction(logits, metrics)

    return Adapter(init, step)
