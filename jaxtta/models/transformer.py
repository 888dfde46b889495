"""CLIP's two transformers in linen, with the parameter names of transformers' Flax CLIP.

Everything but attention works on single tokens, so the blocks take rows of tokens of any
leading shape and an `attend` function that knows how the rows are arranged. That is what lets
the text tower run on packed prompts (see `prompts.py`) with the same parameters and the same code.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtta.models.attention import attention

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
"""(query, key, value), each (rows…, heads, dim), to the attended values of the same shape."""
Keep = Callable[[Array], Array]
"""Tokens (rows…, width) to some of them."""


def _all(x: Array) -> Array:
    return x


class Reading(NamedTuple):
    """How the tokens of a block look at each other, and which of them are read after it.

    Attributes:
        attend: attention, from the queries to the tokens kept.
        queries: the tokens that look.
        keep: the tokens that go on.
    """

    attend: Attend
    queries: Keep = _all
    keep: Keep = _all


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
    """

    width: int
    mlp_width: int
    heads: int
    layers: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    compute_dtype: Any = None
    remat: bool = False


class LayerNorm(nn.Module):
    """LayerNorm computed in at least float32 and returned in the input's dtype."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis of `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        y = standardise(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.epsilon)
        return (y * scale + bias).astype(x.dtype)


# The derivatives that follow are those that JAX would find, written so that the backward pass keeps
# one array where JAX's own keeps two or three. What is kept is most of the memory of a step.


def _moments(x: Array, epsilon: float) -> tuple[Array, Array]:
    y = x - x.mean(-1, keepdims=True)
    inverse_std = jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + epsilon)
    return y * inverse_std, inverse_std


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardise(x: Array, epsilon: float) -> Array:
    """Shift and scale the last axis of `x` to mean 0 and variance 1."""
    return _moments(x, epsilon)[0]


@standardise.defjvp
def _standardise_jvp(
    epsilon: float, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    y, inverse_std = _moments(x, epsilon)
    along = (y * dx).mean(-1, keepdims=True)
    return y, inverse_std * (dx - dx.mean(-1, keepdims=True) - y * along)


class Attention(nn.Module):
    """Multi-head self-attention over rows of tokens."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: Array, reading: Reading) -> Array:
        """Map tokens (rows…, width) to those kept."""
        arch = self.arch

        def project(name: str, x: Array) -> Array:
            y = nn.Dense(arch.width, dtype=arch.compute_dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], arch.heads, arch.width // arch.heads)

        query = project("q_proj", reading.queries(x))
        y = reading.attend(query, project("k_proj", x), project("v_proj", x))
        y = y.reshape(*y.shape[:-2], arch.width)
        return nn.Dense(arch.width, dtype=arch.compute_dtype, name="out_proj")(y)


