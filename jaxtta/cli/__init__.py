"""The `jaxtta` command, and `run_script`: options, one-line errors and exit codes of a script."""

import contextlib
import io
import logging
import os
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

    The codes are 0, 1 for an error in one line (with `--debug` its traceback), 2 for options that
    cannot be parsed, 130 for Ctrl-C and 141 if nobody reads the output any more (`| head`), or what
    `main` returns.

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
    debug, once = False, (tyro.conf.FlagCreatePairsOff,)
    try:
        parsed: Any = tyro.cli(options, prog=prog, description=doc, args=arguments, config=once)
        debug = getattr(parsed, "run", parsed).debug
        with _notes_and_interrupts():
            code = main(parsed)
        sys.stdout.flush()  # here, so that an error is handled
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        for thread in threading.enumerate():  # Python may crash at its end while these read images
            if thread is not threading.current_thread():
                thread.join(2)
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        code = 141  # as the shell says for programs that this ends
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if debug:
            raise
        sentence = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            sentence = f"{error.filename}: {error.strerror}"
        print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
        code = 1
    if code:
        sys.exit(code)


@contextlib.contextmanager
def _notes_and_interrupts() -> Iterator[None]:
    """Print what the package logs, and repeat Ctrl-C: Python drops it in garbage collection."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, _INSIST)
        raise KeyboardInterrupt

    log, handler = logging.getLogger("jaxtta"), logging.StreamHandler()
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGALRM):
            stack.callback(signal.signal, number, signal.signal(number, interrupt))
        stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        stack.callback(log.removeHandler, handler)
        stack.callback(log.setLevel, log.level)
        stack.callback(setattr, log, "propagate", log.propagate)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False  # other libraries' handlers of the root logger print too
        yield
