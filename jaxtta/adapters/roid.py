"""ROID: weighted soft likelihood ratios, consistency with a view, and averaging with the source.

With c̄ the moving average of the probabilities, an image's diversity is d_i = 1 − cos(c̄, p_i) and
its certainty q_i = −H(p_i), both scaled to [0, 1] over the batch; those of at least mean diversity
are kept, K, and with p' the probabilities of a strongly augmented view the loss is

    L = (1/B) Σ_{i∈K} exp(d_i q_i/T) [SLR(p_i) + SCE(p_i, p'_i)],
    SLR(p) = −Σ_c p_c log(p_c/(1 − p_c)),   SCE(p, p') = −½ Σ_c (p_c log p'_c + p'_c log p_c),

weights without gradient. After the step θ ← 0.99 θ + 0.01 θ⁰. The predictions are corrected by the
batch's smoothed mean p. Two forward and two backward passes an image.

References:
    Marsden et al., WACV 2024, https://arxiv.org/abs/2306.00650
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtta.adapters.base import Adapter, Array, Metrics, Preset, State
from jaxtta.adapters.filters import (
    logits_of_one,
    prior_corrected,
    require_range,
    scaled,
    towards,
)
from jaxtta.adapters.online import online
from jaxtta.losses import entropy
from jaxtta.models import Batch, Classifier, Task, context_of, with_batch_norm_statistics
from jaxtta.strong_views import strong_view
from jaxtta.tree import Trainable, normalisation_parameters

ROID_PRESETS = {
    "cifar10-c": Preset(partial(optax.adam, 1e-3), 200),
    "cifar100-c": Preset(partial(optax.adam, 1e-3), 200),
    "imagenet-c": Preset(partial(optax.sgd, 2.5e-4, momentum=0.9, nesterov=True), 64),
}
"""As in the multi-method repository."""


class ROIDMemory(NamedTuple):
    """What ROID remembers.

    Attributes:
        average: (classes,), c̄.
        key: data of the PRNG key, which each image's view is drawn from.
    """

    average: Array
    key: Array


def roid_weights(logits: Array, mask: Array, average: Array, temperature: float = 1 / 3) -> Array:
    """Weigh images by diversity and certainty.

    Args:
        logits: (batch, classes).
        mask: (batch,) bool, false for padding.
        average: (classes,), c̄.
        temperature: T.

    Returns:
        (batch,), the weights; 0 for images that are not kept. Where all images are equally diverse
        all are kept.
    """
    p = jax.nn.softmax(logits)
    norms = jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(average)
    cosines = jnp.matmul(p, average, precision="highest") / norms
    diversity, certainty = (scaled(x, mask) for x in (1 - cosines, -entropy(logits)))
    mean = jnp.where(mask, diversity, 0).sum() / jnp.maximum(mask.sum(), 1)
    kept = mask & (diversity >= mean)
    weights = jnp.where(kept, jnp.exp(diversity * certainty / temperature), 0)
    return jax.lax.stop_gradient(weights)


def roid_objective(
    model: Classifier,
    temperature: float = 1 / 3,
    reference_quirks: bool = False,
    augment: Callable[[Array, Array, Array], Array] | None = None,
) -> Callable[..., Any]:
    """Minimise weighted soft likelihood ratios and the disagreement with a view.

    Args:
        model: any classifier; its own context is the objective's.
        temperature: T.
        reference_quirks: as in `roid`.
        augment: `augment(key, index, image)`, the view of the image of this number; None for
            `strong_view`.

    Returns:
        An objective for `online`; its memory is a `ROIDMemory`.
    """

    def strong(key: Array, index: Array, image: Array) -> Array:
        return strong_view(jax.random.fold_in(key, index), image)

    def apply(params: Any, context: Any, batch: Batch, memory: ROIDMemory) -> Any:
        outputs = model(params, context, batch)
        logits, mask = outputs.logits, jnp.asarray(batch.mask)
        weights = roid_weights(logits, mask, memory.average, temperature)
        kept = weights > 0
        view = partial(augment or strong, jax.random.wrap_key_data(memory.key))
        images = jax.vmap(view)(jnp.asarray(batch.index), jnp.asarray(batch.images))
        # Only the kept images are in the second pass, for the sake of batch norms' statistics.
        seen = model(params, context, batch._replace(images=images, mask=kept)).logits

        log_p, log_view = jax.nn.log_softmax(logits), jax.nn.log_softmax(seen)
        p = jnp.exp(log_p)
        clipped = jnp.minimum(p, 0.99)
        ratio = -(clipped * jnp.log(clipped / (1 - clipped) + 1e-5)).sum(-1)
        consistency = -(p * log_view + jnp.exp(log_view) * log_p).sum(-1) / 2
        count = len(mask) if reference_quirks else mask.sum()
        terms = jnp.where(kept, weights * jnp.stack([ratio, consistency]), 0).sum(-1)
        ratio, consistency = terms / jnp.maximum(count, 1)

        mean = jnp.where(mask[:, None], p, 0).sum(0) / jnp.maximum(mask.sum(), 1)
        average = jax.lax.stop_gradient(0.9 * memory.average + 0.1 * mean)
        memory = memory._replace(average=average.astype(memory.average.dtype))
        corrected = prior_corrected(logits, mask, count, reference_quirks)
        metrics = {"ratio": ratio, "consistency": consistency, "selected": kept.sum()}
        return ratio + consistency, (outputs._replace(logits=corrected), metrics, memory)

    return apply


def roid(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Trainable | None = None,
    temperature: float = 1 / 3,
    source_share: float = 0.01,
    reference_quirks: bool = False,
    augment: Callable[[Array, Array, Array], Array] | None = None,
) -> Adapter:
    """Adapt on diverse and certain images, never far from the source.

    Batch norms use each batch's own statistics.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        optimizer: an optax transformation; None for `ROID_PRESETS["imagenet-c"]`.
        trainable: which parameters to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`.
        temperature: T, of the weights.
        source_share: how far parameters return to the source after each step.
        reference_quirks: as the reference implementation: the prior multiplies logits, not
            probabilities, and B counts padding.
        augment: `augment(key, index, image)`, another view; None for `strong_view`.

    Returns:
        The adapter; `init` takes a key, from which each image's view is drawn by its number.
        Metrics have the loss's terms, `ratio` and `consistency`, and `selected`, how many are kept.

    Raises:
        TypeError: as `tent`.
        ValueError: if a setting is out of range, the model needs a task and there is none; in
            `init`, if no parameter is chosen.

    Examples:
        >>> adapter = jaxtta.adapters.roid(model, task)  # names: see `jaxtta.load`
        >>> state = adapter.init(params, jax.random.key(0))  # the key draws views
    """
    require_range(1e-6, np.inf, temperature=temperature)
    require_range(0, 1, source_share=source_share)
    model = with_batch_norm_statistics(model, "batch")
    trainable = normalisation_parameters("image") if trainable is None else trainable
    optimizer = ROID_PRESETS["imagenet-c"].optimizer() if optimizer is None else optimizer

    def memory(params: Any, context: Any, key: Array) -> ROIDMemory:
        logits = logits_of_one(model, params, context)
        average = jnp.full(logits.shape[1], 1 / logits.shape[1], logits.dtype)
        return ROIDMemory(average, jax.random.key_data(key))

    def restore(state: State, source: State) -> tuple[State, Metrics]:
        return state._replace(adapted=towards(state.adapted, source.adapted, source_share)), {}

    return online(
        roid_objective(model, temperature, reference_quirks, augment),
        context_of(model, task, trainable),
        trainable,
        optimizer,
        memory=memory,
        restore=restore,
    )
