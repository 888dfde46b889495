"""DeYO: entropy minimisation on images whose prediction needs the shape of an object.

Each image's patches are shuffled; where the probability of the predicted class ŷ falls by little,
the prediction rests on colours and texture. With E₀ and E₁ margins of entropy H,

    d_i = p_i[ŷ_i] − p_i^shuffled[ŷ_i],   S = {i: H(p_i) < E₀ and d_i > τ},
    L = mean_{i∈S} (exp(E₁ − H(p_i)) + exp(d_i)) H(p_i),

weights without gradient. Two forward passes and a backward one an image.

References:
    Lee et al., ICLR 2024, https://arxiv.org/abs/2403.07366
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtta.adapters.base import Adapter, Array, Preset
from jaxtta.adapters.filters import (
    MakeObjective,
    log_classes,
    loss_of_selected,
    reliable,
    require_range,
    weighted_entropy,
)
from jaxtta.adapters.online import online
from jaxtta.adapters.settings import at_least
from jaxtta.losses import entropy
from jaxtta.models import Batch, Classifier, Task, context_of, with_batch_norm_statistics
from jaxtta.models.checks import require_model
from jaxtta.tree import Trainable, normalisation_parameters

DEYO_PRESETS = {
    "cifar10-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 200),
    "cifar100-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 200),
    "imagenet-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 64),
}
"""ImageNet-C for ViTs, in proportion to the batch size and doubled at a batch of one image; the
others have the same rate."""


def shuffle_patches(images: Array, permutations: Array) -> Array:
    """Cut images into square patches and put these in other places.

    Args:
        images: (batch, height, width, channels).
        permutations: (batch, side · side) integers: place j gets patch `permutations[:, j]`, row by
            row.

    Returns:
        Images of the same shape; float in [0, 1] where their sides are no multiple of the number of
        patches, for which they are resized down and up again.
    """
    batch, height, width, channels = images.shape
    side = round(permutations.shape[-1] ** 0.5)
    rows, columns = height // side, width // side
    if (even := (rows * side, columns * side)) != (height, width):
        images = images / 255 if images.dtype == jnp.uint8 else images
        images = jax.image.resize(images, (batch, *even, channels), "linear")
    patches = images.reshape(batch, side, rows, side, columns, channels).swapaxes(2, 3)
    patches = patches.reshape(batch, side * side, -1)
    patches = jnp.take_along_axis(patches, permutations[..., None], axis=1)
    patches = patches.reshape(batch, side, side, rows, columns, channels).swapaxes(2, 3)
    images = patches.reshape(batch, *even, channels)
    return (
        images
        if even == (height, width)
        else jax.image.resize(images, (batch, height, width, channels), "linear")
    )


def deyo_objective(
    model: Classifier,
    margin: float = 0.5,
    weight_margin: float = 0.4,
    threshold: float = 0.2,
    patches: int = 4,
    objective: MakeObjective | None = None,
    permute: Callable[[Array, Array], Array] | None = None,
) -> Callable[..., Any]:
    """Minimise the weighted entropy of images that are reliable and whose prediction needs shape.

    Args:
        model: any classifier; its own context is the objective's.
        margin: E₀, part of log C.
        weight_margin: E₁, part of log C.
        threshold: τ.
        patches: a side.
        objective: makes another objective of the selected images, without weights.
        permute: `permute(key, index)`, the patches (patches²,) of the image of this number; None
            for a random permutation.

    Returns:
        An objective for `online`; its memory is the data of a PRNG key, which stays.
    """

    def random(key: Array, index: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, index), patches**2)

    def apply(params: Any, context: Any, batch: Batch, data: Array) -> Any:
        outputs = model(params, context, batch)
        logits, key = outputs.logits, jax.random.wrap_key_data(data)
        sure = reliable(logits, batch.mask, margin)
        places = jax.vmap(partial(permute or random, key))(jnp.asarray(batch.index))
        images = shuffle_patches(jnp.asarray(batch.images), places)
        # Only the reliable images are in the second pass, for the sake of batch norms' statistics.
        shuffled = model(params, context, batch._replace(images=images, mask=sure)).logits
        predicted = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)
        fall = jax.nn.softmax(logits) - jax.nn.softmax(shuffled)
        fall = jax.lax.stop_gradient(jnp.where(predicted & sure[:, None], fall, 0).sum(-1))
        selected = sure & (fall > threshold)
        if objective is None:
            weights = jnp.exp(weight_margin * log_classes(logits) - entropy(logits))
            loss, metrics = weighted_entropy(logits, weights + jnp.exp(fall), selected)
        else:
            loss, metrics = loss_of_selected(objective, outputs, params, context, batch, selected)
        return loss, (outputs, metrics | {"reliable": sure.sum()}, data)

    return apply


def deyo(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Trainable | None = None,
    objective: MakeObjective | None = None,
    margin: float = 0.5,
    weight_margin: float = 0.4,
    threshold: float = 0.2,
    patches: int = 4,
    permute: Callable[[Array, Array], Array] | None = None,
) -> Adapter:
    """Minimise the entropy of reliable images whose prediction needs the shape of an object.

    Batch norms use each batch's own statistics. Where no image is selected there is no step.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        optimizer: an optax transformation; None for `DEYO_PRESETS["imagenet-c"]`.
        trainable: which parameters to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`. The reference implementation leaves out the last
            blocks of its ViT-B: `below_block(normalisation_parameters("image"), 9)`.
        objective: makes another objective of the selected images, `batclip_objective` for one; None
            for the weighted entropy.
        margin: E₀, part of log C.
        weight_margin: E₁, part of log C.
        threshold: τ; 0.3 with batch norms, 0.5 on Waterbirds.
        patches: a side of an image, at most its pixels.
        permute: `permute(key, index)`, another order of its patches; None for a random one.

    Returns:
        The adapter; `init` takes a key, from which each image's permutation is drawn by its number.
        Metrics have `reliable` and `selected`, numbers of images.

    Raises:
        TypeError: as `tent`.
        ValueError: if a setting is out of range, the model needs a task and there is none; in
            `init`, if no parameter is chosen.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.deyo(model, task)
        >>> state = adapter.init(params, jax.random.key(0))  # the key shuffles patches
    """
    require_range(0, np.inf, margin=margin, weight_margin=weight_margin)
    require_range(-1, 1, threshold=threshold)
    at_least(1, patches=patches)
    require_model(model)
    if patches > model.image_size:
        side = model.image_size
        raise ValueError(f"patches is {patches}, the model's images have {side} pixels a side")
    model = with_batch_norm_statistics(model, "batch")
    trainable = normalisation_parameters("image") if trainable is None else trainable
    optimizer = DEYO_PRESETS["imagenet-c"].optimizer() if optimizer is None else optimizer
    return online(
        deyo_objective(model, margin, weight_margin, threshold, patches, objective, permute),
        context_of(model, task, trainable),
        trainable,
        optimizer,
        memory=lambda params, context, key: jax.random.key_data(key),
    )
