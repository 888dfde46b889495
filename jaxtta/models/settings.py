"""Models and functions as JSON values, by which a run notices that they are others."""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtta.io import digest_array

_NO_MATTER = ("source", "remat", "scan", "fused_attention", "class_names", "preprocessing_origin")
"""Fields of a model that change no result but by rounding: its folder, how its blocks are compiled
and with which kernels, and names, which the labels' names stand for."""


def model_settings(model: Any, within: tuple[int, ...] = ()) -> Any:
    """A model's architecture and preprocessing as JSON values; any other object's settings, too.

    Dataclasses and named tuples are listed by field, functions by name and by the values that they
    enclose; of an array the digest is listed, of another object the class, its numbers and texts.

    Examples:
        With `model` of `jaxtta.load`'s example:

        >>> jaxtta.models.model_settings(model)["preprocessing"]["image_size"]
        32
    """
    if id(model) in within:  # a function may enclose itself
        return "itself"
    tell = functools.partial(model_settings, within=(*within, id(model)))
    if isinstance(model, Mapping):
        return {str(name): tell(value) for name, value in model.items()}
    if isinstance(model, list | tuple) and not hasattr(model, "_fields"):
        return [tell(value) for value in model]
    if model is None or isinstance(model, str | int | float):
        return model
    if isinstance(model, np.ndarray | np.generic | jax.Array):
        return digest_array(np.asarray(model))
    if dataclasses.is_dataclass(model) and not isinstance(model, type):
        fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
        # Flax adds parent and name to the fields of its modules.
        left_out = {*_NO_MATTER, *(("parent", "name") if hasattr(model, "parent") else ())}
        return {name: tell(x) for name, x in fields.items() if name not in left_out}
    if names := getattr(model, "_fields", None):  # a named tuple
        return {name: tell(getattr(model, name)) for name in names if name not in _NO_MATTER}
    if isinstance(model, type | np.dtype) and np.dtype(model).kind != "O":
        return np.dtype(model).name
    return _told(model, tell)


def _told(model: Any, tell: Any) -> Any:
    """What `model_settings` tells of a function, class or object."""
    function, values = inspect.unwrap(model), {}
    if isinstance(model, functools.partial):
        function, values = model.func, {"given": model.args, **model.keywords}
    elif inspect.ismethod(model):
        values = {"self": model.__self__}
    elif inspect.isfunction(function) and function.__closure__:
        values = inspect.getclosurevars(function).nonlocals
    elif not hasattr(model, "__qualname__"):
        function, own = type(model), getattr(model, "__dict__", {})
        values = {
            name: value
            for name, value in own.items()
            if isinstance(value, str | int | float) and name[0] != "_" and name not in _NO_MATTER
        }
    name = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    return {"is": name, **tell(values)} if values else name
