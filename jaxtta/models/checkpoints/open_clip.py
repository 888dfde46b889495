"""Reading CLIP and SigLIP checkpoints in OpenCLIP's format.

A folder with `open_clip_config.json` and `open_clip_model.safetensors`: a ViT or ResNet of
OpenCLIP's own, or a SigLIP tower of timm's. A ViT's parameter tree is the one that transformers'
checkpoints give, so that everything else takes both.

The configuration may name many variants (captioning, other text towers, timm's other image
towers); those that would compute something else than CLIP or SigLIP are refused by name, not
ignored.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import jax
from flax.traverse_util import flatten_dict
from PIL import Image

from jaxtta.models.checkpoints.files import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, read_json
from jaxtta.models.checkpoints.weights import (
    NamedArrays,
    drop_leading_axes,
    match_parameters,
    read_weights,
    split_joint,
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
    "custom_text",  # what the text tower's parameters are called
    "nonscalar_logit_scale",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "timm_model_pretrained",  # these, where towers are of timm's and in training alone
    "timm_drop",
    "timm_drop_path",
}
SUPPORTED = "supported are OpenCLIP's own ViT and ResNet towers, and SigLIP"
TIMM_KINDS = {  # by the beginning of timm's name
    "eva": "an EVA",
    "vit_base_mci": "a MobileCLIP",
    "fastvit": "a MobileCLIP",
    "vit_pe": "a Perception Encoder",
    "vitamin": "a ViTamin",
    "convnext": "a ConvNeXt",
    "swin": "a Swin",
}


class TimmSize(NamedTuple):
    """Sizes of one of timm's SigLIP towers."""

    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0


TIMM_SIZES = {
    "base": TimmSize(768, 12, 12),
    "large": TimmSize(1024, 24, 16),
    "so400m": TimmSize(1152, 27, 16, 3.7362),
    "giantopt": TimmSize(1536, 40, 16),
}
TANH_TOWERS = r"base_patch32|large_patch16_siglip_512|so400m_patch16|giantopt"
"""Those of timm's SigLIP towers whose GELU is the approximate one."""


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


def load_folder(
    folder: Path, dtype: Any, compute_dtype: Any, remat: bool, scan: bool
) -> tuple[CLIP, Params]:
    """Load an OpenCLIP checkpoint; all as in `jaxtta.load`, which calls this."""
    model = from_config(
        folder / OPEN_CLIP_CONFIG, compute_dtype=compute_dtype, remat=remat, scan=scan
    )
    shapes = flatten_dict(jax.eval_shape(model.init, jax.random.key(0)))
    table = _RESNET_NAMES if isinstance(model.vision, ResNet) else _VIT_NAMES
    weights, entries = read_weights(folder, lambda name: _path(name, table), OPEN_CLIP_WEIGHTS)
    entries = drop_leading_axes(_without_buffers(split_joint(entries)), shapes)
    return model, match_parameters(entries, shapes, weights, dtype, OPEN_CLIP_CONFIG)


