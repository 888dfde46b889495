r"""Answers of a session, and a file that they are appended to, each line as a whole or not at all.

described(answer, class_names, count=3)["labels"]  # in JSON
answers = AnswersFile("answers.jsonl", header="")
answered = answers.names()  # of the images in the lines that are there already
answers.write('{"file": "a.png"}\n')
"""

import csv
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """What a session says of an image.

    Attributes:
        name: the image's, as given.
        scores: (classes,) probabilities, or all NaN where the model gave no finite answer.
        reference: (classes,) the frozen model's probabilities; None without a guard.
        adapted: (classes,) the adapted model's; None without a guard.
        step: number of the batch that it was answered in, from 0.
        updates: number of batches learnt from before it, since the last return to the source.
        decision: the guard's for its batch, one of `DECISIONS`; None without a guard.
        share: of the adapted model in the answer, 0 to 1; None without a guard.
        guarded: whether the guard's mixture is the answer, and not the frozen model's alone.
    """

    name: Any
    scores: np.ndarray
    reference: np.ndarray | None
    adapted: np.ndarray | None
    step: int
    updates: int
    decision: str | None
    share: float | None
    guarded: bool

    @property
    def finite(self) -> bool:
        """Whether there is an answer."""
        return bool(np.isfinite(self.scores).all())

    @property
    def label(self) -> int:
        """The likeliest class."""
        return int(self.scores.argmax())

    @property
    def confidence(self) -> float:
        """Its probability."""
        return float(self.scores.max())

    @property
    def disagree(self) -> bool:
        """Whether the frozen and the adapted model name different classes."""
        if self.reference is None or self.adapted is None:
            return False
        both = np.stack([self.reference, self.adapted])
        return bool(np.isfinite(both).all() and np.ptp(both.argmax(1)))


def described(answer: Answer, class_names: Sequence[str], count: int) -> dict[str, Any]:
    """An answer in JSON.

    Args:
        answer: of a session.
        class_names: one a class.
        count: how many of the likeliest classes are named.

    Returns:
        labels and scores, the likeliest first and empty where the answer is not finite; updates;
        with a guard its decision, the adapted model's share and the frozen model's likeliest
        class.
    """
    best = np.argsort(-answer.scores, kind="stable")[:count] if answer.finite else []
    found: dict[str, Any] = {
        "labels": [class_names[n] for n in best],
        "scores": [float(answer.scores[n]) for n in best],
        "updates": answer.updates,
    }
    if answer.decision is not None:
        found |= {"decision": answer.decision, "share": answer.share}
    if answer.reference is not None and np.isfinite(answer.reference).all():
        place = int(answer.reference.argmax())
        found |= {
            "frozen_label": class_names[place],
            "frozen_score": float(answer.reference[place]),
        }
    return found


class AnswersFile:
    """An open file of answers, in JSON lines or CSV.

    Attributes:
        lost: number of lines that could not be written, of a full disk for one.
    """

    def __init__(self, path: str | Path, header: str) -> None:
        """Open the file, and cut off a last line that a killed process has left torn.

        Args:
            path: of the file; its folder must exist.
            header: its first line, of CSV; "" for JSON lines.

        Raises:
            OSError: if it cannot be opened or written.
            ValueError: if it has another first line.
        """
        self.path, self.lost = Path(path), 0
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{path}: is no ordinary file, answers cannot be continued there")
        self._file = self.path.open("ab", buffering=0)
        self._size = 0
        first = header.encode()
        for line in self._lines():
            if not self._size and header and line != first:
                raise ValueError(
                    f"{path}: begins with {line.decode(errors='replace').strip()!r}, expected the "
                    f"columns {header.strip()!r}; use another file"
                )
            self._size += len(line)
        self._file.truncate(self._size)
        if header and not self._size:
            self.write(header)
        self._header = header

    def _lines(self) -> Iterator[bytes]:
        """The lines that are whole, of a file that may be torn."""
        with self.path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def names(self) -> set[str]:
        """The names of the images in it.

        Raises:
            ValueError: if a line is no answer.
        """
        if self._header:
            with self.path.open(encoding="utf-8", newline="") as file:
                return {row["file"] for row in csv.DictReader(file)}
        return {record["file"] for record in self.records()}

    def records(self) -> Iterator[dict[str, Any]]:
        """What its JSON lines hold; a ValueError for a line that names no file."""
        for number, line in enumerate(self._lines(), 1):
            try:
                record = json.loads(line)
                hash(record["file"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number} is no answer") from error
            yield record

    def write(self, line: str) -> None:
        """Append a line; one that cannot be written is counted, and logged once."""
        try:
            self.append(line)
        except OSError as error:
            if not self.lost:
                log.warning(
                    "%s: %s; answers are lost, the server goes on", self.path, error.strerror
                )
            self.lost += 1

    def append(self, line: str) -> None:
        """Append a line; an OSError if it cannot be written, and then nothing of it is there."""
        rest = line.encode("utf-8", "backslashreplace")
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file.fileno(), rest) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size = size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
