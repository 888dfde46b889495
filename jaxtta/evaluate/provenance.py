"""What identifies the inputs of a run, and how to repeat it, for the result files."""

import dataclasses
import datetime
import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.data import Dataset, Subset
from jaxtta.io import digest_array
from jaxtta.models import Params, Task, describe_preprocessing

PACKAGES = ("jaxtta", "jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")
_NO_MATTER = ("source", "remat", "class_names", "preprocessing_origin")
"""Fields of a model that change no result: its folder, memory for time, and names, which the
labels' names stand for."""


def fingerprints(
    dataset: Dataset, params: Params, model: Any = None, task: Task | None = None
) -> dict[str, Any]:
    """What must match in another run beside options and stored images, wherever the files are.

    The model counts by its architecture and preprocessing, the task by its tokens, where given.
    """
    weights = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(params):
        weights.update(np.asarray(leaf).tobytes())
    images = f"{len(dataset)}, labels {_digest(dataset.labels)}"
    inner: Any = dataset
    while inner is not None:  # a subset may be within a corruption
        if isinstance(inner, Subset):
            images += f", numbers {_digest(np.asarray(inner.numbers, np.int64))}"
        inner = getattr(inner, "dataset", None)
    found: dict[str, Any] = {
        "images": images,
        "class_names": dataset.class_names,
        "weights": weights.hexdigest(),
    }
    if model is not None:
        found["model_settings"] = model_settings(model)
    if task is not None:
        found["tokens"] = _digest(task.token_ids)
    return found


def _digest(array: np.ndarray) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=8).hexdigest()


def model_settings(model: Any) -> Any:
    """A model's architecture and preprocessing as JSON values.

    Dataclasses and named tuples are listed by field; of an array the digest is listed, of a
    function the name, of another object the class.
    """
    if dataclasses.is_dataclass(model) and not isinstance(model, type):
        fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    elif names := getattr(model, "_fields", None):  # a named tuple
        fields = {name: getattr(model, name) for name in names}
    elif isinstance(model, Mapping):
        return {str(name): model_settings(value) for name, value in model.items()}
    elif isinstance(model, list | tuple):
        return [model_settings(value) for value in model]
    elif model is None or isinstance(model, str | int | float):
        return model
    elif isinstance(model, np.ndarray | np.generic | jax.Array):
        return digest_array(np.asarray(model))
    else:
        try:
            return jnp.dtype(model).name
        except TypeError:
            kind = model if hasattr(model, "__qualname__") else type(model)  # a function: its name
            return f"{kind.__module__}.{kind.__qualname__}"
    # Flax adds parent and name to the fields of its modules.
    left_out = {*_NO_MATTER, *(("parent", "name") if hasattr(model, "parent") else ())}
    return {name: model_settings(x) for name, x in fields.items() if name not in left_out}


def digest_of(content: Any) -> str:
    """A short hash of a JSON value, which may hold arrays."""
    words = json.dumps(content, sort_keys=True, default=digest_array).encode()
    return hashlib.blake2b(words, digest_size=16).hexdigest()


def about(loaded: Any = None, **places: str) -> dict[str, Any]:
    """How to repeat a run: command line, date, commit, preprocessing, versions and device.

    Args:
        loaded: the model, if it came from `jaxtta.load`.
        places: paths of data and model.
    """
    versions = {"python": platform.python_version()}
    commit = _commit()
    if loaded is not None:
        places["preprocessing"] = describe_preprocessing(loaded).removeprefix("preprocessing: ")
    return {
        **places,
        "command": _command(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **({"commit": commit} if commit else {}),
        "versions": versions | {name: version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
    }


def _command() -> str:
    """This process's command line, as one pastes it into a shell."""
    arguments = sys.argv[1:]
    given = sys.orig_argv[1:]  # with "-m package", which `sys.argv` lacks
    if given[len(given) - len(arguments) :] != arguments:  # called by another program
        given = sys.argv
    return shlex.join(["python", *given])


def _commit() -> str | None:
    """The commit of a checkout of jaxtta, "-dirty" if files differ; None without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout that it refuses
        return None
    return told.stdout.strip() or None
