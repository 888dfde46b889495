"""What every script does around its work: options, errors in one sentence, exit codes."""

import contextlib
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

import tyro

from jaxtta import assets

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


def check_choices(**choices: Sequence[Any]) -> None:
    """Raise a ValueError for an option without values, or with the same one twice."""
    for name, given in choices.items():
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{_option(name)} needs one or more different values, not {[*given]}")


def check_limits(**limits: tuple[int | None, int]) -> None:
    """Raise a ValueError for an option below its least value; None is not given."""
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise ValueError(f"{_option(name)} is {value}, expected at least {least}")


def check_rates(**rates: Sequence[float | None]) -> None:
    """Raise a ValueError for learning rates that are not positive; None is not given."""
    for name, given in rates.items():
        for rate in given:
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{_option(name)} is {rate}, expected a positive number")


def severity_of(layout: str, root: str, asked: int | None = None) -> int:
    """The severity asked for, or what suits the pictures.

    Args:
        layout: how they lie there; arrays have one of their own, 0.
        root: where; the corruptions are strong for the embedded ones' size.
        asked: 1 to 5; None for 5, or 1 on the embedded pictures.

    Returns:
        The severity of the pictures' domains.
    """
    if layout == "arrays":
        return 0
    if asked is not None:
        return asked
    return 1 if root == str(assets.PICTURES) else 5


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
