"""A folder of results.

settings.json                                   settings that must match in another run
predictions/tent--fog-5--seed1.safetensors      one adapter on one stream with one seed
checkpoints/                                    of unfinished streams
"""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from filelock import AcquireReturnProxy, FileLock, Timeout

from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.provenance import as_json
from jaxtta.io import read_json, write_json

log = logging.getLogger(__name__)


def safe_name(text: str) -> str:
    """A text as a part of a file's name; another one for each text."""
    return quote(text, safe=",=+")


class Store(NamedTuple):
    """A sweep's folder, and the grouped settings that all of its results share."""

    root: Path
    settings: dict[str, Any]

    @contextlib.contextmanager
    def lock(self, shard: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Lock the folder; only other shards of the same sweep may use it at the same time."""
        number, count = shard
        _refuse_earlier_version(self.root)
        (self.root / "predictions").mkdir(parents=True, exist_ok=True)
        own = self.root / f".lock-{number}-of-{count}"
        with FileLock(self.root / ".lock"):
            for other in self.root.glob(".lock-*-of-*"):
                if other != own and not other.name.endswith(f"-of-{count}"):
                    with _acquire(other):
                        pass
            agree(self.root / "settings.json", self.settings)
            held = _acquire(own)
            _holder(own).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        with held:
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
        own = (found.adapter, found.stream, found.seed)
        if own != key:
            raise ValueError(f"{path}: has the predictions of {own}, expected those of {key}")
        if said := differences(found.settings, settings):
            raise ValueError(f"{path}: was made with {said}; choose another folder")
        _require_same_images(path, found.content, content)
        return found


def _acquire(path: Path) -> AcquireReturnProxy:
    """Acquire a lock, and release it at the end of a `with` statement."""
    try:
        return FileLock(path).acquire(timeout=0)
    except Timeout:
        said = f"another run is writing to this folder ({_holder(path).read_text()})"
        raise ValueError(f"{path.parent}: {said}") from None


def _holder(lock: Path) -> Path:
    """The file that says who has a lock; some versions of filelock empty the lock itself."""
    return lock.with_name(lock.name.replace("lock", "holder"))


def load_predictions(folder: str | Path) -> list[Predictions]:
    """Read all results below a folder, by stream and then adapter, as `sweep` gives them.

    Runs that selected a learning rate, in "validation", are no part of the results.
    """
    root = Path(folder)
    for known in (root, *root.glob("*/")):
        _refuse_earlier_version(known)
    paths = sorted(root.rglob("predictions/*.safetensors"))
    paths = [path for path in paths if "validation" not in path.relative_to(root).parts]
    if not paths:
        raise FileNotFoundError(f"{root}: has no predictions of jaxtta sweep or shifts")
    results = [(path.parent, Predictions.load(path)) for path in paths]
    results.sort(key=lambda pair: (pair[0], pair[1].about.get("place", [])))
    return [result for _, result in results]


def _refuse_earlier_version(root: Path) -> None:
    if (root / "cells").is_dir():
        said = "has results of an earlier version of jaxtta, which this version does not read"
        raise ValueError(f"{root}: {said}; choose another folder")


def agree_on_images(path: Path, content: str | None) -> None:
    """Write a digest of a folder's images, or raise a ValueError for others; None is trusted."""
    if not path.exists():
        write_json(path, {"content": content})
    else:
        _require_same_images(path, read_json(path).get("content"), content)


def _require_same_images(path: Path, earlier: str | None, content: str | None) -> None:
    if content is None or content == earlier:
        return
    reason = "was made from other images: the files have changed, or are a newer copy"
    if earlier is None:
        reason = "does not say which images it was made from"
    raise ValueError(
        f"{path}: {reason}; choose another folder, or --trust-data if the images are the same"
    )


def agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a folder's settings, or raise a ValueError if the existing ones are others."""
    settings = as_json(settings)
    if not path.exists():
        write_json(path, settings)
    elif said := differences(read_json(path), settings):
        raise ValueError(f"{path.parent}: has results with {said}; choose another folder")


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> str:
    """List the settings that differ; a setting within another is named "outer.inner"."""
    lacking = [within + name for name in now if name not in earlier]  # in an earlier version
    listed = [f"no record of {', '.join(lacking)}"] if lacking else []
    for name, value in earlier.items():
        other = now.get(name)
        if isinstance(value, dict) and isinstance(other, dict) and value != other:
            listed.append(differences(value, other, f"{within}{name}."))
        elif value != other:
            listed.append(f"{within}{name} {value!r} (this run: {other!r})")
    return ", ".join(listed)
