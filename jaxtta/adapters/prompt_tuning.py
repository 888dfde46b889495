"""Tuning a prompt's context vectors on the views of one image, as TPT and C-TPT do.

    output = tune_context(encode, start, embeddings, scale, optax.adamw(5e-3, weight_decay=0.01))

`encode` runs the text tower with the context in place of the template's tokens; the image tower has
been run already. See `tpt.py` for the loss.

References:
    Shu et al., NeurIPS 2022, https://arxiv.org/abs/2209.07511
    Yoon et al., ICLR 2024, https://arxiv.org/abs/2403.14119
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import Array
from jaxtta.adapters.image_views import (
    cosine_logits,
    marginal_entropy,
    most_confident,
    share_of,
)
from jaxtta.models import Prompts

Encoded = tuple[Array, Callable[[Array], tuple[Array]]]
"""Class embeddings, and from their gradient to the context's, as `jax.vjp` gives them."""


class TPTOutput(NamedTuple):
    """The result for one image.

    Attributes:
        context: (n, width), the tuned vectors; those to begin with if a step was not finite.
        class_embeddings: (classes, projection), of unit norm, with the tuned context.
        losses: (steps,), before each step.
        selected: (K,) the views that the loss was taken over.
        logits: (classes,), of the plain view.
        finite: () whether all steps were.
    """

    context: Array
    class_embeddings: Array
    losses: Array
    selected: Array
    logits: Array
    finite: Array


def tune_context(
    encode: Callable[[Array], Array],
    start: Array,
    embeddings: Array,
    scale: Array | float,
    optimizer: optax.GradientTransformation,
    *,
    steps: int = 1,
    fraction: float = 0.1,
    dispersion: float = 0.0,
    first: Encoded | None = None,
) -> TPTOutput:
    """Tune the context on the views of one image, and predict the plain one.

    Args:
        encode: from context (n, width) to class embeddings (classes, projection) of unit norm.
        start: (n, width), the context to begin with.
        embeddings: (N, projection), unit embeddings of the views, the plain one first.
        scale: () the model's factor on the cosines.
        optimizer: an optax transformation.
        steps: of the optimiser, at least one.
        fraction: share of the views that the loss is taken over, those of lowest entropy.
        dispersion: λ, weight of the distance of the class embeddings from their mean.
        first: `jax.vjp(encode, start)`, for many images at once; None to compute it here.

    Returns:
        The tuned context and its prediction.

    References:
        Shu et al., NeurIPS 2022, https://arxiv.org/abs/2209.07511
    """
    first = jax.vjp(encode, start) if first is None else first
    scale = jnp.asarray(scale, first[0].dtype)
    logits = cosine_logits(scale, embeddings, first[0])
    kept = share_of(fraction, len(embeddings))
    selected = most_confident(logits, kept)
    chosen = embeddings[selected]

    def loss(texts: Array) -> Array:
        logits = cosine_logits(scale, chosen, texts)
        # A single class is its own mean; the norm's gradient there is 0, and not NaN.
        apart = optax.safe_norm(texts - texts.mean(0), 0.0, axis=-1)
        spread = apart.mean() if dispersion else 0.0
        return marginal_entropy(logits) - dispersion * spread

    def update(tuned: tuple[Array, Any], encoded: Encoded) -> tuple[tuple[Array, Any], Array]:
        (context, moments), (texts, to_context) = tuned, encoded
        value, gradient = jax.value_and_grad(loss)(texts)
        updates, moments = optimizer.update(to_context(gradient)[0], moments, context)
        return (cast(Array, optax.apply_updates(context, updates)), moments), value

    def again(tuned: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], Array]:
        return update(tuned, jax.vjp(encode, tuned[0]))

    tuned, value = update((start, optimizer.init(start)), first)
    (context, _), later = jax.lax.scan(again, tuned, length=steps - 1)
    losses = jnp.append(value, later)
    finite = jnp.isfinite(losses).all() & tree.all_finite(context)
    context = jnp.where(finite, context, start)
    texts = encode(context)
    logits = cosine_logits(scale, embeddings[0], texts)
    return TPTOutput(context, texts, losses, selected, logits, finite)


def initial_context(params: Any, prompts: Prompts, tokens: int = 4) -> Array:
    """The embeddings (tokens, width) of what the prompts share after the beginning of text."""
    table = params["text_model"]["embeddings"]["token_embedding"]["embedding"]
    return table[prompts.prefix[1 : 1 + tokens]].astype(jnp.promote_types(table.dtype, jnp.float32))
