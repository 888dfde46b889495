"""The files of a checkpoint: folders and hub models, configurations, weights by name."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from jaxtta.models.classifier import Params
from jaxtta.models.task import TOKENIZER_FILES

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors",)
_TRANSFORMERS = "transformers' from_pretrained(…).save_pretrained(…)"
PICKLES = {  # with what makes safetensors of them
    "pytorch_model.bin": _TRANSFORMERS,
    "pytorch_model.bin.index.json": _TRANSFORMERS,
    "open_clip_pytorch_model.bin": "open_clip's push_to_hf_hub.save_for_hf(…)",
}


def model_type(config: Path) -> str | None:
    """The model type that a `config.json` names; None where it cannot be read."""
    try:
        content = json.loads(config.read_text())
    except (OSError, ValueError):
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def is_transformers(config: Path | None) -> bool:
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
    missing = f"{hub_id}: is neither a local folder nor a model on the Hugging Face Hub"
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
        if is_transformers(config):
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


NamedArrays = Iterator[tuple[tuple[str, ...], np.ndarray]]
ToParamPath = Callable[[str], tuple[str, ...]]


def read_weights(
    folder: Path, to_param_path: ToParamPath, names: Sequence[str] = WEIGHTS
) -> tuple[Path, NamedArrays]:
    """Read a checkpoint's weights one by one.

    Args:
        folder: the checkpoint's.
        to_param_path: the path in our tree of a parameter that PyTorch calls so.
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
    return weights, reader(weights, to_param_path)


def match_parameters(
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


def _read_safetensors(weights: Path, to_param_path: ToParamPath) -> NamedArrays:
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
                    path = to_param_path(name)
                    yield path, from_torch(path, np.asarray(tensors.get_tensor(name)))
        except SafetensorError as error:
            raise ValueError(f"{file}: is damaged or no safetensors file ({error})") from error


def _shards(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text())["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of sharded weights ({error!r})") from error
    return sorted(set(names))


def _read_msgpack(weights: Path, to_param_path: ToParamPath) -> NamedArrays:
    del to_param_path  # the paths are ours already
    try:
        tree = flatten_dict(flax.serialization.msgpack_restore(weights.read_bytes()))
    except Exception as error:  # msgpack raises errors of many kinds
        raise ValueError(f"{weights}: is damaged or no msgpack file ({error})") from error
    yield from ((path, np.asarray(leaf)) for path, leaf in tree.items())


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Lay a kernel of PyTorch out as ours; other arrays pass through."""
    return map_kernel(path, array, lambda x: x.transpose(2, 3, 1, 0))


def map_kernel(
    path: tuple[str, ...], array: np.ndarray, convolution: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Transpose the kernel of a dense layer, or apply `convolution` to that of a convolution."""
    if path[-1] != "kernel":
        return array
    return convolution(array) if array.ndim == 4 else array.T


_JOINT = {"qkv": ("q_proj", "k_proj", "v_proj"), "kv": ("k_proj", "v_proj")}


def split_joint(entries: NamedArrays) -> NamedArrays:
    """Take layers called `qkv` and `kv`, several in one, apart."""
    for path, array in entries:
        *layers, leaf = path
        names = _JOINT.get(layers[-1]) if layers and array.ndim else None
        if names is None:
            yield path, array
            continue
        # Sizes that their number does not divide come out uneven, and are reported as such.
        for name, part in zip(names, np.array_split(array, len(names), axis=-1), strict=True):
            yield (*layers[:-1], name, leaf), part


def drop_leading_axes(entries: NamedArrays, shapes: Mapping[tuple[str, ...], Any]) -> NamedArrays:
    """Take leading axes of length 1 away where the parameter that is wanted has none."""
    for path, array in entries:
        shape = shapes[path].shape if path in shapes else array.shape
        same = array.size == np.prod(shape) and array.shape[array.ndim - len(shape) :] == shape
        yield path, array.reshape(shape) if same else array
