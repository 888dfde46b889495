"""Running a script: command-line options, one-line errors and exit codes."""

import contextlib
import io
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVar

Options = TypeVar("Options")

_INSIST = 5.0  # seconds; longer than a stopped script needs to write its files


def run_script(
    options: type[Options],
    main: Callable[[Options], Any],
    doc: str | None,
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Parse the command line, run, and exit with a code.

    The codes are 0, 1 for an error, 2 for options that cannot be parsed, 130 for Ctrl-C and 141 if
    nobody reads the output any more (`| head`), or what `main` returns. Invalid input gives a
    one-line error, unless `--debug` asks for its traceback. What the output's encoding lacks is
    printed escaped.

    Args:
        options: a documented dataclass with a field `debug`, or `run` of `RunOptions`.
        main: does the work; returns None or the exit code.
        doc: the script's docstring, shown above the options.
        arguments: the command line; None for that of this process.
        prog: the program's name in the help text.
    """
    import tyro  # here, since the list of commands needs none

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may be closed or replaced
            stream.reconfigure(errors="backslashreplace")
    debug, note, once = False, "", (tyro.conf.FlagCreatePairsOff,)
    try:
        parsed: Any = tyro.cli(options, prog=prog, description=doc, args=arguments, config=once)
        debug = getattr(parsed, "run", parsed).debug
        stores = hasattr(parsed, "run") or hasattr(parsed, "output")
        note = "; finished results are saved" * stores
        with _insistent_interrupts(), _notes_on_stderr():
            code = main(parsed)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, so that an error is handled
    except KeyboardInterrupt:
        print(f"interrupted{note}", file=sys.stderr)
        code = 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            sys.exit(141)  # as the shell says for programs that this ends
        if debug:
            raise
        sentence = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            sentence = f"{error.filename}: {error.strerror}"
        print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
        code = 1
    if code == 130:  # Python may crash at its end while threads that read images still run
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(2)
    if code:
        sys.exit(code)


@contextlib.contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Print what the package logs: the preprocessing that was read, images passed over."""
    log, handler = logging.getLogger("jaxtta"), logging.StreamHandler()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False  # other libraries' handlers of the root logger print too
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def _output_is_closed() -> bool:
    """Whether the reader of the output has gone; nothing more is written to it then."""
    output = select.poll()
    output.register(sys.stdout, 0)  # errors alone
    if not output.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
    return True


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
