"""Running a script: command-line options, one-line errors and exit codes."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol, TypeVar

import tyro


class HasDebug(Protocol):
    """Options with a `debug` field."""

    @property
    def debug(self) -> bool:
        """Whether to show the traceback of an error."""
        ...


Options = TypeVar("Options", bound=HasDebug)

_INSIST = 5.0  # seconds; longer than a stopped script needs to write its files


def run_script(options: type[Options], main: Callable[[Options], Any], doc: str | None) -> None:
    """Parse the command line, run, and exit with a code.

    Invalid input gives a one-line error and exit code 1, Ctrl-C exit code 130. A traceback is shown
    only with `options.debug` or for unexpected errors.

    Args:
        options: a dataclass with a `debug` field; its attribute docstrings are the help text.
        main: does the work.
        doc: the script's docstring, shown above the options.
    """
    parsed = tyro.cli(options, description=doc)
    try:
        with _insistent_interrupts():
            main(parsed)
    except KeyboardInterrupt:
        sys.exit(_say("interrupted; finished results are saved", 130))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if parsed.debug:
            raise
        sentence = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            sentence = f"{error.filename}: {error.strerror}"
        sys.exit(_say(" ".join(sentence.split()), 1))


@contextlib.contextmanager
def _insistent_interrupts() -> Iterator[None]:
    """Repeat Ctrl-C until it is handled.

    Python ignores a KeyboardInterrupt raised in a callback of the garbage collector or of a weak
    reference (compilation has many), and the script would continue.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, _INSIST)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)
    }
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(sentence: str, code: int) -> int:
    print(f"error: {sentence}" if code == 1 else sentence, file=sys.stderr)
    return code
