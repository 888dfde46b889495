"""Adapters by name with settings: `tent:lr=1e-4`, `tnt:steps=3,views=32`, `mymodule:make`."""

import ast
import dataclasses
import importlib
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import optax

from jaxtta import assets
from jaxtta.adapters.base import Adapter
from jaxtta.adapters.batclip import BATCLIP_PRESETS, batclip
from jaxtta.adapters.mgtta import PAPER_LEARNING_RATE, check_statistics, mgtta
from jaxtta.adapters.tent import TENT_PRESETS, tent
from jaxtta.adapters.tnt.adapter import tnt
from jaxtta.adapters.tnt.config import TNTConfig
from jaxtta.adapters.zero_shot import zero_shot
from jaxtta.models import Classifier, Task, load_statistics
from jaxtta.optim import load_mgg, meta_gradient_generator
from jaxtta.tree import normalisation_parameters

log = logging.getLogger(__name__)
SETTINGS = {
    "zero_shot": (),
    "tent": ("lr", "optimizer"),
    "batclip": ("lr", "optimizer"),
    "tnt": tuple(field.name for field in dataclasses.fields(TNTConfig)),
    "mgtta": ("lr", "optimizer", "weight", "tower", "phi", "statistics"),
}
"""The adapters that have a name, and the settings that may follow it."""
OPTIMIZERS = {
    "sgd": partial(optax.sgd, momentum=0.9),
    "adam": partial(optax.adam),
    "adamw": partial(optax.adamw, weight_decay=1e-2),
}


@dataclasses.dataclass(frozen=True)
class MGTTAConfig:
    """MGTTA's settings.

    Attributes:
        phi: file with the generator's weights, from `jaxtta pretrain-mgg`.
        statistics: file with the statistics of clean images' features, from there too.
        weight: of the discrepancy.
        tower: image, or both to adapt the text tower too.
    """

    phi: Path = assets.PHI
    statistics: Path = assets.STATISTICS
    weight: float = 0.4
    tower: Literal["image", "both"] = "image"

    def __post_init__(self) -> None:
        """Validate the settings."""
        if not self.weight >= 0:
            raise ValueError(f"weight is {self.weight}, expected at least 0")
        if self.tower not in ("image", "both"):
            raise ValueError(f"tower is {self.tower!r}, expected image or both")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Settings of the named adapters, where their texts do not say others.

    `preset` names the papers' optimiser settings of TENT and BATCLIP for a benchmark.
    """

    preset: str = "cifar10-c"
    tnt: TNTConfig = dataclasses.field(default_factory=TNTConfig)
    mgtta: MGTTAConfig = dataclasses.field(default_factory=MGTTAConfig)


class AdapterSpec(NamedTuple):
    """An adapter to be made: one of `SETTINGS`, or `function(model, task, **settings)`."""

    text: str  # its name in tables
    name: str
    settings: Mapping[str, Any] = {}
    function: Callable[..., Adapter] | None = None

    @property
    def needs_originals(self) -> bool:
        """Whether it makes its own views, of full-size images."""
        function = getattr(self.function, "func", self.function)  # of a partial
        if function is None:
            return self.name == "tnt"
        return bool(getattr(function, "needs_originals", False))


def parse_adapter(text: str) -> AdapterSpec:
    """Read an adapter's name and settings.

    Args:
        text: `tent`, `tent:lr=1e-4`, `package.module:function` or
            `package.module:function:key=value,…`; modules in the current folder are found.
    """
    name, _, rest = text.partition(":")
    if name not in SETTINGS:
        return _parse_function(text, name, *rest.partition(":")[::2])
    spec = AdapterSpec(text, name, _parse_settings(text, rest))
    if unknown := [key for key in spec.settings if key not in SETTINGS[name]]:
        known = ", ".join(SETTINGS[name]) or "none"
        raise ValueError(f"{text}: unknown setting {unknown[0]!r}, {name} has {known}")
    if name == "tnt":
        tnt_config_of(spec, AdapterConfig())
    elif name != "zero_shot":
        optimizer_of(spec, AdapterConfig())
    if name == "mgtta":
        mgtta_config_of(spec, AdapterConfig())
    return spec


def _parse_function(text: str, module: str, name: str, rest: str) -> AdapterSpec:
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise ValueError(
            f"unknown adapter {text!r}, expected {', '.join(SETTINGS)}, with settings as in "
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
    return AdapterSpec(text, f"{module}:{name}", settings, cast(Callable[..., Adapter], function))


def _parse_settings(text: str, given: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for part in filter(None, re.split(r",(?![^(]*\))", given)):  # not within (0.5,1)
        key, equals, value = part.partition("=")
        if not equals or not value or key in settings:
            raise ValueError(f"{text}: {part!r} is no setting, expected KEY=VALUE, each key once")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[key] = {"true": True, "false": False}.get(value, value)
    return settings


def make_adapter(
    spec: AdapterSpec,
    model: Classifier,
    task: Task | None,
    config: AdapterConfig = AdapterConfig(),
    weights: str | None = None,
) -> Adapter:
    """Make an adapter; `weights`, a digest, tells whether MGTTA's files are the model's."""
    if spec.function is not None:
        made = spec.function(model, task, **spec.settings)
        if not (hasattr(made, "init") and hasattr(made, "step")):
            raise ValueError(f"{spec.text}: gives {made!r:.80}, expected an Adapter")
        return made
    if spec.name == "zero_shot":
        return zero_shot(model, task)
    if spec.name == "tnt":
        return tnt(model, task, config=tnt_config_of(spec, config))
    make = optimizer_of(spec, config)
    if spec.name != "mgtta":
        return {"tent": tent, "batclip": batclip}[spec.name](model, task, optimizer=make())
    settings = mgtta_config_of(spec, config)
    made_for = "was made with another model; run jaxtta pretrain-mgg to make a file for"
    statistics, about = load_statistics(settings.statistics)
    if weights and about.get("weights", weights) != weights:
        raise ValueError(f"{settings.statistics}: {made_for} --mgtta.statistics")
    if make.func is meta_gradient_generator:
        phi, about = load_mgg(settings.phi)
        if weights and about.get("weights", weights) != weights:
            log.warning("%s: %s --mgtta.phi", settings.phi, made_for)
        make = partial(make.func, phi, *make.args)
    if model.feature_shape is not None:
        try:
            check_statistics(statistics.mean, model.feature_shape)
        except ValueError as error:
            raise ValueError(f"{settings.statistics}: {error}") from error
    named = {"statistics": statistics, "weight": settings.weight}
    trainable = normalisation_parameters(settings.tower)
    return mgtta(model, task, optimizer=make(), trainable=trainable, **named)


def tnt_config_of(spec: AdapterSpec, config: AdapterConfig) -> TNTConfig:
    """TNT's settings, with those of the adapter's name."""
    return _replaced(spec, config.tnt, spec.settings)


def mgtta_config_of(spec: AdapterSpec, config: AdapterConfig) -> MGTTAConfig:
    """MGTTA's settings, with those of the adapter's name but for the optimiser's."""
    own = {key: value for key, value in spec.settings.items() if key not in ("lr", "optimizer")}
    files = {key: Path(str(own[key])) for key in ("phi", "statistics") if key in own}
    return _replaced(spec, config.mgtta, own | files)


