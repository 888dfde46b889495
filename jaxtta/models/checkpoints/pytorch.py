"""Making a checkpoint's folder of a PyTorch file of weights.

    convert(Path("ViT-B-32.pt"), Path("vit-b-32"))   # then jaxtta.load("vit-b-32")

Needs PyTorch. Pickles are read with `weights_only=True`, so that nothing in them runs.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxtta.models.checkpoints.files import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    PREPROCESSING_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
    read_json,
    refuse_pointer,
    shards_of,
)
from jaxtta.models.checkpoints.weights import without_prefix
from jaxtta.models.classifier import Params
from jaxtta.models.preprocess import CLIP_MEAN, CLIP_STD

log = logging.getLogger(__name__)

Tensors = dict[str, Any]
Activation = Literal["gelu", "quick_gelu"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the model's parameters."""
_TRANSFORMERS = (
    "vision_model.embeddings.patch_embedding.weight",
    "vit.embeddings.patch_embeddings.projection.weight",
)
_OPEN_CLIP = ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")
_NO_PARAMETERS = ("input_resolution", "context_length", "vocab_size")  # OpenAI's archives have them


def convert(
    file: Path,
    out: Path,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    activation: Activation | None = None,
) -> tuple[Any, Params]:
    """Write a folder that `jaxtta.load`, OpenCLIP or transformers reads.

    Args:
        file: `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors`: OpenAI's TorchScript archives, state
            dicts, OpenCLIP's training checkpoints; or a `.bin.index.json`.
        out: the folder, which must not exist yet, or be empty.
        config: transformers' `config.json`, or OpenCLIP's `open_clip_config.json` or
            `model_configs/NAME.json`; None for one beside the file, or for the sizes that the
            parameters' shapes say.
        tokenizer: folder with the tokenizer's files; None for that of the file.
        activation: of a model whose configuration is not given and whose file does not say.

    Returns:
        The model and its parameters, as `jaxtta.load` reads them of the folder.

    Raises:
        FileNotFoundError: if a file is missing.
        FileExistsError: if the folder holds something.
        ImportError: if PyTorch is not installed.
        ValueError: if the file holds no CLIP, is damaged, or does not fit its configuration.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists; give the name of a new folder")
    for path in filter(None, (file, config, tokenizer)):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
    if tokenizer and not any((tokenizer / name).exists() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{tokenizer}: has none of {', '.join(TOKENIZER_FILES)}")
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "converting needs PyTorch, which is not installed here (pip install torch)"
        ) from error
    tensors, scripted = read_tensors(file)
    tensors, anchor = _own_names(file, tensors)
    settings = _configuration(
        file, config, tensors, anchor, "quick_gelu" if scripted else activation
    )
    with _new_folder(out) as folder:
        name, weights = (
            ("config.json", WEIGHTS[0])
            if anchor in _TRANSFORMERS
            else (OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS[0])
        )
        (folder / name).write_text(json.dumps(settings, indent=2))
        whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        safetensors.torch.save_file(whole, folder / weights, {"format": "pt"})
        beside = [file.parent, *([config.parent] if config else [])]
        _copy(TOKENIZER_FILES, [tokenizer] if tokenizer else beside, folder)
        _copy(PREPROCESSING_FILES, beside, folder)
        from jaxtta.models.load import reader_of  # which imports this package's other modules

        try:
            model, params = reader_of(folder).load_folder(folder, np.float32, None, False, False)
        except ValueError as error:  # it does not fit
            raise ValueError(str(error).replace(str(folder), str(out))) from error
    origin = Path(model.preprocessing_origin)
    if origin.parent == folder:  # which has another name now
        model = dataclasses.replace(model, preprocessing_origin=str(out / origin.name))
    return model, params


def read_tensors(file: Path) -> tuple[Tensors, bool]:
    """Read the parameters of a PyTorch file.

    Args:
        file: as in `convert`.

    Returns:
        The tensors by name, and whether it is a TorchScript archive, as OpenAI's are.

    Raises:
        ValueError: if it is damaged or holds no tensors by name.
    """
    import safetensors.torch
    import torch  # pyright: ignore[reportMissingImports]

    if file.name.endswith(".index.json"):
        parts = [read_tensors(file.parent / name)[0] for name in shards_of(file)]
        return {name: tensor for part in parts for name, tensor in part.items()}, False
    refuse_pointer(file)
    scripted = _is_torchscript(file)
    try:
        if file.suffix == ".safetensors":
            content = safetensors.torch.load_file(file)
        elif scripted:
            content = torch.jit.load(file, map_location="cpu").state_dict()
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: holds Python objects besides tensors, or is not a PyTorch file; where it was "
            "made, torch.save(model.state_dict(), FILE) writes the tensors alone"
        ) from error
    except Exception as error:  # what PyTorch and safetensors raise on damaged files differs
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{file}: is damaged or no PyTorch file ({reason})") from error
    while isinstance(content, Mapping) and (
        inner := next((k for k in WRAPPERS if isinstance(content.get(k), Mapping)), None)
    ):
        content = content[inner]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        str(name): value
        for name, value in entries
        if isinstance(value, torch.Tensor) and name not in _NO_PARAMETERS
    }
    if not tensors:
        raise ValueError(f"{file}: holds no state dict (tensors by name)")
    return tensors, scripted


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def _own_names(file: Path, tensors: Tensors) -> tuple[Tensors, str]:
    """The model's tensors under its own names, and the name that tells its library."""
    if any("lora_" in name for name in tensors):
        raise ValueError(
            f"{file}: holds a LoRA adapter; merge it into its base model with peft's "
            "merge_and_unload() and save that"
        )
    plain = [without_prefix(name, "") for name in tensors]
    found = [
        (name.removesuffix(anchor), anchor)
        for name in plain
        for anchor in (*_TRANSFORMERS, *_OPEN_CLIP)
        if f".{name}".endswith(f".{anchor}")
    ]
    if len(found) != 1:
        what = "no CLIP" if not found else f"{len(found)} models"
        raise ValueError(
            f"{file}: holds {what} under names of transformers, OpenAI or OpenCLIP; it has "
            f"{len(plain)} parameters, {plain[0]} for one"
        )
    prefix, anchor = found[0]
    own = {
        without_prefix(name, prefix): tensor
        for name, tensor in tensors.items()
        if without_prefix(name, "").startswith(prefix)
    }
    if others := [name for name in plain if not name.startswith(prefix)]:
        log.warning("%s: %d others are left out, %s for one", file, len(others), others[0])
    return own, anchor


