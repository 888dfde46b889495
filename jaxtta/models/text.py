"""CLIP's text tower in linen, on rows of tokens in any arrangement."""

import flax.linen as nn
import jax

from jaxtta.models.transformer import (
    Architecture,
    Attend,
    AttentionPlan,
    Encoder,
    LayerNorm,
    Table,
)

Array = jax.Array


class TextEmbeddings(nn.Module):
    """Token and position embeddings."""

    arch: Architecture
    vocabulary: int
    max_length: int

    @nn.compact
    def __call__(self, token_ids: Array, positions: Array) -> Array:
        """Map ids and positions (rows…) to tokens (rows…, width)."""
        tokens = Table(self.vocabulary, self.arch.width, name="token_embedding")()
        table = Table(self.max_length, self.arch.width, name="position_embedding")()
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
        last = AttentionPlan(
            lambda *rows: attend(*rows)[ends], select_outputs=lambda rows: rows[ends]
        )
        outputs, _ = Encoder(self.arch, name="encoder")(x, attend, last)
        return LayerNorm(self.arch.epsilon, name="final_layer_norm")(outputs[-1])
