"""Adapters by name with settings: `tent:lr=1e-4`, `mymodule:make`, `guarded:tnt:steps=3`."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, cast

from jaxtta.adapters.methods import METHODS
from jaxtta.adapters.named import check_settings, known_settings
from jaxtta.adapters.specs import AdapterSpec

GUARDED = "guarded"


def parse_adapter(text: str) -> AdapterSpec:
    """Read an adapter's name and settings.

    Args:
        text: `tent`, `tent:lr=1e-4`, `package.module:function` or
            `package.module:function:key=value,…`; modules in the current folder are found. After
            `guarded:` the adapter is guarded: `guarded:tent:lr=1e-4`.

    Examples:
        >>> spec = jaxtta.adapters.parse_adapter("guarded:tent:lr=1e-4")
        >>> spec.name, dict(spec.settings), spec.guard
        ('tent', {'lr': 0.0001}, True)
    """
    name, _, rest = text.partition(":")
    if name == GUARDED:
        inner = parse_adapter(rest)
        if inner.guard:
            raise ValueError(f"{text}: is guarded twice")
        return inner._replace(text=text, guard=True)
    if name not in METHODS:
        return _parse_function(text, name, *rest.partition(":")[::2])
    spec = AdapterSpec(text, name, _parse_settings(text, rest), METHODS[name].make, own=False)
    check_settings(spec)
    return spec


def _parse_function(text: str, module: str, name: str, rest: str) -> AdapterSpec:
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise ValueError(
            f"unknown adapter {text!r}, expected {', '.join(METHODS)}, with settings as in "
            "tent:lr=1e-4, or MODULE:FUNCTION of your own"
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"{module}:{name}: the module cannot be imported ({error!r})") from error
    if not callable(function):
        raise ValueError(f"{module}:{name}: the module has no function of this name")
    settings, signature = _parse_settings(text, rest), inspect.signature(function)
    try:
        signature.bind(None, None, **settings)
    except TypeError as error:
        called = f"it is called (model, task, **settings) and takes {signature}"
        raise ValueError(f"{text}: {error}; {called}") from error
    return AdapterSpec(text, f"{module}:{name}", settings, cast(Any, function))


def _parse_settings(text: str, given: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^(]*\))", given)):  # not within (0.5,1)
        key, equals, value = part.partition("=")
        if not equals or not value or key in settings:
            raise ValueError(f"{text}: {part!r} is no setting, expected KEY=VALUE, each key once")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            settings[key] = {"true": True, "false": False}.get(value, value)
    return settings


def has_rate(text: str) -> bool:
    """Whether a named adapter has a learning rate that its text does not say."""
    spec = parse_adapter(text)
    return not spec.own and "lr" in {*known_settings(spec.name)} - {*spec.settings}


def with_rate(text: str, rate: float) -> str:
    """An adapter's text with a learning rate: tent:lr=0.0001."""
    return f"{text}{',' if parse_adapter(text).settings else ':'}lr={float(rate)!r}"
