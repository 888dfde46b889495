"""What every script does around its work: options, errors in one sentence, exit codes."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")

_INSIST = 5.0  # seconds; longer than what a stopped script still has to write


def run_script(options: type[Options], main: Callable[[Options], Any], doc: str | None) -> None:
    """Parse the command line, run, and leave with an exit code.

    Bad input ends in one sentence and exit code 1, Ctrl-C in 130; a traceback is shown only where
    `options.debug` asks for it, or for errors that no input explains.

    Args:
        options: a dataclass with a `debug` field; its docstrings are the help text.
        main: does the work.
        doc: the script's docstring, shown above the options.
    """
    parsed = tyro.cli(options, description=doc)
    try:
        with _insistent_interrupts():
            main(parsed)
    except KeyboardInterrupt:
        sys.exit(_say("stopped; what was finished is saved", 130))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if parsed.debug:
            raise
        known = isinstance(error, OSError) and error.filename and error.strerror
        sentence = f"{error.filename}: {error.strerror}" if known else str(error)
        sys.exit(_say(" ".join(sentence.split()), 1))


@contextlib.contextmanager
def _insistent_interrupts() -> Iterator[None]:
    """Ctrl-C that comes again until it is heard.

    Python drops a KeyboardInterrupt that happens to be raised in a callback (of the garbage
    collector or a weak reference, of which compiling has many), and the script would go on.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, _INSIST)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are not this thread's
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
