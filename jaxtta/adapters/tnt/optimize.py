"""TNT: a small noise map on an image's pixels, optimised until its augmented views agree.

Of N views of one image, x_n + ε with the same noise map ε, the K of lowest entropy are selected
once, before the first step. Each step moves ε against the sign of the gradient of

    L = weight · H(mean_n p_n) + mean_{n<m} ‖e_n − e_m‖,

with p_n and e_n the probabilities and unit embeddings of the selected views, and clips it
to ±1/255. The prediction is the mean probability of the views that are then the most confident,
softened by the paper's temperature or the model's own.

    output = optimize_noise(embed, params, classes, scale, views, noise, TNTConfig(steps=3))

References:
    Imam et al., 2025, https://arxiv.org/abs/2502.06019
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.adapters.base import Array
from jaxtta.adapters.image_views import (
    in_chunks,
    marginal_entropy,
    mean_log_probability,
    most_confident,
    share_of,
)
from jaxtta.adapters.tnt.config import TNTConfig
from jaxtta.models import l2_normalize

Embed = Callable[[Any, Array], Array]


class TNTOutput(NamedTuple):
    """The result for one image.

    Attributes:
        noise: (height, width, 3), the optimised map.
        log_probabilities: (classes,), of the mean over the most confident views.
        noise_steps: (steps, height, width, 3), the map after each step.
        losses: (steps, 3): marginal entropy, distance between views, their weighted sum.
        selected: (K,) the views that the loss was taken over.
        ensemble: (V,) the views whose probabilities are averaged.
        logits: (N, classes) of the views with the optimised map.
    """

    noise: Array
    log_probabilities: Array
    noise_steps: Array
    losses: Array
    selected: Array
    ensemble: Array
    logits: Array


def optimize_noise(
    embed: Embed,
    params: Any,
    classes: Array,
    scale: Array,
    views: Array,
    noise: Array,
    config: TNTConfig,
    select: bool = True,
) -> TNTOutput:
    """Optimise a noise map on the views of one image, then average the most confident views.

    Args:
        embed: `embed(params, images in [0, 1])` to embeddings (views, projection).
        params: of the model.
        classes: (classes, projection), normalised embeddings of the texts.
        scale: () the model's logit scale, exponentiated.
        views: (N, height, width, 3) in [0, 1].
        noise: (height, width, 3), the map to begin with.
        config: the settings.
        select: differentiate through the selected views alone; the result is the same, and the
            backward pass N/K times smaller, where K views are selected.

    Returns:
        The optimised map and its prediction.

    Raises:
        ValueError: if views and map differ in size.
    """
    if views.shape[1:] != noise.shape:
        raise ValueError(f"a noise map of shape {noise.shape} for views of {views.shape[1:]}")

    def embeddings(views: Array, noise: Array) -> Array:
        return l2_normalize(embed(params, _clip(views + noise)))

    def logits_of(embedded: Array) -> Array:
        # As CLIP's own cosines: the vote may divide them by a small temperature.
        return scale * jnp.matmul(embedded, classes.T, precision="highest")

    def logits_of_all(noise: Array) -> Array:
        return logits_of(in_chunks(lambda x: embeddings(x, noise), views, config.views_per_chunk))

    fractions = config.select_fraction, config.ensemble_fraction
    kept, averaged = (share_of(fraction, len(views)) for fraction in fractions)
    selected = jnp.arange(0)
    losses, noise_steps = jnp.zeros((0, 3)), jnp.zeros((0, *noise.shape))
    if config.steps:
        selected = most_confident(logits_of_all(noise), kept)
        chosen = views[selected] if select else views

        def loss(noise: Array) -> tuple[Array, Array]:
            embedded = embeddings(chosen, noise)
            embedded = embedded if select else embedded[selected]
            terms = marginal_entropy(logits_of(embedded)), inter_view_distance(embedded)
            total = config.entropy_weight * terms[0] + terms[1]
            return total, jnp.stack([*terms, total])

        def update(noise: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            gradient, terms = jax.grad(loss, has_aux=True)(noise)
            noise = noise - config.learning_rate * jnp.sign(gradient)
            noise = noise.clip(-config.epsilon, config.epsilon)
            return noise, (terms, noise)

        noise, (losses, noise_steps) = jax.lax.scan(update, noise, length=config.steps)
    logits = logits_of_all(noise)
    ensemble = most_confident(logits, averaged)
    votes, temperature = logits[ensemble], config.temperature
    if temperature == "code":  # half precision's epsilon, and the entropy added to it
        temperature = 2.0**-10 * (1 + marginal_entropy(logits))
    if config.steps and temperature != "model":
        votes = votes / scale / temperature
    log_probabilities = mean_log_probability(votes)
    return TNTOutput(noise, log_probabilities, noise_steps, losses, selected, ensemble, logits)


def _clip(x: Array) -> Array:
    # Unlike jnp.clip's, the derivative is 1 at the ends too, where many pixels lie.
    return jnp.where((x >= 0) & (x <= 1), x, jax.lax.stop_gradient(x.clip(0, 1)))


def inter_view_distance(embeddings: Array) -> Array:
    """Mean distance between pairs of different unit embeddings (views, projection)."""
    squared = ((embeddings[:, None] - embeddings) ** 2).sum(-1)
    # Each pair once, by a mask: the derivative of an index adds up row after row on a GPU.
    apart = (squared > 0) & np.triu(np.ones(squared.shape, bool), 1)
    distances = jnp.sqrt(jnp.where(apart, squared, 1.0))  # a root of 0 has no derivative
    return jnp.where(apart, distances, 0).sum() / jnp.maximum(apart.sum(), 1)
