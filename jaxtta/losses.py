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


def prototypes(embeddings: Array, labels: Array, mask: Array, classes: int) -> tuple[Array, Array]:
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
    sums = jnp.matmul(members.T, jnp.where(mask[:, None], embeddings, 0), precision="highest")
    return sums / jnp.maximum(counts, 1)[:, None], counts > 0


def image_text_alignment(means: Array, present: Array, class_embeddings: Array) -> Array:
    """Mean projection of the prototypes on their classes' texts.

    Args:
        means: prototypes (classes, projection), unnormalised.
        present: (classes,) bool.
        class_embeddings: (classes, projection), of unit norm.

    Returns:
        A scalar.

    References:
        BATCLIP, https://arxiv.org/abs/2412.02837
    """
    return masked_mean((means * class_embeddings).sum(-1), present)


def prototype_separation(means: Array, present: Array) -> Array:
    """Sum of the cosine distances between the prototypes of all ordered pairs of classes.

    Args:
        means: prototypes (classes, projection).
        present: (classes,) bool.

    Returns:
        A scalar; 0 where fewer than two classes occur.

    References:
        BATCLIP, https://arxiv.org/abs/2412.02837
    """
    safe = jnp.where(present[:, None], means, 1)
    directions = safe / jnp.linalg.norm(safe, axis=-1, keepdims=True)
    pairs = present[:, None] & present & ~jnp.eye(len(present), dtype=bool)
    cosines = jnp.matmul(directions, directions.T, precision="highest")
    return jnp.where(pairs, 1 - cosines, 0).sum()


def feature_discrepancy(features: Array, mask: Array, mean: Array, std: Array) -> Array:
    """Squared distance of a batch's feature statistics from given ones.

    Args:
        features: (batch, …).
        mask: (batch,) bool, false for padding.
        mean: (…), to compare with.
        std: (…), unbiased.

    Returns:
        A scalar, summed over all features; 0 below two valid images, and so is its gradient.

    References:
        MGTTA, https://arxiv.org/abs/2412.16901
    """
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    rows, count = mask.reshape(-1, *(1,) * mean.ndim), mask.sum()
    own_mean = jnp.where(rows, features, 0).sum(0) / jnp.maximum(count, 1)
    squares = (jnp.where(rows, features - own_mean, 0) ** 2).sum(0)
    varies = squares > 0  # the root of 0 has no derivative
    own_std = jnp.sqrt(jnp.where(varies, squares, 1) / jnp.maximum(count - 1, 1))
    own_std = jnp.where(varies, own_std, 0)
    distance = ((own_std - std) ** 2 + (own_mean - mean) ** 2).sum()
    return jnp.where(count > 1, distance, 0)
