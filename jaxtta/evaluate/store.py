"""A folder of results.

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
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout
from flax.traverse_util import flatten_dict

from jaxtta.evaluate.predictions import Predictions
from jaxtta.io import as_json, read_json, write_json

log = logging.getLogger(__name__)
safe_name = functools.partial(quote, safe=",=+")  # another file name for each text


@contextlib.contextmanager
def lock(root: Path, settings: Mapping[str, Any], shard: tuple[int, int]) -> Iterator[None]:
    """Lock a folder for results with these settings; other shards may use it at the same time."""
    if (root / "cells").is_dir():
        said = "has results of an earlier version of jaxtta, which this version does not read"
        raise ValueError(f"{root}: {said}; choose another folder")
    (root / "predictions").mkdir(parents=True, exist_ok=True)
    own = root / f".lock-{shard[0]}-of-{shard[1]}"
    held: Any = None
    known = [path for path in root.glob(".lock-*") if not path.name.endswith(f"-of-{shard[1]}")]
    for path in (*known, own):  # shards of another count have the same streams
        holder = path.with_name(path.name.replace("lock", "holder"))  # filelock empties its file
        try:
            held = FileLock(path).acquire(timeout=0)
        except Timeout:
            said = f"another run is writing to this folder ({holder.read_text()})"
            raise ValueError(f"{root}: {said}") from None
        if path != own:
            held.lock.release()
    with held:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        agree(root / "settings.json", settings)
        yield


def result_path(root: Path, adapter: str, stream: str, seed: int) -> Path:
    """Path of a result; its folder exists while the folder is locked."""
    return root / "predictions" / safe_name(f"{adapter}--{stream}--seed{seed}.safetensors")


def read_result(path: Path, settings: Mapping[str, Any], content: str | None) -> Predictions | None:
    """The result if it was finished; `content` None is not compared."""
    try:
        found = Predictions.load(path)
    except FileNotFoundError:
        return None
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
