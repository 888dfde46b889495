"""One stream of images, answered batch by batch; the adapter's state goes on from each to the next.

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
from jaxtta.adapters.guard import DECISIONS
from jaxtta.deploy.answers import Answer
from jaxtta.deploy.audit import record_of
from jaxtta.models import Batch, Task

CANVAS = 512  # side in pixels to which full-size images are padded; larger ones are shrunk


class Log(Protocol):
    """What takes a record of every step; `jaxtta.deploy.audit.AuditLog` is one."""

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record; must not wait for a disk."""


class Prepared(NamedTuple):
    """An image as the model takes it.

    Attributes:
        pixels: (side, side, 3) uint8, at the model's resolution or padded to the canvas.
        size: (2,) its height and width on the canvas.
    """

    pixels: np.ndarray
    size: np.ndarray


class Session:
    """One stream of images, its adapter's state and its counters.

    Attributes:
        model: the model.
        params: its parameters.
        state: the adapter's.
        log: gets a record of each step, or None; one that is set later does from then on.
        served: from an image's name to whether the guard's mixture is its answer; None for always.
        prediction: of the last step, in numpy, padding included; None before the first.
        digest: eight hexadecimal digits of the state's checksum; "" where `digests` is false.
        steps: number of batches answered.
        seen: number of images answered.
        updates: number of batches learnt from, since the last return to the source.
        class_names: one name a class.

    Examples:
        >>> from jaxtta.deploy.session import Session
        >>> adapter = jaxtta.adapters.tent(model, task)  # names: see `jaxtta.load`
        >>> session = Session(model, params, task, adapter, batch_size=4)
        >>> answers = session.answer([*images[:4]], ["a.png", "b.png", "c.png", "d.png"])
        >>> answers[0].name, answers[0].scores.shape, session.updates
        ('a.png', (10,), 1)
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
        about: Any = None,
        log: Log | None = None,
        digests: bool = False,
        served: Callable[[str], bool] | None = None,
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
            about: JSON that is saved with a state, and not compared.
            log: gets a record of each step; may be set later too, with `digests`.
            digests: whether to compute `digest` without a log too.
            served: from an image's name to whether the guard's mixture is its answer, or the frozen
                model's; the adapter learns from all images. A record then says so in `guarded`.
            key: PRNG key for the adapter's `init`.
            now: the time of a record in seconds since 1970.

        Raises:
            ValueError: if batch_size or min_adapt is below 1.
        """
        for name, value in (("batch_size", batch_size), ("min_adapt", min_adapt)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.model, self.params, self.log = model, params, log
        self.batch_size, self.full_size = batch_size, full_size
        own = getattr(task, "class_names", ()) or getattr(model, "class_names", ()) or ()
        self.class_names = tuple(class_names or own)
        prompts = "" if task is None else io.digest_array(task.token_ids)
        self.settings = io.as_json(
            {**(settings or {}), "class names": self.class_names, "prompts": prompts}
        )
        self._min_adapt, self.served, self._now, self._about = min_adapt, served, now, about
        self._digests = digests or log is not None
        self.prediction: Prediction | None = None
        self.steps = self.seen = self.updates = 0

        @jax.jit
        def step(params: Any, state: Any, batch: Batch, learn: Any) -> tuple[Any, Prediction]:
            after, prediction = adapter.step(params, state, batch)
            if "decision" not in prediction.metrics:
                after = optax.tree.where(learn, after, state)
            return after, prediction._replace(outputs=None)

        # The state is not donated: an error must not take it away. Its digest is a program of its
        # own: with it, XLA could round the step's numbers otherwise.
        self._step, self._digest = step, jax.jit(tree.fingerprint)
        self._begin(adapter.init(params, key))

    def compile(self) -> None:
        """Compile the step now, not when the first images come."""
        side = CANVAS if self.full_size else self.model.image_size
        blank = np.zeros((self.batch_size, side, side, 3), np.uint8)
        sizes = np.ones((self.batch_size, 2), np.int32) if self.full_size else None
        mask = np.zeros(self.batch_size, bool)
        batch = Batch(blank, mask, self.seen + np.arange(self.batch_size), sizes)
        jax.block_until_ready(self._step(self.params, self.state, batch, False)[1].logits)

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
        self,
        images: Sequence[Image.Image | np.ndarray | Prepared],
        names: Sequence[Any],
        reply: Callable[[list[Answer]], None] = lambda answers: None,
    ) -> list[Answer]:
        """Answer a batch, and let the adapter learn from it afterwards.

        Args:
            images: 1 to batch_size of them, in the forms that `prepare` takes or gives.
            names: one for each; they are in the answers and in the log.
            reply: gets the answers before anything is done for the log.

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
        state, given = self._step(self.params, self.state, batch, learn)
        prediction, guarded = self._chosen(jax.device_get(given), names)
        metrics = prediction.metrics
        answers = self._answers(prediction, guarded, names)
        # The state and its counters change together: nothing between can fail.
        self.state, self.prediction = state, prediction
        self.steps, self.seen = self.steps + 1, self.seen + len(images)
        if "decision" in metrics:
            self.updates = int(metrics["updates"])
        else:
            self.updates += learn and not metrics.get("skipped", False)
        reply(answers)
        self.digest = self._digest_of(state)
        if self.log is not None:
            pixels = [x.pixels for x in ready]
            now, step = self._now(), self.steps - 1
            record = record_of(prediction, step, names, pixels, self.class_names, self.digest, now)
            self.log.write(record | ({"guarded": guarded} if self.served else {}))
        return answers

    def _begin(self, state: Any) -> None:
        self.state = state
        self.digest = self._digest_of(state)

    def _digest_of(self, state: Any) -> str:
        return f"{int(self._digest(state)):08x}" if self._digests else ""

    def _chosen(
        self, prediction: Prediction, names: Sequence[Any]
    ) -> tuple[Prediction, Sequence[bool]]:
        """The prediction with the frozen model's answers where those are to be served."""
        if self.served is None or prediction.answers is None:
            return prediction, [prediction.answers is not None] * len(names)
        chosen = [bool(self.served(str(name))) for name in names]
        logits, reference = np.array(prediction.logits), prediction.answers.reference
        for n in np.flatnonzero(~np.array(chosen)):
            logits[n] = reference[n]
        return prediction._replace(logits=logits), chosen

    def _answers(
        self, prediction: Prediction, guarded: Sequence[bool], names: Sequence[Any]
    ) -> list[Answer]:
        metrics, both = prediction.metrics, prediction.answers
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
                self.updates,
                decision,
                share if guarded[n] or share is None else 0.0,
                guarded[n],
            )
            for n, name in enumerate(names)
        ]

    def save(self, path: str | Path) -> None:
        """Save the state and the counters, atomically."""
        counts = {"steps": self.steps, "seen": self.seen, "updates": self.updates}
        note = {"settings": self.settings, "counts": counts, "about": self._about}
        io.save_state(path, self.state, note)

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
        counts = [note["counts"].get(name, 0) for name in ("steps", "seen", "updates")]
        self._begin(io.load_state(path, self.state))
        self.steps, self.seen, self.updates = counts
        self.prediction = None


def _softmax(logits: Any) -> np.ndarray:
    """Probabilities, in numpy; a row that holds a NaN, or infinity, is all NaN."""
    with np.errstate(invalid="ignore"):
        return softmax(np.asarray(logits, np.float32), axis=-1)
