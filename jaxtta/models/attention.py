"""Scaled dot-product attention."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Fused = Literal["cudnn", "xla"]
FUSED_MULTIPLE = 8  # what cuDNN's kernels ask of the number of tokens


def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: np.ndarray | None = None,
    fused: Fused | None = None,
) -> Array:
    """Attend, with the softmax in float32 (float64 under x64).

    Args:
        query: (batch, queries, heads, dim).
        key: (batch, keys, heads, dim).
        value: (batch, keys, heads, dim).
        mask: (queries, keys) bool, true where a query may look; None for everywhere.
        fused: one of JAX's own implementations, which is used where all tokens attend to all tokens
            (no mask, as many queries as keys); None for batched matrix products.

    Returns:
        (batch, queries, heads, dim) in the query's dtype.
    """
    if fused and query.shape == key.shape and mask is None:
        return fused_attention(query, key, value, fused)
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


def _padded(query: Array, key: Array, value: Array, implementation: Fused) -> Array:
    batch, tokens = query.shape[:2]
    padding = [(0, 0), (0, -tokens % FUSED_MULTIPLE), (0, 0), (0, 0)]
    lengths = jnp.full(batch, tokens, jnp.int32)
    y = jax.nn.dot_product_attention(
        *(jnp.pad(x, padding) for x in (query, key, value)),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return y[:, :tokens]


def _pull_back(attend: Callable[..., Array], *arrays: Array) -> tuple[Array, ...]:
    *inputs, dy = arrays
    return jax.vjp(attend, *inputs)[1](dy)


def _with_larger_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under `vmap`, one call on a larger batch: JAX's own rule for cuDNN cannot map the lengths."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def rule(size: int, batched: Sequence[bool], *arrays: Array) -> tuple[Any, Any]:
        whole = [
            x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(arrays, batched, strict=True)
        ]
        found = mapped(*(x.reshape(-1, *x.shape[2:]) for x in whole))
        found = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return mapped


# cuDNN's kernel has a first derivative only. The derivative of that one, for meta-training, is the
# plain form's.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_attention(query: Array, key: Array, value: Array, implementation: Fused) -> Array:
    """JAX's own attention, of tokens padded to a multiple of 8; no token attends to the padding.

    Args:
        query: (batch, tokens, heads, dim).
        key: of the same shape.
        value: of the same shape.
        implementation: "cudnn", for NVIDIA GPUs and tokens in 16 bits, or "xla".

    Returns:
        As `attention`.
    """
    attend = functools.partial(_padded, implementation=implementation)
    return _with_larger_batch(attend)(query, key, value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_gradient(implementation: Fused, *arrays: Array) -> tuple[Array, ...]:
    attend = functools.partial(_padded, implementation=implementation)
    return _with_larger_batch(functools.partial(_pull_back, attend))(*arrays)


fused_attention.defvjp(
    lambda *given: (fused_attention(*given), given[:3]),
    lambda implementation, inputs, dy: _fused_gradient(implementation, *inputs, dy),
)
_fused_gradient.defvjp(
    lambda *given: (_fused_gradient(*given), given[1:]),
    lambda _, arrays, dy: jax.vjp(functools.partial(_pull_back, attention), *arrays)[1](dy),
)
