"""Files that come to a folder while it is watched; a file that is being written is tried again.

watcher = Watcher(folder)
for path in watcher.poll():
    try: image = open_image(path)
    except UnreadableImageError: broken = watcher.failed(path)  # False: it may be half-written
    else: watcher.done(path)
"""

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from jaxtta.images import find_images

PATIENCE = 5.0  # seconds that a file is left unchanged before it is taken for broken


class Watcher:
    """The images in a folder and below that have not been read yet."""

    def __init__(
        self,
        folder: str | Path,
        skip: Collection[str] = (),
        shown: Callable[[Any], str] = str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch a folder.

        Args:
            folder: its path.
            skip: names of files that were read before.
            shown: from a path to such a name.
            now: seconds on a clock that never goes back.
        """
        self._folder, self._shown, self._now = Path(folder), shown, now
        self._skip, self._done = set(skip), set[str]()
        # Of those that could not be read: size and time, since when, whether given up.
        self._failed: dict[str, tuple[Any, float, bool]] = {}

    def poll(self) -> list[Path]:
        """The files to read now, the oldest first.

        Raises:
            FileNotFoundError: if the folder is not there.
        """
        if not self._folder.is_dir():
            raise FileNotFoundError(f"{self._folder}: no such folder")
        present = find_images(self._folder)[0]
        here = set(present)
        # Names of files that are gone are forgotten: a folder may be emptied every hour.
        self._done &= here
        self._failed = {name: value for name, value in self._failed.items() if name in here}
        found = []
        for name in present:
            path = self._folder / name
            if name in self._done:
                continue
            if self._shown(path) in self._skip:
                self._done.add(name)
                continue
            stat = _stat(path)
            if stat is None or (self._failed.get(name, (None, 0, False))[::2] == (stat, True)):
                continue
            found.append((stat[0], name, path))
        self._skip = set()  # each is in `_done` now, or not in the folder
        return [path for *_, path in sorted(found)]

    def done(self, path: Path) -> None:
        """Say that a file was read; `poll` does not give it again."""
        name = path.relative_to(self._folder).as_posix()
        self._done.add(name)
        self._failed.pop(name, None)

    def failed(self, path: Path) -> bool:
        """Say that a file could not be read.

        Returns:
            Whether it is broken: it has not changed for `PATIENCE` seconds, and `poll` gives it
            again only once it does. False if it may be half-written, or is gone.
        """
        name, stat = path.relative_to(self._folder).as_posix(), _stat(path)
        if stat is None:
            return False
        before, since, _ = self._failed.get(name, (None, 0.0, False))
        since = since if before == stat else self._now()
        broken = self._now() - since >= PATIENCE
        self._failed[name] = stat, since, broken
        return broken


def _stat(path: Path) -> tuple[int, int] | None:
    """A file's time and size; None if it is gone."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
