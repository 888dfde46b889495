"""Scaled dot-product attention, written for the backend that runs it."""

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

    def products(query: Array, key: Array, value: Array) -> Array:
        # Batched matrix products over (batch, head), the layout that the CPU's kernels take
        # without another copy, forward and backward.
        query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        scores = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)
        scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        weights = jax.nn.softmax(scores).astype(value.dtype)
        return (weights @ value).transpose(0, 2, 1, 3)

    def fused(query: Array, key: Array, value: Array) -> Array:
        # XLA's choice on an accelerator, in whatever form that backend fuses best.
        allowed = None if mask is None else jnp.asarray(mask)[None, None]
        return jax.nn.dot_product_attention(query, key, value, mask=allowed)

    # Chosen when the program is lowered, so that a TPU program compiled on a CPU host gets its own.
    return jax.lax.platform_dependent(query, key, value, cpu=products, default=fused)
