"""Terms of the objectives: pure functions of arrays, with masks for padded images.

Everything is a sum over the whole batch and the whole set of classes, without axis names, so that
a batch split over devices gives the same value. Absent classes and padded images contribute
neither to a value nor to a gradient: zeros are put in before a quotient or a norm, not after it.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of the values where the mask holds, 0 where it holds nowhere.

    Args:
        values: (batch,).
        mask: (batch,) bool.

    Returns:
        A scalar.
    """
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def entropy(logits: Array) -> Array:
    """Entropy of the predictions in nats.

    Args:
        logits: (…, classes).

    Returns:
        (…).
    """
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_p) * log_p).sum(-1)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean cross-entropy of predictions with soft targets, in nats.

    Args:
        logits: (rows, classes).
        targets: (rows, classes), probabilities.

    Returns:
        A scalar.
    """
    return -(targets * jax.nn.log_softmax(logits)).sum(-1).mean()


def smoothed(targets: Array, smoothing: float) -> Array:
    """Spread a share of the targets' probability over all classes."""
    return (1 - smoothing) * targets + smoothing / targets.shape[-1]


def classification(logits: Array, labels: Array, smoothing: float = 0.2) -> Array:
    """Cross-entropy with smoothed labels.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.
        smoothing: share of the target that is spread over all classes.

    Returns:
        A scalar.
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return cross_entropy(logits, smoothed(targets, smoothing))


def contrastive_distillation(student: Array, teacher: Array, temperature: float = 2.0) -> Array:
    """How far a student's matching of images and texts is from its teacher's.

    Args:
        student: (images, texts), logits.
        teacher: likewise.
        temperature: both are divided by.

    Returns:
        A scalar, images over texts; give transposed logits for texts over images.
    """
    targets = jax.nn.softmax(teacher / temperature)
    return temperature**2 * cross_entropy(student / temperature, targets)


def modality_alignment(logits: Array, labels: Array, smoothing: float = 0.2) -> Array:
    """Cross-entropy against targets that share their mass among pairs of the same label.

    Args:
        logits: (pairs, pairs), images over texts or texts over images.
        labels: (pairs,) integers, the same for pairs that match each other.
        smoothing: share of the target that is spread over all pairs.

    Returns:
        A scalar.

    References:
        GNSP, https://arxiv.org/abs/2507.19839
    """
    same = (labels[:, None] == labels).astype(logits.dtype)
    return cross_entropy(logits, smoothed(same / same.sum(-1, keepdims=True), smoothing))