def _replaced(spec: AdapterSpec, config: Any, settings: Mapping[str, Any]) -> Any:
    for key, value in settings.items():
        kind = type(getattr(config, key))
        if key != "temperature" and not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{spec.text}: {key} is {value!r}, expected type {kind.__name__}")
    try:
        return dataclasses.replace(config, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{spec.text}: {error}") from error


def optimizer_of(spec: AdapterSpec, config: AdapterConfig) -> partial:
    """Makes the optimiser of TENT, BATCLIP or MGTTA; its first argument is the learning rate."""
    rate, kind = spec.settings.get("lr"), spec.settings.get("optimizer")
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
        raise ValueError(f"{spec.text}: lr is {rate}, expected a positive number")
    kinds = [*OPTIMIZERS, *(("mgg",) if spec.name == "mgtta" else ())]
    if kind is not None and kind not in kinds:
        raise ValueError(f"{spec.text}: optimizer is {kind}, expected {', '.join(kinds)}")
    if spec.name == "mgtta":
        make = OPTIMIZERS.get(kind or "mgg", partial(meta_gradient_generator))
        return partial(make, rate or PAPER_LEARNING_RATE)
    usual, presets = ("sgd", TENT_PRESETS) if spec.name == "tent" else ("adamw", BATCLIP_PRESETS)
    if config.preset not in presets:
        raise ValueError(f"preset is {config.preset!r}, expected {', '.join(presets)}")
    preset = presets[config.preset].optimizer
    if rate is None and kind is None:
        return preset
    return partial(OPTIMIZERS[kind or usual], rate or preset.args[0])


def has_rate(text: str) -> bool:
    """Whether a named adapter has a learning rate that its text does not say."""
    spec = parse_adapter(text)
    return "lr" in SETTINGS.get(spec.name, ()) and "lr" not in spec.settings


def with_rate(text: str, rate: float) -> str:
    """An adapter's text with a learning rate: tent:lr=0.0001."""
    return f"{text}{',' if parse_adapter(text).settings else ':'}lr={float(rate)!r}"
