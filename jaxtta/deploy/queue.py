"""A bounded queue of images from several sources, taken out in batches: full ones, or what is due.

    queue = BatchQueue(size=8, limit=256, sources=1)
    queue.put(Item("a.png", session.prepare(image), due=time.monotonic() + 0.05))  # in a thread
    queue.finish()  # this source has no more
    answer_all(queue, session)  # until every source has finished

Images leave it in the order in which they came.
"""

import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

from jaxtta.deploy.answers import Answer
from jaxtta.deploy.session import Prepared, Session

WAIT = 0.2  # seconds between two looks at `stopping`, which a signal's handler may set
NEVER = float("inf")


def nobody(answer: Answer | None) -> None:
    """Of a source that does not wait for its answers."""


class Item(NamedTuple):
    """An image that waits for its answer.

    Attributes:
        name: of the image.
        image: as the model takes it.
        reply: gets the answer, in the thread that answers; None if there will be none.
        original: its file, or the file's content; for the review of images.
        due: time (of `time.monotonic`) at which it is answered in a batch that is not full.
    """

    name: Any
    image: Prepared
    reply: Callable[[Answer | None], None] = nobody
    original: Any = None
    due: float = NEVER


class BatchQueue:
    """A bounded queue of images, for any number of threads that put and one that takes.

    Attributes:
        stopping: set it to end: nothing is taken any more, and no one waits for room.
        limit: number of images at which `offer` refuses more.
    """

    def __init__(self, size: int, limit: int, sources: int) -> None:
        """Make an empty queue.

        Args:
            size: images of a batch.
            limit: images that may wait; above, `offer` refuses. `put` waits for room instead, and
                leaves it for a batch at least.
            sources: how many will call `finish`.
        """
        self.stopping, self.limit = False, limit
        self._size, self._sources, self._error = size, sources, None
        self._items, self._changed = deque[Item](), threading.Condition()

    def __len__(self) -> int:
        """How many images wait."""
        return len(self._items)

    def offer(self, items: Sequence[Item]) -> bool:
        """Add all or none; False where there is no room for all."""
        with self._changed:
            if self.stopping or len(self._items) + len(items) > self.limit:
                return False
            self._items.extend(items)
            self._changed.notify_all()
        return True

    def put(self, item: Item) -> bool:
        """Add one, once fewer than two batches wait; False where the queue is stopping."""
        room = max(self._size, min(2 * self._size, self.limit))  # or no batch would be full
        with self._changed:
            while len(self._items) >= room and not self.stopping:
                self._changed.wait(WAIT)
            if self.stopping:
                return False
            self._items.append(item)
            self._changed.notify_all()
        return True

    def finish(self, error: Exception | None = None) -> None:
        """End a source; what waits is due now. `take` raises the error that it ended with."""
        with self._changed:
            self._sources, self._error = self._sources - 1, self._error or error
            self._items = deque(item._replace(due=0) for item in self._items)
            self._changed.notify_all()

    def take(self) -> list[Item]:
        """Wait for a batch: a full one, what is due, or the rest; [] at the end."""
        with self._changed:
            while not self.stopping:
                if self._error is not None:
                    raise self._error
                count = min(len(self._items), self._size)
                first = [self._items[n] for n in range(count)]
                left = min((item.due for item in first), default=NEVER) - time.monotonic()
                if count == self._size or (count and (left <= 0 or not self._sources)):
                    for _ in first:
                        self._items.popleft()
                    self._changed.notify_all()
                    return first
                if not count and not self._sources:
                    return []
                self._changed.wait(min(left, WAIT))
            return []

    def close(self) -> None:
        """Stop, and tell those that still wait that there is no answer."""
        self.stopping = True
        with self._changed:
            waiting, self._items = self._items, deque[Item]()
            self._changed.notify_all()
        for item in waiting:
            item.reply(None)


def answer_all(
    queue: BatchQueue,
    session: Session,
    after: Callable[[Sequence[Item], Sequence[Answer]], None] = lambda items, answers: None,
) -> None:
    """Answer what a queue gives until it ends.

    Args:
        queue: closed at the end, and after an error.
        session: the model.
        after: called for each batch, once its answers are on their way and its record is written.
    """
    waiting: Sequence[Item] = ()

    def reply(answers: Sequence[Answer]) -> None:
        nonlocal waiting
        replied, waiting = waiting, ()
        for item, answer in zip(replied, answers, strict=True):
            item.reply(answer)

    try:
        while items := queue.take():
            waiting = items
            after(items, session.answer([x.image for x in items], [x.name for x in items], reply))
    finally:
        for item in waiting:  # an error came between
            item.reply(None)
        queue.close()


@contextlib.contextmanager
def signals(queue: BatchQueue) -> Iterator[list[int]]:
    """Stop the queue at Ctrl-C and SIGTERM; a second one interrupts at once.

    Yields:
        The signals that came.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        if came:
            raise KeyboardInterrupt
        came.append(number)
        queue.stopping = True

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, stop))
        yield came
