"""What the methods that adapt on some images of a batch share: pure functions of arrays.

Margins of entropy are parts of log C, the entropy of a uniform distribution over C classes, so that
one setting fits all numbers of classes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.adapters.base import Array, Metrics, Objective
from jaxtta.losses import entropy, masked_mean
from jaxtta.models import Batch, Classifier, Outputs, as_batch

MakeObjective = Callable[[Any], Objective]
"""Makes an objective of a model, as `tent_objective` and `batclip_objective` do."""


def log_classes(logits: Array) -> Array:
    """Logarithm of C, in the dtype of the logits (…, C)."""
    return jnp.log(jnp.asarray(logits.shape[-1], logits.dtype))


def reliable(logits: Array, mask: Array | np.ndarray, margin: float) -> Array:
    """Which images are predicted with an entropy below a margin.

    Args:
        logits: (batch, classes).
        mask: (batch,) bool, false for padding.
        margin: part of log C.

    Returns:
        (batch,) bool.
    """
    return jnp.asarray(mask) & (entropy(logits) < margin * log_classes(logits))


def weighted_entropy(logits: Array, weights: Array, selected: Array) -> tuple[Array, Metrics]:
    """Mean over the selected images of weight times entropy; no gradient through the weights.

    Args:
        logits: (batch, classes).
        weights: (batch,).
        selected: (batch,) bool.

    Returns:
        The mean, 0 where none is selected, and it as a metric, `entropy`, with `selected`, the
        number of images.
    """
    loss = masked_mean(jax.lax.stop_gradient(weights) * entropy(logits), selected)
    return loss, {"entropy": loss, "selected": selected.sum(dtype=jnp.int32)}


def logits_of_one(model: Classifier, params: Any, context: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a model's logits (1, classes); nothing is computed."""
    images = np.zeros((1, model.image_size, model.image_size, 3), np.uint8)
    return jax.eval_shape(lambda: model(params, context, as_batch(images)).logits)


def loss_of_selected(
    make: MakeObjective, outputs: Outputs, params: Any, context: Any, batch: Batch, selected: Array
) -> tuple[Array, Metrics]:
    """The loss of an objective on some images of a batch, of outputs that are there already.

    The model has seen all of the batch: batch norms' statistics are not those of the selected.

    Args:
        make: makes the objective of a model.
        outputs: the model's, of the whole batch.
        params: the model's parameters.
        context: the objective's context.
        batch: the whole batch.
        selected: (batch,) bool.

    Returns:
        The loss and its metrics, among them `selected`, the number of images.
    """
    known = _Known(outputs)
    loss, (_, metrics) = make(known)(params, context, batch._replace(mask=selected))
    return loss, {**metrics, "selected": selected.sum(dtype=jnp.int32)}


class _Known:
    """A classifier whose outputs are there already."""

    image_size, mixes_batch, feature_shape = 0, True, None

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs

    def init_context(self, params: Any, task: Any) -> Any:
        del params, task
        return ()

    def __call__(self, params: Any, context: Any, batch: Batch) -> Outputs:
        del params, context, batch
        return self.outputs


def moving_average(before: Array, new: Array, decay: float, some: Array) -> Array:
    """Move an average, which is infinite before its first value.

    Args:
        before: the average.
        new: the new value, of the same shape.
        decay: share of the average that stays.
        some: () bool; where false, the average stays as it is.

    Returns:
        The average, the new value itself if it is the first.
    """
    moved = jnp.where(jnp.isinf(before), new, decay * before + (1 - decay) * new)
    return jax.lax.stop_gradient(jnp.where(some, moved, before)).astype(before.dtype)


def require_context(context: Any, kind: type, method: str) -> None:
    """Raise a TypeError for the context of another method's state."""
    if not isinstance(context, kind):
        given = type(context).__name__
        raise TypeError(
            f"the state's context is a {given}, not {method}'s: it is another adapter's"
        )


def towards(adapted: Any, source: Any, share: float) -> Any:
    """Move parameters a share of the way to others, leaf by leaf."""
    return jax.tree.map(lambda x, y: x + share * (y - x), adapted, source)


def scaled(values: Array, mask: Array) -> Array:
    """Scale (batch,) to [0, 1] over the images of a batch; to 0 where all are equal."""
    low, high = jnp.where(mask, values, jnp.inf).min(), jnp.where(mask, values, -jnp.inf).max()
    return jnp.where(mask & (high > low), values - low, 0) / jnp.where(high > low, high - low, 1)


def prior_corrected(
    logits: Array, mask: Array, count: Array | int, reference_quirks: bool = False
) -> Array:
    """Correct predictions by the smoothed mean of a batch's probabilities.

    Args:
        logits: (batch, classes).
        mask: (batch,) bool, false for padding.
        count: images in the batch.
        reference_quirks: whether the prior multiplies the logits, which is right only while all are
            positive; otherwise it multiplies the probabilities.

    Returns:
        Logits (batch, classes).
    """
    classes = logits.shape[-1]
    mask = mask & jnp.isfinite(logits).all(-1)  # one image that is not spoils no others
    p = jnp.where(mask[:, None], jax.nn.softmax(logits), 0)
    prior = p.sum(0) / jnp.maximum(mask.sum(), 1)
    greatest = jnp.where(mask.any(), prior.max(), 1)
    smoothing = jnp.maximum(1 / jnp.maximum(count, 1), 1 / classes) / greatest
    prior = (prior + smoothing) / (1 + smoothing * classes)
    return logits * prior if reference_quirks else logits + jnp.log(prior)


def require_range(low: float, high: float, **settings: float) -> None:
    """Raise a ValueError for a setting outside of a range, or NaN."""
    for name, value in settings.items():
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}, expected between {low} and {high}")
