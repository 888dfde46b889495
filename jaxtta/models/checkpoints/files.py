"""The files of a checkpoint: folders and hub models, configurations, weights by name."""

import contextlib
import json
import logging
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

SENTENCE_PIECES = ("spiece.model", "tokenizer.model")
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    *SENTENCE_PIECES,
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors",)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")
_NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
PREPROCESSING_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where the image processor is looked for, as transformers 5 does; 4 writes the second."""
ADAPTER = "adapter_config.json"
PREFIXES = ("module.", "model.", "clip_model.", "clip.")
"""What wrappers put before the name of every parameter."""
_COMPILED = "_orig_mod."  # torch.compile's, before any part of a model
_LFS = b"version https://git-lfs"
_OPEN_CLIP_NAME = re.compile(
    # ViT-B-32, vit_base_patch16_clip_224.openai, …; with a slash only what is no owner on the hub:
    # ViT-B/32, ViT-B-32/laion2b_s34b_b79k
    r"(?i:ViT|RN\d+|coca|EVA\d*|convnext|MobileCLIP|nllb|roberta|xlm|swin|mt5)([-_x@][^/]*)?"
    r"|(ViT-[A-Za-z]+|RN\d+)([-x@][^/]*)?/.*"
)

_OPENAI = {
    "ViT-B-32": "openai/clip-vit-base-patch32",
    "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14",
    "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
}

log = logging.getLogger(__name__)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put a file's name before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def refuse_pointer(path: Path) -> None:
    """Refuse what git-LFS leaves in a file's place until the file is fetched.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(
                f"{path}: is a git-LFS pointer, not the file itself; `git lfs pull` in its "
                "repository fetches it"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.

    Returns:
        The object.

    Raises:
        ValueError: if the file holds something else.
    """
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def model_type(config: Path) -> str | None:
    """The model type that a `config.json` names; None where it cannot be read."""
    try:
        return read_json(config).get("model_type")
    except (OSError, ValueError):
        return None


def is_transformers(config: Path | None) -> bool:
    """Whether to read a `config.json` as transformers'; timm's, beside OpenCLIP's files, is not."""
    if config is None or not config.exists():
        return False
    try:
        return "model_type" in read_json(config)
    except ValueError:
        return True  # for its reader to refuse


def find_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """A checkpoint's folder; the files of a hub model are fetched first.

    Args:
        path_or_hub_id: a folder here, or the id of a model on the hub.
        revision: of the hub's model.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is neither, or a link in the folder leads nowhere.
        TypeError: if it is neither a path nor a string.
        ValueError: if it is a file, or a LoRA adapter.
    """
    if not isinstance(path_or_hub_id, str | Path):
        raise TypeError(
            f"path_or_hub_id is {path_or_hub_id!r}, expected a folder or the id of a hub's model"
        )
    path = Path(path_or_hub_id)
    with contextlib.suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if path.is_dir():
        _refuse_adapter(path)
        _refuse_broken_links(path)
        if not any((path / name).exists() for name in ("config.json", OPEN_CLIP_CONFIG)):
            _refuse_pickles(path)
        return path
    if path.is_file():
        raise ValueError(_said_of_file(path))
    hub_id = str(path_or_hub_id).rstrip("/")
    hint = _said_of_name(hub_id)
    if hint or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise FileNotFoundError(
            f"{hub_id}: is neither a local folder nor a model's id (OWNER/NAME) on the Hugging "
            f"Face Hub{hint}"
        )
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    unknown: dict[str, LocalEntryNotFoundError] = {}

    def fetch(name: str) -> Path | None:
        try:
            return Path(huggingface_hub.hf_hub_download(hub_id, name, revision=revision))
        except LocalEntryNotFoundError as error:
            # The hub could not be asked. That it has no such file may be known from last time.
            if huggingface_hub.try_to_load_from_cache(hub_id, name, revision=revision) is None:
                unknown[name] = error
            return None
        except EntryNotFoundError:  # the hub says that there is no such file
            return None

    def require_known(found: Any, names: Iterable[str]) -> None:
        """Where the hub cannot be asked, one file of a kind does: the others may not exist."""
        for name in names:
            if not found and name in unknown:
                raise unknown[name]

    missing = f"{hub_id}: is neither a local folder nor a model on the Hugging Face Hub"
    try:
        config, weights, names = fetch("config.json"), None, WEIGHTS
        if is_transformers(config):
            weights = next(filter(None, map(fetch, WEIGHTS)), None)
        others = [PREPROCESSING_FILES]
        if weights is None and (other := fetch(OPEN_CLIP_CONFIG)):
            config, names, others = other, OPEN_CLIP_WEIGHTS, []
            weights = fetch(*OPEN_CLIP_WEIGHTS)
        if config is None:
            config, others = fetch(ADAPTER), []
            require_known(config, ("config.json", OPEN_CLIP_CONFIG))
        else:
            require_known(weights, names)
            if model_type(config) != "vit":
                others = [*others, TOKENIZER_FILES]
        for group in others:
            require_known([*filter(None, map(fetch, group))], group)
        if weights and weights.name.endswith("index.json"):
            for name in shards_of(weights):
                fetch(name)
    except Exception as error:  # the hub's client raises its HTTP library's errors too
        if isinstance(error, LocalEntryNotFoundError):
            missing = f"{hub_id}: is neither a local folder nor complete in the hub's cache, and "
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                missing += "HF_HUB_OFFLINE is set, so that the hub is not asked; unset it, or give"
            else:
                missing += "the Hugging Face Hub cannot be reached; give"
            raise FileNotFoundError(f"{missing} a folder") from error
        raise FileNotFoundError(f"{missing} ({type(error).__name__})") from error
    if config is None:
        raise FileNotFoundError(f"{missing} (it has no config.json)")
    _refuse_adapter(config.parent)
    if weights is None:
        raise FileNotFoundError(
            f"{hub_id}: has none of {', '.join(names)}; pickled weights (.bin, .pt) are converted "
            f"once, where PyTorch is installed: `hf download {hub_id}`, then `jaxtta convert FILE "
            "OUT`"
        )
    return config.parent


