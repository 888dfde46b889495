"""Checks of command-line options that several commands share."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtta import assets


def require_distinct(**choices: Sequence[Any]) -> None:
    """Raise a ValueError for an option with no values or with duplicates."""
    for name, given in choices.items():
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{_option(name)} needs one or more distinct values, not {[*given]}")


def require_at_least(**limits: tuple[int | None, int]) -> None:
    """Raise a ValueError for an option below its minimum; None means not set."""
    for name, (value, least) in limits.items():
        if value is not None and value < least:
            raise ValueError(f"{_option(name)} is {value}, expected at least {least}")


def require_positive(**rates: Sequence[float | None]) -> None:
    """Raise a ValueError for learning rates that are not positive; None means not set."""
    for name, given in rates.items():
        for rate in given:
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{_option(name)} is {rate}, expected a positive number")


def default_severity(layout: str, root: str, asked: int | None = None) -> int:
    """The given severity, or 0 for arrays, 1 for the small bundled images, 5 for others."""
    if layout == "arrays":
        return 0
    return asked or (1 if root == str(assets.IMAGES) else 5)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
