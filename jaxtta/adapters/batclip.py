"""BATCLIP: bimodal online test-time adaptation of CLIP.

Pseudo-labels are the predictions of the same pass. A class's prototype v_k is the mean unnormalised
embedding of the images predicted as k, and t_k its text embedding, of unit norm. Both towers'
normalisation layers take one step per batch on

    L = mean_i H(p_i) − mean_k v_k·t_k − Σ_{k≠m} (1 − cos(v_k, v_m)),

over the classes that occur in the batch; gradients flow through all but the argmax.

References:
    Maharana et al., ICCV 2025, https://arxiv.org/abs/2412.02837
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxtta.adapters.base import Adapter, Array, Objective, ObjectiveValue, Preset
from jaxtta.adapters.online import online
from jaxtta.losses import entropy, masked_mean
from jaxtta.models import Batch, Classifier, Task, context_of, with_batch_norm_statistics
from jaxtta.tree import Trainable, normalisation_parameters


def prototypes(
    embeddings: Array, labels: Array, mask: Array | np.ndarray, classes: int
) -> tuple[Array, Array]:
    """Mean embedding of each class that occurs.

    Args:
        embeddings: (batch, projection).
        labels: (batch,) integers.
        mask: (batch,) bool, false for padding.
        classes: number of classes.

    Returns:
        Prototypes (classes, projection), zero for absent classes, and the mask (classes,) of the
        classes that occur.
    """
    members = jax.nn.one_hot(labels, classes, dtype=embeddings.dtype) * mask[:, None]
    counts = members.sum(0)
    # where, not a product: a padded image's embedding may be anything, even NaN
    valid = jnp.where(mask[:, None], embeddings, 0)
    mesh = jax.typeof(embeddings).sharding.mesh
    # A sum over devices: on explicit mesh axes JAX asks where it shall be.
    whole = NamedSharding(mesh, PartitionSpec()) if mesh.explicit_axes else None
    sums = jnp.matmul(members.T, valid, precision="highest", out_sharding=whole)
    return sums / jnp.maximum(counts, 1)[:, None], counts > 0


def image_text_alignment(means: Array, present: Array, class_embeddings: Array) -> Array:
    """Mean dot product of the prototypes (classes, projection) with their classes' texts."""
    return masked_mean((means * class_embeddings).sum(-1), present)


def prototype_separation(means: Array, present: Array) -> Array:
    """Sum of the cosine distances between the prototypes of all ordered pairs of classes.

    Args:
        means: prototypes (classes, projection).
        present: (classes,) bool.

    Returns:
        A scalar; 0 where fewer than two classes occur.
    """
    safe = jnp.where(present[:, None], means, 1)
    directions = safe / jnp.linalg.norm(safe, axis=-1, keepdims=True)
    pairs = present[:, None] & present & ~jnp.eye(len(present), dtype=bool)
    cosines = jnp.matmul(directions, directions.T, precision="highest")
    return jnp.where(pairs, 1 - cosines, 0).sum()


def batclip_objective(model: Classifier) -> Objective:
    """Minimise entropy − image-text alignment − separation.

    Args:
        model: any classifier with class embeddings; its own context is the objective's.

    Returns:
        The objective; it raises a ValueError if the model has no class embeddings.
    """

    def objective(params: Any, context: Any, batch: Batch) -> ObjectiveValue:
        outputs = model(params, context, batch)
        logits, embeddings, texts, _ = outputs
        if texts is None:
            raise ValueError("BATCLIP needs class embeddings, which this model's outputs lack")
        means, present = prototypes(embeddings, logits.argmax(-1), batch.mask, len(texts))
        metrics = {
            "entropy": masked_mean(entropy(logits), batch.mask),
            "image_text": image_text_alignment(means, present, texts),
            "separation": prototype_separation(means, present),
        }
        loss = metrics["entropy"] - metrics["image_text"] - metrics["separation"]
        return loss, (outputs, metrics)

    return objective


def adam_with_l2(learning_rate: float, weight_decay: float = 1e-2) -> optax.GradientTransformation:
    """Adam whose weight decay is L2 in the gradient, as PyTorch's `Adam(weight_decay=…)`."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))


BATCLIP_PRESETS = {
    "cifar10-c": Preset(partial(optax.adamw, 1e-3, weight_decay=1e-2), 200),
    "cifar100-c": Preset(partial(adam_with_l2, 5e-4, weight_decay=1e-2), 200),
    "imagenet-c": Preset(partial(optax.adamw, 5e-4, weight_decay=1e-2), 64),
}
"""The published settings for ViT-B/16 and ViT-B/32, severity 5."""


def batclip(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Trainable | None = None,
) -> Adapter:
    """Adapt the normalisation layers of both towers, by default.

    Batch norms use each batch's own statistics. Where parameters of the text tower are adapted, the
    text is encoded at every step, otherwise once.

    Args:
        model: any classifier with class embeddings.
        task: the classes; None for a model that has its own.
        optimizer: an optax transformation; None for `BATCLIP_PRESETS["imagenet-c"]`.
        trainable: which parameters to adapt, a predicate on paths; None for
            `normalisation_parameters("both")`.

    Returns:
        The adapter.

    Raises:
        TypeError: if an argument is of another kind: a learning rate for the optimizer, a list for
            `trainable`, class names for the task.
        ValueError: if the model needs a task and there is none; in `init`, if no parameter is
            chosen.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> optimizer = jaxtta.adapters.BATCLIP_PRESETS["cifar10-c"].optimizer()
        >>> adapter = jaxtta.adapters.batclip(model, task, optimizer=optimizer)
        >>> state = adapter.init(params)
        >>> sorted(state.adapted)  # both towers
        ['text_model', 'vision_model']
    """
    model = with_batch_norm_statistics(model, "batch")
    if trainable is None:
        trainable = normalisation_parameters("both")
    if optimizer is None:
        optimizer = BATCLIP_PRESETS["imagenet-c"].optimizer()
    return online(
        batclip_objective(model), context_of(model, task, trainable), trainable, optimizer
    )
