"""CLIP's ViT image tower in linen."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtta.models.attention import attention
from jaxtta.models.transformer import (
    Architecture,
    AttentionPlan,
    Encoder,
    Kernel,
    LayerNorm,
    Table,
    identity,
)

Array = jax.Array


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
        kernel = Kernel((patch, patch, 3, width), name="patch_embedding")()
        positions = Table(side * side + 1, width, name="position_embedding")()
        # A convolution whose stride is its size is one matrix product over patches.
        batch = pixels.shape[0]
        patches = pixels[:, : side * patch, : side * patch]
        patches = patches.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        dtype = self.arch.compute_dtype or kernel.dtype
        patches = patches.reshape(batch, side * side, patch * patch * 3).astype(dtype)
        tokens = patches @ kernel.reshape(-1, width).astype(dtype)
        class_token = jnp.broadcast_to(class_token.astype(dtype), (batch, 1, width))
        return jnp.concatenate([class_token, tokens], 1) + positions.astype(dtype)


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
    layer_features: Array | None


class VisionTransformer(nn.Module):
    """CLIP's ViT without its projection; without `pre_norm`, that of a supervised model."""

    arch: Architecture
    image_size: int
    patch_size: int
    pre_norm: bool = True

    mixes_batch = False
    projection_bias = False

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(Layers, width) of the layer features."""
        return self.arch.layers, self.arch.width

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
        x = VisionEmbeddings(self.arch, self.image_size, self.patch_size, name="embeddings")(pixels)
        if self.pre_norm:
            x = LayerNorm(self.arch.epsilon, name="pre_layrnorm")(x)
        read = identity if all_tokens else _class_token
        last = AttentionPlan(attention, read, read)
        outputs, normed = Encoder(self.arch, name="encoder")(x, attention, last)
        pooled = LayerNorm(self.arch.epsilon, name="post_layernorm")(outputs[-1][:, 0])
        features = [y[:, 0] for y in normed[1:]] + [pooled]
        return VisionOutput(pooled, [x, *outputs], jnp.stack(features, 1))


def _class_token(x: Array) -> Array:
    return x[:, :1]