def from_config(
    path: Path, *, compute_dtype: Any = None, remat: bool = False, scan: bool = False
) -> CLIP:
    """Make a model of an `open_clip_config.json`; `model.init(key)` draws its parameters.

    Args:
        path: of the file.
        compute_dtype: of the matrix products; None for that of the parameters.
        remat: recompute each block's activations in the backward pass.
        scan: run the blocks as one loop (not a ResNet's).

    Returns:
        The model; its tokenizer is looked for beside the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or describes something else than CLIP or SigLIP.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    whole = ConfigSection(path, "", read_json(path))
    config = whole.section("model_cfg")
    vision_section, text_section = config.section("vision_cfg"), config.section("text_cfg")
    # First what names another kind of model: its other settings would make less sense of it.
    _refuse_other_kinds(config, vision_section, text_section)
    known = "embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_bias"
    config.check(*known)
    activation = "quick_gelu" if config.values.get("quick_gelu") else "gelu"
    options = activation, compute_dtype, remat, scan
    vision, text = _vision_tower(vision_section, *options), _text_tower(text_section, *options)
    projection = config.integer("embed_dim")
    for tower in (vision, text):
        if not tower.has_projection and projection != tower.arch.width:
            raise config.error("embed_dim", f"a tower's width of {tower.arch.width}")
    return CLIP(
        vision,
        text,
        projection,
        EOS_IS_HIGHEST_ID if text.causal else None,
        _preprocessing(whole.section("preprocess_cfg", required=False), vision.image_size),
        str(path.parent),
        logit_bias=config.values.get("init_logit_bias") is not None,
        clean=_cleaner(text_section.section("tokenizer_kwargs", required=False)),
        preprocessing_origin=str(path),
    )


def _refuse_other_kinds(config: ConfigSection, vision: ConfigSection, text: ConfigSection) -> None:
    """Raise a ValueError where the configuration is of another kind of model, and say which."""
    kind, name = None, vision.values.get("timm_model_name")
    if config.values.get("multimodal_cfg"):
        kind = "a CoCa model (model_cfg.multimodal_cfg)"
    elif text.values.get("hf_model_name"):
        kind = f"a Hugging Face text tower ({text.values['hf_model_name']})"
    elif name and not _timm_siglip(name):
        kinds = (kind for start, kind in TIMM_KINDS.items() if str(name).startswith(start))
        kind = f"{next(kinds, 'another timm')} image tower ({name})"
    if kind:
        raise ValueError(f"{config.file}: describes {kind}, which is not supported; {SUPPORTED}")


def _cleaner(section: ConfigSection) -> str | None:
    """How OpenCLIP cleans prompts for this tokenizer, beside mending their characters."""
    section.check("clean")
    name = section.values.get("clean") or "whitespace"
    names = {"canonicalize": "canonicalize", "lower": "lower", "whitespace": None}
    if name not in names:
        raise section.error("clean", f"one of {', '.join(names)}")
    return names[name]


def _timm_siglip(name: Any) -> re.Match | None:
    """The size, patch and image size in the name of one of timm's SigLIP towers."""
    return re.fullmatch(rf"vit_({'|'.join(TIMM_SIZES)})_patch(\d+)_siglip_(\d+)", str(name))


def _timm_tower(
    section: ConfigSection, compute_dtype: Any, remat: bool, scan: bool
) -> VisionTransformer:
    name = section.values["timm_model_name"]
    found = _timm_siglip(name)
    assert found is not None  # other names were refused
    section.check("timm_model_name", "image_size", "timm_pool", "timm_proj")
    for key, wanted in (("timm_pool", "map"), ("timm_proj", "none")):
        if section.values.get(key) != wanted:
            raise section.error(key, repr(wanted))
    size, patch, image_size = TIMM_SIZES[found[1]], int(found[2]), int(found[3])
    if section.side("image_size", 224) != image_size:
        raise section.error("image_size", f"the {image_size} of {name}")
    arch = Architecture(
        size.width,
        int(size.width * size.mlp_ratio),
        size.heads,
        size.layers,
        "gelu_pytorch_tanh" if re.search(TANH_TOWERS, name) else "gelu",
        1e-6,
        compute_dtype,
        remat,
        scan,
    )
    return VisionTransformer(arch, image_size, patch, pre_norm=False, class_token=False)


def _vision_tower(
    section: ConfigSection, activation: str, compute_dtype: Any, remat: bool, scan: bool
) -> VisionTransformer | ResNet:
    if section.values.get("timm_model_name"):
        return _timm_tower(section, compute_dtype, remat, scan)
    known = "image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"
    standard = {"pool_type": "tok", "pos_embed_type": "learnable"}
    if isinstance(section.values.get("layers"), list):
        section.check(*known, **standard)
        return _resnet(section, compute_dtype, remat)
    section.check(*known, "act_kwargs", "norm_kwargs", **standard)
    size, patch = section.side("image_size", 224), section.side("patch_size", 16)
    if size < patch:
        raise section.error("patch_size", f"at most the image_size of {size}")
    width = section.integer("width", 768)
    heads = _heads(section, width)
    arch = _architecture(section, width, heads, activation, compute_dtype, remat, scan)
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
    section: ConfigSection, activation: str, compute_dtype: Any, remat: bool, scan: bool
) -> TextTransformer:
    known = "context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"
    known = *known, "act_kwargs", "norm_kwargs", "no_causal_mask", "proj_bias", "tokenizer_kwargs"
    causal = not section.values.get("no_causal_mask")
    pool = "argmax" if causal else "last"
    projection = section.values.get("proj_type") or "linear"
    if projection not in ("linear", "none"):
        raise section.error("proj_type", "linear or none")
    section.check(*known, "proj_type", pool_type=pool)
    if not causal and section.values.get("pool_type") != pool:
        raise section.error("pool_type", repr(pool))
    width, heads = section.integer("width", 512), section.integer("heads", 8)
    if width % heads:
        raise section.error("heads", f"a divisor of the width of {width}")
    return TextTransformer(
        _architecture(section, width, heads, activation, compute_dtype, remat, scan),
        section.integer("vocab_size", 49408),
        section.integer("context_length", 77),
        causal,
        projection == "linear",
        bool(section.values.get("proj_bias")),
    )


