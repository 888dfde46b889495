"""Helpers for command-line scripts."""

from jaxtta.cli.script import run_script

__all__ = ["run_script"]
