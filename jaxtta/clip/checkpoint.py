"""Reading and writing CLIP checkpoints in transformers' formats."""

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from jaxtta.clip.model import CLIP, Params
from jaxtta.clip.modules import ACTIVATIONS, Architecture, TextTransformer, VisionTransformer
from jaxtta.clip.preprocess import Preprocessing, read_preprocessing

if TYPE_CHECKING:  # transformers is imported where it is used: it brings PyTorch along
    from transformers import CLIPConfig

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors",)
_TRANSFORMERS = "transformers' CLIPModel.from_pretrained(…).save_pretrained(…)"
PICKLES = {  # with what makes safetensors of them
    "pytorch_model.bin": _TRANSFORMERS,
    "pytorch_model.bin.index.json": _TRANSFORMERS,
    "open_clip_pytorch_model.bin": "open_clip's push_to_hf_hub.save_for_hf(…)",
}
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    remat: bool = False,
    revision: str | None = None,
) -> tuple[CLIP, Params]:
    """Load a CLIP checkpoint of transformers or OpenCLIP.

    Args:
        path_or_hub_id: a folder with `config.json` and `model.safetensors` (single or sharded) or
            `flax_model.msgpack`, or with `open_clip_config.json` and
            `open_clip_model.safetensors`; or the id of such a model on the hub. Where both are
            there with weights, transformers' is read.
        dtype: of the parameters.
        compute_dtype: of the matrix products, `jnp.bfloat16` say; None for that of the parameters.
            LayerNorm, softmax, losses and adapted parameters stay in float32.
        remat: recompute each block's activations in the backward pass: less memory, more time.
        revision: of the hub's model.

    Returns:
        The model and its parameter tree (`vision_model`, `text_model`, `visual_projection`,
        `text_projection`, `logit_scale`); a ViT's is the same for both kinds of checkpoint.

    Raises:
        FileNotFoundError: if there is no such folder or hub model, or a file is missing.
        ValueError: if the configuration is none of CLIP's, only pickled weights are there, or a
            parameter is missing or has another shape (they are named).
    """
    folder = find_folder(path_or_hub_id, revision)
    if compute_dtype is None and jnp.finfo(dtype).bits < 32:
        compute_dtype = dtype  # adapted parameters are float32 and must not decide it
    readable = any((folder / name).exists() for name in WEIGHTS)
    if (folder / OPEN_CLIP_CONFIG).exists() and not (
        readable and _is_transformers(folder / "config.json")
    ):
        from jaxtta.clip import openclip  # which imports this module

        return openclip.load_folder(folder, dtype, compute_dtype, remat)
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
    return model, fitted(entries, shapes, weights, dtype)


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
    vision, text = config.vision_config, config.text_config
    size = vision.image_size
    options = compute_dtype, remat
    return CLIP(
        vision_tower(vision, "vision_config", *options),
        TextTransformer(
            _architecture(text, "text_config", *options),
            text.vocab_size,
            text.max_position_embeddings,
        ),
        config.projection_dim,
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
    arch = _architecture(config, name, compute_dtype, remat)
    return VisionTransformer(arch, config.image_size, config.patch_size, pre_norm)


def _architecture(tower: Any, name: str, compute_dtype: Any, remat: bool) -> Architecture:
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
        ValueError: if the image tower is a ResNet, which transformers' CLIP has not.
    """
    from transformers import CLIPConfig

    if not isinstance(model.vision, VisionTransformer):
        raise ValueError(
            f"{folder}: a {type(model.vision).__name__} image tower cannot be saved as a "
            "transformers checkpoint"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vision, text = model.vision, model.text
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


def read_config(folder: Path, wanted: type) -> Any:
    """Read a checkpoint's `config.json`.

    Args:
        folder: the checkpoint's.
        wanted: a configuration class of transformers.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another kind of model.
    """
    path, model = folder / "config.json", wanted.__name__.removesuffix("Config")
    if not path.exists():
        raise FileNotFoundError(f"{folder}: has no config.json, so it is no {model} checkpoint")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != wanted.model_type:
        raise ValueError(f"{path}: model_type is {kind!r}, expected {wanted.model_type!r}")
    try:
        return wanted.from_dict(config)
    except Exception as error:  # what transformers raises here differs by version
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is refused by transformers ({reason})") from error


def _is_transformers(config: Path | None) -> bool:
    """Whether to read a `config.json` as transformers'; timm's, beside OpenCLIP's files, is not."""
    if config is None or not config.exists():
        return False
    try:
        content = json.loads(config.read_text())
    except ValueError:
        return True
    return not isinstance(content, dict) or "model_type" in content


def find_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """A checkpoint's folder; the files of a hub model are fetched first.

    Args:
        path_or_hub_id: a folder here, or the id of a model on the hub.
        revision: of the hub's model.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is neither.
    """
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    hub_id = str(path_or_hub_id)
    missing = f"{hub_id}: is neither a folder here nor a model that the hub gives"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise FileNotFoundError(missing)
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(hub_id, name, revision=revision))
        except LocalEntryNotFoundError:
            # The hub could not be asked. That it has no such file may be known from last time.
            known = huggingface_hub.try_to_load_from_cache(hub_id, name, revision=revision)
            if known is None:
                raise
            return None
        except EntryNotFoundError:  # the hub says that there is no such file
            return None

    try:
        config, weights = fetch("config.json"), None
        if _is_transformers(config):
            weights = next(filter(None, map(fetch, WEIGHTS)), None)
        others = ("preprocessor_config.json", *TOKENIZER_FILES)
        if weights is None and (other := fetch(OPEN_CLIP_CONFIG)):
            config, others = other, (*OPEN_CLIP_WEIGHTS, *others)
        for name in others:
            fetch(name)
        if weights and weights.name.endswith("index.json"):
            for name in _shards(weights):
                fetch(name)
    except Exception as error:  # the hub's client raises its HTTP library's errors too
        raise FileNotFoundError(f"{missing} ({type(error).__name__})") from error
    if config is None:
        raise FileNotFoundError(f"{missing} (it has no config.json)")
    return config.parent


