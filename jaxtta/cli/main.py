"""Test-time adaptation of CLIP: `jaxtta COMMAND --help` explains a command."""

import sys
from typing import Annotated, Any, Union

import tyro

from jaxtta.cli import convert
from jaxtta.cli.script import run_script

COMMANDS = {"convert": (convert.Convert, convert.run, convert.__doc__)}
"""By name: the options, what runs with them, and the help text."""


def main() -> None:
    """Parse the command line, run the subcommand, and exit with a code (see `run_script`)."""
    runs = {options: run for options, run, _ in COMMANDS.values()}
    run_script(_options(), lambda options: runs[type(options)](options), __doc__)


def _options() -> Any:
    chosen, kinds = sys.argv[1:2], []
    for name, (options, _, doc) in COMMANDS.items():
        # The list of commands shows one line of each.
        text = doc if chosen == [name] else (doc or "").partition("\n")[0]
        kinds.append(Annotated[options, tyro.conf.subcommand(name, description=text)])
    # tyro makes subcommands of two kinds and more.
    return Union[(*kinds, Annotated[None, tyro.conf.Suppress])]
