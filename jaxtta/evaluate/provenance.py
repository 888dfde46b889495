"""What identifies a result: model, images and adapter; and how to repeat the run."""

import dataclasses
import datetime
import hashlib
import inspect
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxtta.adapters import AdapterConfig, AdapterSpec, tnt_config_of
from jaxtta.adapters.guard import Policy
from jaxtta.adapters.methods import METHODS
from jaxtta.adapters.named import optimizer_of, settings_of
from jaxtta.adapters.specs import mgtta_config_of
from jaxtta.data import Batches, Dataset, Subset, content_of
from jaxtta.data.datasets import stored_in
from jaxtta.io import digest_array, digest_leaves, digest_of
from jaxtta.models import Params, Task, describe_preprocessing, model_settings

PACKAGES = ("jaxtta", "jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")
_SPEED_ONLY = ("views_per_chunk", "images_per_map")  # of TNT


def fingerprints(
    dataset: Dataset, params: Params, model: Any = None, task: Task | None = None
) -> dict[str, Any]:
    """What must match in another run beside options and stored images, wherever the files are.

    The model counts by its architecture and preprocessing, the task by its tokens, where given.
    """
    weights = digest_leaves(params)
    images = f"{len(dataset)}, labels {digest_array(np.asarray(dataset.labels, np.int32))}"
    inner: Any = dataset
    while inner is not None:  # a subset may be within a corruption
        if isinstance(inner, Subset):
            images += f", numbers {digest_array(np.asarray(inner.numbers, np.int64))}"
        inner = getattr(inner, "dataset", None)
    names = dataset.class_names
    found = {"images": images, "class_names": names, "weights": weights}
    if model is not None:
        found["model_settings"] = model_settings(model)
    if task is not None:
        found["tokens"] = digest_array(task.token_ids)
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def source_of(function: Any) -> str | None:
    """A digest of the file that defines a function or class, or of its text in a notebook."""
    function = getattr(function, "func", function)  # of a partial
    path = getattr(sys.modules.get(function.__module__), "__file__", None)
    try:
        return _digest(Path(path).read_bytes() if path else inspect.getsource(function).encode())
    except (OSError, TypeError):  # typed into an interpreter
        return None


def identity_of(spec: AdapterSpec, config: AdapterConfig, canvas: int | None = None) -> dict:
    """What decides an adapter's results: settings, and digests of files and of its source."""
    own: dict[str, Any] = {"name": spec.name}
    if spec.guard:
        own["guard"] = dataclasses.asdict(Policy())
    if spec.needs_originals:
        own["canvas"] = canvas
    if spec.own:
        function, settings = model_settings(spec.make), model_settings(spec.settings)
        source = source_of(spec.make)
        return own | {"function": function, "settings": settings, "source": source}
    if spec.name == "tnt":
        settings = dataclasses.asdict(tnt_config_of(spec, config))
        return own | {"tnt": {k: v for k, v in settings.items() if k not in _SPEED_ONLY}}
    if spec.name != "mgtta":
        own |= model_settings(settings_of(spec, config))
        if not METHODS[spec.name].presets:
            return own
    made = optimizer_of(spec, config)
    given = [str(made.args[0]), *(f"{key}={value}" for key, value in made.keywords.items())]
    own["optimizer"] = f"{made.func.__name__}({', '.join(given)})"
    if spec.name == "mgtta":
        settings = mgtta_config_of(spec, config)
        own |= {"weight": settings.weight, "tower": settings.tower}
        own["statistics"] = _digest(settings.statistics.read_bytes())
        if spec.settings.get("optimizer", "mgg") == "mgg":
            own["phi"] = _digest(settings.phi.read_bytes())
    return own


def contents_of(batches: Batches, share: range, progress: bool) -> dict[int, str | None]:
    """One digest of the stored images of each stream; None where a dataset cannot tell."""
    segments = {number: batches.streams[number].segments for number in share}
    stored = {d: stored_in(batches.benchmark[d]) for own in segments.values() for d in own}
    each = {id(dataset): dataset for dataset in stored.values()}.items()
    bar = tqdm(each, "checking the images", leave=False, disable=not progress)
    known = {key: content_of(dataset) for key, dataset in bar}
    parts = {n: [known[id(stored[d])] for d in own] for n, own in segments.items()}
    return {n: None if None in own else digest_of(own) for n, own in parts.items()}


def _command() -> list[str]:
    """As it was typed: `jaxtta …`, or `python` and its arguments."""
    if Path(sys.argv[0]).name == "jaxtta":
        return ["jaxtta", *sys.argv[1:]]
    return ["python", *sys.orig_argv[1:]]


def about(loaded: Any = None, **places: str) -> dict[str, Any]:
    """How to repeat a run with a model from `jaxtta.load`; `places` are paths of data and model."""
    if hasattr(loaded, "preprocessing_origin"):
        places["preprocessing"] = describe_preprocessing(loaded).removeprefix("preprocessing: ")
    root = Path(__file__).parents[2]  # a checkout of jaxtta, or a folder of packages
    git = f"git -C {shlex.quote(str(root))} describe --always --dirty --exclude='*'"
    if (root / ".git").exists() and (found := subprocess.getstatusoutput(git))[0] == 0:
        places["commit"] = found[1]
    return {
        **places,
        "command": shlex.join(_command()),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{x: version(x) for x in PACKAGES}},
        "device": jax.devices()[0].device_kind,
    }
