"""The folder of a sweep: one file per cell, written atomically.

settings.json                    the settings; they must match in another run
cells/batclip--fog-5--seed1.json one adapter on one stream with one seed
predictions/….npz                per-image predictions of a cell, with save_predictions
checkpoints/                     checkpoints of unfinished streams
"""

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.io import atomic_write, write_json

Cell = dict[str, Any]
log = logging.getLogger(__name__)


class Results:
    """A folder of results."""

    def __init__(
        self,
        root: str | Path,
        settings: Mapping[str, Any],
        about: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Describe the folder; nothing is written before `claim`.

        Args:
            root: the folder.
            settings: all settings that affect the results, JSON values.
            about: additional information for each cell: versions, device.
            adapters: settings that affect one adapter's results only, by its name.
        """
        self.root = Path(root)
        self.settings = json.loads(json.dumps(settings))
        self.about = json.loads(json.dumps(about or {}))
        self.adapters = json.loads(json.dumps(adapters or {}))

    def settings_of(self, adapter: str) -> dict[str, Any]:
        """All settings that affect an adapter's results."""
        return self.settings | self.adapters.get(adapter, {})

    @contextlib.contextmanager
    def claim(self, worker: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Lock the folder for this run, so that no other run writes the same cells.

        Args:
            worker: this worker's index and the number of workers.

        Raises:
            ValueError: if the folder has other settings, or another run is using it.
            OSError: if it cannot be written.
        """
        for folder in (self.root, self.root / "cells"):
            folder.mkdir(parents=True, exist_ok=True)
        number, count = worker
        with contextlib.ExitStack() as locks:
            # Only workers of the same sweep share the folder.
            locks.enter_context(self._lock(".lock", shared=count > 1))
            if count > 1:
                locks.enter_context(self._lock(f".lock-{number}-of-{count}", shared=False))
            for other in self.root.glob(".lock-*-of-*"):
                if not other.name.endswith(f"-of-{count}"):  # workers of another partition
                    with self._lock(other.name, shared=False):
                        pass
            with self._lock(".lock-settings", shared=False, wait=True):
                agree(self.root / "settings.json", self.settings)
            yield

    @contextlib.contextmanager
    def _lock(self, name: str, *, shared: bool, wait: bool = False) -> Iterator[None]:
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        with (self.root / name).open("a") as file:
            try:
                fcntl.flock(file, kind)
            except BlockingIOError:
                raise ValueError(f"{self.root}: another run is writing to this folder") from None
            yield  # the system releases the lock when the process ends

    def path(self, adapter: str, stream: str, seed: int) -> Path:
        """Path of a cell's file."""
        return self.root / "cells" / f"{adapter}--{stream}--seed{seed}.json"

    def read(self, adapter: str, stream: str, seed: int, content: str | None = None) -> Cell | None:
        """A finished cell, or None if it has to be computed.

        Args:
            adapter: the adapter's name.
            stream: the stream's.
            seed: its seed.
            content: digest of the stream's stored images; None where they are trusted to be those
                that the cell was made from.

        Returns:
            The cell.

        Raises:
            ValueError: if the file was changed after it was written, or made from other images or
                with other settings.
        """
        path = self.path(adapter, stream, seed)
        if not path.exists():
            return None
        try:
            cell = json.loads(path.read_text())
            digest = cell.pop("digest")
        except (ValueError, KeyError, AttributeError, TypeError):
            log.warning("%s: is corrupt; recomputing", path)
            return None
        if digest != digest_of(cell):
            raise ValueError(
                f"{path}: was changed after it was written; remove it to recompute the cell"
            )
        if (cell["adapter"], cell["stream"], cell["seed"]) != (adapter, stream, seed):
            raise ValueError(f"{path}: is the cell of another stream with the same name")
        settings = self.settings_of(adapter)
        if cell["settings"] != settings:
            raise ValueError(
                f"{path}: was made with {differences(cell['settings'], settings)}; choose another "
                "folder"
            )
        _require_same_images(path, cell.get("content"), content)
        return cell

    def write(self, cell: Cell, arrays: Mapping[str, np.ndarray] | None = None) -> Cell:
        """Save a finished cell, and its predictions if there are any.

        Args:
            cell: has `adapter`, `stream` and `seed`.
            arrays: one entry per image, for the `.npz`.

        Returns:
            The cell as written.
        """
        path = self.path(cell["adapter"], cell["stream"], cell["seed"])
        if arrays is not None:
            folder = self.root / "predictions"
            folder.mkdir(exist_ok=True)
            with (
                atomic_write(folder / f"{path.stem}.npz") as temporary,
                temporary.open("wb") as file,
            ):
                # The stub takes the keywords for `allow_pickle`.
                np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
        settings = self.settings_of(cell["adapter"])
        cell = json.loads(json.dumps({**cell, "settings": settings, "about": self.about}))
        write_json(path, {**cell, "digest": digest_of(cell)})
        return cell


def agree_on_images(path: Path, content: str | None) -> None:
    """Write a digest of a folder's images, or check that it matches the existing one.

    Args:
        path: the file in the folder.
        content: the digest; None where the images are trusted to be those of earlier results.

    Raises:
        ValueError: if the folder has results of other images, or the file is damaged.
    """
    if not path.exists():
        write_json(path, {"content": content})
        return
    try:
        earlier = json.loads(path.read_text())["content"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove the folder") from error
    _require_same_images(path, earlier, content)


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
    """Write a folder's settings, or check that they match the existing ones.

    Args:
        path: the settings file in the folder.
        settings: JSON values.

    Raises:
        ValueError: if the folder has other settings, or the file is damaged.
    """
    if not path.exists():
        write_json(path, settings)
        return
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error}); remove the folder") from error
    if not isinstance(earlier, dict):
        raise ValueError(f"{path}: has no settings; remove the folder")
    if earlier != settings:
        raise ValueError(
            f"{path.parent}: has results with {differences(earlier, settings)}; choose another "
            "folder"
        )


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> str:
    """List the settings that differ; a setting within another is named "outer.inner"."""
    listed = []
    lacking = [name for name in now if name not in earlier]  # results of an earlier version
    if lacking:
        listed.append(f"no record of {', '.join(within + name for name in lacking)}")
    for name in dict.fromkeys([*earlier, *now]):
        a, b = earlier.get(name), now.get(name)
        if name in lacking:
            continue
        if isinstance(a, dict) and isinstance(b, dict) and a != b:
            listed.append(differences(a, b, f"{within}{name}."))
        elif a != b:
            listed.append(f"{within}{name} {a!r} (this run: {b!r})")
    return ", ".join(listed)


def digest_of(content: Any) -> str:
    """A short hash of a JSON value."""
    words = json.dumps(content, sort_keys=True).encode()
    return hashlib.blake2b(words, digest_size=16).hexdigest()
