"""A folder of images that a person should look at, and the labels that the person gives them.

    review = Review("review", class_names, below=0.5, limit=1000)
    review.offer(item, answer)  # copied if the answer is unsure, or both models disagree
    if review.adapted_is_worse(): ...  # by the labels in review/labels.csv

`review.jsonl` in the folder has a line for each image: its file there, where it came from, and what
the models said. `labels.csv` has the columns file and label.
"""

import contextlib
import datetime
import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.adapters.guard.labels import bounds, count_pairs, is_worse, no_pairs
from jaxtta.deploy.answers import Answer, AnswersFile, described
from jaxtta.deploy.queue import Item
from jaxtta.images import lone_images, printable
from jaxtta.io import atomic_write, read_rows

log = logging.getLogger(__name__)
TOP = 3  # labels in a line
RECOUNT = 60.0  # seconds between two counts of the images in a full folder


class Review:
    """The images that wait for a person.

    Attributes:
        lost: number of images that could not be copied.
        pairs: how often each model was right on the labelled images that they disagree on.
        gain: bounds of the adapted model's gain in accuracy on these, in [-1, 1], that hold at all
            times; None before the first label.
    """

    def __init__(
        self, folder: str | Path, class_names: Sequence[str], below: float, limit: int
    ) -> None:
        """Open the folder; it is made where there is none.

        Args:
            folder: its path.
            class_names: one a class.
            below: an answer is unsure where its likeliest class has a lower probability.
            limit: images in the folder at which no more are copied to it.

        Raises:
            OSError: if it cannot be made, read or written.
            ValueError: if a line of `review.jsonl` is no record.
        """
        self._folder, self._names = Path(folder), tuple(class_names)
        self._below, self._limit, self.lost = below, limit, 0
        self._folder.mkdir(parents=True, exist_ok=True)
        self._labels = self._folder / "labels.csv"
        self._lines = AnswersFile(self._folder / "review.jsonl", header="")
        self._records = {record["file"]: record for record in self._lines.records()}
        self._counted, self._count = time.monotonic(), len(lone_images(self._folder))
        self._read: Any = None
        self.pairs, self._worse = no_pairs(), False
        self.gain: tuple[float, float] | None = None

    def offer(self, item: Item, answer: Answer) -> bool:
        """Copy an image to the folder if a person should look at it and there is room.

        Args:
            item: the image; it needs its original.
            answer: its answer.

        Returns:
            Whether it was copied. A copy that fails is logged once, and counted.
        """
        unsure = answer.finite and answer.confidence < self._below
        if not (unsure or answer.disagree) or item.original is None:
            return False
        if self._count >= self._limit and time.monotonic() - self._counted > RECOUNT:
            self._counted, self._count = time.monotonic(), len(lone_images(self._folder))
        if self._count >= self._limit:
            return False
        adapted = None if answer.adapted is None else self._names[answer.adapted.argmax()]
        stem, _, suffix = str(item.name).replace("\\", "/").rpartition("/")[2].rpartition(".")
        stem = re.sub(r"[^\w-]+", "_", stem or suffix)[-60:] or "image"
        name = f"{len(self._records):06}-{stem}.{re.sub(r'[^a-zA-Z0-9]', '', suffix)[:5] or 'png'}"
        record = {
            "file": name,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "image": printable(item.name),
            "step": answer.step,
            "why": "disagree" if answer.disagree else "unsure",
            **described(answer, self._names, TOP),
            "adapted_label": adapted,
        }
        try:
            with atomic_write(self._folder / name) as temporary:
                if isinstance(item.original, bytes):
                    temporary.write_bytes(item.original)
                else:
                    shutil.copyfile(item.original, temporary)
            self._lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:
            if not self.lost:
                log.warning("%s: %s; images for review are lost", self._folder, error.strerror)
            self.lost += 1
            with contextlib.suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)
            return False
        self._records[name], self._count = record, self._count + 1
        return True

    def adapted_is_worse(self) -> bool:
        """Whether the labels so far say that the adapted model is less accurate than the frozen.

        Only images on which the two disagree count: they decide, and all of them were offered. The
        test is valid whenever one looks; what it once said stays.
        """
        if (labelled := self._labelled()) is not None and not self._worse:
            pairs = [(x["adapted_label"] == y, x["frozen_label"] == y) for y, x in labelled]
            self.pairs = count_pairs(*np.array(pairs).T) if pairs else no_pairs()
            self._worse = bool(is_worse(self.pairs))
            low, high = map(float, bounds(self.pairs))
            self.gain = (low, high) if pairs else None
        return self._worse

    def _labelled(self) -> list[tuple[str, dict[str, Any]]] | None:
        """Label and record of each labelled image that the models disagree on; None if unchanged.

        Lines that name an unknown file or class are logged and left out.
        """
        try:
            stat = self._labels.stat()
        except FileNotFoundError:
            return None
        if self._read == (stat.st_mtime_ns, stat.st_size):
            return None
        self._read, found = (stat.st_mtime_ns, stat.st_size), {}
        try:
            for place, row in read_rows(self._labels, ("file", "label")):
                name, label = row["file"].strip(), row["label"].strip()
                if (record := self._records.get(name)) is None or label not in self._names:
                    log.warning("%s: the file or the class is unknown", place)
                elif record["why"] == "disagree":
                    found[name] = label, record  # the last of several labels of an image
        except (OSError, ValueError) as error:  # a person may be writing it
            log.warning("%s", error)
        return [*found.values()]
