"""The log of a model that adapts while it runs: JSON lines, a record for each step.

    with AuditLog("log.jsonl", header) as log:
        log.write(record_of(prediction, step, names, pixels, class_names, state_digest, now))
    header, events = read_log("log.jsonl")

The first line of a file is the header, event "start": format, time, model, settings. A process that
goes on with the file writes another one. A "step" is a batch with its answers; "lost" counts the
steps that could not be written, of a full disk for one. Every line is JSON as strict parsers read
it (`lines.py` says how).

In OpenTelemetry's terms (`as_log_record`) a line is a LogRecord: `time` is its Timestamp, `event`
its EventName, `decision` its severity, `served` its Body and the other fields its Attributes; the
header is the Resource of the records after it.

References:
    https://opentelemetry.io/docs/specs/otel/logs/data-model
"""

import datetime
import fcntl
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any

import numpy as np
from scipy.special import softmax

from jaxtta.adapters import Prediction
from jaxtta.adapters.guard import DECISIONS, REASONS
from jaxtta.deploy.lines import decode, encode, number
from jaxtta.io import digest_array

FORMAT = 1
_BEGINNING = b'{"event":"start","format":'
_PATIENCE = 0.1  # seconds that an answer may wait for the record before it
_LATE = 0.001  # the same while the disk does not keep up; the thread that writes needs Python too
_SEVERITY = {"forget": ("WARN", 13), "roll_back": ("WARN", 13), "stop": ("ERROR", 17)}

logger = logging.getLogger(__name__)


def record_of(
    prediction: Prediction,
    step: int,
    names: Sequence[str],
    pixels: Sequence[np.ndarray],
    class_names: Sequence[str],
    state_digest: str,
    now: float,
) -> dict[str, Any]:
    """A step's record.

    Args:
        prediction: what the step gave, in numpy; padding at its end is left out.
        step: number of the batch in its stream, from 0.
        names: of the batch's images.
        pixels: each image as the model got it; digests of them go into the record.
        class_names: one a class.
        state_digest: checksum of the state after the step.
        now: seconds since 1970.

    Returns:
        JSON values: time, step, images, digests; reference, adapted and served, each a list of
        {label, probability}, or None for the first two without a guard (label None where the
        answer is not finite); share, decision and reason, None without a guard; signals, all other
        scalars; state_digest. In a roll-out a session adds guarded: which images the guard's
        mixture answered, and not the frozen model.
    """
    metrics, both = dict(prediction.metrics), prediction.answers
    reference, adapted = (None, None) if both is None else both
    decision, reason = metrics.pop("decision", None), metrics.pop("reason", None)
    share = metrics.pop("share", None)

    def answers(logits: Any) -> list[dict[str, Any]] | None:
        if logits is None:
            return None
        with np.errstate(invalid="ignore"):
            scores = softmax(np.asarray(logits)[: len(names)], axis=-1)
        places = scores.argmax(-1)
        best = [(n, row[n]) for n, row in zip(places, scores, strict=True)]
        labels = (class_names[n] if np.isfinite(x) else None for n, x in best)
        numbers = (number(x) for _, x in best)
        return [{"label": a, "probability": b} for a, b in zip(labels, numbers, strict=True)]

    return {
        "time": _time(now),
        "step": step,
        "images": [*map(str, names)],
        "digests": [digest_array(np.asarray(each)).removeprefix("bytes ") for each in pixels],
        "reference": answers(reference),
        "adapted": answers(adapted),
        "served": answers(prediction.logits),
        "share": None if share is None else number(share),
        "decision": None if decision is None else DECISIONS[int(decision)],
        "reason": None if reason is None else REASONS[int(reason)],
        "signals": {name: number(value) for name, value in sorted(metrics.items())},
        "state_digest": state_digest,
    }