Entries = Iterator[tuple[tuple[str, ...], np.ndarray]]
PathOf = Callable[[str], tuple[str, ...]]


def read_weights(
    folder: Path, path_of: PathOf, names: Sequence[str] = WEIGHTS
) -> tuple[Path, Entries]:
    """Read a checkpoint's weights one by one.

    Args:
        folder: the checkpoint's.
        path_of: the path in our tree of a parameter that PyTorch calls so.
        names: what the file may be called, the first that is there is read.

    Returns:
        The file that was read, and (path, array) for each parameter, kernels turned as ours are.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they are pickled.
    """
    weights = next((folder / name for name in names if (folder / name).exists()), None)
    if weights is None:
        pickled = next((name for name in PICKLES if (folder / name).exists()), None)
        if pickled:
            raise ValueError(
                f"{folder / pickled}: pickled weights can run code and are not read; convert them "
                f"with {PICKLES[pickled]}"
            )
        raise FileNotFoundError(f"{folder}: has none of {', '.join(names)}")
    reader = _read_msgpack if weights.suffix == ".msgpack" else _read_safetensors
    return weights, reader(weights, path_of)


def fitted(
    entries: Iterable[tuple[tuple[str, ...], np.ndarray]],
    shapes: Mapping[tuple[str, ...], Any],
    weights: Path,
    dtype: Any,
    config: str = "config.json",
) -> Params:
    """Make a parameter tree of what was read.

    Args:
        entries: (path, array) of each parameter.
        shapes: every parameter that is wanted, with its shape.
        weights: the file, for messages.
        dtype: of the parameters.
        config: the file that the shapes are from, for messages.

    Returns:
        The tree.

    Raises:
        ValueError: if a parameter is missing or has another shape.
    """
    found: dict[tuple[str, ...], jax.Array] = {}
    wrong, unused = [], []
    for path, array in entries:
        if path not in shapes:
            unused.append("/".join(path))
        elif array.shape != shapes[path].shape:
            wrong.append(f"{'/'.join(path)} has shape {array.shape}, expected {shapes[path].shape}")
        else:
            found[path] = jnp.asarray(array, dtype)
    wrong += [
        f"{'/'.join(path)} is missing"
        for path in shapes
        if path not in found and not any(w.startswith("/".join(path) + " ") for w in wrong)
    ]
    if wrong:
        raise ValueError(f"{weights}: does not fit its {config}: {'; '.join(wrong)}")
    if unused:
        warnings.warn(f"{weights}: not used: {', '.join(unused)}", stacklevel=3)
    return unflatten_dict(found)


def _read_safetensors(weights: Path, path_of: PathOf) -> Entries:
    files = [weights]
    if weights.suffix == ".json":
        files = [weights.parent / name for name in _shards(weights)]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: named in {weights.name}, but missing")
        try:
            with safe_open(file, framework="flax") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name.endswith("position_ids"):  # a buffer of old checkpoints
                        continue
                    path = path_of(name)
                    yield path, _from_torch(path, np.asarray(tensors.get_tensor(name)))
        except SafetensorError as error:
            raise ValueError(f"{file}: is damaged or no safetensors file ({error})") from error


def _shards(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of sharded weights ({error!r})") from error
    return sorted(set(names))


def _read_msgpack(weights: Path, path_of: PathOf) -> Entries:
    del path_of  # the paths are ours already
    try:
        tree = flatten_dict(flax.serialization.msgpack_restore(weights.read_bytes()))
    except Exception as error:  # msgpack raises errors of many kinds
        raise ValueError(f"{weights}: is damaged or no msgpack file ({error})") from error
    yield from ((path, np.asarray(leaf)) for path, leaf in tree.items())


def _torch_name(path: tuple[str, ...]) -> str:
    """The name that PyTorch's CLIPModel gives the parameter of this path."""
    leaf = "weight" if path[-1] in ("kernel", "scale", "embedding") else path[-1]
    return ".".join((*path[:-1], leaf))


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    return _kernel(path, array, lambda x: x.transpose(3, 2, 0, 1))


def _from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    return _kernel(path, array, lambda x: x.transpose(2, 3, 1, 0))


def _kernel(
    path: tuple[str, ...], array: np.ndarray, convolution: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    if path[-1] != "kernel":
        return array
    return convolution(array) if array.ndim == 4 else array.T
