"""Results in a bucket: a local folder whose files are uploaded while a run goes on.

    with mirror("gs://bucket/runs/one", "0-of-4") as folder:
        evaluate.sweep(spec, adapters, model, params, folder, shard=(0, 4))

needs fsspec, and gcsfs for gs:// or s3fs for s3://. Several machines need one bucket and nothing
else: each has a share of the run, a local copy, and uploads what it writes itself.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

EVERY = 5.0  # seconds between two uploads
ENDED = 120.0  # seconds without a sign of a process after which its share is free
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}
_MARKER = ".running-"
_SKIPPED = re.compile(r"(^|/)(\.|$)")  # hidden files, and objects that stand for folders
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def mirror(url: str | Path, part: str | None = "") -> Iterator[Path]:
    """Give a local folder for a URL's files; new and changed ones are uploaded every few seconds.

    What lies there is downloaded first, so that a stopped run goes on. Files whose names begin with
    "." are left out. Everything is uploaded once more at the end, also after an error or Ctrl-C.

    Args:
        url: such as gs://bucket/runs; as a `Path` it may have lost a slash. A local folder is given
            as it is, by its path or by file://.
        part: this machine's share, such as "0-of-4", or "" for all. Only one process may have it;
            nor may others have shares of another number. None for a report, which asks nobody.

    Yields:
        The folder, which exists if there are files in it, and is removed at the end.

    Raises:
        ImportError: if a package is missing.
        OSError: if the URL cannot be read or written to, which is tried at the start; if the last
            upload fails, and then the folder is kept.
        ValueError: for an unknown protocol, or if another process holds the share.
    """
    found = re.fullmatch(r"([a-z][a-z0-9+.-]+):/+(.*)", str(url))
    if not found or found[1] == "file":
        yield Path(f"/{found[2]}" if found else url)
        return
    copy = _Copy(f"{found[1]}://{found[2]}", part)
    try:
        copy.begin()
    except BaseException:
        shutil.rmtree(copy.temporary)
        with contextlib.suppress(Exception):  # or it counts as ended later
            copy.give_back()
        raise
    try:
        yield copy.folder
    except BaseException as error:
        local = str(copy.folder)
        said = (x.replace(local, copy.url) if isinstance(x, str) else x for x in error.args)
        error.args = tuple(said)
        try:
            copy.finish()
        except OSError as other:
            _log.error("%s", other)
        raise
    copy.finish()


class _Copy:
    """A local copy of the files at a URL."""

    def __init__(self, url: str, part: str | None) -> None:
        self.url, self.marker = url, None if part is None else _MARKER + part
        self.files, root = _open(url)
        self.root = root.rstrip("/")
        self.me = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
        self.me |= {"since": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "time": 0.0}
        self.temporary = Path(tempfile.mkdtemp(prefix="jaxtta-"))
        self.folder = self.temporary / (self.root.rpartition("/")[2] or "results")
        self.sent: dict[str, tuple[int, int]] = {}
        self.stop = threading.Event()
        self.uploads = threading.Thread(target=self._upload_until_stopped, daemon=True)

    def begin(self) -> None:
        """Take the share, download, and begin to upload."""
        with _named(f"{self.url}: cannot be read; is there such a bucket, and who may read it?"):
            start, found = f"{self.root}/", self.files.find(self.root)
            names = [path.removeprefix(start) for path in found if path.startswith(start)]
            holders = {name: self._holder(name) for name in names if self._excludes(name)}
        for name, other in holders.items():
            if other and not _has_ended(other):
                raise ValueError(
                    f"{self.url}/{name}: {_who(other)}, holds this share; run another one, or wait "
                    f"until it ends ({ENDED:g} s without a sign count as the end)"
                )
            if other:
                _log.info("%s/%s: taken over from %s", self.url, name, _who(other))
        with _named(f"{self.url}: cannot be written to"):
            self._sign()
        names = [name for name in names if not _SKIPPED.search(name)]
        _log.info("%s: %d files, copied to %s", self.url, len(names), self.folder)
        with _named(f"{self.url}: cannot be read"), ThreadPoolExecutor() as pool:
            list(pool.map(self._download, names))
        self.sent = self._present()
        self.uploads.start()

    def finish(self) -> None:
        """Upload the rest and give the share back; an OSError says where the files are if not."""
        self.stop.set()
        self.uploads.join()
        with _named(f"{self.url}: the last upload failed, the files are in {self.folder}"):
            self._upload()
            self.give_back()
        _log.info("%s: has all files of %s, which is removed", self.url, self.folder)
        shutil.rmtree(self.temporary)

    def give_back(self) -> None:
        """Remove the marker, if it is this process's."""
        if self.marker and self.me["time"] and not self._holder(self.marker):
            self.files.rm_file(f"{self.root}/{self.marker}")

    def _upload_until_stopped(self) -> None:
        """Upload every few seconds; of several failures in a row the first is logged."""
        failing = False
        while not self.stop.wait(EVERY):
            try:
                self._upload()
                failing = False
            except Exception as error:
                if not failing:
                    _log.warning("%s: an upload failed, trying on (%s)", self.url, _text(error))
                failing = True

    def _upload(self) -> None:
        """Upload what is new or changed, then remove checkpoints that were removed here."""
        self._renew()
        present = self._present()
        for name in sorted(present, key=lambda name: present[name][1]):  # as they were written
            if self.sent.get(name) != present[name]:
                if not (self.folder / name).exists():  # a later checkpoint has come
                    return self._upload()
                self.files.put_file(str(self.folder / name), f"{self.root}/{name}")
                self.sent[name] = present[name]
                self._renew()
        # A run removes checkpoints of its own streams alone. Nothing else is removed: the system
        # may delete old temporary files.
        gone = self.sent.keys() - present.keys() if self.folder.is_dir() else ()
        for name in [name for name in gone if "checkpoints" in name.split("/")]:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(f"{self.root}/{name}")
            del self.sent[name]

    def _present(self) -> dict[str, tuple[int, int]]:
        """Size and time of change of the files in the folder, by name."""
        found = {}
        for folder, _, files in os.walk(self.folder):
            for path in (Path(folder, file) for file in files):
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    if not _SKIPPED.search(name):
                        found[name] = path.stat().st_size, path.stat().st_mtime_ns
        return found

    def _download(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another share's, removed meanwhile
            self.files.get_file(f"{self.root}/{name}", str(path))
        self._renew()  # many files may take longer than a share is kept without a sign

    def _excludes(self, name: str) -> bool:
        """Whether a file is the marker of this share, or of one of another number of shares."""
        if not self.marker or not name.startswith(_MARKER):
            return False
        return name == self.marker or name.partition("-of-")[2] != self.marker.partition("-of-")[2]

    def _holder(self, marker: str) -> dict[str, Any] | None:
        """The process that wrote a marker; None for this one."""
        try:
            found = json.loads(self.files.cat_file(f"{self.root}/{marker}"))
        except FileNotFoundError:
            return None
        return None if found["id"] == self.me["id"] else found

    def _sign(self) -> None:
        """Write the marker by which others know that this process is running."""
        if self.marker:
            self.me["time"] = time.time()
            self.files.pipe_file(f"{self.root}/{self.marker}", json.dumps(self.me).encode())

    def _renew(self) -> None:
        """Write the marker again, if it is old and still this process's; else a ValueError."""
        if self.marker and time.time() - self.me["time"] > EVERY / 2:
            if other := self._holder(self.marker):
                raise ValueError(f"the share was taken over by {_who(other)}")
            self._sign()


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and where the URL is in it."""
    protocol = url.partition(":")[0]
    try:
        import fsspec

        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        packages = " ".join(["fsspec", PACKAGES.get(protocol, "")]).strip()
        raise ImportError(f"{url}: {error}: pip install {packages}") from error
    except ValueError as error:
        said = f"{url}: unknown protocol {protocol!r}, expected gs, s3 or another one of fsspec"
        raise ValueError(said) from error
    with _named(f"{url}: cannot be opened"):  # lists are not kept: other machines write, too
        return fsspec.url_to_fs(url, use_listings_cache=False)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Raise an OSError for any error of a bucket's package, which may have types of its own."""
    try:
        yield
    except Exception as error:
        raise OSError(f"{what} ({_text(error)})") from error


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _who(other: dict[str, Any]) -> str:
    seen = f"since {other['since']} and last seen {time.time() - other['time']:.0f} s ago"
    return f"process {other['process']} on {other['host']}, running {seen}"


def _has_ended(other: dict[str, Any]) -> bool:
    """Whether a process has given no sign for long, or was one of this host's and is gone."""
    if other["host"] == socket.gethostname():
        with contextlib.suppress(PermissionError):  # another user's
            try:
                os.kill(other["process"], 0)
            except ProcessLookupError:
                return True
    return time.time() - other["time"] > ENDED
