"""A folder of results, and checkpoints of whatever runs in steps.

settings.json                                   settings that must match in another run
predictions/tent--fog-5--seed1.safetensors      one adapter on one stream with one seed
checkpoints/                                    of unfinished streams
"""

import contextlib
import functools
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from filelock import FileLock, Timeout
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.provenance import as_json
from jaxtta.io import error_context, load_arrays, load_state, read_json, save_state, write_json

log = logging.getLogger(__name__)


safe_name = functools.partial(quote, safe=",=+")  # another file name for each text


class Store(NamedTuple):
    """A sweep's folder, and the grouped settings that all of its results share."""

    root: Path
    settings: dict[str, Any]

    @contextlib.contextmanager
    def lock(self, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Lock the folder; other shards may use it at the same time."""
        if (self.root / "cells").is_dir():
            said = "has results of an earlier version of jaxtta, which this version does not read"
            raise ValueError(f"{self.root}: {said}; choose another folder")
        (self.root / "predictions").mkdir(parents=True, exist_ok=True)
        lock = self.root / f".lock-{shard[0]}-of-{shard[1]}"
        holder = lock.with_name(lock.name.replace("lock", "holder"))  # filelock empties its file
        try:
            held = FileLock(lock).acquire(timeout=0)
        except Timeout:
            said = f"another run is writing to this folder ({holder.read_text()})"
            raise ValueError(f"{self.root}: {said}") from None
        with held:
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            agree(self.root / "settings.json", self.settings)
            yield

    def path(self, adapter: str, stream: str, seed: int) -> Path:
        """Path of a result; its folder exists while the store is locked."""
        name = safe_name(f"{adapter}--{stream}--seed{seed}.safetensors")
        return self.root / "predictions" / name

    def checkpoints(self, stream: str, seed: int) -> Path:
        """Folder for the checkpoints of a stream."""
        return self.root / "checkpoints" / safe_name(f"{stream}--seed{seed}")

    def read(
        self, key: tuple[str, str, int], settings: Mapping[str, Any], content: str | None
    ) -> Predictions | None:
        """The result of an adapter, stream and seed, or None; `content` None is not compared."""
        path = self.path(*key)
        if not path.exists():
            return None
        try:
            found = Predictions.load(path)
        except ValueError as error:
            log.warning("%s; recomputing", error)
            return None
        if said := differences(found.settings, settings):
            raise ValueError(f"{path}: was made with {said}; choose another folder")
        _require_same_images(path, found.content, content)
        return found


def load_predictions(folder: str | Path) -> list[Predictions]:
    """Read all results below a folder, by stream and then adapter, as `sweep` gives them.

    Runs that selected a learning rate, in "validation", are no part of the results.
    """
    root = Path(folder)
    paths = sorted(root.rglob("predictions/*.safetensors"))
    paths = [path for path in paths if "validation" not in path.relative_to(root).parts]
    if not paths:
        raise FileNotFoundError(f"{root}: has no predictions of jaxtta sweep or shifts")
    results = [(path.parent, Predictions.load(path)) for path in paths]
    results.sort(key=lambda pair: (pair[0], pair[1].about.get("place", [])))
    return [result for _, result in results]


def agree_on_images(path: Path, content: str | None) -> None:
    """Write a digest of a folder's images, or raise a ValueError for others; None is trusted."""
    if not path.exists():
        write_json(path, {"content": content})
    _require_same_images(path, read_json(path).get("content"), content)


def _require_same_images(path: Path, earlier: str | None, content: str | None) -> None:
    if content not in (None, earlier):
        raise ValueError(
            f"{path}: was made from other images (changed files, a newer copy) or does not say "
            "from which; choose another folder, or --trust-data if the images are the same"
        )


def agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a folder's settings, or raise a ValueError if the existing ones are others."""
    if not path.exists():
        write_json(path, as_json(settings))
    if said := differences(read_json(path), as_json(settings)):
        raise ValueError(f"{path.parent}: has results with {said}; choose another folder")


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the settings that differ; a setting within another is named "outer.inner"."""
    earlier, now = (flatten_dict(dict(settings), sep=".") for settings in (earlier, now))
    lacking = [name for name in now if name not in earlier]  # in an earlier version
    listed = [f"no record of {', '.join(lacking)}"] if lacking else []
    for name, value in earlier.items():
        if value != now.get(name):
            listed.append(f"{name} {value!r} (this run: {now.get(name)!r})")
    return ", ".join(listed)


def save_checkpoint(folder: Path, step: int, tree: Any, note: Any = None) -> None:
    """Save a tree of arrays and a JSON value after so many steps; only the newest step is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.safetensors"
    save_state(path, tree, note)
    for earlier in {*folder.glob("step-*.safetensors")} - {path}:
        earlier.unlink()


def restore_checkpoint(folder: Path, like: Any = None) -> tuple[int, Any, Any] | None:
    """Restore the newest step, its tree and its note; None without a checkpoint.

    `like` is a tree of the same structure; what the checkpoint has beside it is left out. Without,
    the tree is nested dicts of numpy arrays. Raises a ValueError if it is damaged or does not fit.
    """
    steps = {int(path.stem[5:]): path for path in folder.glob("step-*.safetensors")}
    if not steps:
        return None
    path = steps[max(steps)]
    with error_context("unusable checkpoint, remove it to start from the beginning"):
        arrays, metadata = load_arrays(path)
        tree = unflatten_dict(arrays, "/") if like is None else load_state(path, like, part=True)
    return max(steps), tree, metadata.get("note")
