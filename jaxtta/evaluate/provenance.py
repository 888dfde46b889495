"""What identifies a result: model, images and adapter; and how to repeat the run."""

import dataclasses
import datetime
import functools
import hashlib
import inspect
import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtta.adapters import AdapterConfig, AdapterSpec, tnt_config_of
from jaxtta.adapters.by_name import mgtta_config_of, optimizer_of
from jaxtta.data import Dataset, Subset
from jaxtta.io import digest_array
from jaxtta.models import Params, Task, describe_preprocessing, model_settings

PACKAGES = ("jaxtta", "jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")
_SPEED_ONLY = ("views_per_chunk", "images_per_map")  # of TNT


def fingerprints(
    dataset: Dataset, params: Params, model: Any = None, task: Task | None = None
) -> dict[str, Any]:
    """What must match in another run beside options and stored images, wherever the files are.

    The model counts by its architecture and preprocessing, the task by its tokens, where given.
    """
    weights = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(params):
        weights.update(np.asarray(leaf).tobytes())
    images = f"{len(dataset)}, labels {digest_array(np.asarray(dataset.labels, np.int32))}"
    inner: Any = dataset
    while inner is not None:  # a subset may be within a corruption
        if isinstance(inner, Subset):
            images += f", numbers {digest_array(np.asarray(inner.numbers, np.int64))}"
        inner = getattr(inner, "dataset", None)
    names = dataset.class_names
    found = {"images": images, "class_names": names, "weights": weights.hexdigest()}
    if model is not None:
        found["model_settings"] = model_settings(model)
    if task is not None:
        found["tokens"] = digest_array(task.token_ids)
    return found


def source_of(function: Any) -> str | None:
    """A digest of the file that defines a function or class, or of its text in a notebook."""
    while isinstance(function, functools.partial):
        function = function.func
    path = getattr(sys.modules.get(getattr(function, "__module__", "")), "__file__", None)
    try:
        text = Path(path).read_bytes() if path else inspect.getsource(function).encode()
    except (OSError, TypeError):  # typed into an interpreter
        return None
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def identity_of(
    spec: AdapterSpec, config: AdapterConfig, canvas: int | None = None
) -> dict[str, Any]:
    """What decides an adapter's results: settings, and digests of files and of its source."""
    own: dict[str, Any] = {"name": spec.name}
    if spec.needs_originals:
        own["canvas"] = canvas
    if spec.function is not None:
        function, settings = model_settings(spec.function), model_settings(spec.settings)
        source = source_of(spec.function)
        return own | {"function": function, "settings": settings, "source": source}
    if spec.name == "tnt":
        settings = dataclasses.asdict(tnt_config_of(spec, config))
        return own | {"tnt": {k: v for k, v in settings.items() if k not in _SPEED_ONLY}}
    if spec.name == "zero_shot":
        return own
    made = optimizer_of(spec, config)
    given = [str(made.args[0]), *(f"{key}={value}" for key, value in made.keywords.items())]
    own["optimizer"] = f"{made.func.__name__}({', '.join(given)})"
    if spec.name == "mgtta":
        settings = mgtta_config_of(spec, config)
        own |= {"weight": settings.weight, "tower": settings.tower}
        learnt = {} if spec.settings.get("optimizer", "mgg") != "mgg" else {"phi": settings.phi}
        for name, path in {"statistics": settings.statistics, **learnt}.items():
            own[name] = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()
    return own


def as_json(content: Any) -> Any:
    """A value as JSON gives it back: tuples are lists, and what it does not know is its text."""
    return json.loads(json.dumps(content, default=str))


def digest_of(content: Any) -> str:
    """A short hash of a JSON value, which may hold arrays."""
    words = json.dumps(content, sort_keys=True, default=digest_array).encode()
    return hashlib.blake2b(words, digest_size=16).hexdigest()


def about(loaded: Any = None, **places: str) -> dict[str, Any]:
    """How to repeat a run: command line, date, commit, preprocessing, versions and device.

    Args:
        loaded: the model; its preprocessing is told if it came from `jaxtta.load`.
        places: paths of data and model.
    """
    commit = _commit()
    if hasattr(loaded, "preprocessing_origin"):
        places["preprocessing"] = describe_preprocessing(loaded).removeprefix("preprocessing: ")
    arguments, given = sys.argv[1:], sys.orig_argv[1:]  # with "-m package", which `sys.argv` lacks
    if given[len(given) - len(arguments) :] != arguments:  # called by another program
        given = sys.argv
    versions = {"python": platform.python_version()}
    return {
        **places,
        "command": shlex.join(["python", *given]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **({"commit": commit} if commit else {}),
        "versions": versions | {name: version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
    }


def _commit() -> str | None:
    """The commit of a checkout of jaxtta, "-dirty" if files differ; None without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or a checkout that it refuses
        return None
