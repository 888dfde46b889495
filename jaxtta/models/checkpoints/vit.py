"""Reading checkpoints of transformers' ViTForImageClassification."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from jaxtta.io import error_context
from jaxtta.models.checkpoints.files import WEIGHTS, read_config
from jaxtta.models.checkpoints.preprocessing import with_preprocessing
from jaxtta.models.checkpoints.transformers import square_side, vision_tower
from jaxtta.models.checkpoints.weights import match_parameters, read_weights
from jaxtta.models.classifier import Params
from jaxtta.models.preprocess import HALF_MEAN, Preprocessing
from jaxtta.models.supervised import ImageClassifier

if TYPE_CHECKING:
    from transformers import ViTConfig


def load_folder(
    folder: Path, dtype: Any, compute_dtype: Any, remat: bool, scan: bool
) -> tuple[ImageClassifier, Params]:
    """Load a ViTForImageClassification checkpoint; all as in `jaxtta.load`, which calls this."""
    from transformers import ViTConfig

    config = read_config(folder, ViTConfig)
    with error_context(folder / "config.json"):
        model = from_config(config, compute_dtype=compute_dtype, remat=remat, scan=scan)
    model = with_preprocessing(model, folder, "ViTImageProcessor")
    weights, entries = read_weights(folder, _path, WEIGHTS[:2])
    found = dict(entries)
    bias = found.pop((*_EMBEDDINGS, "patch_embedding", "bias"), None)
    for path in (_POSITIONS, _CLASS_TOKEN):
        if path in found:
            found[path] = np.array(found[path].reshape(found[path].shape[-2:]).squeeze())
    if bias is not None and _POSITIONS in found:
        # The same for every patch: a part of the positions, as CLIP has it.
        found[_POSITIONS][1:] += bias
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    return model, match_parameters(found.items(), shapes, weights, dtype)


def from_config(
    config: "ViTConfig", *, compute_dtype: Any = None, remat: bool = False, scan: bool = False
) -> ImageClassifier:
    """Make a model of a transformers configuration; `model.init(key)` draws its parameters.

    Args:
        config: the configuration.
        compute_dtype: of the matrix products; None for that of the parameters.
        remat: recompute each block's activations in the backward pass.
        scan: run the blocks as one loop.

    Returns:
        The model.

    Raises:
        ValueError: if the activation is unknown or the sizes do not fit each other.
    """
    if not config.qkv_bias:
        raise ValueError("qkv_bias is false, expected true")
    values = cast(Any, config)  # its annotations allow None and lists where ViT has neither
    side, names = square_side(values, "image_size"), values.id2label
    return ImageClassifier(
        vision_tower(config, "the configuration", compute_dtype, remat, scan, pre_norm=False),
        tuple(names[number] for number in sorted(names)),
        Preprocessing(
            side, (side, side), None, int(Image.Resampling.BILINEAR), HALF_MEAN, HALF_MEAN
        ),
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