def _architecture(
    section: ConfigSection,
    width: int,
    heads: int,
    activation: str,
    compute_dtype: Any,
    remat: bool,
    scan: bool,
) -> Architecture:
    ratio = section.values.get("mlp_ratio", 4.0)
    if not _is_number(ratio) or int(width * ratio) < 1:
        raise section.error("mlp_ratio", "a number above 0")
    norm = section.section("norm_kwargs", required=False)
    norm.check("eps")
    epsilon = norm.values.get("eps", 1e-5)
    if not _is_number(epsilon) or epsilon <= 0:
        raise norm.error("eps", "a number above 0")
    if section.values.get("act_kwargs"):
        if activation != "gelu" or section.values["act_kwargs"] != {"approximate": "tanh"}:
            raise section.error("act_kwargs", '{"approximate": "tanh"}, without quick_gelu')
        activation = "gelu_pytorch_tanh"
    return Architecture(
        width,
        int(width * ratio),
        heads,
        section.integer("layers", 12),
        activation,
        epsilon,
        compute_dtype,
        remat,
        scan,
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
        rounding="transformers" if windows[mode][1] is None else "torchvision",
        resize_longer=mode == "longest",
        fill=fill if mode == "longest" else 0,
    )


def _is_positive_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Names = tuple[tuple[str, str], ...]
# `matrix` is a kernel that OpenCLIP has as we have it, not transposed as a layer's is
# (`_without_buffers` knows it); `qkv` and `kv` are layers in one (`split_joint`).
_TEXT_NAMES: Names = (
    (r"^text\.", ""),  # where the text tower is called custom, whatever it is
    (r"^token_embedding\.weight$", "text_model.embeddings.token_embedding.embedding"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.embedding"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.matrix"),
)
_BLOCK_NAMES: Names = (
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.qkv.\1"),
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
    # timm's
    (r"^visual\.trunk\.pos_embed$", "vision_model.embeddings.position_embedding.embedding"),
    (r"^visual\.trunk\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.trunk\.norm\.", "vision_model.post_layernorm."),
    (r"^visual\.trunk\.attn_pool\.latent$", "vision_model.head.probe"),
    (r"^visual\.trunk\.attn_pool\.(norm|mlp)\b", r"vision_model.head.\1"),
    (r"^visual\.trunk\.attn_pool\.", "vision_model.head.attention."),
    (r"\.head\.norm\.", ".head.layernorm."),
    (r"^visual\.trunk\.blocks\.(\d+)\.norm", r"vision_model.encoder.layers.\1.layer_norm"),
    (r"^visual\.trunk\.blocks\.(\d+)\.attn\.", r"vision_model.encoder.layers.\1.self_attn."),
    (r"^visual\.trunk\.blocks\.", "vision_model.encoder.layers."),
    (r"\.(self_attn|attention)\.proj\.", r".\1.out_proj."),
    (r"\.attention\.q\.", ".attention.q_proj."),
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


def _without_buffers(entries: NamedArrays) -> NamedArrays:
    """Leave buffers out, and call the kernels kernels that were not to be transposed."""
    for path, array in entries:
        if path[-1] not in _BUFFERS:
            yield (*path[:-1], "kernel") if path[-1] == "matrix" else path, array
