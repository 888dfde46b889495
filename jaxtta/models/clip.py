"""The CLIP model as an immutable object of pure methods; its parameters live outside it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxtta.models import prompts as packing
from jaxtta.models.attention import attention
from jaxtta.models.preprocess import Preprocessing
from jaxtta.models.prompts import Prompts, Task
from jaxtta.models.resnet import ResNet
from jaxtta.models.transformer import TextTransformer, VisionTransformer

Array = jax.Array
Params = dict


class ImageFeatures(NamedTuple):
    """What one pass over images gives.

    Attributes:
        embeddings: (batch, projection), unnormalised.
        pooled: (batch, width), the class token before the projection; of a ResNet, what its
            attention pooling gives.
        hidden_states: a list of (batch, tokens, width): the embeddings, then every block's output
            (the last block's for the class token alone, unless all tokens were asked for); of a
            ResNet, all positions after the stem and every stage.
        layer_features: (batch, layers, width), the class token after every block through the next
            block's first LayerNorm (the last through the final one); None for a ResNet.
    """

    embeddings: Array
    pooled: Array
    hidden_states: list[Array]
    layer_features: Array | None


class Outputs(NamedTuple):
    """What an objective sees of a model.

    Attributes:
        logits: (batch, classes), unnormalised log-probabilities.
        image_embeddings: (batch, projection), unnormalised.
        class_embeddings: (classes, projection), of unit norm.
        layer_features: (batch, layers, width); None for a ResNet.
    """

    logits: Array
    image_embeddings: Array
    class_embeddings: Array
    layer_features: Array | None


@dataclasses.dataclass(frozen=True)
class CLIP:
    """A CLIP model without its parameters; hashable, so that jitted functions may close over it.

    Attributes:
        vision: the image tower, a ViT or a ResNet.
        text: the text tower.
        projection: size of the shared embedding.
        eos_token_id: as in transformers' config (2 stands for "the highest id in the prompt").
        preprocessing: what the checkpoint wants done to images.
        source: folder that holds the checkpoint's tokenizer; None for a model made from a config.
    """

    vision: VisionTransformer | ResNet
    text: TextTransformer
    projection: int
    eos_token_id: int
    preprocessing: Preprocessing
    source: str | None = None

    def init(self, key: Array) -> Params:
        """Draw random parameters.

        Args:
            key: PRNG key.

        Returns:
            The parameter tree, float32.
        """
        vision_key, text_key, *keys = jax.random.split(key, 4)
        size = self.preprocessing.image_size
        ids = jnp.zeros((1, 1), jnp.int32)
        vision = self.vision.init(vision_key, jnp.zeros((1, size, size, 3)))
        text = self.text.init(text_key, ids[0], ids[0], lambda q, k, v: v, ids[0])
        projection = _projection(keys[0], self.vision.arch.width, self.projection)
        if isinstance(self.vision, ResNet):
            projection["bias"] = jnp.zeros(self.projection)
        return {
            "vision_model": vision["params"],
            "text_model": text["params"],
            "visual_projection": projection,
            "text_projection": _projection(keys[1], self.text.arch.width, self.projection),
            "logit_scale": jnp.float32(2.6592),
        }

    def with_batch_statistics(self, use: bool = True) -> "CLIP":
        """Let the batch norms normalise with each batch's own mean and variance.

        The adapters of BATCLIP and TENT do so by themselves. An objective of one's own gives
        `forward` the batch's mask, so that padding does not count.

        Args:
            use: False for the checkpoint's running statistics again.

        Returns:
            A model that takes the same parameters; the model itself if it has no batch norms.
        """
        if not isinstance(self.vision, ResNet):
            return self
        return dataclasses.replace(self, vision=self.vision.clone(batch_statistics=use))

    @property
    def batch_statistics(self) -> bool:
        """Whether an image's prediction depends on the others of its batch."""
        return isinstance(self.vision, ResNet) and self.vision.batch_statistics

    def normalize(self, images: Array) -> Array:
        """Normalise images as the checkpoint was trained.

        Args:
            images: (batch, height, width, 3), uint8, or float in [0, 1] (neither clipped nor
                checked).

        Returns:
            Normalised pixels of the same shape, in at least float32.

        Raises:
            ValueError: if shape or dtype is another.
        """
        return normalize(self.preprocessing, images)

    def preprocess(self, images: list[Image.Image]) -> np.ndarray:
        """Bring PIL images to the model's resolution.

        Args:
            images: of any mode and size.

        Returns:
            (batch, height, width, 3) uint8.
        """
        return np.stack([self.preprocessing(image) for image in images])

    def image_features(
        self,
        params: Params,
        pixels: Array,
        mask: Array | None = None,
        *,
        all_tokens: bool = False,
    ) -> ImageFeatures:
        """Encode normalised pixels and keep what the layers said.

        Args:
            params: the parameter tree.
            pixels: (batch, height, width, 3), normalised.
            mask: (batch,) bool, false for padding, which enters no batch statistics; None for none.
            all_tokens: also compute the last block's output for the tokens that the embedding
                does not depend on.

        Returns:
            The features; what is not used is not computed under `jit`.
        """
        inputs = (pixels, mask) if isinstance(self.vision, ResNet) else (pixels,)
        out = self.vision.apply({"params": params["vision_model"]}, *inputs, all_tokens=all_tokens)
        embeddings = _project(out.pooled, params["visual_projection"])
        return ImageFeatures(embeddings, *out)

    def encode_image(self, params: Params, pixels: Array) -> Array:
        """Encode normalised pixels (batch, height, width, 3) to embeddings (batch, projection)."""
        return self.image_features(params, pixels).embeddings

    def encode_text(self, params: Params, token_ids: Array) -> Array:
        """Encode prompts as they are, one row of token ids each.

        Args:
            params: the parameter tree.
            token_ids: (prompts, length).

        Returns:
            Unnormalised embeddings (prompts, projection).

        Raises:
            ValueError: if the prompts are longer than the model takes.
        """
        count, length = token_ids.shape
        if length > self.text.max_length:
            raise ValueError(
                f"prompts of {length} tokens are longer than the model's {self.text.max_length}"
            )
        mask = np.tril(np.ones((length, length), bool))

        def attend(query: Array, key: Array, value: Array) -> Array:
            grid = (count, length, *query.shape[1:])
            query, key, value = (x.reshape(grid) for x in (query, key, value))
            return attention(query, key, value, mask=mask).reshape(-1, *grid[2:])

        positions = np.tile(np.arange(length, dtype=np.int32), count)
        ends = packing.ends_of_text(token_ids, self.eos_token_id)
        ends = ends + length * np.arange(count)
        return self._encode_rows(params, token_ids.reshape(-1), positions, attend, ends)

    def prompts(self, task: Task) -> Prompts:
        """Pack a task's prompts for `class_embeddings`.

        Args:
            task: the task.

        Returns:
            Its prompts, packed.

        Raises:
            ValueError: if a prompt is longer than the model takes, has no end of text, or holds a
                token that the model does not know.
        """
        if not 0 <= task.token_ids.min() <= task.token_ids.max() < self.text.vocabulary:
            raise ValueError(
                f"token ids run from {task.token_ids.min()} to {task.token_ids.max()}, the model "
                f"knows 0 to {self.text.vocabulary - 1}"
            )
        prompts = packing.pack(task, self.eos_token_id)
        if prompts.positions.max() >= self.text.max_length:
            raise ValueError(
                f"a prompt has {prompts.positions.max() + 1} tokens, the model takes at most "
                f"{self.text.max_length}"
            )
        return prompts

    def class_embeddings(self, params: Params, prompts: Prompts) -> Array:
        """Encode a task's classes.

        Several templates are averaged as CLIP does: each embedding normalised, their mean
        normalised again.

        Args:
            params: the parameter tree.
            prompts: from `prompts`.

        Returns:
            (classes, projection), of unit norm.
        """
        token_ids, positions = packing.rows(prompts)
        attend = packing.packed_attention(prompts)
        flat = self._encode_rows(params, token_ids, positions, attend, prompts.ends.reshape(-1))
        embeddings = unit(flat).reshape(*prompts.ends.shape, -1)
        return embeddings[:, 0] if embeddings.shape[1] == 1 else unit(embeddings.mean(1))

    def forward(
        self, params: Params, classes: Array | Prompts, images: Array, mask: Array | None = None
    ) -> Outputs:
        """Classify images: the forward function that objectives see.

        Args:
            params: the parameter tree.
            classes: packed prompts, encoded here with these parameters, or ready class embeddings
                (classes, projection) of unit norm.
            images: (batch, height, width, 3), uint8 or float in [0, 1].
            mask: (batch,) bool, as in `image_features`.

        Returns:
            Logits, embeddings and layer features.
        """
        features = self.image_features(params, self.normalize(images), mask)
        if isinstance(classes, Prompts):
            classes = self.class_embeddings(params, classes)
        scale = jnp.exp(params["logit_scale"].astype(classes.dtype))
        cosines = jnp.matmul(unit(features.embeddings), classes.T, precision="highest")
        return Outputs(scale * cosines, features.embeddings, classes, features.layer_features)

    def _encode_rows(self, params: Params, *rows: Array) -> Array:
        pooled = self.text.apply({"params": params["text_model"]}, *rows)
        return _project(pooled, params["text_projection"])


def normalize(preprocessing: Preprocessing, images: Array) -> Array:
    """Normalise images; see `CLIP.normalize`."""
    size = preprocessing.image_size
    if images.ndim != 4 or images.shape[1:] != (size, size, 3):
        raise ValueError(f"images must have shape (batch, {size}, {size}, 3), not {images.shape}")
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8 or float in [0, 1], not {images.dtype}")
    images = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    mean, std = (np.asarray(x, np.float32) for x in preprocessing[-2:])
    return (images - mean) / std


def unit(x: Array) -> Array:
    """Scale vectors (…, size) to unit norm."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _project(pooled: Array, projection: Params) -> Array:
    # Embeddings, and all that follows from them, stay in at least float32, on every backend.
    dtype = jnp.promote_types(pooled.dtype, jnp.float32)
    kernel = projection["kernel"].astype(dtype)
    embeddings = jnp.matmul(pooled.astype(dtype), kernel, precision="highest")
    return embeddings + projection["bias"] if "bias" in projection else embeddings


def _projection(key: Array, width: int, size: int) -> Params:
    return {"kernel": jax.random.normal(key, (width, size)) * width**-0.5}
