"""Scaled dot-product attention."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def attention(query: Array, key: Array, value: Array, mask: np.ndarray | None = None) -> Array:
    """Attend, with the softmax in float32 (float64 under x64).

    Args:
        query: (batch, queries, heads, dim).
        key: (batch, keys, heads, dim).
        value: (batch, keys, heads, dim).
        mask: (queries, keys) bool, true where a query may look; None for everywhere.

    Returns:
        (batch, queries, heads, dim) in the query's dtype.
    """
    # Batched matrix products over (batch, head), the layout that the CPU's kernels take without
    # another copy, forward and backward.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = softmax(scores).astype(value.dtype)
    return (weights @ value).transpose(0, 2, 1, 3)


@jax.custom_jvp
def softmax(x: Array) -> Array:
    """Softmax over the last axis, whose backward pass keeps the result alone."""
    return jax.nn.softmax(x)


@softmax.defjvp
def _softmax_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y = softmax(x)
    return y, y * (dx - (y * dx).sum(-1, keepdims=True))
