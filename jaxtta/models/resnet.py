"""CLIP's ResNet image tower in linen: a three-convolution stem and attention pooling.

    model, params = jaxtta.load(folder)               # an OpenCLIP RN50, say
    zero_shot = jaxtta.adapters.zero_shot(model, task)     # with running statistics
    adapter = jaxtta.adapters.batclip(model, task)         # with each batch's own

Its batch norms use the checkpoint's running statistics, or each batch's own for test-time
adaptation. This is a field of the module; running statistics are never updated. They are in the
parameter tree beside the scales and biases, under names that `normalisation_parameters` does not
choose, and their gradient is zero.

With batch statistics an image's prediction depends on the others in its batch, but not on masked
padding.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtta.models.attention import attention
from jaxtta.models.vit import VisionOutput

Array = jax.Array

OUTPUT_STRIDE = 32
"""How many pixels of the image's side one position of the last stage stands for."""
EXPANSION = 4


class ResNetArchitecture(NamedTuple):
    """What a ResNet looks like.

    Attributes:
        blocks: number of blocks in each of the four stages, (3, 4, 6, 3) for RN50.
        channels: of the stem's output, 64 for RN50.
        heads: of the attention pooling.
        epsilon: the batch norms'.
        compute_dtype: dtype of convolutions and matrix products; None for that of the parameters.
            Batch norms, softmax and everything after the embeddings stay in float32.
        remat: recompute each block in the backward pass instead of keeping its activations.
    """

    blocks: tuple[int, int, int, int]
    channels: int
    heads: int
    epsilon: float = 1e-5
    compute_dtype: Any = None
    remat: bool = False

    @property
    def width(self) -> int:
        """Size of the last stage's positions, and of what the attention pooling gives."""
        return self.channels * 8 * EXPANSION


