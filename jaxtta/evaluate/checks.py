"""Checks of command-line options that several commands share."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtta import assets


def require_distinct(**choices: Sequence[Any]) -> None:
    """Raise a ValueError for an option with no values or with duplicates."""
    for name, given in choices.items():
        fits = given and len(set(given)) == len(given)
        _require(fits, name, f"needs one or more distinct values, not {[*given]}")


def require_at_least(**limits: tuple[int | None, int]) -> None:
    """Raise a ValueError for an option below its minimum; None means not set."""
    for name, (value, least) in limits.items():
        fits = value is None or value >= least
        _require(fits, name, f"is {value}, expected at least {least}")


def require_positive(**rates: Sequence[float | None]) -> None:
    """Raise a ValueError for learning rates that are not positive; None means not set."""
    for name, rate in ((name, rate) for name, given in rates.items() for rate in given):
        fits = rate is None or 0 < rate < math.inf
        _require(fits, name, f"is {rate}, expected a positive number")


def default_severity(layout: str, root: str, asked: int | None = None) -> int:
    """The given severity, or 0 for arrays, 1 for the small bundled images, 5 for others."""
    usual = 1 if root == str(assets.IMAGES) else 5
    return 0 if layout == "arrays" else asked or usual


def _require(fits: Any, name: str, said: str) -> None:
    if not fits:
        raise ValueError(f"--{name.replace('_', '-')} {said}")
