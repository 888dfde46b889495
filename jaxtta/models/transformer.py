"""Transformer blocks in linen, with the parameter names of transformers' Flax CLIP.

Everything but attention works on single tokens, so the blocks take rows of tokens of any
leading shape and an `attend` function that knows how the rows are arranged. That is what lets
the text tower run on packed prompts (see `prompts.py`) with the same parameters and the same code.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtta.models.attention import Fused

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
"""(query, key, value), each (rows…, heads, dim), to the attended values of the same shape."""
Select = Callable[[Array], Array]
"""Tokens (rows…, width) to some of them."""


def identity(x: Array) -> Array:
    """Select all tokens."""
    return x


class AttentionPlan(NamedTuple):
    """How the tokens of a block attend, and which of them are computed after it.

    Attributes:
        attend: attention, from the queries to all tokens.
        select_queries: the tokens that attend.
        select_outputs: the tokens that the block returns.
    """

    attend: Attend
    select_queries: Select = identity
    select_outputs: Select = identity


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Architecture(NamedTuple):
    """What the blocks of one tower look like.

    Attributes:
        width: size of a token.
        mlp_width: size of the hidden layer of a block's MLP.
        heads: number of attention heads.
        layers: number of blocks.
        activation: a key of `ACTIVATIONS`.
        epsilon: LayerNorm's epsilon.
        compute_dtype: dtype of matrix products; None for that of the parameters. LayerNorm,
            softmax and everything after the embeddings stay in float32.
        remat: recompute each block in the backward pass instead of keeping its activations.
        scan: run the blocks as one loop, which compiles faster for TPU and computes the same.
        fused_attention: JAX's implementation by which an image's tokens attend, "cudnn" or "xla";
            None for batched matrix products.
    """

    width: int
    mlp_width: int
    heads: int
    layers: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    compute_dtype: Any = None
    remat: bool = False
    scan: bool = False
    fused_attention: Fused | None = None


class LayerNorm(nn.Module):
    """LayerNorm computed in at least float32 and returned in the input's dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis of `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon)


# The derivatives that JAX would find, written so that a compiled backward pass reads `x` and its
# moments where JAX's own reads two or three arrays of its size. What is kept is most of the memory
# of a step. The barrier makes arrays of the moments: the gradients of scale and bias are then sums
# that one kernel computes; without it a GPU's program would write each term to memory first.


def _moments(x: Array, epsilon: float) -> tuple[Array, Array]:
    mean = x.mean(-1, keepdims=True)
    y = x - mean
    return mean, jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + epsilon)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Normalise the last axis of `x`, in at least float32; the result has its dtype."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean, inverse_std = _moments(wide, epsilon)
    return ((wide - mean) * inverse_std * scale + bias).astype(x.dtype)


@layer_norm.defjvp
def _layer_norm_jvp(
    epsilon: float, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    wide, dwide = (one.astype(jnp.promote_types(x.dtype, jnp.float32)) for one in (x, dx))
    mean, inverse_std = jax.lax.optimization_barrier(_moments(wide, epsilon))
    y = (wide - mean) * inverse_std
    along = (y * dwide).mean(-1, keepdims=True)
    dy = inverse_std * (dwide - dwide.mean(-1, keepdims=True) - y * along)
    return layer_norm(x, scale, bias, epsilon), (dy * scale + y * dscale + dbias).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention over rows of tokens."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: Array, plan: AttentionPlan) -> Array:
        """Map tokens (rows…, width) to those kept."""
        arch = self.arch

        def project(name: str, x: Array) -> Array:
            y = nn.Dense(arch.width, dtype=arch.compute_dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], arch.heads, arch.width // arch.heads)

        query = project("q_proj", plan.select_queries(x))
        y = plan.attend(query, project("k_proj", x), project("v_proj", x))
        y = y.reshape(*y.shape[:-2], arch.width)
        return nn.Dense(arch.width, dtype=arch.compute_dtype, name="out_proj")(y)


class MLP(nn.Module):
    """A block's two dense layers."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map tokens (rows…, width) to the same shape."""
        arch = self.arch
        self.sow("inputs", "fc1_inputs", x)  # no-op unless "inputs" is mutable
        x = nn.Dense(arch.mlp_width, dtype=arch.compute_dtype, name="fc1")(x)
        x = jax.checkpoint(ACTIVATIONS[arch.activation])(x)  # keeps x alone for the backward pass
        self.sow("inputs", "fc2_inputs", x)
        return nn.Dense(arch.width, dtype=arch.compute_dtype, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer block."""

    arch: Architecture
    plan: AttentionPlan

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Return the block's output and its first LayerNorm's, (rows…, width)."""
        arch = self.arch
        normed = LayerNorm(arch.epsilon, name="layer_norm1")(x)
        x = self.plan.select_outputs(x) + Attention(arch, name="self_attn")(normed, self.plan)
        y = LayerNorm(arch.epsilon, name="layer_norm2")(x)
        return x + MLP(arch, name="mlp")(y), normed


class Layers(nn.Module):
    """The stack of blocks; their names are their numbers."""

    arch: Architecture

    @nn.compact
    def __call__(
        self, x: Array, attend: Attend, last: AttentionPlan, read: Select = identity
    ) -> tuple[list[Array], list[Array]]:
        """Return every block's output and what `read` selects of its first LayerNorm's output.

        Of the last block only the tokens that are read need computing: `last` says which.
        """
        first = [str(layer) for layer in range(self.arch.layers - 1)]
        blocks = self.variables.get("params", {})
        there = all(name in blocks for name in first)  # not where they are drawn: in `init`
        outputs, normed = [], []
        if self.arch.scan and len(first) > 1 and there and not self.is_mutable_collection("inputs"):
            plan = AttentionPlan(attend)
            outputs, normed = self._scan([blocks[name] for name in first], x, plan, read)
            x = outputs[-1]
        block = nn.remat(Block) if self.arch.remat else Block
        for layer in range(len(outputs), self.arch.layers):
            plan = last if layer == len(first) else AttentionPlan(attend)
            x, y = block(self.arch, plan, name=str(layer))(x)
            outputs.append(x)
            normed.append(read(y))
        return outputs, normed

    def _scan(
        self, params: list[Any], x: Array, plan: AttentionPlan, read: Select
    ) -> tuple[list[Array], list[Array]]:
        """The blocks of these parameters, as one loop over the parameters' stack."""
        block = Block(self.arch, plan, parent=None)

        def body(x: Array, params: Any) -> tuple[Array, tuple[Array, Array]]:
            x, normed = cast(tuple[Array, Array], block.apply({"params": params}, x))
            return x, (x, read(normed))

        # A loop keeps all that its derivative reads, though XLA would recompute what costs little:
        # so the matrix products alone are kept, or nothing.
        keep = None if self.arch.remat else jax.checkpoint_policies.dots_saveable
        body = jax.checkpoint(body, prevent_cse=False, policy=keep)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
        last, (outputs, normed) = jax.lax.scan(body, x, stacked)
        # The stacks that nobody reads are not kept; the last output is at hand without its stack.
        return [*outputs[:-1], last], [*normed]


class Encoder(nn.Module):
    """Holds the blocks one level down, where transformers has them."""

    arch: Architecture

    @nn.compact
    def __call__(
        self, x: Array, attend: Attend, last: AttentionPlan, read: Select = identity
    ) -> tuple[list[Array], list[Array]]:
        """As `Layers`."""
        return Layers(self.arch, name="layers")(x, attend, last, read)


class Table(nn.Module):
    """An embedding table under its own name."""

    rows: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        """Return the array."""
        return self.param("embedding", nn.initializers.normal(0.02), (self.rows, self.width))