class BatchNorm(nn.Module):
    """Batch norm computed in at least float32 and returned in the input's dtype."""

    epsilon: float
    batch_statistics: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Normalise the channels of `x`, (batch, height, width, channels); mask (batch,)."""
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        variance = self.param("var", nn.initializers.ones, shape)
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.batch_statistics:
            y = y - _mean(y, mask)
            variance = _mean(y * y, mask)
        else:  # buffers: whoever trains all parameters must not train these
            y = y - jax.lax.stop_gradient(mean)
            variance = jax.lax.stop_gradient(variance).astype(y.dtype)
        inverse_std = jax.lax.rsqrt(variance + self.epsilon)
        return (y * (inverse_std * scale) + bias).astype(x.dtype)


class _Layer(nn.Module):
    """What the parts of a ResNet are made of; the number names both of a pair."""

    arch: ResNetArchitecture
    batch_statistics: bool

    def _convolve(self, x: Array, name: str, size: int, features: int, stride: int = 1) -> Array:
        return nn.Conv(
            features,
            (size, size),
            stride,
            padding=size // 2,
            use_bias=False,
            dtype=self.arch.compute_dtype,
            name=name,
        )(x)

    def _norm(self, x: Array, mask: Array | None, name: str) -> Array:
        return BatchNorm(self.arch.epsilon, self.batch_statistics, name=name)(x, mask)


class Stem(_Layer):
    """Three convolutions and an average pool: a quarter of the resolution."""

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Map pixels (batch, height, width, 3) to (batch, height / 4, width / 4, channels)."""
        channels = self.arch.channels
        for number, (features, stride) in enumerate(
            [(channels // 2, 2), (channels // 2, 1), (channels, 1)], 1
        ):
            x = self._convolve(x, f"conv{number}", 3, features, stride)
            x = nn.relu(self._norm(x, mask, f"norm{number}"))
        return _average_pool(x, 2)


class Bottleneck(_Layer):
    """A residual block whose stride is an average pool, so that it does not alias."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Map (batch, height, width, channels) to a stride-th of it, 4 × features channels."""
        widest = self.features * EXPANSION
        y = nn.relu(self._norm(self._convolve(x, "conv1", 1, self.features), mask, "norm1"))
        y = nn.relu(self._norm(self._convolve(y, "conv2", 3, self.features), mask, "norm2"))
        y = _average_pool(y, self.stride)
        y = self._norm(self._convolve(y, "conv3", 1, widest), mask, "norm3")
        if self.stride > 1 or x.shape[-1] != widest:
            x = _average_pool(x, self.stride)
            x = self._convolve(x, "downsample_conv", 1, widest)
            x = self._norm(x, mask, "downsample_norm")
        return nn.relu(x + y)


class Stage(nn.Module):
    """The blocks of one resolution; their names are their numbers."""

    arch: ResNetArchitecture
    batch_statistics: bool
    number: int

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Map (batch, height, width, channels) to the last block's output."""
        make = nn.remat(Bottleneck) if self.arch.remat else Bottleneck
        features = self.arch.channels * 2**self.number
        for block in range(self.arch.blocks[self.number]):
            stride = 2 if self.number and not block else 1
            x = make(self.arch, self.batch_statistics, features, stride, name=str(block))(x, mask)
        return x


class AttentionPool(nn.Module):
    """The mean over all positions looks at them and at itself."""

    arch: ResNetArchitecture

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Pool positions (batch, positions, width) to (batch, width)."""
        heads, dtype = self.arch.heads, self.arch.compute_dtype
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], 1)
        _, count, width = tokens.shape
        init = nn.initializers.normal(width**-0.5)
        positions = self.param("position_embedding", init, (count, width))
        tokens = tokens + positions.astype(tokens.dtype)

        def project(name: str, x: Array) -> Array:
            y = nn.Dense(width, dtype=dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], heads, width // heads)

        y = attention(
            project("q_proj", tokens[:, :1]), project("k_proj", tokens), project("v_proj", tokens)
        )
        return y.reshape(-1, width)


class ResNet(nn.Module):
    """CLIP's ResNet, without its projection (the attention pooling's last dense layer).

    Attributes:
        arch: what it looks like.
        image_size: side of the images, a multiple of 32.
        batch_statistics: whether the batch norms normalise with each batch's own mean and variance
            instead of the checkpoint's.
    """

    arch: ResNetArchitecture
    image_size: int
    batch_statistics: bool = False

    has_projection = True
    projection_bias = True
    feature_shape = None  # the stages have features of different sizes

    @property
    def mixes_batch(self) -> bool:
        """Whether an image's output depends on the other images of its batch."""
        return self.batch_statistics

    @nn.compact
    def __call__(
        self, pixels: Array, mask: Array | None = None, *, all_tokens: bool = False
    ) -> VisionOutput:
        """Encode images.

        Args:
            pixels: (batch, height, width, 3), normalised.
            mask: (batch,) bool, false for images that enter no batch statistics; None for none.
            all_tokens: as a ViT's; every position is always computed here.

        Returns:
            `pooled`, (batch, width), what the attention pooling gives before the projection;
            `hidden_states`, (batch, positions, channels) each, the stem's output and every
            stage's; no `layer_features`, which would have to be of one size.
        """
        del all_tokens
        options = self.arch, self.batch_statistics
        x = pixels.astype(self.arch.compute_dtype or pixels.dtype)
        hidden = [Stem(*options, name="stem")(x, mask)]
        for number in range(len(self.arch.blocks)):
            hidden.append(Stage(*options, number, name=f"layer{number + 1}")(hidden[-1], mask))
        pooled = AttentionPool(self.arch, name="attention_pool")(_positions(hidden[-1]))
        return VisionOutput(pooled, [_positions(x) for x in hidden], None)


def _mean(x: Array, mask: Array | None) -> Array:
    """Mean of each channel over all positions of the images that count."""
    if mask is None:
        return x.mean((0, 1, 2))
    total = jnp.where(mask[:, None, None, None], x, 0).sum((0, 1, 2))
    return total / jnp.maximum(mask.sum() * x.shape[1] * x.shape[2], 1)


def _average_pool(x: Array, size: int) -> Array:
    return nn.avg_pool(x, (size, size), (size, size)) if size > 1 else x


def _positions(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, x.shape[-1])
