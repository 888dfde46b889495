"""Reading CLIP checkpoints in OpenCLIP's format.

A folder with `open_clip_config.json` and `open_clip_model.safetensors`, ViT or ResNet. A ViT's
parameter tree is the one that transformers' checkpoints give, so that everything else takes both.

The configuration may name many variants (attentional pooling, other text towers, timm's image
towers); those that would compute something else than CLIP are refused by name, not ignored.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

from jaxtta.models.checkpoints.files import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    match_parameters,
    read_json,
    read_weights,
)
from jaxtta.models.classifier import Params
from jaxtta.models.clip import CLIP
from jaxtta.models.preprocess import CLIP_MEAN, CLIP_STD, Preprocessing
from jaxtta.models.resnet import OUTPUT_STRIDE, ResNet, ResNetArchitecture
from jaxtta.models.text import TextTransformer
from jaxtta.models.transformer import Architecture
from jaxtta.models.vit import VisionTransformer

log = logging.getLogger(__name__)

EOS_IS_HIGHEST_ID = 2
"""In place of an end of text: the prompt's highest id (see `prompts.ends_of_text`)."""
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
FILTERS["random"] = FILTERS["bicubic"]  # in training alone
IGNORED_KEYS = {  # on what the model computes from ready token ids
    "cast_dtype",
    "init_logit_scale",
    "output_dict",
    "patch_dropout",  # in training alone
    "output_tokens",
    "attn_pooler_queries",  # of a pooling that is refused itself
    "attn_pooler_heads",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
}


class ConfigSection(NamedTuple):
    """A JSON object of the configuration, read setting by setting.

    Attributes:
        file: the configuration's, for messages.
        name: the object's place in the file.
        values: the object.
    """

    file: Path
    name: str
    values: Mapping[str, Any]

    def error(self, key: str, expected: str) -> ValueError:
        """What to raise where a setting has a value that cannot be."""
        return ValueError(
            f"{self.file}: {self.place(key)} is {self.values.get(key)!r}, expected {expected}"
        )

    def place(self, key: str) -> str:
        """A setting's place in the file."""
        return f"{self.name}.{key}".removeprefix(".")

    def section(self, key: str, required: bool = True) -> "ConfigSection":
        """The object that a setting holds; empty where it may be missing."""
        value = self.values.get(key)
        if value is None and not required:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, "an object")
        return ConfigSection(self.file, self.place(key), value)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.values.get(key)
        value = default if value is None else value
        if not _is_positive_integer(value):
            raise self.error(key, "a positive whole number")
        return value

    def side(self, key: str, default: int | None = None) -> int:
        """The side of a square, which may be written as (height, width)."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            return self._replace(values={key: value[0]}).integer(key)
        return self.integer(key, default)

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A number for each colour."""
        value: Any = self.values.get(key) or default
        value = [value] * 3 if _is_number(value) else value
        numbers = isinstance(value, list | tuple) and all(map(_is_number, value))
        if not numbers or len(value) != 3:
            raise self.error(key, "three numbers")
        return tuple(map(float, value))

    def check(self, *known: str, **standard: Any) -> None:
        """Refuse settings that are neither known, nor off, nor at the value given for them."""
        for key, value in self.values.items():
            if key in known or key in IGNORED_KEYS or not value:
                continue
            if key in standard and value != standard[key]:
                raise self.error(key, repr(standard[key]))
            if key not in standard:
                raise ValueError(
                    f"{self.file}: {self.place(key)} is {value!r}, which is not supported"
                )


def load_folder(folder: Path, dtype: Any, compute_dtype: Any, remat: bool) -> tuple[CLIP, Params]:
    """Load an OpenCLIP checkpoint; `jaxtta.load` calls this.

    Args:
        folder: with `open_clip_config.json` and `open_clip_model.safetensors`.
        dtype: of the parameters.
        compute_dtype: of the matrix products; None for that of the parameters.
        remat: recompute each block's activations in the backward pass.

    Returns:
        The model and its parameter tree.

    Raises:
        FileNotFoundError: if there are no weights.
        ValueError: if the configuration is not CLIP's, only pickled weights are there, or a
            parameter is missing or has another shape.
    """
    model = from_config(folder / OPEN_CLIP_CONFIG, compute_dtype=compute_dtype, remat=remat)
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    table = _RESNET_NAMES if isinstance(model.vision, ResNet) else _VIT_NAMES
    weights, entries = read_weights(folder, lambda name: _path(name, table), OPEN_CLIP_WEIGHTS)
    return model, match_parameters(_split_qkv(entries), shapes, weights, dtype, OPEN_CLIP_CONFIG)


