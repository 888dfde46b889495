"""What command-line scripts share."""

from jaxtta.cli.script import run_script

__all__ = ["run_script"]
