"""Repeat a logged run: the same images through the same adapter, compared step by step.

    found = replay("log.jsonl")
    print(found.difference or f"{found.steps} steps are the same, bit for bit")

The header says what the session was made of, every record which images it had and what came of
them. Where a process went on with the log, from a state that it had saved, the replay does too.
Images are read from files by their names: HTTP requests, which no file holds, cannot be repeated.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtta import images, io
from jaxtta.deploy.audit import read_log
from jaxtta.deploy.lines import ANSWERS
from jaxtta.deploy.session import Session
from jaxtta.deploy.setup import PACKAGES, Setup, digest_of_state, fingerprint_of, sha256_of
from jaxtta.images import printable

FIELDS = (*ANSWERS, "share", "decision", "reason", "signals", "state_digest")
"""What is compared, in this order."""
_NEEDED = {
    "start": {"setup": dict, "model": dict, "files": dict, "versions": dict, "device": str}
    | {"state_digest": str, **dict.fromkeys(("steps", "seen", "updates"), int)},
    "step": {"step": int, "images": list, "digests": list},
    "lost": {"count": int},
}
"""What a log's lines must have to be repeated."""


class Replayed(NamedTuple):
    """What a replay found.

    Attributes:
        steps: number of steps that are the same.
        images: number of images in them.
        lost: number of steps that the log could not write, by its own account.
        difference: where it first differs, a sentence; None if it does not.
        step: of the difference; None if there is none, or before the first step.
        field: of the record that differs.
    """

    steps: int
    images: int
    lost: int
    difference: str | None = None
    step: int | None = None
    field: str | None = None


class Differs(Exception):
    """A difference: its sentence, and the field."""


class _Last:
    """A log that keeps the last record."""

    def write(self, record: dict[str, Any]) -> None:
        self.record = record


def replay(
    path: str | Path,
    *,
    folder: str | Path = "",
    state: str | Path | None = None,
    model: str | None = None,
    adapter: str | None = None,
    read: Callable[[str | Path], Any] = images.open_image,
) -> Replayed:
    """Repeat a run.

    Args:
        path: of the log.
        folder: that the images' names are relative to.
        state: file of the state that the first step went on from, if it was not a new one.
        model: where the model is now, if the log's folder has moved.
        adapter: another adapter, to see from which step on it would have answered otherwise.
        read: gives an image by its path.

    Returns:
        How many steps are the same, and where they first differ.

    Raises:
        FileNotFoundError: if there is no such log, state or model.
        ValueError: if it is no log or one of another version, the model or a file is another, or a
            step went on from a state that neither the log leads to nor the file holds.
    """
    header, events = read_log(path)
    events = [header, *events]
    for event in events:
        for name, kind in _NEEDED.get(event["event"], {}).items():
            if not isinstance(event.get(name), kind):
                raise ValueError(f"{path}: a {event['event']} has no {name}, it cannot be repeated")
    lost = sum(event["count"] for event in events if event["event"] == "lost")
    run = _Run(path, events, state, {"model": model, "adapter": adapter})
    steps = count = 0
    for event in events:
        try:
            if event["event"] == "start":
                run.start(event)
            elif event["event"] == "step":
                run.step(event, Path(folder), read)
                steps, count = steps + 1, count + len(event["images"])
        except Differs as found:
            sentence, field = found.args
            step = run.session.steps if event["event"] == "start" else event["step"]
            sentence = f"step {step}: {sentence}{_elsewhere(run.header)}"
            return Replayed(steps, count, lost, sentence, step, field)
    return Replayed(steps, count, lost)