class MLP(nn.Module):
    """A block's two dense layers."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map tokens (rows…, width) to the same shape."""
        arch = self.arch
        self.sow("inputs", "fc1_inputs", x)  # for whoever makes the collection mutable, nobody else
        x = nn.Dense(arch.mlp_width, dtype=arch.compute_dtype, name="fc1")(x)
        x = jax.checkpoint(ACTIVATIONS[arch.activation])(x)  # keeps x alone for the backward pass
        self.sow("inputs", "fc2_inputs", x)
        return nn.Dense(arch.width, dtype=arch.compute_dtype, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer block."""

    arch: Architecture
    reading: Reading

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Return the block's output and its first LayerNorm's, (rows…, width)."""
        arch = self.arch
        normed = LayerNorm(arch.epsilon, name="layer_norm1")(x)
        x = self.reading.keep(x) + Attention(arch, name="self_attn")(normed, self.reading)
        y = LayerNorm(arch.epsilon, name="layer_norm2")(x)
        return x + MLP(arch, name="mlp")(y), normed


class Layers(nn.Module):
    """The stack of blocks; their names are their numbers."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: Array, attend: Attend, last: Reading) -> tuple[list[Array], list[Array]]:
        """Return every block's output and every block's first LayerNorm's output.

        Of the last block only the tokens that are read need computing: `last` says which.
        """
        block = nn.remat(Block) if self.arch.remat else Block
        outputs, normed = [], []
        for layer in range(self.arch.layers):
            reading = last if layer == self.arch.layers - 1 else Reading(attend)
            x, y = block(self.arch, reading, name=str(layer))(x)
            outputs.append(x)
            normed.append(y)
        return outputs, normed


class Encoder(nn.Module):
    """Holds the blocks one level down, where transformers has them."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: Array, attend: Attend, last: Reading) -> tuple[list[Array], list[Array]]:
        """As `Layers`."""
        return Layers(self.arch, name="layers")(x, attend, last)


class VisionEmbeddings(nn.Module):
    """Patches to tokens, with the class token in front."""

    arch: Architecture
    image_size: int
    patch_size: int

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Map pixels (batch, height, width, 3) to tokens (batch, 1 + patches, width)."""
        width, patch, side = self.arch.width, self.patch_size, self.image_size // self.patch_size
        init = nn.initializers.normal(0.02)
        class_token = self.param("class_embedding", init, (width,))
        kernel = _Kernel((patch, patch, 3, width), name="patch_embedding")()
        positions = _Table(side * side + 1, width, name="position_embedding")()
        # A convolution whose stride is its size is one matrix product over patches.
        batch = pixels.shape[0]
        patches = pixels[:, : side * patch, : side * patch]
        patches = patches.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        dtype = self.arch.compute_dtype or kernel.dtype
        patches = patches.reshape(batch, side * side, patch * patch * 3).astype(dtype)
        tokens = patches @ kernel.reshape(-1, width).astype(dtype)
        class_token = jnp.broadcast_to(class_token.astype(dtype), (batch, 1, width))
        return jnp.concatenate([class_token, tokens], 1) + positions.astype(dtype)


class _Kernel(nn.Module):
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        return self.param("kernel", nn.initializers.normal(0.02), self.shape)


class _Table(nn.Module):
    rows: int
    width: int

    @nn.compact
    def __call__(self) -> Array:
        return self.param("embedding", nn.initializers.normal(0.02), (self.rows, self.width))


class VisionOutput(NamedTuple):
    """What one pass of the image tower gives; what nobody reads is never computed.

    Attributes:
        pooled: (batch, width), the class token after the final LayerNorm.
        hidden_states: (batch, tokens, width) each: the embeddings, then every block's output (the
            last block's for the class token alone, unless all tokens were asked for).
        layer_features: (batch, layers, width), the class token after every block, passed through
            the next block's first LayerNorm (the last through the final LayerNorm).
    """

    pooled: Array
    hidden_states: list[Array]
    layer_features: Array


class VisionTransformer(nn.Module):
    """CLIP's ViT, without its projection; or, without the first LayerNorm, anybody's."""

    arch: Architecture
    image_size: int
    patch_size: int
    pre_norm: bool = True

    @nn.compact
    def __call__(self, pixels: Array, *, all_tokens: bool = False) -> VisionOutput:
        """Encode normalised pixels (batch, height, width, 3)."""
        x = VisionEmbeddings(self.arch, self.image_size, self.patch_size, name="embeddings")(pixels)
        if self.pre_norm:
            x = LayerNorm(self.arch.epsilon, name="pre_layrnorm")(x)
        read = _all if all_tokens else _class_token
        last = Reading(attention, read, read)
        outputs, normed = Encoder(self.arch, name="encoder")(x, attention, last)
        pooled = LayerNorm(self.arch.epsilon, name="post_layernorm")(outputs[-1][:, 0])
        features = [y[:, 0] for y in normed[1:]] + [pooled]
        return VisionOutput(pooled, [x, *outputs], jnp.stack(features, 1))


def _class_token(x: Array) -> Array:
    return x[:, :1]


class TextEmbeddings(nn.Module):
    """Token and position embeddings."""

    arch: Architecture
    vocabulary: int
    max_length: int

    @nn.compact
    def __call__(self, token_ids: Array, positions: Array) -> Array:
        """Map ids and positions (rows…) to tokens (rows…, width)."""
        tokens = _Table(self.vocabulary, self.arch.width, name="token_embedding")()
        table = _Table(self.max_length, self.arch.width, name="position_embedding")()
        dtype = self.arch.compute_dtype or tokens.dtype
        return tokens[token_ids].astype(dtype) + table[positions].astype(dtype)


class TextTransformer(nn.Module):
    """CLIP's text tower, without its projection, on rows of tokens in any arrangement."""

    arch: Architecture
    vocabulary: int
    max_length: int

    @nn.compact
    def __call__(self, token_ids: Array, positions: Array, attend: Attend, ends: Array) -> Array:
        """Encode rows of tokens and read them at the ends of text.

        Args:
            token_ids: (rows,).
            positions: (rows,), each token's place in its prompt.
            attend: causal attention over the rows as they are arranged.
            ends: (prompts,), the rows of the end-of-text tokens.

        Returns:
            (prompts, width), after the final LayerNorm.
        """
        x = TextEmbeddings(self.arch, self.vocabulary, self.max_length, name="embeddings")(
            token_ids, positions
        )
        last = Reading(lambda *rows: attend(*rows)[ends], keep=lambda rows: rows[ends])
        outputs, _ = Encoder(self.arch, name="encoder")(x, attend, last)
        return LayerNorm(self.arch.epsilon, name="final_layer_norm")(outputs[-1])
