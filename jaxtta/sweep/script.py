"""What every script does around its work: options, errors in one sentence, exit codes."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

Options = TypeVar("Options")


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
        main(parsed)
    except KeyboardInterrupt:
        sys.exit(_say("stopped; what was finished is saved", 130))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if parsed.debug:
            raise
        known = isinstance(error, OSError) and error.filename and error.strerror
        sentence = f"{error.filename}: {error.strerror}" if known else str(error)
        sys.exit(_say(" ".join(sentence.split()), 1))


def _say(sentence: str, code: int) -> int:
    print(f"error: {sentence}" if code == 1 else sentence, file=sys.stderr)
    return code
