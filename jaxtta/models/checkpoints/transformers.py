"""Reading CLIP checkpoints of transformers, and what it takes to write them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jaxtta.io import error_context
from jaxtta.models.checkpoints.files import read_config
from jaxtta.models.checkpoints.preprocessing import with_preprocessing
from jaxtta.models.checkpoints.weights import map_kernel, match_parameters, read_weights
from jaxtta.models.classifier import Params
from jaxtta.models.clip import CLIP
from jaxtta.models.preprocess import Preprocessing
from jaxtta.models.text import TextTransformer
from jaxtta.models.transformer import ACTIVATIONS, Architecture
from jaxtta.models.vit import VisionTransformer

if TYPE_CHECKING:  # transformers is imported where it is used: it brings PyTorch along
    from transformers import CLIPConfig


def load_folder(
    folder: Path, dtype: Any, compute_dtype: Any, remat: bool, scan: bool
) -> tuple[CLIP, Params]:
    """Load a CLIP checkpoint of transformers; all as in `jaxtta.load`, which calls this."""
    from transformers import CLIPConfig

    config = read_config(folder, CLIPConfig)
    with error_context(folder / "config.json"):
        model = from_config(config, compute_dtype=compute_dtype, remat=remat, scan=scan)
    model = dataclasses.replace(with_preprocessing(model, folder), source=str(folder))
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    names = {_torch_name(path): path for path in shapes}
    weights, entries = read_weights(folder, lambda name: names.get(name, tuple(name.split("."))))
    return model, match_parameters(entries, shapes, weights, dtype)


def from_config(
    config: "CLIPConfig", *, compute_dtype: Any = None, remat: bool = False, scan: bool = False
) -> CLIP:
    """Make a model of a transformers configuration; `model.init(key)` draws its parameters.

    Args:
        config: the configuration.
        compute_dtype: as in `load`.
        remat: as in `load`.
        scan: as in `load`.

    Returns:
        The model, without tokenizer.

    Raises:
        ValueError: if the activation is unknown or the sizes do not fit each other.

    Examples:
        >>> import transformers
        >>> model = jaxtta.models.from_config(transformers.CLIPConfig())  # ViT-B/32
        >>> model.image_size, model.feature_shape
        (224, (12, 768))
    """
    values = cast(Any, config)  # its annotations allow None and lists where CLIP has numbers
    vision, text = values.vision_config, values.text_config
    size = square_side(vision, "image_size")
    options = compute_dtype, remat, scan
    return CLIP(
        vision_tower(vision, "vision_config", *options),
        TextTransformer(
            architecture(text, "text_config", *options),
            text.vocab_size,
            text.max_position_embeddings,
        ),
        values.projection_dim,
        _end_of_text(text),
        Preprocessing(size, size, (size, size)),
    )


def vision_tower(
    config: Any,
    name: str,
    compute_dtype: Any,
    remat: bool = False,
    scan: bool = False,
    pre_norm: bool = True,
) -> VisionTransformer:
    """Make an image tower of a transformers configuration.

    Args:
        config: of the tower.
        name: what to call the configuration in a message.
        compute_dtype: as in `load`.
        remat: as in `load`.
        scan: as in `load`.
        pre_norm: whether the tokens pass a LayerNorm before the blocks.

    Returns:
        The tower.

    Raises:
        ValueError: if the activation is unknown or the sizes do not fit each other.
    """
    size, patch = square_side(config, "image_size"), square_side(config, "patch_size")
    if size < patch:
        raise ValueError(f"an image size of {size} is smaller than a patch of {patch}")
    arch = architecture(config, name, compute_dtype, remat, scan)
    return VisionTransformer(arch, size, patch, pre_norm)


def square_side(config: Any, key: str) -> int:
    """A side in pixels, which a configuration may write as (height, width).

    Args:
        config: of a tower.
        key: the setting.

    Returns:
        The side.

    Raises:
        ValueError: if it is not a square's.
    """
    value = getattr(config, key)
    sides = {*value} if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int) or side < 1:
        raise ValueError(f"{key} is {value!r}, expected the side of a square in pixels")
    return side


def _end_of_text(text: Any) -> int:
    value = text.eos_token_id
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ValueError(f"text_config.eos_token_id is {value!r}, expected one token id")
    return value


def architecture(
    tower: Any, name: str, compute_dtype: Any, remat: bool = False, scan: bool = False
) -> Architecture:
    """Read what a tower's blocks look like; arguments and errors are `vision_tower`'s."""
    if tower.hidden_act not in ACTIVATIONS:
        raise ValueError(
            f"{name}.hidden_act is {tower.hidden_act!r}, known are {', '.join(ACTIVATIONS)}"
        )
    if tower.hidden_size % tower.num_attention_heads:
        raise ValueError(
            f"{name}: {tower.num_attention_heads} heads do not divide a width of "
            f"{tower.hidden_size}"
        )
    return Architecture(
        tower.hidden_size,
        tower.intermediate_size,
        tower.num_attention_heads,
        tower.num_hidden_layers,
        tower.hidden_act,
        tower.layer_norm_eps,
        compute_dtype,
        remat,
        scan,
    )


def config_of(model: CLIP) -> "CLIPConfig":
    """Make transformers' configuration of a model with CLIP's towers."""
    from transformers import CLIPConfig

    vision, text = cast(VisionTransformer, model.vision), model.text
    return CLIPConfig(
        projection_dim=model.projection,
        vision_config=vision_values(vision) | {"projection_dim": model.projection},
        text_config={
            **text_values(text),
            "projection_dim": model.projection,
            "eos_token_id": model.eos_token_id,
        },
        architectures=["CLIPModel"],
    )


def vision_values(vision: VisionTransformer) -> dict[str, Any]:
    """The settings of an image tower that transformers' configurations share."""
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return _config_of(vision.arch) | sizes


def text_values(text: TextTransformer) -> dict[str, Any]:
    """The settings of a text tower that transformers' configurations share."""
    return _config_of(text.arch) | {
        "vocab_size": text.vocabulary,
        "max_position_embeddings": text.max_length,
        "bos_token_id": None,  # the tokenizer's business
        "eos_token_id": None,
        "pad_token_id": None,
    }


def tensors_of(params: Params) -> dict[str, np.ndarray]:
    """The parameters under PyTorch's names, laid out as PyTorch has them."""
    return {
        _torch_name(path): np.array(_to_torch(path, np.asarray(leaf)), order="C")
        for path, leaf in flatten_dict(params).items()
    }


def _config_of(arch: Architecture) -> dict[str, Any]:
    return {
        "hidden_size": arch.width,
        "intermediate_size": arch.mlp_width,
        "num_attention_heads": arch.heads,
        "num_hidden_layers": arch.layers,
        "hidden_act": arch.activation,
        "layer_norm_eps": arch.epsilon,
    }


def _torch_name(path: tuple[str, ...]) -> str:
    """The name that PyTorch's CLIPModel gives the parameter of this path."""
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    return ".".join((*path[:-1], leaf))


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    return map_kernel(path, array, lambda x: x.transpose(3, 2, 0, 1))
