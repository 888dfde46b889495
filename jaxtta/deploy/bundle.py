"""What an adapter learnt for an environment, in a folder that is never changed.

    path = save_bundle("bundles", session, setup)          # bundles/<SHA-256 of its manifest>
    install(path, "store")                                 # store/current is it now
    session = load_bundle("store/current", model, params).session(model, params)
    revert("store")                                        # and now what was current before

A bundle holds the adapter's state, the files that the adapter is made of, and a manifest in JSON
with the settings, the model's fingerprint and a digest of each file. Arrays are in safetensors.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtta import io
from jaxtta.adapters import Adapter
from jaxtta.deploy.manifest import (
    ALIASES,
    FILES,
    FORMAT,
    MANIFEST,
    STATE,
    aliases_of,
    entries_of,
    entry_of,
    is_digest,
    require_model,
    require_named,
    resolve,
    verified,
)
from jaxtta.deploy.session import Session
from jaxtta.deploy.setup import Setup, counters_of, digest_of_state, fingerprint_of, sha256_of


class Bundle(NamedTuple):
    """What `load_bundle` gives.

    Attributes:
        setup: the settings; their files are in the bundle.
        adapter: made of them.
        state: to go on with.
        counters: steps, seen and updates of the session that learnt it.
    """

    setup: Setup
    adapter: Adapter
    state: Any
    counters: dict[str, int]

    def session(self, model: Any, params: Any, **more: Any) -> Session:
        """A session that goes on; its arguments are those of `Setup.session`."""
        session = self.setup.session(model, params, **more)
        session.state = self.state
        session.digest = digest_of_state(self.state) if session.digest else ""
        for name, value in self.counters.items():
            setattr(session, name, value)
        return session


def save_bundle(folder: str | Path, session: Session, setup: Setup) -> Path:
    """Make a bundle of what a session has learnt so far.

    Args:
        folder: where the bundle's own folder is made.
        session: made of `setup`.
        setup: its settings, which name the model.

    Returns:
        The bundle's folder, named by its manifest's digest.

    Raises:
        ValueError: if the adapter is a function of the user's, which no settings can name safely.
    """
    folder = Path(folder)
    require_named(setup.adapter)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder), _new_folder(folder) as new:
        io.save_state(new / STATE, session.state)
        for name, file in setup.files.items():
            shutil.copyfile(file, new / FILES[name])
        own = {name: FILES[name] for name in setup.files}
        files = sorted(path.name for path in new.iterdir())
        now = datetime.datetime.now(datetime.UTC)
        manifest = {
            "format": FORMAT,
            "created": now.isoformat(timespec="seconds"),
            "setup": dataclasses.asdict(dataclasses.replace(setup, **own)),
            "model": fingerprint_of(session.model, session.params),
            "counters": counters_of(session),
            "files": {name: entry_of(new / name) for name in files},
        }
        io.write_json(new / MANIFEST, manifest)
        return _moved(new, folder / sha256_of(new / MANIFEST))


def verify(path: str | Path) -> dict[str, Any]:
    """Check that a bundle is whole and as it was made.

    Args:
        path: its folder, or store/current and store/previous.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a file is missing, was changed, is not in the manifest or no regular file, or
            the manifest is not of this format or not the one that the folder is named by.
    """
    path = resolve(path)
    return verified(path, path.name)


def load_bundle(path: str | Path, model: Any, params: Any) -> Bundle:
    """Load a bundle for the model that it was made with.

    Args:
        path: its folder, or store/current and store/previous.
        model: the model.
        params: its parameters.

    Returns:
        The adapter, and the state to go on with.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: as `verify`, or if it is of another model.
    """
    path = resolve(path)
    manifest = verified(path, path.name)
    require_model(path, manifest, fingerprint_of(model, params))
    setup = setup_of(path)
    _, adapter = setup.make(model, params)
    state = io.load_state(path / STATE, adapter.init(params, jax.random.key(setup.seed)))
    counters = {name: manifest["counters"][name] for name in ("steps", "seen", "updates")}
    return Bundle(setup, adapter, state, counters)


def setup_of(path: str | Path, model: str | None = None) -> Setup:
    """A bundle's settings, with its files' paths and, if given, a model's folder or hub id."""
    path = resolve(path)
    manifest = verified(path, path.name)
    own = {name: str(path / file) for name, file in FILES.items() if file in manifest["files"]}
    own |= {"model": model} if model else {}
    return dataclasses.replace(Setup.of(manifest["setup"]), **own)


def install(path: str | Path, store: str | Path, model: dict[str, str] | None = None) -> str:
    """Copy a bundle into a store, verify the copy, and make it the current one.

    Args:
        path: the bundle's folder.
        store: the store's; made if it is not there.
        model: fingerprint of the model that it is to run with; None for that of the store's current
            bundle, if there is one.

    Returns:
        Its digest.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: as `verify`, or if it is of another model; the store is as it was then.
    """
    path, store = resolve(path), Path(store)
    store.mkdir(parents=True, exist_ok=True)
    with _locked(store):
        aliases = aliases_of(store)
        if model is None and aliases["current"]:
            with contextlib.suppress(ValueError, FileNotFoundError):  # a broken one is replaced
                model = verify(store / "current")["model"]
        with _new_folder(store) as new:
            for entry in entries_of(path):
                shutil.copyfile(entry, new / entry.name, follow_symlinks=False)
            manifest = verified(new, path.name, path)  # the copy, which nobody else writes
            if model is not None:
                require_model(path, manifest, model)
            _moved(new, store / path.name)
        if aliases["current"] != path.name:
            _point(store, {"current": path.name, "previous": aliases["current"]})
    return path.name


def revert(store: str | Path) -> str:
    """Make the previous bundle the current one, and the current one the previous.

    Args:
        store: the store's folder.

    Returns:
        The digest of the current one.

    Raises:
        ValueError: if there is no previous one, or it is not whole.
    """
    store = Path(store)
    with _locked(store):
        aliases = aliases_of(store)
        if not aliases["previous"]:
            raise ValueError(f"{store}: has no previous bundle to go back to")
        verify(store / "previous")
        _point(store, {"current": aliases["previous"], "previous": aliases["current"]})
    return aliases["previous"]


def bundles_in(store: str | Path) -> list[Path]:
    """The folders of a store's bundles, sorted by name."""
    store = Path(store)
    if not store.is_dir():
        raise FileNotFoundError(f"{store}: no such folder")
    return sorted(path for path in store.iterdir() if is_digest(path.name) and path.is_dir())


def _point(store: Path, aliases: dict[str, str | None]) -> None:
    """Move both aliases, at once."""
    io.write_json(store / ALIASES, aliases)


@contextlib.contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in one that is locked; it is removed unless it was moved."""
    new = parent / f".new-{os.getpid()}"
    new.mkdir(mode=0o755)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _moved(new: Path, path: Path) -> Path:
    """Give a new folder its name; one that is there already stays if it is whole."""
    for file in new.iterdir():
        file.chmod(0o444)
    if path.exists():
        with contextlib.suppress(ValueError):
            verified(path, path.name)
            return path
        shutil.rmtree(path)
    return new.rename(path)


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keep others from changing a store; a lock ends with its process, however that ends."""
    if not store.is_dir():
        raise FileNotFoundError(f"{store}: no such folder")
    with (store / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for left in store.glob(".new-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield
