"""The text towers of CLIP and SigLIP in linen, on rows of tokens in any arrangement."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtta.models.transformer import (
    Architecture,
    Attend,
    AttentionPlan,
    Encoder,
    LayerNorm,
    Select,
    Table,
)

Array = jax.Array


class TextEmbeddings(nn.Module):
    """Token and position embeddings."""

    arch: Architecture
    vocabulary: int
    max_length: int

    @nn.compact
    def __call__(self, token_ids: Array, positions: Array, context: Array | None = None) -> Array:
        """Map ids and positions (rows…) to tokens (rows…, width); see `TextTransformer`."""
        tokens = Table(self.vocabulary, self.arch.width, name="token_embedding")()
        table = Table(self.max_length, self.arch.width, name="position_embedding")()
        dtype = self.arch.compute_dtype or tokens.dtype
        embedded = tokens[token_ids].astype(dtype)
        if context is not None:
            parts = embedded[:1], context.astype(dtype), embedded[1 + len(context) :]
            embedded = jnp.concatenate(parts)
        return embedded + table[positions].astype(dtype)


class TextTransformer(nn.Module):
    """A text tower without its projection, on rows of tokens in any arrangement.

    Attributes:
        arch: its blocks.
        vocabulary: number of tokens that it knows.
        max_length: tokens that a prompt may have.
        causal: whether a token attends to those before it alone, as in CLIP; otherwise to all of
            its prompt's, padding too, and the prompt is read at its last token, as in SigLIP.
        has_projection: whether embeddings are a projection of what is read.
        projection_bias: whether that has a bias.
    """

    arch: Architecture
    vocabulary: int
    max_length: int
    causal: bool = True
    has_projection: bool = True
    projection_bias: bool = False

    @nn.compact
    def __call__(
        self,
        token_ids: Array,
        positions: Array,
        attend: Attend,
        read: Select,
        context: Array | None = None,
    ) -> Array:
        """Encode rows of tokens and read them at the ends of the prompts.

        Args:
            token_ids: (rows,).
            positions: (rows,), each token's place in its prompt.
            attend: attention over the rows as they are arranged.
            read: selects the rows (prompts, …) at which prompts are read.
            context: (n, width), what stands for the token embeddings of rows 1 to n; None for
                their own.

        Returns:
            (prompts, width), after the final LayerNorm.
        """
        x = TextEmbeddings(self.arch, self.vocabulary, self.max_length, name="embeddings")(
            token_ids, positions, context
        )
        last = AttentionPlan(lambda *rows: read(attend(*rows)), select_outputs=read)
        outputs, _ = Encoder(self.arch, name="encoder")(x, attend, last)
        return LayerNorm(self.arch.epsilon, name="final_layer_norm")(outputs[-1])
