"""Loading checkpoints: CLIP and SigLIP of transformers or OpenCLIP, or a supervised ViT."""

import dataclasses
import functools
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxtta.models.attention import attention
from jaxtta.models.checkpoints import open_clip, siglip, transformers, vit
from jaxtta.models.checkpoints.files import OPEN_CLIP_CONFIG, WEIGHTS, is_transformers, model_type
from jaxtta.models.checkpoints.find import find_folder
from jaxtta.models.checks import require_dtype
from jaxtta.models.classifier import Params
from jaxtta.models.clip import CLIP
from jaxtta.models.preprocess import describe_preprocessing
from jaxtta.models.supervised import ImageClassifier
from jaxtta.models.transformer import Architecture

READERS = {"clip": transformers, "siglip": siglip, "vit": vit}
"""What reads each of transformers' model types."""

log = logging.getLogger(__name__)


def load_clip(
    path_or_hub_id: str | Path, *, dtype: Any = jnp.float32, compute_dtype: Any = None
) -> tuple[CLIP, Params]:
    """Load a checkpoint as `load` does, and refuse one that is not CLIP's.

    Args:
        path_or_hub_id: as in `load`.
        dtype: as in `load`.
        compute_dtype: as in `load`.

    Returns:
        The model and its parameter tree.

    Raises:
        FileNotFoundError: as in `load`.
        ValueError: as in `load`, or if the model is a supervised classifier.
    """
    model, params = load(path_or_hub_id, dtype=dtype, compute_dtype=compute_dtype)
    if not isinstance(model, CLIP):
        raise ValueError(f"{path_or_hub_id}: is a supervised classifier, this needs a CLIP model")
    return model, params


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: bool = False,
    scan: bool = False,
    fused_attention: bool = False,
    revision: str | None = None,
) -> tuple[CLIP | ImageClassifier, Params]:
    """Load a checkpoint: CLIP or SigLIP of transformers or OpenCLIP, or a supervised ViT.

    Args:
        path_or_hub_id: a folder with `config.json` and `model.safetensors` (single or sharded) or
            `flax_model.msgpack`, or with `open_clip_config.json` and
            `open_clip_model.safetensors`; or the id of such a model on the hub. Where both are
            there with weights, transformers' is read. `jaxtta convert` makes such a folder of
            pickled weights (`.pt`, `.bin`).
        dtype: of the parameters.
        compute_dtype: of the matrix products, `jnp.bfloat16` say; None for that of the parameters.
            LayerNorm, softmax, losses and adapted parameters stay in float32.
        remat: recompute each block's activations in the backward pass: less memory, more time.
        scan: run the blocks of ViT and text towers as one loop: deep models compile faster for TPU,
            where that takes minutes; nothing is gained on a CPU. A ResNet's blocks differ and are
            not scanned.
        fused_attention: let the images' tokens attend by cuDNN's kernel, which keeps no scores, on
            an NVIDIA GPU; see `with_fused_attention`.
        revision: of the hub's model.

    Returns:
        The model and its parameter tree (`vision_model`, `text_model`, `visual_projection`,
        `text_projection`, `logit_scale`; of SigLIP `logit_bias` and no `visual_projection`; of a
        supervised ViT `vision_model`, `classifier`).

    Raises:
        FileNotFoundError: if there is no such folder or hub model, or a file is missing.
        TypeError: if a dtype is not a floating one.
        ValueError: if the configuration is none of CLIP's, SigLIP's and ViT's, only pickled weights
            or a LoRA adapter are there, a file is a git-LFS pointer, a parameter is missing, has
            another shape or is not finite (they are named), or the preprocessing cannot be read;
            for fused attention if JAX has no GPU, and as `with_fused_attention`.

    Examples:
        >>> import jax, jaxtta, numpy as np
        >>> model, params = jaxtta.load(jaxtta.assets.MODEL)  # small, and comes with the package
        >>> dataset = jaxtta.data.open_dataset("folder", jaxtta.assets.IMAGES)
        >>> task = jaxtta.zero_shot_task(model, dataset.class_names)
        >>> images = np.stack([dataset[number] for number in range(8)])
        >>> images.shape, task.classes
        ((8, 32, 32, 3), 10)
    """
    require_dtype("dtype", dtype)
    if compute_dtype is not None:
        require_dtype("compute_dtype", compute_dtype)
    if fused_attention and jax.default_backend() != "gpu":
        raise ValueError(f"fused attention needs a GPU, JAX has a {jax.default_backend()}")
    folder = find_folder(path_or_hub_id, revision)
    if compute_dtype is None and jnp.finfo(dtype).bits < 32:
        compute_dtype = dtype  # adapted parameters are float32 and must not decide it
    model, params = reader_of(folder).load_folder(folder, dtype, compute_dtype, remat, scan)
    model = with_fused_attention(model) if fused_attention else model
    log.info("%s", describe_preprocessing(model))
    return model, params


def with_fused_attention(model: Any) -> Any:
    """Let the images' tokens attend by cuDNN's kernel, on NVIDIA GPUs.

    It moves less memory, since it keeps no scores. The text tower stays as it is, and so do the
    second derivatives of meta-training. Derivatives are reverse-mode only (no `jax.jvp`), and on
    explicit mesh axes the batch is not kept apart.

    Args:
        model: a CLIP or SigLIP model or a classifier with a ViT, its products in 16 bits.

    Returns:
        A model of the same parameters.

    Raises:
        ValueError: if the images' tower is no ViT, its products are not in 16 bits, JAX finds no
            cuDNN, or cuDNN has no kernel for heads of this size.
    """
    arch = getattr(getattr(model, "vision", None), "arch", None)
    if not isinstance(arch, Architecture):
        raise ValueError("fused attention needs a ViT for the images, this model has another tower")
    dtype = jnp.dtype(arch.compute_dtype or jnp.float32)
    if jnp.finfo(dtype).bits != 16:
        raise ValueError(f"fused attention needs compute_dtype bfloat16 or float16, not {dtype}")
    token = jax.ShapeDtypeStruct((1, 1, 1, arch.width // arch.heads), arch.compute_dtype)
    try:
        jax.eval_shape(functools.partial(attention, fused="cudnn"), token, token, token)
    except NotImplementedError as error:
        raise ValueError(f"fused attention: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"fused attention needs an NVIDIA GPU with cuDNN: {error}") from error
    arch = arch._replace(fused_attention="cudnn")
    return dataclasses.replace(model, vision=model.vision.clone(arch=arch))


def reader_of(folder: Path) -> ModuleType:
    """The module that reads a checkpoint's folder.

    Args:
        folder: the checkpoint's.

    Returns:
        A module with `load_folder(folder, dtype, compute_dtype, remat, scan)`.

    Raises:
        ValueError: if its configuration is of an unknown kind of model.
    """
    config = folder / "config.json"
    readable = any((folder / name).exists() for name in WEIGHTS)
    if (folder / OPEN_CLIP_CONFIG).exists() and not (readable and is_transformers(config)):
        return open_clip
    kind = model_type(config)
    if kind is None:
        return transformers  # which says what is wrong with the file
    if kind not in READERS:
        naflex = " (SigLIP 2 for images of any shape; those for one size are 'siglip')"
        said = naflex if kind == "siglip2" else ""
        raise ValueError(
            f"{config}: model_type is {kind!r}{said}, supported are {', '.join(READERS)}"
        )
    return READERS[kind]