def from_config(path: Path, *, compute_dtype: Any = None, remat: bool = False) -> CLIP:
    """Make a model of an `open_clip_config.json`; `model.init(key)` draws its parameters.

    Args:
        path: of the file.
        compute_dtype: of the matrix products; None for that of the parameters.
        remat: recompute each block's activations in the backward pass.

    Returns:
        The model; its tokenizer is looked for beside the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or describes something else than CLIP.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    whole = ConfigSection(path, "", read_json(path))
    config = whole.section("model_cfg")
    # First what names another kind of model: its other settings would make less sense of it.
    config.check("embed_dim", "quick_gelu", "vision_cfg", "text_cfg")
    activation = "quick_gelu" if config.values.get("quick_gelu") else "gelu"
    options = activation, compute_dtype, remat
    vision = _vision_tower(config.section("vision_cfg"), *options)
    return CLIP(
        vision,
        _text_tower(config.section("text_cfg"), *options),
        config.integer("embed_dim"),
        EOS_IS_HIGHEST_ID,
        _preprocessing(whole.section("preprocess_cfg", required=False), vision.image_size),
        str(path.parent),
        str(path),
    )


def _vision_tower(
    section: ConfigSection, activation: str, compute_dtype: Any, remat: bool
) -> VisionTransformer | ResNet:
    known = "image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"
    section.check(*known, pool_type="tok", pos_embed_type="learnable")
    if isinstance(section.values.get("layers"), list):
        return _resnet(section, compute_dtype, remat)
    size, patch = section.side("image_size", 224), section.side("patch_size", 16)
    if size < patch:
        raise section.error("patch_size", f"at most the image_size of {size}")
    width = section.integer("width", 768)
    arch = _architecture(section, width, _heads(section, width), activation, compute_dtype, remat)
    return VisionTransformer(arch, size, patch)


def _resnet(section: ConfigSection, compute_dtype: Any, remat: bool) -> ResNet:
    blocks, size = section.values["layers"], section.side("image_size", 224)
    if len(blocks) != 4 or not all(map(_is_positive_integer, blocks)):
        raise section.error("layers", "a number of blocks for each of four stages")
    if size % OUTPUT_STRIDE:
        raise section.error("image_size", f"a multiple of {OUTPUT_STRIDE}")
    channels = section.integer("width", 64)
    if channels % 2:
        raise section.error("width", "an even number")
    arch = ResNetArchitecture(tuple(blocks), channels, 1, compute_dtype=compute_dtype, remat=remat)
    return ResNet(arch._replace(heads=_heads(section, arch.width)), size)


def _text_tower(
    section: ConfigSection, activation: str, compute_dtype: Any, remat: bool
) -> TextTransformer:
    known = "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"
    section.check(*known, pool_type="argmax", proj_type="linear")
    width, heads = section.integer("width", 512), section.integer("heads", 8)
    if width % heads:
        raise section.error("heads", f"a divisor of the width of {width}")
    return TextTransformer(
        _architecture(section, width, heads, activation, compute_dtype, remat),
        section.integer("vocab_size", 49408),
        section.integer("context_length", 77),
    )


def _architecture(
    section: ConfigSection, width: int, heads: int, activation: str, compute_dtype: Any, remat: bool
) -> Architecture:
    ratio = section.values.get("mlp_ratio", 4.0)
    if not _is_number(ratio) or int(width * ratio) < 1:
        raise section.error("mlp_ratio", "a number above 0")
    return Architecture(
        width,
        int(width * ratio),
        heads,
        section.integer("layers", 12),
        activation,
        compute_dtype=compute_dtype,
        remat=remat,
    )


def _heads(section: ConfigSection, width: int) -> int:
    """Number of heads that attention over vectors of this width has."""
    size = section.integer("head_width", 64)
    if width % size:
        raise section.error("head_width", f"a divisor of {width}")
    return width // size


def _preprocessing(section: ConfigSection, image_size: int) -> Preprocessing:
    section.check("size", "interpolation", "resize_mode", "mean", "std", "fill_color", mode="RGB")
    if not section.values:
        log.warning("%s: has no preprocess_cfg: OpenCLIP's defaults are taken", section.file)
    # OpenCLIP too resizes to the model's own size, whatever the setting is.
    if (size := section.side("size", image_size)) != image_size:
        log.warning("%s: size is %s, the model's %s is taken", section.file, size, image_size)
    name = section.values.get("interpolation") or "bicubic"
    if name not in FILTERS:
        raise section.error("interpolation", f"one of {', '.join(FILTERS)}")
    square = (image_size, image_size)
    windows: dict[str, tuple[int | tuple[int, int], tuple[int, int] | None]] = {
        "shortest": (image_size, square),
        "longest": (image_size, square),
        "squash": (square, None),
    }
    mode = section.values.get("resize_mode") or "shortest"
    if mode not in windows:
        raise section.error("resize_mode", f"one of {', '.join(windows)}")
    mean, std = section.numbers("mean", CLIP_MEAN), section.numbers("std", CLIP_STD)
    if min(std) <= 0:
        raise section.error("std", "numbers above 0")
    fill = section.values.get("fill_color") or 0
    if not isinstance(fill, int) or not 0 <= fill <= 255:
        raise section.error("fill_color", "a grey level from 0 to 255")
    return Preprocessing(
        image_size,
        *windows[mode],
        int(FILTERS[name]),
        mean,
        std,
        rounding="torchvision",
        resize_longer=mode == "longest",
        fill=fill if mode == "longest" else 0,
    )


def _is_positive_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Names = tuple[tuple[str, str], ...]
# `matrix` is a kernel that OpenCLIP has as we have it, not transposed as a layer's is; `joint` are
# three layers in one. `_split_qkv` knows both.
_TEXT_NAMES: Names = (
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.embedding"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.embedding"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.matrix"),
)
_BLOCK_NAMES: Names = (
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.joint.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_VIT_NAMES: Names = (
    *_TEXT_NAMES,
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.embedding"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.matrix"),
    *_BLOCK_NAMES,
)
_RESNET_NAMES: Names = (
    *_TEXT_NAMES,
    (r"^visual\.attnpool\.c_proj\.", "visual_projection."),
    (r"^visual\.attnpool\.positional_embedding$", "vision_model.attention_pool.position_embedding"),
    (r"^visual\.attnpool\.", "vision_model.attention_pool."),
    (r"^visual\.(conv|bn)", r"vision_model.stem.\1"),
    (r"^visual\.layer", "vision_model.layer"),
    (r"\.downsample\.0\.", ".downsample_conv."),
    (r"\.downsample\.1\.", ".downsample_norm."),
    (r"\.bn(\d)\.", r".norm\1."),
    *_BLOCK_NAMES,
)
_LEAVES = {"running_mean": "mean", "running_var": "var"}
_BUFFERS = ("num_batches_tracked", "attn_mask")  # say nothing about the model


def _path(name: str, table: Names) -> tuple[str, ...]:
    """Our path for a parameter of theirs."""
    for pattern, ours in table:
        name = re.sub(pattern, ours, name)
    *layers, leaf = name.split(".")
    if leaf == "weight":
        leaf = "scale" if layers and "norm" in layers[-1] else "kernel"
    return (*layers, _LEAVES.get(leaf, leaf))


def _split_qkv(
    entries: Iterable[tuple[tuple[str, ...], np.ndarray]],
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """Take queries, keys and values apart, and leave buffers out."""
    for path, array in entries:
        if path[-1] in _BUFFERS:
            continue
        if path[-1] == "matrix":
            yield (*path[:-1], "kernel"), array
        elif "joint" in path and array.ndim:
            # Sizes that three do not divide come out uneven, and are reported as such.
            parts = np.array_split(array, 3, axis=-1)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                yield (*path[:-2], name, path[-1]), part
        else:
            yield path, array
