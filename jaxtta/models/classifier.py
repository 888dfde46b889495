"""A supervised image classifier in CLIP's place: transformers' ViTForImageClassification.

    model, params = load_classifier("google/vit-base-patch16-224")    # or a local folder
    adapter = online(objectives.mgtta(model), context, normalisation_parameters("image"), optimizer)

Its tower is CLIP's but for the first LayerNorm, so that everything that adapts CLIP's image tower
adapts this too.
"""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from jaxtta.models.checkpoints.files import find_folder, fitted, read_config, read_weights
from jaxtta.models.checkpoints.transformers import vision_tower
from jaxtta.models.clip import Outputs, Params, normalize
from jaxtta.models.preprocess import Preprocessing, read_preprocessing
from jaxtta.models.transformer import VisionOutput, VisionTransformer

if TYPE_CHECKING:
    from transformers import ViTConfig

Array = jax.Array
HALF = (0.5, 0.5, 0.5)  # what these checkpoints were normalised with, unless they say otherwise


@dataclasses.dataclass(frozen=True)
class ImageClassifier:
    """A classifier without its parameters; hashable, so that jitted functions may close over it.

    Attributes:
        vision: the tower.
        class_names: names of the classes.
        preprocessing: what the checkpoint wants done to images.
    """

    vision: VisionTransformer
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def init(self, key: Array) -> Params:
        """Draw random parameters; the tree has `vision_model` and `classifier`."""
        tower_key, head_key = jax.random.split(key)
        size = self.preprocessing.image_size
        tower = self.vision.init(tower_key, jnp.zeros((1, size, size, 3)))
        width, classes = self.vision.arch.width, len(self.class_names)
        head = {
            "kernel": jax.random.normal(head_key, (width, classes)) * width**-0.5,
            "bias": jnp.zeros(classes),
        }
        return {"vision_model": tower["params"], "classifier": head}

    def normalize(self, images: Array) -> Array:
        """Normalise images (batch, height, width, 3), uint8 or float in [0, 1]."""
        return normalize(self.preprocessing, images)

    def preprocess(self, images: list[Image.Image]) -> np.ndarray:
        """Bring PIL images to the model's resolution, (batch, height, width, 3) uint8."""
        return np.stack([self.preprocessing(image) for image in images])

    def image_features(self, params: Params, pixels: Array) -> VisionOutput:
        """Encode normalised pixels (batch, height, width, 3) and keep what the layers said."""
        return self.vision.apply({"params": params["vision_model"]}, pixels)

    def forward(self, params: Params, classes: None, images: Array) -> Outputs:
        """Classify images: the forward function that objectives see.

        Args:
            params: the parameter tree.
            classes: None; they are the head's.
            images: (batch, height, width, 3), uint8 or float in [0, 1].

        Returns:
            Logits; the class token as embedding, the head's unit rows as class embeddings; layer
            features.
        """
        del classes
        out = self.image_features(params, self.normalize(images))
        head = params["classifier"]
        pooled = out.pooled.astype(jnp.promote_types(out.pooled.dtype, jnp.float32))
        rows = head["kernel"].astype(pooled.dtype)
        logits = jnp.matmul(pooled, rows, precision="highest") + head["bias"]
        directions = (rows / jnp.linalg.norm(rows, axis=0)).T
        return Outputs(logits, pooled, directions, out.layer_features)


def load_classifier(
    path_or_hub_id: str | Path, *, dtype: Any = jnp.float32, compute_dtype: Any = None
) -> tuple[ImageClassifier, Params]:
    """Load a ViTForImageClassification checkpoint of transformers.

    Args:
        path_or_hub_id: a folder with `config.json` and `model.safetensors` (single or sharded), or
            the id of such a model on the hub.
        dtype: of the parameters.
        compute_dtype: of the matrix products; None for that of the parameters.

    Returns:
        The model and its parameter tree.

    Raises:
        FileNotFoundError: if there is no such folder or hub model, or a file is missing.
        ValueError: if the configuration is none of ViT's, or a parameter is missing or has another
            shape.
    """
    from transformers import ViTConfig

    folder = find_folder(path_or_hub_id)
    config = read_config(folder, ViTConfig)
    model = classifier_from_config(config, compute_dtype=compute_dtype)
    settings = folder / "preprocessor_config.json"
    if settings.exists():
        preprocessing = read_preprocessing(settings, config.image_size, crop=False)
        model = dataclasses.replace(model, preprocessing=preprocessing)
    weights, entries = read_weights(folder, _path)
    found = dict(entries)
    bias = found.pop((*_EMBEDDINGS, "patch_embedding", "bias"), None)
    for path in (_POSITIONS, _CLASS_TOKEN):
        if path in found:
            found[path] = np.array(found[path].reshape(found[path].shape[-2:]).squeeze())
    if bias is not None and _POSITIONS in found:
        # The same for every patch: a part of the positions, as CLIP has it.
        found[_POSITIONS][1:] += bias
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    return model, fitted(found.items(), shapes, weights, dtype)


def classifier_from_config(config: "ViTConfig", *, compute_dtype: Any = None) -> ImageClassifier:
    """Make a model of a transformers configuration; `model.init(key)` draws its parameters.

    Args:
        config: the configuration.
        compute_dtype: of the matrix products; None for that of the parameters.

    Returns:
        The model.

    Raises:
        ValueError: if the activation is unknown or the sizes do not fit each other.
    """
    if not config.qkv_bias:
        raise ValueError("config.json: qkv_bias is false, expected true")
    side, names = config.image_size, config.id2label
    return ImageClassifier(
        vision_tower(config, "config.json", compute_dtype, pre_norm=False),
        tuple(names[number] for number in sorted(names)),
        Preprocessing(side, (side, side), None, int(Image.Resampling.BILINEAR), HALF, HALF),
    )


_EMBEDDINGS = ("vision_model", "embeddings")
_POSITIONS = (*_EMBEDDINGS, "position_embedding", "embedding")
_CLASS_TOKEN = (*_EMBEDDINGS, "class_embedding")
_NAMES = (  # both of transformers 4's names and 5's
    (r"^vit\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (
        r"^vit\.embeddings\.position_embeddings$",
        "vision_model.embeddings.position_embedding.embedding",
    ),
    (
        r"^vit\.embeddings\.patch_embeddings\.projection\.",
        "vision_model.embeddings.patch_embedding.",
    ),
    (r"^vit\.layernorm\.", "vision_model.post_layernorm."),
    (r"^vit\.(?:encoder\.layer|layers)\.", "vision_model.encoder.layers."),
    (r"\.attention\.(?:attention\.)?(?:query|q_proj)\.", ".self_attn.q_proj."),
    (r"\.attention\.(?:attention\.)?(?:key|k_proj)\.", ".self_attn.k_proj."),
    (r"\.attention\.(?:attention\.)?(?:value|v_proj)\.", ".self_attn.v_proj."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".self_attn.out_proj."),
    (r"\.layernorm_before\.", ".layer_norm1."),
    (r"\.layernorm_after\.", ".layer_norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)


def _path(name: str) -> tuple[str, ...]:
    """Our path for a parameter of theirs."""
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    path = tuple(name.split("."))
    if path[-1] != "weight":
        return path
    return (*path[:-1], "scale" if "norm" in path[-2] else "kernel")
