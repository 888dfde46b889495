"""The `jaxtta` command, and `run_script`: options, one-line errors and exit codes of a script."""

import contextlib
import dataclasses
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeVar

from jaxtta.remote import mirror

Options = TypeVar("Options")

_EXHAUSTED = re.compile("RESOURCE_EXHAUSTED.*(memory|allocat)", re.IGNORECASE)  # or files, disks
_INSIST = 5.0  # seconds; longer than a stopped script needs to write its files


@dataclasses.dataclass(frozen=True)
class ProcessOptions:
    """Errors and compilation."""

    debug: bool = False  # show tracebacks
    # compile anew; otherwise programs are kept in JAX_COMPILATION_CACHE_DIR or the user's cache
    no_cache: bool = False


def run_script(
    options: type[Options],
    main: Callable[[Options], Any],
    doc: str | None,
    arguments: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Parse the command line, with `ProcessOptions` beside the script's own; run; exit with a code.

    The codes are 0, 1 for an error in one line (with `--debug` its traceback), 2 for options that
    cannot be parsed, 130 for Ctrl-C and 141 if nobody reads the output any more (`| head`), or what
    `main` returns.

    Args:
        options: a documented dataclass.
        main: does the work; returns None or the exit code.
        doc: the script's docstring, shown above the options.
        arguments: the command line; None for that of this process.
        prog: the program's name in the help text.
    """
    import tyro  # here, since the list of commands needs none

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it may be closed or replaced
            stream.reconfigure(errors="backslashreplace")
    flat, debug = tyro.conf.arg(name=""), False
    both: Any = {"own": Annotated[options, flat], "process": Annotated[ProcessOptions, flat]}
    both = dataclasses.make_dataclass("Arguments", both.items())
    once = (tyro.conf.FlagCreatePairsOff,)
    try:
        given: Any = tyro.cli(both, prog=prog, description=doc, args=arguments, config=once)
        parsed, process = given.own, given.process
        debug = process.debug
        _keep_programs(not process.no_cache)
        with _notes(), contextlib.ExitStack() as stack:
            parsed = _with_local_folders(parsed, stack)
            with _interrupts():  # which insist; the last upload may take longer
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
    except (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError) as error:
        sentence = str(error)
        exhausted = _EXHAUSTED.search(sentence) or isinstance(error, MemoryError)
        if debug or (isinstance(error, RuntimeError) and not exhausted):
            raise
        if exhausted:
            sentence = _memory(sentence)
        if isinstance(error, OSError) and error.filename and error.strerror:
            sentence = f"{error.filename}: {error.strerror}"
        print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
        code = 1
    if code:
        sys.exit(code)


def _memory(message: str) -> str:
    """What was asked of the device's or this machine's memory, and what lowers it."""
    asked = message.removeprefix("RESOURCE_EXHAUSTED: ").partition("\n")[0].rstrip(".")
    asked = asked or "memory is short"
    asked = re.sub(r"(\d{6,}) bytes", lambda found: f"{int(found[1]) / 1e9:.3g} GB", asked)
    lower = "use a smaller --batch-size (TNT: --tnt.views-per-chunk or --canvas), --remat"
    return f"{asked}: {lower} or --compute-dtype bfloat16; finished results are kept"


def _keep_programs(keep: bool) -> None:
    """Keep compiled programs for later runs, where JAX_COMPILATION_CACHE_DIR says or by default."""
    import jax

    jax.config.update("jax_enable_compilation_cache", keep)
    if not keep or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    with contextlib.suppress(OSError, RuntimeError):  # no home, or not one's own
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "jaxtta")
        cache.mkdir(0o700, parents=True, exist_ok=True)  # others' programs would be run
        if os.access(cache, os.W_OK):  # JAX would warn of each program
            jax.config.update("jax_compilation_cache_dir", str(cache))
            jax.config.update("jax_compilation_cache_max_size", 2**31)  # bytes; the oldest go
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _with_local_folders(options: Any, stack: contextlib.ExitStack) -> Any:
    """Options with a local copy, until the stack closes, of folders of results that are URLs."""
    given, copies = vars(options), {}
    if given.get("dry_run"):
        return options
    if "run" in given:
        copies["run"] = _with_local_folders(given["run"], stack)
    if given.get("output"):
        part: str | None = ""
        if "shard" in given:
            part = "{}-of-{}".format(*options.part)
            part = part if options.join_hosts() == 0 else None  # of several hosts, one writes
        local = stack.enter_context(mirror(given["output"], part))
        copies["output"] = type(given["output"])(local)  # some have it as text
    if "folders" in given:  # of a report
        copies["folders"] = tuple(stack.enter_context(mirror(x, None)) for x in given["folders"])
    return dataclasses.replace(options, **copies)


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Repeat Ctrl-C, which Python drops in garbage collection."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, _INSIST)
        raise KeyboardInterrupt

    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGALRM):
            stack.callback(signal.signal, number, signal.signal(number, interrupt))
        stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
        yield


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Print what the package logs."""
    log, handler = logging.getLogger("jaxtta"), logging.StreamHandler()
    with contextlib.ExitStack() as stack:
        stack.callback(log.removeHandler, handler)
        stack.callback(log.setLevel, log.level)
        stack.callback(setattr, log, "propagate", log.propagate)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False  # other libraries' handlers of the root logger print too
        yield
