"""Reading and writing SigLIP checkpoints of transformers, SigLIP 2's for a fixed size too."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxtta.io import error_context
from jaxtta.models.checkpoints import transformers
from jaxtta.models.checkpoints.files import WEIGHTS, read_config
from jaxtta.models.checkpoints.preprocessing import with_preprocessing
from jaxtta.models.checkpoints.transformers import (
    architecture,
    square_side,
    text_values,
    vision_tower,
    vision_values,
)
from jaxtta.models.checkpoints.weights import (
    drop_leading_axes,
    match_parameters,
    read_weights,
    split_joint,
)
from jaxtta.models.classifier import Params
from jaxtta.models.clip import CLIP
from jaxtta.models.preprocess import HALF_MEAN, Preprocessing
from jaxtta.models.text import TextTransformer
from jaxtta.models.vit import VisionTransformer

if TYPE_CHECKING:
    from transformers import SiglipConfig


def load_folder(
    folder: Path, dtype: Any, compute_dtype: Any, remat: bool, scan: bool
) -> tuple[CLIP, Params]:
    """Load a SigLIP checkpoint of transformers; all as in `jaxtta.load`, which calls this."""
    from transformers import SiglipConfig

    config = read_config(folder, SiglipConfig)
    with error_context(folder / "config.json"):
        model = from_config(config, compute_dtype=compute_dtype, remat=remat, scan=scan)
    model = with_preprocessing(model, folder, "SiglipImageProcessor")
    model = dataclasses.replace(model, source=str(folder))
    weights, entries = read_weights(folder, _path, WEIGHTS[:2])
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    entries = drop_leading_axes(split_joint(entries), shapes)
    return model, match_parameters(entries, shapes, weights, dtype)


def from_config(
    config: "SiglipConfig", *, compute_dtype: Any = None, remat: bool = False, scan: bool = False
) -> CLIP:
    """Make a model of a transformers configuration; `model.init(key)` draws its parameters.

    Args:
        config: the configuration.
        compute_dtype: of the matrix products; None for that of the parameters.
        remat: recompute each block's activations in the backward pass.
        scan: run the blocks as one loop.

    Returns:
        The model, without tokenizer.

    Raises:
        ValueError: if the activation is unknown, the sizes do not fit each other or the image tower
            has no attention pooling.
    """
    values = cast(Any, config)  # its annotations allow None and lists where SigLIP has numbers
    vision, text = values.vision_config, values.text_config
    if not getattr(vision, "vision_use_head", True):  # transformers 4 sets it only if it is given
        raise ValueError("vision_config.vision_use_head is false, expected true")
    if text.projection_size != vision.hidden_size:
        raise ValueError(
            f"text_config.projection_size is {text.projection_size}, expected the image tower's "
            f"hidden_size of {vision.hidden_size}"
        )
    options, size = (compute_dtype, remat, scan), square_side(vision, "image_size")
    return CLIP(
        vision_tower(vision, "vision_config", *options, pre_norm=False).clone(class_token=False),
        TextTransformer(
            architecture(text, "text_config", *options),
            text.vocab_size,
            text.max_position_embeddings,
            causal=False,
            projection_bias=True,
        ),
        text.projection_size,
        None,
        Preprocessing(size, (size, size), mean=HALF_MEAN, std=HALF_MEAN),
        preprocessing_origin="SigLIP's defaults",
        logit_bias=True,
        clean="siglip",
    )


def config_of(model: CLIP) -> "SiglipConfig":
    """Make transformers' configuration of a model with SigLIP's towers."""
    from transformers import SiglipConfig

    return SiglipConfig(
        vision_config=vision_values(cast(VisionTransformer, model.vision)),
        text_config=text_values(model.text) | {"projection_size": model.projection},
        architectures=["SiglipModel"],
    )


def tensors_of(params: Params) -> dict[str, np.ndarray]:
    """The parameters under PyTorch's names, laid out as PyTorch has them."""
    tensors = transformers.tensors_of(params)
    pool = "vision_model.head.attention"
    for leaf in ("weight", "bias"):
        parts = [tensors.pop(f"{pool}.{name}_proj.{leaf}") for name in "qkv"]
        tensors[f"{pool}.in_proj_{leaf}"] = np.concatenate(parts)
        tensors[f"text_model.head.{leaf}"] = tensors.pop(f"text_projection.{leaf}")
    for name, axes in (("logit_scale", 1), ("logit_bias", 1), ("vision_model.head.probe", 3)):
        tensors[name] = np.array(tensors[name], ndmin=axes)
    return tensors


_NAMES = (
    (r"^text_model\.head\.", "text_projection."),
    (r"\.head\.attention\.in_proj_", ".head.attention.qkv."),
    (r"(token|position)_embedding\.weight$", r"\1_embedding.embedding"),
    (r"norm(\d?)\.weight$", r"norm\1.scale"),
    (r"\.weight$", ".kernel"),
)


def _path(name: str) -> tuple[str, ...]:
    """Our path for a parameter of theirs."""
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    return tuple(name.split("."))
