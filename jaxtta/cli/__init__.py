"""Helpers for command-line scripts."""

from jaxtta.cli.class_names import class_names_of
from jaxtta.cli.script import run_script

__all__ = ["class_names_of", "run_script"]
