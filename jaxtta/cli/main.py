"""Test-time adaptation of CLIP."""

import importlib
import sys
from collections.abc import Sequence

from jaxtta.cli import run_script

COMMANDS = {
    "classify": "Label images with zero-shot CLIP or any adapter.",
    "sweep": "Measure adapters on corrupted images.",
    "shifts": "Measure adapters on natural distribution shifts.",
    "diagnose": "Diagnose models, or check a folder of your own images.",
    "pilot": "Find out on your own images whether to switch adaptation on.",
    "serve": "Label images as they come, with a guarded model that adapts while it runs.",
    "continual": "Train a model on one task after another.",
    "pretrain-mgg": "Train MGTTA's generator of updates.",
    "replay": "Repeat the run of a log, and say where it first differs.",
    "bundle": "Keep, install and revert what was learnt for an environment.",
    "report": "Make a sweep's report again, or compare sweeps.",
    "convert": "Convert a PyTorch file of weights to a folder that jaxtta loads.",
}
"""Each in the file of its name, with `Options`, `run` and the help text as docstring."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command with its options, or those of this process; exit as `run_script` says."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ("--help",)
    if name not in COMMANDS:
        known = "\n".join(f"  {command:<12}  {text}" for command, text in COMMANDS.items())
        print(f"usage: jaxtta COMMAND …\n\n{__doc__}\n\n{known}\n")
        print("jaxtta COMMAND --help explains a command.")
        return None if name in ("-h", "--help") else sys.exit(2)
    # Commands are imported when they run: the list of them needs no JAX.
    try:
        command = importlib.import_module(f"jaxtta.cli.{name.replace('-', '_')}")
    except ModuleNotFoundError as error:
        if str(error.name).startswith("jaxtta"):
            raise
        sys.exit(f"error: jaxtta {name} needs {error.name}: pip install 'jaxtta[experiments]'")
    run_script(command.Options, command.run, command.__doc__, rest, f"jaxtta {name}")