class AuditLog:
    """A file of records, written by a thread of its own so that no answer waits for a disk.

    A process that is killed loses at most the last record, as long as the disk is as fast as the
    steps are. Where it is not, up to `limit` records wait in memory and later ones are lost; where
    it is full, those that could not be written are. Both are counted, in the log too once it can
    be written.

    Attributes:
        path: of the file.
        lost: number of records lost so far.
    """

    def __init__(
        self,
        path: str | Path,
        header: Mapping[str, Any],
        *,
        limit: int = 1024,
        now: Callable[[], float] = time,
    ) -> None:
        """Open the file, to go on at its end if there is one, and write the header.

        Args:
            path: of the file, in a folder that exists.
            header: JSON, what the run is made of.
            limit: number of records that may wait.
            now: the time in seconds since 1970.

        Raises:
            OSError: if the file cannot be opened or written.
            ValueError: if it is no log or one of another version, or another process writes to it.
        """
        self.path, self.lost = Path(path), 0
        self._limit, self._now = limit, now
        self._file = self.path.open("ab", buffering=0)
        try:
            self._lock()
            self._torn = _is_torn(self.path)
            self._put(encode("start", {"format": FORMAT, "time": _time(now()), **header}))
        except (OSError, ValueError):
            self._file.close()
            raise
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Any, bytes]] = deque()
        self._gap: dict[str, Any] | None = None
        self._on_time, self._closed = True, False
        self._thread = threading.Thread(target=self._run, name="audit log", daemon=True)
        self._thread.start()

    def write(self, record: Mapping[str, Any]) -> None:
        """Have a step's record written.

        It waits until the record before it is written, 0.1 s at most; where the disk is slower,
        1 ms from then on until it keeps up again.

        Raises:
            TypeError: if it holds anything that JSON has not.
            ValueError: if the log is closed.
        """
        line = encode("step", record)
        with self._changed:
            if self._closed:
                raise ValueError(f"{self.path}: the log is closed")
            patience = _PATIENCE if self._on_time else _LATE
            self._on_time = self._changed.wait_for(lambda: not self._waiting, patience)
            if len(self._waiting) < self._limit:
                self._waiting.append((record.get("step"), line))
                self._changed.notify_all()
            else:
                self._lose(record.get("step"), "the disk is too slow")

    def close(self) -> None:
        """Write what waits, and close the file."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._file.close()

    def __enter__(self) -> "AuditLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        """Refuse a file that another log is open on: a replay could not tell their steps apart."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self.path}: another process writes to this log") from error
        except OSError as error:  # a file system without locks
            logger.warning("%s: cannot be locked (%s)", self.path, error.strerror)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                step, line = self._waiting[0] if self._waiting else (None, b"")
                gap, self._gap = self._gap, None
            try:
                if gap is not None:
                    self._put(encode("lost", {"time": _time(self._now()), **gap}))
                    gap = None
                self._put(line)
            except OSError as error:
                with self._changed:
                    self._gap = _joined(gap, self._gap)
                    if line:
                        self._lose(step, str(error.strerror))
            with self._changed:
                if not line:
                    break
                self._waiting.popleft()
                self._changed.notify_all()
        if self._gap is not None:
            logger.warning("%s: %d records are lost", self.path, self._gap["count"])

    def _put(self, line: bytes) -> None:
        """Write a whole line, or say by `_torn` that it was cut."""
        rest = b"\n" + line if self._torn and line else line
        while rest:
            try:
                written = self._file.write(rest)
            except OSError:
                if rest == b"\n":  # the record is there; the next line begins with it
                    return
                raise
            self._torn = rest[:written][-1:] != b"\n"
            rest = rest[written:]

    def _lose(self, step: Any, why: str) -> None:
        if self._gap is None:
            logger.warning("%s: %s; records are lost, answers go on", self.path, why)
        own = {"count": 1, "first_step": step, "last_step": step, "why": why}
        self._gap = _joined(self._gap, own)
        self.lost += 1


def _joined(first: dict[str, Any] | None, then: dict[str, Any] | None) -> dict[str, Any] | None:
    if first is None or then is None:
        return first or then
    steps = [x[key] for x in (first, then) for key in ("first_step", "last_step")]
    count = first["count"] + then["count"]
    return {**first, "count": count, "first_step": min(steps), "last_step": max(steps)}


def read_log(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a log.

    A torn line, of a process that was killed or a disk that was full, is passed over.

    Args:
        path: of the file.

    Returns:
        The header, and all lines after it in their order; `event` says what each is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no log or one of another version, or a line was changed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    _is_torn(path)  # a file of another kind may be large
    events: list[dict[str, Any]] = []
    torn = 0
    for place, line in enumerate(path.read_bytes().split(b"\n"), 1):
        event = decode(line)
        if event is None:
            torn = torn or (place if line else 0)
        else:
            # A line ends early only before one that says so.
            if torn and event["event"] not in ("start", "lost"):
                raise ValueError(f"{path}: line {torn} is not a record, the log was changed")
            torn = 0
            events.append(event)
    if not events:
        raise ValueError(f"{path}: holds no log, its first line is torn")
    return events[0], events[1:]


def steps_of(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of steps among a log's lines."""
    return [event for event in events if event["event"] == "step"]


def as_log_record(event: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a log under the names of OpenTelemetry's log data model."""
    others = {k: v for k, v in event.items() if k not in ("time", "event", "served")}
    stamp = datetime.datetime.fromisoformat(event["time"])
    passed = stamp - datetime.datetime.fromtimestamp(0, datetime.UTC)
    text, number = _SEVERITY.get(str(event.get("decision")), ("INFO", 9))
    if event["event"] == "lost":
        text, number = "ERROR", 17
    return {
        "Timestamp": passed // datetime.timedelta(microseconds=1) * 1000,  # nanoseconds
        "SeverityText": text,
        "SeverityNumber": number,
        "EventName": f"jaxtta.{event['event']}",
        "Body": event.get("served"),
        "Attributes": {f"jaxtta.{name}": value for name, value in others.items()},
    }


def _is_torn(path: Path) -> bool:
    """Whether a file's last line lacks its end; a ValueError for a file that is no such log."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        first = file.readline(2**20)
        file.seek(-1, 2)
        torn = file.read() != b"\n"
    if not first.startswith(_BEGINNING[: len(first.rstrip(b"\n"))]):
        raise ValueError(f"{path}: is no log of jaxtta")
    found = re.match(rb"(\d+),", first[len(_BEGINNING) :])
    if found and int(found[1]) != FORMAT:
        raise ValueError(
            f"{path}: is a log of format {int(found[1])}, this version of jaxtta has {FORMAT}"
        )
    return torn


def _time(now: float) -> str:
    return datetime.datetime.fromtimestamp(now, datetime.UTC).isoformat(timespec="microseconds")
