"""A sweep's folder: one file a cell, written whole, that outlives whatever happens to the run.

settings.json                    what decides the figures; another run must agree with it
cells/batclip--fog-5--seed1.json one adapter on one stream with one seed
predictions/….npz                the same cell image by image, where asked for
checkpoints/                     where a stream stands that is not finished
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
        """Describe the folder; nothing is touched before `claim`.

        Args:
            root: the folder.
            settings: what decides the figures, as JSON has it.
            about: what else each cell should say: versions, device.
            adapters: what decides one adapter's figures alone, by its name.
        """
        self.root = Path(root)
        self.settings = json.loads(json.dumps(settings))
        self.about = json.loads(json.dumps(about or {}))
        self.adapters = json.loads(json.dumps(adapters or {}))

    def settings_of(self, adapter: str) -> dict[str, Any]:
        """All that decides an adapter's figures."""
        return self.settings | self.adapters.get(adapter, {})

    @contextlib.contextmanager
    def claim(self, worker: tuple[int, int] = (0, 1)) -> Iterator[None]:
        """Hold the folder for this run, so that no other writes the same cells.

        Args:
            worker: this worker's number and how many there are.

        Raises:
            ValueError: if the folder belongs to other settings, or to a run that is going on.
            OSError: if it cannot be written.
        """
        for folder in (self.root, self.root / "cells"):
            folder.mkdir(parents=True, exist_ok=True)
        number, count = worker
        with contextlib.ExitStack() as locks:
            # Workers share the folder with each other and with nobody else.
            locks.enter_context(self._lock(".lock", shared=count > 1))
            if count > 1:
                locks.enter_context(self._lock(f".lock-{number}-of-{count}", shared=False))
            for other in self.root.glob(".lock-*-of-*"):
                if not other.name.endswith(f"-of-{count}"):  # its workers share otherwise
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
            yield  # the system drops the lock with the process, however it ends

    def path(self, adapter: str, stream: str, seed: int) -> Path:
        """Where a cell's file lies."""
        return self.root / "cells" / f"{adapter}--{stream}--seed{seed}.json"

    def read(self, adapter: str, stream: str, seed: int) -> Cell | None:
        """A finished cell, or None if it has to be computed.

        Raises:
            ValueError: if the file was changed after it was written.
        """
        path = self.path(adapter, stream, seed)
        if not path.exists():
            return None
        try:
            cell = json.loads(path.read_text())
            digest = cell.pop("digest")
        except (ValueError, KeyError, AttributeError, TypeError):
            log.warning("%s: is torn, the cell is computed again", path)
            return None
        if digest != digest_of(cell):
            raise ValueError(
                f"{path}: was changed after it was written; remove it to compute the cell again"
            )
        if (cell["adapter"], cell["stream"], cell["seed"]) != (adapter, stream, seed):
            raise ValueError(f"{path}: is the cell of another stream under this one's name")
        settings = self.settings_of(adapter)
        if cell["settings"] != settings:
            raise ValueError(
                f"{path}: was made with {differences(cell['settings'], settings)}; choose another "
                "folder"
            )
        return cell

    def write(self, cell: Cell, arrays: Mapping[str, np.ndarray] | None = None) -> Cell:
        """Save a finished cell, and its predictions if there are any.

        Args:
            cell: with `adapter`, `stream` and `seed`.
            arrays: one entry an image, for the `.npz`.

        Returns:
            The cell as it was written.
        """
        path = self.path(cell["adapter"], cell["stream"], cell["seed"])
        if arrays is not None:
            folder = self.root / "predictions"
            folder.mkdir(exist_ok=True)
            with (
                atomic_write(folder / f"{path.stem}.npz") as temporary,
                temporary.open("wb") as file,
            ):
                np.savez_compressed(file, **arrays)
        settings = self.settings_of(cell["adapter"])
        cell = json.loads(json.dumps({**cell, "settings": settings, "about": self.about}))
        write_json(path, {**cell, "digest": digest_of(cell)})
        return cell


def agree(path: Path, settings: Mapping[str, Any]) -> None:
    """Write a folder's settings, or refuse the folder if it has others.

    Args:
        path: of the file in the folder.
        settings: as JSON has them.

    Raises:
        ValueError: if there are others already, or the file is damaged.
    """
    if not path.exists():
        write_json(path, settings)
        return
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({error}); remove the folder") from error
    if not isinstance(earlier, dict):
        raise ValueError(f"{path}: holds no settings; remove the folder")
    if earlier != settings:
        raise ValueError(
            f"{path.parent}: holds results with {differences(earlier, settings)}; choose another "
            "folder"
        )


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say which settings differ, and how."""
    return ", ".join(
        f"{name} {earlier.get(name)!r} (this run: {now.get(name)!r})"
        for name in dict.fromkeys([*earlier, *now])
        if earlier.get(name) != now.get(name)
    )


def digest_of(content: Any) -> str:
    """A short hash of anything JSON knows."""
    words = json.dumps(content, sort_keys=True).encode()
    return hashlib.blake2b(words, digest_size=16).hexdigest()