def _refuse_adapter(folder: Path) -> None:
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder}: holds a LoRA adapter ({ADAPTER}); merge it into its base model with peft's "
            "merge_and_unload() and save that with save_pretrained(…)"
        )


def _refuse_broken_links(folder: Path) -> None:
    """The hub's cache is made of links; a copy of them has no files."""
    for name in ("config.json", OPEN_CLIP_CONFIG, *PREPROCESSING_FILES, *TOKENIZER_FILES, *WEIGHTS):
        if (folder / name).is_symlink() and not (folder / name).exists():
            target = (folder / name).readlink()
            raise FileNotFoundError(f"{folder / name}: is a link to {target}, which is not there")


def _refuse_pickles(folder: Path) -> None:
    """Say how to convert a folder's pickled weights, if it has any."""
    pickled = [
        file
        for file in sorted(folder.iterdir())
        if file.name.endswith(PICKLE_SUFFIXES) and not file.name.startswith(_NO_WEIGHTS)
    ]
    if pickled:  # the index of shards, else the last epoch
        chosen = max(pickled, key=lambda file: (file.suffix == ".json", file.stat().st_mtime))
        raise ValueError(f"{chosen}: {_said_of_pickle(chosen)}")


def _said_of_file(path: Path) -> str:
    """What to do where a file was given for a folder."""
    if path.name.endswith(PICKLE_SUFFIXES):
        return f"{path}: {_said_of_pickle(path)}"
    if path.name in (*WEIGHTS, *OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG, "config.json"):
        return f"{path}: is a file, expected the checkpoint's folder; give {path.parent}"
    return (
        f"{path}: is a file, expected a checkpoint's folder; `jaxtta convert {path} OUT` makes one "
        "of a file of weights"
    )


def _said_of_pickle(path: Path) -> str:
    return (
        "pickled weights can run code and are not read; convert them once, where PyTorch is "
        f"installed, with `jaxtta convert {path} OUT`"
    )


