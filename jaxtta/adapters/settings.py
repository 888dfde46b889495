"""Checks of methods' settings: one sentence each, for values of another type too."""

import math
from collections.abc import Callable
from typing import Any


def at_least(least: float, **settings: Any) -> None:
    """Raise a ValueError for a setting below a number, or NaN."""
    _require(lambda value: value >= least, f"at least {least}", settings)


def positive(**settings: Any) -> None:
    """Raise a ValueError for a setting that is not above 0 and finite."""
    _require(lambda value: 0 < value < math.inf, "a positive number", settings)


def positive_or_none(**settings: Any) -> None:
    """Raise a ValueError for a setting that is neither None nor above 0 and finite."""
    _require(
        lambda value: value is None or 0 < value < math.inf, "a positive number or None", settings
    )


def fraction(**settings: Any) -> None:
    """Raise a ValueError for a setting that is not above 0 and at most 1."""
    _require(lambda value: 0 < value <= 1, "above 0 and at most 1", settings)


def in_order(**settings: Any) -> None:
    """Raise a ValueError for a setting that is not two numbers from 0 to 1 in order."""

    def ordered(value: Any) -> bool:
        return len(value) == 2 and 0 <= value[0] <= value[1] <= 1

    _require(ordered, "two numbers from 0 to 1 in order", settings)


def _require(holds: Callable[[Any], Any], expected: str, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        try:
            fits = holds(value)
        except TypeError:  # a text, for one
            fits = False
        if not fits:
            raise ValueError(f"{name} is {value!r}, expected {expected}")