class _Run:
    """The session that repeats a log, and the states that the log goes back to."""

    session: Session
    header: dict[str, Any]
    new: Any

    def __init__(
        self,
        path: str | Path,
        events: Sequence[dict[str, Any]],
        file: str | Path | None,
        given: dict[str, str | None],
    ) -> None:
        self.path, self.file = path, file
        self.given = {name: value for name, value in given.items() if value is not None}
        self.setup: Setup | None = None
        self.wanted = {event["state_digest"] for event in events if event["event"] == "start"}
        self.states: dict[str, Any] = {}

    def start(self, header: dict[str, Any]) -> None:
        """Make the session of a header, in the state that it begins with; may raise `Differs`."""
        self.header = header
        with io.error_context(self.path):
            setup = dataclasses.replace(Setup.of(header["setup"]), **self.given)
        if setup != self.setup:
            model, params = setup.load()
            _require_same(setup, header, fingerprint_of(model, params))
            self.setup, self.session = setup, setup.session(model, params)
            self.session.log = self.log = _Last()
            self.new = self.session.state
            self._keep(digest_of_state(self.new))
        digest = header["state_digest"]
        if digest not in self.states and self.file:
            # Of a session or a bundle; another adapter may go on from it too.
            self.session.state = io.load_state(self.file, self.new)
            self._keep(digest_of_state(self.session.state))
        elif digest not in self.states and not header["steps"]:
            if "adapter" not in self.given:
                own = digest_of_state(self.new)
                raise Differs(f"a new state is {own}, the log has {digest}", "state_digest")
            self.states[digest] = self.new
        if digest not in self.states:
            found = "; that of --state is another" if self.file else ", give it with --state"
            raise ValueError(
                f"{self.path}: goes on at step {header['steps']} from a state (checksum {digest}) "
                f"that no step before it led to{found}"
            )
        self.session.state = self.states[digest]
        for name in ("steps", "seen", "updates"):
            setattr(self.session, name, header[name])

    def step(self, event: dict[str, Any], folder: Path, read: Callable[..., Any]) -> None:
        """Repeat a step; raises `Differs`."""
        session, names = self.session, event["images"]
        if event["step"] != session.steps:
            raise Differs(f"the log lacks those from {session.steps} on, which led to it", "step")
        guarded = event.get("guarded")  # of a roll-out: not those that the frozen model answered
        for field, each in (("digests", event["digests"]), ("guarded", guarded or names)):
            if not isinstance(each, list) or len(each) != len(names):
                raise Differs(f"{field} is not a list of one for each image", field)
        ready = []
        for name, digest in zip(names, event["digests"], strict=True):
            try:
                ready.append(session.prepare(read(folder / name)))
            except images.UnreadableImageError as error:
                raise Differs(printable(error), "images") from error
            if io.digest_array(ready[-1].pixels).removeprefix("bytes ") != digest:
                place = printable(folder / name)
                raise Differs(f"{place} has other pixels than when it was logged", "digests")
        session.served = dict(zip(names, guarded, strict=True)).__getitem__ if guarded else None
        session.answer(ready, names)
        for field in FIELDS:
            if said := _difference(event.get(field), self.log.record[field], names, field):
                raise Differs(said, field)
        self._keep(session.digest)

    def _keep(self, digest: str) -> None:
        if digest in self.wanted:
            self.states[digest] = self.session.state


def _require_same(setup: Setup, header: dict[str, Any], own: dict[str, str]) -> None:
    """Raise a ValueError for another model, or a file of the adapter's that has changed."""
    logged = header["model"]
    for name, what in (("weights", "weights"), ("settings", "architecture or preprocessing")):
        if own[name] != (expected := logged.get(name)):
            raise ValueError(
                f"{setup.model}: has other {what} than the log's model (digest {own[name]}, "
                f"expected {expected})"
            )
    for name, path in setup.files.items():
        if name in header["files"] and sha256_of(path) != header["files"][name]:
            raise ValueError(f"{path}: has changed since the log was written")


def _difference(logged: Any, own: Any, names: Sequence[str], field: str) -> str | None:
    """How a field of a record differs, in words; None if it does not."""
    if json.dumps(logged, sort_keys=True) == json.dumps(own, sort_keys=True):  # so that NaN is NaN
        return None
    parts: list[tuple[str, Any, Any]] = [(field, logged, own)]
    if isinstance(logged, list) and isinstance(own, list) and len(logged) == len(own):
        pairs = zip(names, logged, own, strict=True)
        parts = [(f"the {field} answer for {printable(name)}", *pair) for name, *pair in pairs]
    elif isinstance(logged, dict) and isinstance(own, dict):
        keys = sorted({*logged, *own})
        parts = [(f"{field}.{key}", logged.get(key), own.get(key)) for key in keys]
    what, before, now = next(x for x in parts if json.dumps(x[1]) != json.dumps(x[2]))
    return f"{what} is {_shown(now)}, the log has {_shown(before)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('label')} ({value.get('probability')})"
    return str(value)


def _elsewhere(header: dict[str, Any]) -> str:
    """What of a log's versions and device differs from those here, which may be why."""
    own = {name: version(name) for name in PACKAGES}
    logged = {name: header["versions"].get(name) for name in PACKAGES}
    others = {name: value for name, value in logged.items() if own[name] != value}
    if (device := jax.devices()[0].device_kind) != header["device"]:
        others["device"], own["device"] = header["device"], device
    parts = [f"{name} {value}, here {own[name]}" for name, value in others.items()]
    return f" (the log was written with {'; '.join(parts)})" if parts else ""