def _said_of_name(name: str) -> str:
    """What to give in place of another library's name of a model."""
    if name.startswith(("hf-hub:", "hf_hub:", "https://huggingface.co/")):
        rest = name.removeprefix("https://huggingface.co/").split(":")[-1]
        return f"; give {rest}"
    if _OPEN_CLIP_NAME.fullmatch(name) and not name.endswith((*PICKLE_SUFFIXES, ".safetensors")):
        plain = name.replace("/", "-").replace("@", "-").removesuffix("px").removesuffix("-openai")
        example = _OPENAI.get(plain, _OPENAI["ViT-B-32"])
        return (
            ": it is a name of OpenCLIP's or timm's, which do not name files; give the id of the "
            f"weights on the hub, as {example} or laion/CLIP-ViT-B-32-laion2B-s34B-b79K, or a "
            "folder with open_clip_config.json and open_clip_model.safetensors"
        )
    return ""


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
    config = read_json(path)
    kind = config.get("model_type")
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
        _refuse_pickles(folder)
        names_there = sorted(file.name for file in folder.iterdir())
        other = next((name for name in names_there if ".safetensors" in name), None)
        found = f"; {other} would be read under the name {names[0]}" if other else ""
        raise FileNotFoundError(f"{folder}: has none of {', '.join(names)}{found}")
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
        ValueError: if a parameter is missing, has another shape or is not finite floats.
    """
    found: dict[tuple[str, ...], jax.Array] = {}
    wrong, unused, misshapen = [], [], set()
    for path, array in entries:
        if path not in shapes:
            unused.append("/".join(path))
        elif array.shape != shapes[path].shape:
            misshapen.add(path)
            wrong.append(f"{'/'.join(path)} has shape {array.shape}, expected {shapes[path].shape}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{weights}: {'/'.join(path)} is {array.dtype}, expected floats")
        elif not _is_finite(array):
            raise ValueError(f"{weights}: {'/'.join(path)} holds NaN or infinite values")
        else:
            found[path] = jnp.asarray(array, dtype)
    missing = ["/".join(path) for path in shapes if path not in found and path not in misshapen]
    if wrong or missing:
        raise ValueError(
            f"{weights}: does not fit its {config}: "
            + "; ".join(_summary(wrong) + _missing(missing, len(shapes), unused))
        )
    if unused:
        warnings.warn(f"{weights}: not used: {', '.join(unused)}", stacklevel=3)
    return unflatten_dict(found)


def _is_finite(array: np.ndarray) -> bool:
    """Whether all values are; a sum says so at the cost of reading them once."""
    with np.errstate(all="ignore"):
        total = np.sum(array, dtype=np.float32)
    return bool(np.isfinite(total)) or bool(np.isfinite(array.astype(np.float32)).all())


_NAMED = 3  # parameters that a message names


def _summary(sentences: list[str]) -> list[str]:
    rest = len(sentences) - _NAMED
    return [*sentences[:_NAMED], *([f"{rest} more have other shapes"] if rest > 0 else [])]


def _missing(missing: list[str], count: int, unused: list[str]) -> list[str]:
    if len(missing) <= _NAMED:
        return [f"{name} is missing" for name in missing]
    said = f"{len(missing)} of {count} parameters are missing, {missing[0]} for one"
    return [said, f"{len(unused)} others are there, {unused[0]} for one"] if unused else [said]


def _read_safetensors(weights: Path, to_param_path: ToParamPath) -> NamedArrays:
    files = [weights]
    refuse_pointer(weights)
    if weights.suffix == ".json":
        files = [weights.parent / name for name in shards_of(weights)]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file}: named in {weights.name}, but missing")
        refuse_pointer(file)
    prefix = common_prefix([name for file in files for name in _names(file)])
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if name.endswith("position_ids"):  # a buffer of old checkpoints
                    continue
                path = to_param_path(without_prefix(name, prefix))
                yield path, from_torch(path, _tensor(file, tensors, name))


def _tensor(file: Path, tensors: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(tensors.get_tensor(name))
    except (AttributeError, TypeError) as error:  # of types that numpy lacks
        dtype = tensors.get_slice(name).get_dtype()
        raise ValueError(f"{file}: {name} is {dtype}, expected F64, F32, F16 or BF16") from error


def common_prefix(names: Iterable[str]) -> str:
    """What wrappers put before every name, `_orig_mod.` aside, which may stand anywhere.

    Args:
        names: of all parameters.

    Returns:
        The prefix, as `module.model.`; empty where the names share none.
    """
    names, prefix = [name.replace(_COMPILED, "") for name in names], ""
    while names and (
        step := next(
            (p for p in PREFIXES if all(name.startswith(prefix + p) for name in names)), None
        )
    ):
        prefix += step
    return prefix


def without_prefix(name: str, prefix: str) -> str:
    """A parameter's own name.

    Args:
        name: as the file has it.
        prefix: from `common_prefix`.

    Returns:
        The name.
    """
    return name.replace(_COMPILED, "").removeprefix(prefix)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="flax") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: is damaged or no safetensors file ({error})") from error


def _names(file: Path) -> list[str]:
    with _open(file) as tensors:
        return list(tensors.keys())


def shards_of(index: Path) -> list[str]:
    """The files that an index of sharded weights names.

    Args:
        index: a `….index.json`.

    Returns:
        Their names, each once.

    Raises:
        ValueError: if it is not such an index.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise ValueError(f"{index}: is not an index of sharded weights: no weight_map of names")
    return sorted(set(names.values()))


def _read_msgpack(weights: Path, to_param_path: ToParamPath) -> NamedArrays:
    del to_param_path  # the paths are ours already
    refuse_pointer(weights)
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
