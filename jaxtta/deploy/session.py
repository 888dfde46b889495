"""One stream of images, answered batch by batch; the adapter's state goes on from each to the next.

    session = Session(model, params, task, adapter, batch_size=16)
    for answer in session.answer(images, names):  # at most 16 PIL images
        print(answer.name, session.class_names[answer.label], answer.confidence)
    session.save("state.safetensors")  # another Session of the same settings loads it and goes on

A session is not for several threads at once; `prepare`, which is the slow work on an image, is.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from PIL import Image
from scipy.special import softmax

from jaxtta import data, io, tree
from jaxtta.adapters import Adapter, Prediction
from jaxtta.models import Batch, Task

CANVAS = 512  # side in pixels to which full-size images are padded; larger ones are shrunk
DECISIONS = ("adapt", "skip", "forget", "roll_back", "stop", "stopped")


class Log(Protocol):
    """What takes a record of every step; `jaxtta.deploy.audit.AuditLog` is one."""

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record; must not wait for a disk."""
        ...


class Prepared(NamedTuple):
    """An image as the model takes it.

    Attributes:
        pixels: (side, side, 3) uint8, at the model's resolution or padded to the canvas.
        size: (2,) its height and width on the canvas.
    """

    pixels: np.ndarray
    size: np.ndarray


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
    """

    name: Any
    scores: np.ndarray
    reference: np.ndarray | None
    adapted: np.ndarray | None
    step: int
    updates: int
    decision: str | None
    share: float | None

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
        return bool(self.reference.argmax() != self.adapted.argmax())


class Session:
    """One stream of images, its adapter's state and its counters.

    Attributes:
        state: the adapter's.
        prediction: of the last step, in numpy, padding included; None before the first.
        digest: eight hexadecimal digits of the state's checksum after the last step; "" before the
            first and where `digests` is false.
        steps: number of batches answered.
        seen: number of images answered.
        updates: number of batches learnt from, since the last return to the source.
        class_names: one name a class.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        task: Task | None,
        adapter: Adapter,
        *,
        batch_size: int,
        min_adapt: int = 4,
        full_size: bool = False,
        class_names: Sequence[Any] = (),
        settings: Mapping[str, Any] | None = None,
        log: Log | None = None,
        digests: bool = False,
        key: jax.Array | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Start a stream.

        Args:
            model: a model that `jaxtta.load` gave.
            params: its parameters.
            task: the classes; None for a model that has its own.
            adapter: made for them, with a guard or without.
            batch_size: images per step; fewer are padded, so that there is one compilation.
            min_adapt: a batch of fewer images is answered and leaves the state as it was; 1 for
                methods that take images one by one. A guard has a limit of its own instead.
            full_size: whether the adapter cuts its own views, of full-size images
                (`AdapterSpec.needs_originals`).
            class_names: by default the task's or the model's.
            settings: JSON that a loaded state must have been saved with, beside the classes.
            log: gets a record of each step.
            digests: whether to compute `digest` without a log too.
            key: PRNG key for the adapter's `init`.
            now: the time of a record in seconds since 1970.

        Raises:
            ValueError: if batch_size or min_adapt is below 1.
        """
        for name, value in (("batch_size", batch_size), ("min_adapt", min_adapt)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.model, self.batch_size, self.full_size = model, batch_size, full_size
        own = getattr(task, "class_names", ()) or getattr(model, "class_names", ()) or ()
        self.class_names = tuple(class_names or own)
        prompts = "" if task is None else io.digest_array(task.token_ids)
        self.settings = io.as_json(
            {**(settings or {}), "class names": self.class_names, "prompts": prompts}
        )
        self.state, self.prediction, self.digest = adapter.init(params, key), None, ""
        self.steps = self.seen = self.updates = 0
        self._params, self._min_adapt, self._log, self._now = params, min_adapt, log, now
        with_digest = digests or log is not None

        @jax.jit
        def step(params: Any, state: Any, batch: Batch, learn: Any) -> tuple[Any, Prediction, Any]:
            after, prediction = adapter.step(params, state, batch)
            if "decision" not in prediction.metrics:
                after = optax.tree.where(learn, after, state)
            digest = tree.fingerprint(after) if with_digest else None
            return after, prediction._replace(outputs=None), digest

        # The state is not donated: an error must not take it away.
        self._step = step

    def prepare(self, image: Image.Image | np.ndarray) -> Prepared:
        """Bring an image to the form that the model takes; may run in other threads.

        Args:
            image: in any mode and size; or (height, width, 3) uint8.
        """
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if self.full_size:
            return Prepared(
                *data.pad_to_canvas(np.asarray(self.model.preprocessing.rgb(image)), CANVAS)
            )
        pixels = self.model.preprocess([image])[0]
        return Prepared(pixels, np.array(pixels.shape[:2], np.int32))

    def answer(
        self, images: Sequence[Image.Image | np.ndarray | Prepared], names: Sequence[Any]
    ) -> list[Answer]:
        """Answer a batch, and let the adapter learn from it afterwards.

        Args:
            images: 1 to batch_size of them, in the forms that `prepare` takes or gives.
            names: one for each; they are in the answers and in the log.

        Returns:
            An answer for each image, in order.

        Raises:
            ValueError: for no image, more than batch_size, or another number of names.
        """
        if not 1 <= len(images) <= self.batch_size:
            raise ValueError(f"{len(images)} images, expected 1 to {self.batch_size}")
        if len(images) != len(names):
            raise ValueError(f"{len(images)} images and {len(names)} names")
        ready = [x if isinstance(x, Prepared) else self.prepare(x) for x in images]
        batch = Batch.padded(np.stack([x.pixels for x in ready]), self.batch_size, self.seen)
        if self.full_size:
            sizes = np.ones((self.batch_size, 2), np.int32)
            sizes[: len(ready)] = [x.size for x in ready]
            batch = batch._replace(sizes=sizes)
        learn = len(images) >= self._min_adapt
        state, given, digest = self._step(self._params, self.state, batch, learn)
        prediction = jax.device_get(given)
        metrics, before = prediction.metrics, self.updates
        guarded = "decision" in metrics
        answers = self._answers(prediction, names, before)
        # What follows cannot fail: the state and its counters change together.
        self.state, self.prediction = state, prediction
        self.digest = "" if digest is None else f"{int(digest):08x}"
        self.steps, self.seen = self.steps + 1, self.seen + len(images)
        if guarded:
            self.updates = int(metrics["updates"])
        else:
            self.updates += learn and not metrics.get("skipped", False)
        if self._log is not None:
            self._log.write(self._record(answers))
        return answers

    def _answers(self, prediction: Prediction, names: Sequence[Any], updates: int) -> list[Answer]:
        metrics, both = prediction.metrics, getattr(prediction, "answers", None)
        decision = DECISIONS[int(metrics["decision"])] if "decision" in metrics else None
        share = float(metrics["share"]) if "share" in metrics else None
        scores = _softmax(prediction.logits)
        reference, adapted = (None, None) if both is None else map(_softmax, both)
        return [
            Answer(
                name,
                scores[n],
                None if reference is None else reference[n],
                None if adapted is None else adapted[n],
                self.steps,
                updates,
                decision,
                share,
            )
            for n, name in enumerate(names)
        ]

    def _record(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {
            "time": self._now(),
            "step": answers[0].step,
            "images": [answer.name for answer in answers],
            "served": [[self.class_names[a.label], a.confidence] for a in answers],
            "state_digest": self.digest,
        }

    def save(self, path: str | Path) -> None:
        """Save the state and the counters, atomically."""
        counts = {"steps": self.steps, "seen": self.seen, "updates": self.updates}
        io.save_state(path, self.state, {"settings": self.settings, "counts": counts})

    def load(self, path: str | Path) -> None:
        """Go on from what `save` saved.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not the state of a session with the same settings, adapter, classes
                and model.
        """
        note = io.load_arrays(path)[1].get("note")
        if not isinstance(note, dict) or {"settings", "counts"} - note.keys():
            raise ValueError(f"{path}: holds no session's state")
        saved = note["settings"]
        for name in sorted({*saved, *self.settings}):
            if saved.get(name) != (own := self.settings.get(name)):
                raise ValueError(f"{path}: has {name} {saved.get(name)!r}, expected {own!r}")
        self.state = io.load_state(path, self.state)
        counts = (note["counts"][name] for name in ("steps", "seen", "updates"))
        self.steps, self.seen, self.updates = counts
        self.prediction, self.digest = None, ""


def _softmax(logits: Any) -> np.ndarray:
    """Probabilities, in numpy; a row that holds a NaN or an infinity is all NaN."""
    with np.errstate(invalid="ignore"):
        return softmax(np.asarray(logits, np.float32), axis=-1)
