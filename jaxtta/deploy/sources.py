"""Images from files, a list of paths on stdin and a watched folder, read in threads.

reader = Reader(queue, session, report=print)
reader.start(lambda: reader.read(files, NEVER))
reader.start(lambda: reader.follow(Watcher("incoming"), 2.0))
answer_all(queue, session)  # until every source that was started has ended
"""

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxtta.deploy.queue import BatchQueue, Item
from jaxtta.deploy.session import Prepared, Session
from jaxtta.images import UnreadableImageError, find_images, open_image, printable

PATIENCE = 5.0  # seconds that a file is left unchanged before it is taken for broken
POLL = 0.25  # seconds between two looks at a folder or at stdin
SLIM = 200  # a side at most so many times as long as the other: it is resized by the shorter one


def load(session: Session, file: str | Path | BinaryIO, name: Any = "") -> Prepared:
    """Decode an image and prepare it.

    Args:
        session: which takes it.
        file: its path, or an open file.
        name: its name in messages; its path by default.

    Raises:
        UnreadableImageError: if it cannot be decoded, or would be too large once it is resized.
    """
    image = open_image(file, name)
    (width, height), shown = image.size, printable(name or file)
    if max(width, height) > SLIM * min(width, height):
        raise UnreadableImageError(
            f"{shown}: has {width}×{height} pixels, one side is over {SLIM} times the other"
        )
    try:
        return session.prepare(image)
    except MemoryError as error:
        raise UnreadableImageError(f"{shown}: is too large for this machine's memory") from error


class Reader:
    """Reads images into a queue.

    Attributes:
        named: number of images that its sources had.
        skipped: number of those that were answered before, not among `named`.
    """

    def __init__(
        self,
        queue: BatchQueue,
        session: Session,
        report: Callable[[str], None],
        shown: Callable[[Any], str] = str,
        skip: Collection[str] = (),
    ) -> None:
        """Begin with no source.

        Args:
            queue: where the images go.
            session: prepares them.
            report: is told of each file that cannot be read.
            shown: from a path to its name in the answers.
            skip: names of those that were answered before.
        """
        self.named = self.skipped = 0
        self._queue, self._session, self._report = queue, session, report
        self._shown, self._skip = shown, skip
        self._threads: list[threading.Thread] = []

    def start(self, source: Callable[[], None]) -> None:
        """Run a source in a thread; `answer_all` raises the error that it ends with."""

        def run() -> None:
            error = None
            try:
                source()
            except Exception as problem:  # for the thread that answers
                error = problem
            self._queue.finish(error)

        self._threads.append(threading.Thread(target=run, name="reader", daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        """Wait for the sources to end; Python aborts where it meets their threads at its exit."""
        for thread in self._threads:
            thread.join(4 * POLL)  # one that waits for input may not end

    def read(self, paths: Iterable[Path], wait: float) -> None:
        """Read files; each waits so many seconds for others to fill its batch."""
        for path in paths:
            if self._shown(path) in self._skip:
                self.skipped += 1
                continue
            self.named += 1
            try:
                image = load(self._session, path)
            except UnreadableImageError as error:
                self._report(str(error))
                continue
            if not self._put(path, image, wait):
                return

    def follow(self, watcher: "Watcher", wait: float) -> None:
        """Read what comes to a folder, until the queue stops."""
        while not self._queue.stopping:
            for path in watcher.poll():
                try:
                    image = load(self._session, path)
                except UnreadableImageError as error:
                    if watcher.failed(path):
                        self.named += 1
                        self._report(str(error))
                    continue
                watcher.done(path)
                self.named += 1
                if not self._put(path, image, wait):
                    return
            time.sleep(POLL)

    def _put(self, path: Path, image: Prepared, wait: float) -> bool:
        due = time.monotonic() + wait
        return self._queue.put(Item(path, image, original=path, due=due))


def paths_on_stdin(queue: BatchQueue) -> Iterator[Path]:
    """The paths on stdin, one a line, as they come; until its end, or until the queue stops."""
    file, rest, chunk = sys.stdin.fileno(), b"", b"-"
    while chunk and not queue.stopping:
        if select.select([file], [], [], POLL)[0]:  # Python may crash at its end while this reads
            chunk = os.read(file, 2**16)
            *lines, rest = (rest + (chunk or b"\n")).split(b"\n")
            yield from (Path(os.fsdecode(x.rstrip(b"\r"))) for x in lines if x.strip())


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
