"""Reading and writing CLIP checkpoints in transformers' formats."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save as to_bytes

from jaxtta.models.checkpoints.files import (
    TOKENIZER_FILES,
    map_kernel,
    match_parameters,
    read_config,
    read_weights,
)
from jaxtta.models.classifier import Params
from jaxtta.models.clip import CLIP
from jaxtta.models.preprocess import Preprocessing, read_preprocessing
from jaxtta.models.text import TextTransformer
from jaxtta.models.transformer import ACTIVATIONS, Architecture
from jaxtta.models.vit import VisionTransformer

if TYPE_CHECKING:  # transformers is imported where it is used: it brings PyTorch along
    from transformers import CLIPConfig


def load_folder(folder: Path, dtype: Any, compute_dtype: Any, remat: bool) -> tuple[CLIP, Params]:
    """Load a CLIP checkpoint of transformers; `jaxtta.load` calls this.

    Args:
        folder: with `config.json`, and `model.safetensors` (single or sharded) or
            `flax_model.msgpack`.
        dtype: of the parameters.
        compute_dtype: of the matrix products; None for that of the parameters.
        remat: recompute each block's activations in the backward pass.

    Returns:
        The model and its parameter tree.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the configuration is not CLIP's, only pickled weights are there, or a
            parameter is missing or has another shape.
    """
    from transformers import CLIPConfig

    config = read_config(folder, CLIPConfig)
    model = from_config(config, compute_dtype=compute_dtype, remat=remat)
    settings = folder / "preprocessor_config.json"
    preprocessing = read_preprocessing(
        settings if settings.exists() else None, model.preprocessing.image_size
    )
    model = dataclasses.replace(model, preprocessing=preprocessing, source=str(folder))
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    names = {_torch_name(path): path for path in shapes}
    weights, entries = read_weights(folder, lambda name: names.get(name, tuple(name.split("."))))
    return model, match_parameters(entries, shapes, weights, dtype)


def from_config(config: "CLIPConfig", *, compute_dtype: Any = None, remat: bool = False) -> CLIP:
    """Make a model of a transformers configuration; `model.init(key)` draws its parameters.

    Args:
        config: the configuration.
        compute_dtype: as in `load`.
        remat: as in `load`.

    Returns:
        The model, without tokenizer.

    Raises:
        ValueError: if the activation is unknown or the sizes do not fit each other.
    """
    values = cast(Any, config)  # its annotations allow None and lists where CLIP has numbers
    vision, text = values.vision_config, values.text_config
    size = vision.image_size
    options = compute_dtype, remat
    return CLIP(
        vision_tower(vision, "vision_config", *options),
        TextTransformer(
            architecture(text, "text_config", *options),
            text.vocab_size,
            text.max_position_embeddings,
        ),
        values.projection_dim,
        text.eos_token_id,
        Preprocessing(size, size, (size, size)),
    )


def vision_tower(
    config: Any, name: str, compute_dtype: Any, remat: bool = False, pre_norm: bool = True
) -> VisionTransformer:
    """Make an image tower of a transformers configuration.

    Args:
        config: of the tower.
        name: what to call the configuration in a message.
        compute_dtype: as in `load`.
        remat: as in `load`.
        pre_norm: whether the tokens pass a LayerNorm before the blocks.

    Returns:
        The tower.

    Raises:
        ValueError: if the activation is unknown or the sizes do not fit each other.
    """
    if config.image_size < config.patch_size:
        raise ValueError(
            f"an image size of {config.image_size} is smaller than a patch of {config.patch_size}"
        )
    arch = architecture(config, name, compute_dtype, remat)
    return VisionTransformer(arch, config.image_size, config.patch_size, pre_norm)


def architecture(tower: Any, name: str, compute_dtype: Any, remat: bool = False) -> Architecture:
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
    )


def save(folder: str | Path, model: CLIP, params: Params) -> None:
    """Write a transformers checkpoint: configuration, weights, preprocessing and tokenizer.

    Args:
        folder: made if it is missing; files in it are overwritten.
        model: the model; its tokenizer is copied from its source, if it has one.
        params: the parameter tree.

    Raises:
        ValueError: if the image tower is a ResNet, which transformers' CLIP has not, or the model
            is SigLIP.
    """
    from transformers import CLIPConfig

    if not isinstance(model.vision, VisionTransformer):
        raise ValueError(
            f"{folder}: a {type(model.vision).__name__} image tower cannot be saved as a "
            "transformers checkpoint"
        )
    text = model.text
    plain = text.causal and text.has_projection and not text.projection_bias
    if not plain or model.logit_bias or not model.vision.class_token:
        raise ValueError(
            f"{folder}: SigLIP, and CLIP with a bias on its logits or another text projection, "
            "cannot be saved as a transformers checkpoint"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vision = model.vision
    config = CLIPConfig(
        projection_dim=model.projection,
        vision_config={
            **_config_of(vision.arch),
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_dim": model.projection,
        },
        text_config={
            **_config_of(text.arch),
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.max_length,
            "projection_dim": model.projection,
            "eos_token_id": model.eos_token_id,
            "bos_token_id": None,  # the tokenizer's business
            "pad_token_id": None,
        },
        architectures=["CLIPModel"],
    )
    config.save_pretrained(folder)
    side = model.preprocessing.resize
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": side is not None,
        "size": {"shortest_edge": side}
        if isinstance(side, int)
        else dict(zip(("height", "width"), side or (), strict=False)),
        "resample": model.preprocessing.resample,
        "do_center_crop": model.preprocessing.crop is not None,
        "crop_size": dict(zip(("height", "width"), model.preprocessing.crop or (), strict=False)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": model.preprocessing.mean,
        "image_std": model.preprocessing.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    source = Path(model.source).resolve() if model.source else folder.resolve()
    for name in TOKENIZER_FILES:
        if source != folder.resolve() and (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    tensors = {
        _torch_name(path): np.array(_to_torch(path, np.asarray(leaf)), order="C")
        for path, leaf in flatten_dict(params).items()
    }
    (folder / "model.safetensors").write_bytes(to_bytes(tensors, metadata={"format": "pt"}))


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
