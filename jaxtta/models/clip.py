"""CLIP and SigLIP as an immutable object of pure methods; its parameters live outside it.

SigLIP differs from CLIP in its towers (`vit.py`, `text.py`) and in a bias on its logits. Its own
probabilities are sigmoids of the logits, one for each pair of image and text. Classification asks
which of the classes it is, so that everything here takes a softmax over them, as of CLIP's logits;
the bias, the same for all classes, changes neither that nor its gradient.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxtta.models import prompts as packing
from jaxtta.models.attention import attention
from jaxtta.models.checks import require_pil
from jaxtta.models.classifier import Batch, Outputs, Params, as_batch
from jaxtta.models.preprocess import DEFAULTS, Preprocessing
from jaxtta.models.prompts import Prompts
from jaxtta.models.resnet import ResNet
from jaxtta.models.task import Task
from jaxtta.models.text import TextTransformer
from jaxtta.models.transformer import Attend, Select, identity
from jaxtta.models.vit import VisionOutput, VisionTransformer

Array = jax.Array


class ImageFeatures(NamedTuple):
    """What one pass over images gives.

    Attributes:
        embeddings: (batch, projection), unnormalised.
        pooled: (batch, width), the class token before the projection; of a ResNet and of SigLIP,
            what attention pooling gives.
        hidden_states: a list of (batch, tokens, width): the embeddings, then every block's output
            (the last block's for the class token alone, unless all tokens were asked for); of a
            ResNet, all positions after the stem and every stage.
        layer_features: (batch, layers, width), the class token after every block through the next
            block's first LayerNorm (the last through the final one); None without a class token.
    """

    embeddings: Array
    pooled: Array
    hidden_states: list[Array]
    layer_features: Array | None


@dataclasses.dataclass(frozen=True)
class CLIP:
    """CLIP or SigLIP without parameters; hashable, so that jitted functions may close over it.

    Attributes:
        vision: the image tower, a ViT or a ResNet.
        text: the text tower.
        projection: size of the shared embedding.
        eos_token_id: as in transformers' config (2 stands for "the highest id in the prompt"); None
            where prompts are read at their last token.
        preprocessing: the checkpoint's image preprocessing.
        source: folder that holds the checkpoint's tokenizer; None for a model made from a config.
        logit_bias: whether a bias is added to the scaled cosines.
        clean: how prompts are cleaned before they are tokenised, a key of `task.CLEANERS`.
        preprocessing_origin: the file that `preprocessing` was read from.
    """

    vision: VisionTransformer | ResNet
    text: TextTransformer
    projection: int
    eos_token_id: int | None
    preprocessing: Preprocessing
    source: str | None = None
    logit_bias: bool = False
    clean: str | None = None
    preprocessing_origin: str = dataclasses.field(default=DEFAULTS, compare=False)

    def init(self, key: Array) -> Params:
        """Draw random parameters.

        Args:
            key: PRNG key.

        Returns:
            The parameter tree, float32.

        Examples:
            With `model` of `jaxtta.load`'s example:

            >>> shapes = jax.eval_shape(model.init, jax.random.key(0))  # of an untrained model
            >>> shapes["visual_projection"]["kernel"].shape
            (192, 128)
        """
        vision_key, text_key, *keys = jax.random.split(key, 4)
        size = self.preprocessing.image_size
        ids = jnp.zeros((1, 1), jnp.int32)
        vision = self.vision.init(vision_key, jnp.zeros((1, size, size, 3)))
        text = self.text.init(text_key, ids[0], ids[0], lambda q, k, v: v, identity)
        params = {
            "vision_model": vision["params"],
            "text_model": text["params"],
            "logit_scale": jnp.float32(2.6592),
        }
        if self.vision.has_projection:
            params["visual_projection"] = _projection(keys[0], self.vision, self.projection)
        if self.text.has_projection:
            params["text_projection"] = _projection(keys[1], self.text, self.projection)
        if self.logit_bias:
            params["logit_bias"] = jnp.float32(-10)
        return params

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.preprocessing.image_size

    @property
    def max_length(self) -> int:
        """Tokens that a prompt may have."""
        return self.text.max_length

    @property
    def mixes_batch(self) -> bool:
        """Whether an image's logits depend on the other images of its batch."""
        return self.vision.mixes_batch

    @property
    def feature_shape(self) -> tuple[int, int] | None:
        """(Layers, width) of the layer features; None without a class token."""
        return self.vision.feature_shape

    @property
    def padded_prompts(self) -> bool:
        """Whether prompts are filled up to `max_length`, because their padding is read too."""
        return self.eos_token_id is None

    def with_batch_norm_statistics(self, which: Literal["batch", "running"]) -> "CLIP":
        """Let the batch norms use each batch's own mean and variance, or the checkpoint's.

        BATCLIP and TENT choose "batch" automatically.

        Args:
            which: "batch" or "running".

        Returns:
            A model of the same parameters; the model itself if it has no batch norms.

        Raises:
            ValueError: for another value.
        """
        if which not in ("batch", "running"):
            raise ValueError(f"which is {which!r}, expected batch or running")
        if not isinstance(self.vision, ResNet):
            return self
        return dataclasses.replace(
            self, vision=self.vision.clone(batch_statistics=which == "batch")
        )

    def normalize(self, images: Array) -> Array:
        """Normalise images as the checkpoint was trained.

        Args:
            images: (batch, height, width, 3), uint8, or float in [0, 1] (neither clipped nor
                checked).

        Returns:
            Normalised pixels of the same shape, in at least float32.

        Raises:
            ValueError: if shape or dtype is another.

        Examples:
            With `model` of `jaxtta.load`'s example:

            >>> pixels = model.normalize(np.full((1, 32, 32, 3), 255, np.uint8))
            >>> pixels.shape, pixels.dtype.name
            ((1, 32, 32, 3), 'float32')
        """
        return normalize(self.preprocessing, images)

    def preprocess(self, images: list[Image.Image]) -> np.ndarray:
        """Bring PIL images to the model's resolution.

        Args:
            images: of any mode and size.

        Returns:
            (batch, height, width, 3) uint8.

        Raises:
            TypeError: for anything but a list of PIL images.

        Examples:
            With `model` of `jaxtta.load`'s example:

            >>> from PIL import Image
            >>> model.preprocess([Image.new("RGB", (100, 60))]).shape
            (1, 32, 32, 3)
        """
        require_pil(images)
        return np.stack([self.preprocessing(image) for image in images])

    def image_features(
        self,
        params: Params,
        pixels: Array,
        mask: Array | np.ndarray | None = None,
        *,
        all_tokens: bool = False,
    ) -> ImageFeatures:
        """Encode normalised pixels and return the layers' features too.

        Args:
            params: the parameter tree.
            pixels: (batch, height, width, 3), normalised.
            mask: (batch,) bool, false for padding, which enters no batch statistics; None for none.
            all_tokens: also compute the last block's output for the tokens that the embedding
                does not depend on.

        Returns:
            The features; what is not used is not computed under `jit`.

        Examples:
            With `model`, `params` and `images` of `jaxtta.load`'s example:

            >>> features = jax.jit(model.image_features)(params, model.normalize(images))
            >>> features.layer_features.shape[1:] == model.feature_shape  # (layers, width)
            True
        """
        variables = {"params": part(params, "vision_model")}
        out = self.vision.apply(variables, pixels, mask, all_tokens=all_tokens)
        out = cast(VisionOutput, out)
        embeddings = _project(out.pooled, params.get("visual_projection"))
        return ImageFeatures(embeddings, *out)

    def encode_image(self, params: Params, pixels: Array) -> Array:
        """Encode normalised pixels (batch, height, width, 3) to embeddings (batch, projection).

        Examples:
            With `model`, `params` and `images` of `jaxtta.load`'s example:

            >>> embeddings = jax.jit(model.encode_image)(params, model.normalize(images))
            >>> embeddings.shape
            (8, 128)
        """
        return self.image_features(params, pixels).embeddings

    def encode_text(self, params: Params, token_ids: Array | np.ndarray) -> Array:
        """Encode prompts as they are, one row of token ids each.

        Args:
            params: the parameter tree.
            token_ids: (prompts, length); of SigLIP, filled up to the model's length.

        Returns:
            Unnormalised embeddings (prompts, projection).

        Raises:
            ValueError: if the prompts are longer than the model takes.

        Examples:
            With `model`, `params` and `task` of `jaxtta.load`'s example:

            >>> jax.jit(model.encode_text)(params, task.token_ids[:, 0]).shape  # first template
            (10, 128)
        """
        count, length = token_ids.shape
        if length > self.text.max_length:
            raise ValueError(
                f"prompts of {length} tokens are longer than the model's {self.text.max_length}"
            )
        mask = np.tril(np.ones((length, length), bool)) if self.text.causal else None

        def attend(query: Array, key: Array, value: Array) -> Array:
            grid = (count, length, *query.shape[1:])
            query, key, value = (x.reshape(grid) for x in (query, key, value))
            return attention(query, key, value, mask=mask).reshape(-1, *grid[2:])

        positions = np.tile(np.arange(length, dtype=np.int32), count)
        ends = length * np.arange(count)
        if self.eos_token_id is None:
            ends += length - 1
        else:
            ends = ends + packing.ends_of_text(token_ids, self.eos_token_id)
        return self._encode_rows(
            params, token_ids.reshape(-1), positions, attend, lambda rows: rows[ends]
        )

    def prompts(self, task: Task) -> Prompts:
        """Pack a task's prompts for `class_embeddings`.

        Args:
            task: the task.

        Returns:
            Its prompts, packed.

        Raises:
            TypeError: if the task is something else, such as class names.
            ValueError: if a prompt is longer than the model takes (or shorter, of SigLIP), has no
                end of text, or holds a token that the model does not know.

        Examples:
            With `model`, `params` and `task` of `jaxtta.load`'s example:

            >>> prompts = model.prompts(task)
            >>> jax.jit(model.class_embeddings)(params, prompts).shape
            (10, 128)
        """
        if task is None:
            raise ValueError("CLIP needs a task (jaxtta.zero_shot_task gives one), task is None")
        if not hasattr(task, "token_ids"):
            raise TypeError(
                f"task is a {type(task).__name__}, expected a Task: "
                "jaxtta.zero_shot_task(model, class_names)"
            )
        if not 0 <= task.token_ids.min() <= task.token_ids.max() < self.text.vocabulary:
            raise ValueError(
                f"token ids run from {task.token_ids.min()} to {task.token_ids.max()}, the model "
                f"knows 0 to {self.text.vocabulary - 1}"
            )
        if self.eos_token_id is None:
            if task.token_ids.shape[-1] != self.max_length:
                raise ValueError(
                    f"prompts have {task.token_ids.shape[-1]} tokens, this model reads their "
                    f"padding too and needs them filled up to {self.max_length}"
                )
            return packing.whole(task)
        prompts = packing.pack(task, self.eos_token_id)
        if prompts.positions.max() >= self.text.max_length:
            raise ValueError(
                f"a prompt has {prompts.positions.max() + 1} tokens, the model takes at most "
                f"{self.text.max_length}"
            )
        return prompts

    def class_embeddings(
        self, params: Params, prompts: Prompts, context: Array | None = None
    ) -> Array:
        """Encode a task's classes.

        Several templates are averaged as CLIP does: each embedding normalised, their mean
        normalised again.

        Args:
            params: the parameter tree.
            prompts: from `prompts`.
            context: (n, width), vectors in place of the embeddings of tokens 1 to n, which all
                prompts share (`Prompts.prefix`); None for the tokens' own.

        Returns:
            (classes, projection), of unit norm.
        """
        token_ids, positions = packing.rows(prompts)
        attend = packing.packed_attention(prompts, self.text.causal)
        read = packing.read_ends(prompts)
        spread = packing.over_devices(token_ids, positions, attend, read)
        flat = self._encode_rows(params, *spread, context)[: prompts.ends.size]
        embeddings = l2_normalize(flat).reshape(*prompts.ends.shape, -1)
        return embeddings[:, 0] if embeddings.shape[1] == 1 else l2_normalize(embeddings.mean(1))

    def init_context(self, params: Params, task: Task) -> Array:
        """Encode a task's classes, (classes, projection), of unit norm.

        Args:
            params: the parameter tree.
            task: the classes.

        Returns:
            A context for calls; `prompts(task)` is another, whose text is encoded at every call.

        Raises:
            TypeError: as `prompts`.
            ValueError: as `prompts`.

        Examples:
            With `model`, `params` and `task` of `jaxtta.load`'s example:

            >>> context = model.init_context(params, task)
            >>> context.shape, jnp.allclose(jnp.linalg.norm(context, axis=1), 1).item()
            ((10, 128), True)
        """
        return _class_embeddings(self, params, self.prompts(task))

    def logit_scale(self, params: Params) -> Array:
        """The factor on the cosines, a scalar in at least float32."""
        scale = jnp.asarray(params["logit_scale"])
        return jnp.exp(scale.astype(jnp.promote_types(scale.dtype, jnp.float32)))

    def __call__(self, params: Params, context: Array | Prompts, batch: Batch | Array) -> Outputs:
        """Classify a batch.

        Args:
            params: the parameter tree.
            context: class embeddings (classes, projection) of unit norm, or packed prompts, which
                are encoded here with these parameters.
            batch: the batch, or (batch, height, width, 3) images, uint8 or float in [0, 1].

        Returns:
            Logits, scaled cosines, of SigLIP with their bias; embeddings and layer features.
        """
        batch = as_batch(batch)
        pixels = self.normalize(jnp.asarray(batch.images))
        features = self.image_features(params, pixels, batch.mask)
        classes = context
        if isinstance(classes, Prompts):
            classes = self.class_embeddings(params, classes)
        cosines = jnp.matmul(l2_normalize(features.embeddings), classes.T, precision="highest")
        logits = self.logit_scale(params) * cosines
        if self.logit_bias:
            logits += params["logit_bias"].astype(logits.dtype)
        return Outputs(logits, features.embeddings, classes, features.layer_features)

    def _encode_rows(
        self,
        params: Params,
        token_ids: Array | np.ndarray,
        positions: Array | np.ndarray,
        attend: Attend,
        read: Select,
        context: Array | None = None,
    ) -> Array:
        variables = {"params": part(params, "text_model")}
        pooled = self.text.apply(variables, token_ids, positions, attend, read, context)
        return _project(cast(Array, pooled), params.get("text_projection"))


def part(params: Params, name: str) -> Any:
    """One tower of a parameter tree; a ValueError for another model's tree, or a wrapped one."""
    if name not in params:
        raise ValueError(
            f"params has {', '.join(map(str, params))} and no {name}, expected this model's tree "
            "as jaxtta.load gives it"
        )
    return params[name]


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
    mean, std = (np.asarray(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std


def l2_normalize(x: Array) -> Array:
    """Scale vectors (…, size) to unit norm.

    Examples:
        >>> [f"{x:.1f}" for x in jaxtta.models.l2_normalize(jnp.array([3.0, 4.0]))]
        ['0.6', '0.8']
    """
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnums=0)
def _class_embeddings(model: CLIP, params: Params, prompts: Prompts) -> Array:
    return model.class_embeddings(params, prompts)


def _project(pooled: Array, projection: Params | None) -> Array:
    # Embeddings, and all that follows from them, stay in at least float32, on every backend.
    dtype = jnp.promote_types(pooled.dtype, jnp.float32)
    if projection is None:
        return pooled.astype(dtype)
    kernel = projection["kernel"].astype(dtype)
    embeddings = jnp.matmul(pooled.astype(dtype), kernel, precision="highest")
    return embeddings + projection["bias"] if "bias" in projection else embeddings


def _projection(
    key: Array, tower: VisionTransformer | ResNet | TextTransformer, size: int
) -> Params:
    width = tower.arch.width
    projection = {"kernel": jax.random.normal(key, (width, size)) * width**-0.5}
    return projection | ({"bias": jnp.zeros(size)} if tower.projection_bias else {})