def _configuration(
    file: Path, config: Path | None, tensors: Tensors, anchor: str, activation: Activation | None
) -> dict[str, Any]:
    """The content of the folder's configuration."""
    theirs = anchor in _TRANSFORMERS
    wanted = "config.json" if theirs else OPEN_CLIP_CONFIG
    if config is None and (file.parent / wanted).exists():
        config = file.parent / wanted
    if config is None:
        if theirs or anchor != "visual.conv1.weight" or "text_projection" not in tensors:
            raise ValueError(
                f"{file}: does not say all of its architecture; give its {wanted} with --config"
            )
        if activation is None:
            raise ValueError(
                f"{file}: does not say its activation; give --activation quick_gelu (OpenAI's "
                "weights and what was trained from them) or gelu (most of OpenCLIP's), or its "
                f"{wanted} or OpenCLIP's model_configs/NAME.json with --config"
            )
        return _of_shapes(tensors, activation)
    content = read_json(config)
    if "embed_dim" in content:  # one of OpenCLIP's model_configs
        content = {"model_cfg": content}
    if ("model_type" if theirs else "model_cfg") not in content:
        library = "transformers" if theirs else "OpenCLIP"
        raise ValueError(f"{config}: is not {wanted}, but {file} has {library}'s names")
    return content


def _of_shapes(tensors: Tensors, activation: Activation) -> dict[str, Any]:
    """OpenCLIP's configuration of a model with OpenAI's names; all its heads are 64 wide."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def count(prefix: str) -> int:
        places = prefix.count(".")
        return len({name.split(".")[places] for name in shape if name.startswith(prefix)})

    width = shape["ln_final.weight"][0]
    if "visual.proj" in shape:
        patch = shape["visual.conv1.weight"][-1]
        grid = round((shape["visual.positional_embedding"][0] - 1) ** 0.5)
        vision = {
            "image_size": patch * grid,
            "layers": count("visual.transformer.resblocks."),
            "width": shape["visual.conv1.weight"][0],
            "patch_size": patch,
        }
    else:
        grid = round((shape["visual.attnpool.positional_embedding"][0] - 1) ** 0.5)
        vision = {
            "image_size": 32 * grid,
            "layers": [count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
            "width": shape["visual.layer1.0.conv1.weight"][0],
            "patch_size": None,
        }
    return {
        "model_cfg": {
            "embed_dim": shape["text_projection"][1],
            "quick_gelu": activation == "quick_gelu",
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": shape["positional_embedding"][0],
                "vocab_size": shape["token_embedding.weight"][0],
                "width": width,
                "heads": width // 64,
                "layers": count("transformer.resblocks."),
            },
        },
        "preprocess_cfg": {
            "size": vision["image_size"],
            "mode": "RGB",
            "mean": CLIP_MEAN,
            "std": CLIP_STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }


def _copy(names: Sequence[str], sources: Iterable[Path], folder: Path) -> None:
    """Copy the files of the first source that has any."""
    for source in sources:
        found = [name for name in names if (source / name).exists()]
        for name in found:
            shutil.copyfile(source / name, folder / name)
        if found:
            return


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name once it is complete."""
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(out)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
