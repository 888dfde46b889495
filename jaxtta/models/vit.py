"""The ViT image towers of CLIP and SigLIP in linen."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtta.models.attention import attention
from jaxtta.models.transformer import (
    MLP,
    Architecture,
    Attention,
    AttentionPlan,
    Encoder,
    LayerNorm,
    Table,
    identity,
)

Array = jax.Array


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, as one matrix product over patches."""

    arch: Architecture
    patch_size: int
    use_bias: bool

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Map pixels (batch, height, width, 3) to (batch, patches, width)."""
        width, patch = self.arch.width, self.patch_size
        init = nn.initializers.normal(0.02)
        kernel = self.param("kernel", init, (patch, patch, 3, width))
        batch, side = pixels.shape[0], pixels.shape[1] // patch
        patches = pixels[:, : side * patch, : side * patch]
        # One axis at a time, as explicit mesh axes ask of a reshape.
        patches = patches.reshape(batch, side, patch, side * patch, 3)
        patches = patches.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        patches = patches.reshape(batch, side * side, patch, patch, 3)
        dtype = self.arch.compute_dtype or kernel.dtype
        patches = patches.reshape(batch, side * side, patch * patch * 3).astype(dtype)
        tokens = patches @ kernel.reshape(-1, width).astype(dtype)
        if self.use_bias:
            tokens += self.param("bias", nn.initializers.zeros, (width,)).astype(dtype)
        return tokens


class VisionEmbeddings(nn.Module):
    """Patches to tokens, with the class token in front where there is one."""

    arch: Architecture
    image_size: int
    patch_size: int
    class_token: bool = True

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """Map pixels (batch, height, width, 3) to tokens (batch, [1 +] patches, width)."""
        width, side = self.arch.width, self.image_size // self.patch_size
        patches = PatchEmbedding(
            self.arch, self.patch_size, use_bias=not self.class_token, name="patch_embedding"
        )
        tokens = patches(pixels)
        if self.class_token:
            first = self.param("class_embedding", nn.initializers.normal(0.02), (width,))
            tokens = jnp.concatenate([_for_each_image(first, tokens), tokens], 1)
        positions = Table(side * side + self.class_token, width, name="position_embedding")()
        return tokens + positions.astype(tokens.dtype)


def _for_each_image(token: Array, tokens: Array) -> Array:
    """One token (width,) for each image, on the devices of its tokens: (batch, 1, width)."""
    return jnp.zeros_like(tokens[:, :1]) + token.astype(tokens.dtype)


class AttentionPool(nn.Module):
    """SigLIP's pooling: a learned query attends to all tokens, and an MLP follows."""

    arch: Architecture

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map tokens (batch, tokens, width) to (batch, width)."""
        width = self.arch.width
        probe = self.param("probe", nn.initializers.normal(0.02), (width,))
        queries = _for_each_image(probe, x)
        plan = AttentionPlan(attention, select_queries=lambda _: queries)
        x = Attention(self.arch, name="attention")(x, plan)
        x += MLP(self.arch, name="mlp")(LayerNorm(self.arch.epsilon, name="layernorm")(x))
        return x[:, 0]


class VisionOutput(NamedTuple):
    """What one pass of the image tower gives; what nobody reads is never computed.

    Attributes:
        pooled: (batch, width), the class token after the final LayerNorm; without a class token,
            what attention pooling makes of all tokens.
        hidden_states: (batch, tokens, width) each: the embeddings, then every block's output (the
            last block's for the class token alone, unless all tokens were asked for).
        layer_features: (batch, layers, width), the class token after every block, passed through
            the next block's first LayerNorm (the last through the final LayerNorm); None without a
            class token.
    """

    pooled: Array
    hidden_states: list[Array]
    layer_features: Array | None


class VisionTransformer(nn.Module):
    """CLIP's ViT without its projection, a supervised model's or SigLIP's.

    Attributes:
        arch: its blocks.
        image_size: side of the images in pixels.
        patch_size: side of a patch in pixels.
        pre_norm: whether the tokens pass a LayerNorm before the blocks, as CLIP's do.
        class_token: whether the image is read at a class token; otherwise attention pools it, as in
            SigLIP, and no projection follows.
    """

    arch: Architecture
    image_size: int
    patch_size: int
    pre_norm: bool = True
    class_token: bool = True

    mixes_batch = False
    projection_bias = False

    @property
    def has_projection(self) -> bool:
        """Whether embeddings are a projection of what is pooled."""
        return self.class_token

    @property
    def feature_shape(self) -> tuple[int, int] | None:
        """(Layers, width) of the layer features; None without a class token."""
        return (self.arch.layers, self.arch.width) if self.class_token else None

    @nn.compact
    def __call__(
        self, pixels: Array, mask: Array | None = None, *, all_tokens: bool = False
    ) -> VisionOutput:
        """Encode normalised pixels.

        Args:
            pixels: (batch, height, width, 3).
            mask: ignored; no image depends on another.
            all_tokens: also compute the last block's output for all tokens.

        Returns:
            Class token, hidden states and layer features.
        """
        del mask
        sizes = self.image_size, self.patch_size
        x = VisionEmbeddings(self.arch, *sizes, self.class_token, name="embeddings")(pixels)
        if self.pre_norm:
            x = LayerNorm(self.arch.epsilon, name="pre_layrnorm")(x)
        read = _class_token if self.class_token and not all_tokens else identity
        attend = functools.partial(attention, fused=self.arch.fused_attention)
        last = AttentionPlan(attend, read, read)
        outputs, first = Encoder(self.arch, name="encoder")(x, attend, last, _class_token)
        norm = LayerNorm(self.arch.epsilon, name="post_layernorm")
        if not self.class_token:
            pooled = AttentionPool(self.arch, name="head")(norm(outputs[-1]))
            return VisionOutput(pooled, [x, *outputs], None)
        pooled = norm(outputs[-1][:, 0])
        features = [y[:, 0] for y in first[1:]] + [pooled]
        return VisionOutput(pooled, [x, *outputs], jnp.stack(features, 1))


def _class_token(x: Array) -> Array:
    return x[:, :1]
