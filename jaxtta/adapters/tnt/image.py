"""TNT on one image."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtta.adapters.base import Array
from jaxtta.adapters.image_views import cut_views
from jaxtta.adapters.tnt.config import TNT_PRESETS, TNTConfig
from jaxtta.adapters.tnt.optimize import TNTOutput, optimize_noise
from jaxtta.augmix import augmix
from jaxtta.models import as_batch


def tnt_image(
    model: Any,
    params: Any,
    classes: Any,
    key: Array,
    image: Array,
    size: Array | None = None,
    config: TNTConfig = TNT_PRESETS["paper"],
    noise: Array | None = None,
) -> tuple[Array, TNTOutput]:
    """Cut an image's views, optimise a noise map on them, and predict.

    Args:
        model: a model with cosine logits and `preprocessing`, as CLIP.
        params: its parameters.
        classes: class embeddings (classes, projection) of unit norm, the model's context.
        key: PRNG key of this image.
        image: (height, width, 3), uint8 or float in [0, 1].
        size: (2,) true height and width where the image is an original on a canvas; None where
            it has the model's resolution.
        config: the settings.
        noise: (size, size, 3), the map to begin with; None for noise within the bounds.

    Returns:
        The views (N, size, size, 3) without noise, the plain one first, and the result.
    """
    side = model.image_size
    noise_key, view_key, mix_key = jax.random.split(key, 3)
    start = initial_noise(noise_key, side, config.epsilon) if noise is None else noise
    views = cut_views(model, view_key, image, size, config.views, config.scale, config.ratio)
    if config.augmix:
        keys = jax.random.split(mix_key, config.views - 1)
        others = jax.vmap(augmix, (0, 0, None))(keys, views[1:], config.augmix)
        views = jnp.concatenate([views[:1], others])

    def embed(params: Any, images: Array) -> Array:
        return model(params, classes, as_batch(images)).embeddings

    scale = model.logit_scale(params)
    return views, optimize_noise(embed, params, classes, scale, views, start, config)


def initial_noise(key: Array, side: int, epsilon: float) -> Array:
    """Draw the map to begin with, (side, side, 3): normal noise, clipped to its bounds."""
    return jax.random.normal(key, (side, side, 3)).clip(-epsilon, epsilon)
