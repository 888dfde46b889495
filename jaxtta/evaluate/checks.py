"""Checks of command-line options that several commands share."""

from collections.abc import Sequence
from typing import Any

from jaxtta import assets


def require_distinct(**choices: Sequence[Any]) -> None:
    """Raise a ValueError for an option with no values or with duplicates."""
    for name, given in choices.items():
        if not given or len(set(given)) < len(given):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} needs one or more distinct values, not {[*given]}")


def require_at_least(**limits: tuple[float | None, float]) -> None:
    """Raise a ValueError for an option below its minimum; None means not set."""
    for name, (value, least) in limits.items():
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")


def default_severity(layout: str, root: str, asked: int | None = None) -> int:
    """The given severity, or 0 for arrays, 1 for the small bundled images, 5 for others."""
    usual = 1 if root == str(assets.IMAGES) else 5
    return 0 if layout == "arrays" else asked or usual
