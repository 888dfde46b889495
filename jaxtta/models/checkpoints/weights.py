"""A checkpoint's weights: from files to a parameter tree."""

import contextlib
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

from jaxtta.models.checkpoints.files import WEIGHTS, refuse_pointer, shards_of
from jaxtta.models.checkpoints.find import refuse_pickles
from jaxtta.models.classifier import Params

PREFIXES = ("module.", "model.", "clip_model.", "clip.")
"""What wrappers put before the name of every parameter."""
_COMPILED = "_orig_mod."  # torch.compile's, before any part of a model
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
        refuse_pickles(folder)
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
