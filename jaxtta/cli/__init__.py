"""The `jaxtta` command, and helpers for scripts."""

from jaxtta.cli.script import run_script

__all__ = ["run_script"]
