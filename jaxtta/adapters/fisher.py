"""How much predictions of clean images depend on each parameter: EATA's Fisher information.

    fisher = jaxtta.adapters.eata_fisher(model, task, params, clean_batches)

References:
    Niu et al., ICML 2022, https://arxiv.org/abs/2204.02610
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import Array
from jaxtta.losses import masked_mean
from jaxtta.models import Batch, Classifier, Task, as_batch, context_of, with_batch_norm_statistics
from jaxtta.models.classifier import images_and_mask
from jaxtta.tree import Trainable, normalisation_parameters


class EATAContext(NamedTuple):
    """What the objective needs beside parameters and batch.

    Attributes:
        classes: the model's own context.
        fisher: F, a tree of the adapted parameters; {} for ETA.
        source: θ⁰, a tree of the same; {} for ETA.
    """

    classes: Any
    fisher: Any
    source: Any


def eata_fisher(
    model: Classifier,
    task: Task | None,
    params: Any,
    batches: Iterable[Any],
    *,
    trainable: Trainable | None = None,
) -> tree.Tree:
    """Compute F: how much predictions of clean images depend on each parameter.

    It is the mean over batches of the square of the gradient of the batch's mean cross entropy,
    with the model's own predictions as labels. So it shrinks as batches grow: make them as large as
    those of the stream.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        params: the model's parameters.
        batches: clean images, 2,000 in the paper: arrays (batch, height, width, 3), or anything
            with `images` and `mask`.
        trainable: the parameters that will be adapted, a predicate on paths; None for
            `normalisation_parameters("image")`.

    Returns:
        A tree of the chosen parameters.

    Raises:
        ValueError: if there are no images, or a gradient is not finite.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> fisher = jaxtta.adapters.eata_fisher(model, task, params, [images])
        >>> fisher["vision_model"]["post_layernorm"]["scale"].shape
        (192,)
    """
    model = with_batch_norm_statistics(model, "batch")
    trainable = trainable or normalisation_parameters("image")
    chosen = tree.adapted_part(params, trainable)
    context = context_of(model, task, trainable)(params)

    @jax.jit
    def add(total: Any, images: Array, mask: Array) -> tuple[Any, Array]:
        batch = as_batch(Batch(images, mask, jnp.arange(len(images))))

        def loss_of(adapted: Any) -> Array:
            logits = model(tree.merge(params, adapted), context, batch).logits
            labels = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
            return masked_mean(optax.softmax_cross_entropy(logits, labels), batch.mask)

        gradients = jax.grad(loss_of)(chosen)
        return jax.tree.map(lambda x, g: x + g**2, total, gradients), jnp.any(batch.mask)

    total, count = jax.tree.map(jnp.zeros_like, chosen), 0
    for each in batches:
        total, some = add(total, *images_and_mask(each))
        count += int(some)
    if not count:
        raise ValueError("batches has no images, expected clean ones: EATA needs about 2,000")
    if not bool(tree.all_finite(total)):
        raise ValueError("the gradient of a batch of clean images is not finite")
    return jax.tree.map(lambda x: x / count, total)


def fisher_distance(params: Any, context: EATAContext) -> Array:
    """Squared distance of the parameters from the source, weighted by F; 0 where there is none."""
    now = {tree.path_of(keys): leaf for keys, leaf in jax.tree.leaves_with_path(params)}
    terms = jax.tree.map_with_path(
        lambda keys, f, start: (f * (now[tree.path_of(keys)] - start) ** 2).sum(),
        context.fisher,
        context.source,
    )
    return sum(jax.tree.leaves(terms), jnp.zeros(()))
