"""Adapters by name with settings: `tent:lr=1e-4`, `tnt:steps=3,views=32`, `mymodule:make`."""

import ast
import dataclasses
import importlib
import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import optax

from jaxtta import adapters, assets
from jaxtta.adapters import BATCLIP_PRESETS, TENT_PRESETS, Adapter, TNTConfig
from jaxtta.adapters.mgtta import PAPER_LEARNING_RATE, check_statistics
from jaxtta.io import digest_files
from jaxtta.models import Classifier, Task, load_statistics
from jaxtta.optim import load_mgg, meta_gradient_generator
from jaxtta.tree import normalisation_parameters

log = logging.getLogger(__name__)
SPEED_ONLY = ("views_per_chunk", "images_per_map")
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
        weight: weight of the discrepancy.
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
    """An adapter to be made.

    Attributes:
        text: its name in tables, as it was given.
        name: a key of `SETTINGS`, or the function's module and name.
        settings: by name.
        function: `function(model, task, **settings) -> Adapter`; None for a named adapter.
    """

    text: str
    name: str
    settings: Mapping[str, Any] = {}
    function: Callable[..., Adapter] | None = None

    @property
    def needs_originals(self) -> bool:
        """Whether it makes its own views, of full-size images."""
        return self.name == "tnt" or bool(getattr(self.function, "needs_originals", False))


def parse_adapter(text: str) -> AdapterSpec:
    """Read an adapter's name and settings.

    Args:
        text: `tent`, `tent:lr=1e-4`, `package.module:function` or
            `package.module:function:key=value,…`; modules in the current folder are found.

    Raises:
        ValueError: for an unknown name or setting, or a function that cannot be imported.
    """
    name, _, rest = text.partition(":")
    function = None
    if name not in SETTINGS:
        attribute, _, rest = rest.partition(":")
        if not re.fullmatch(r"\w+(\.\w+)*", name) or not attribute.isidentifier():
            raise ValueError(
                f"unknown adapter {text!r}, expected {', '.join(SETTINGS)}, with settings as in "
                "tent:lr=1e-4, or MODULE:FUNCTION of your own"
            )
        function = _import_function(name, attribute)
        name = f"{name}:{attribute}"
    settings = _parse_settings(text, rest)
    spec = AdapterSpec(text, name, settings, function)
    if function is not None:
        signature = inspect.signature(function)
        try:
            signature.bind(None, None, **settings)
        except TypeError as error:
            called = f"it is called (model, task, **settings) and takes {signature}"
            raise ValueError(f"{text}: {error}; {called}") from error
    elif unknown := [key for key in settings if key not in SETTINGS[name]]:
        known = ", ".join(SETTINGS[name]) or "none"
        raise ValueError(f"{text}: unknown setting {unknown[0]!r}, {name} has {known}")
    else:
        identity_of(spec, AdapterConfig())  # validates the values
    return spec


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


def _import_function(module: str, name: str) -> Callable[..., Adapter]:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"{module}:{name}: the module cannot be imported ({error!r})") from error
    if not callable(found):
        raise ValueError(f"{module}:{name}: the module has no function of this name")
    return cast(Callable[..., Adapter], found)


def specs_of(
    given: Sequence[str | AdapterSpec] | Mapping[str, Callable[..., Adapter]],
) -> list[AdapterSpec]:
    """The adapters of a sweep, as `sweep` takes them."""
    if isinstance(given, Mapping):
        specs = [
            AdapterSpec(text, getattr(make, "__qualname__", type(make).__qualname__), {}, make)
            for text, make in given.items()
        ]
    else:
        specs = [parse_adapter(each) if isinstance(each, str) else each for each in given]
    names = [spec.text for spec in specs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a sweep needs one or more adapters of distinct names, not {names}")
    return specs


def make_adapter(
    spec: AdapterSpec,
    model: Classifier,
    task: Task | None,
    config: AdapterConfig = AdapterConfig(),
    weights: str | None = None,
) -> Adapter:
    """Make an adapter; `weights`, from `fingerprints`, tell whether MGTTA's files are the model's.

    Raises:
        FileNotFoundError: if one of MGTTA's files is missing.
        TypeError: if a function gives something else.
        ValueError: if a file is invalid, or for another model.
    """
    if spec.function is not None:
        made = spec.function(model, task, **spec.settings)
        if not (hasattr(made, "init") and hasattr(made, "step")):
            raise TypeError(f"{spec.text}: gives a {type(made).__name__}, expected an Adapter")
        return made
    if spec.name == "zero_shot":
        return adapters.zero_shot(model, task)
    if spec.name == "tnt":
        return adapters.tnt(model, task, config=tnt_config_of(spec, config))
    make = _optimizer_of(spec, config)
    if spec.name != "mgtta":
        method = adapters.tent if spec.name == "tent" else adapters.batclip
        return method(model, task, optimizer=make())
    settings = _mgtta_config_of(spec, config)
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
    return adapters.mgtta(
        *(model, task),
        optimizer=make(),
        trainable=normalisation_parameters(settings.tower),
        statistics=statistics,
        weight=settings.weight,
    )


def tnt_config_of(spec: AdapterSpec, config: AdapterConfig) -> TNTConfig:
    """TNT's settings, with those of the adapter's name."""
    return _replaced(spec, config.tnt, spec.settings)


def _mgtta_config_of(spec: AdapterSpec, config: AdapterConfig) -> MGTTAConfig:
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


def _optimizer_of(spec: AdapterSpec, config: AdapterConfig) -> partial:
    """Makes the optimiser of an adapter that has one; its first argument is the learning rate."""
    rate, kind = spec.settings.get("lr"), spec.settings.get("optimizer")
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
        raise ValueError(f"{spec.text}: lr is {rate}, expected a positive number")
    kinds = [*OPTIMIZERS, *(("mgg",) if spec.name == "mgtta" else ())]
    if kind is not None and kind not in kinds:
        raise ValueError(f"{spec.text}: optimizer is {kind}, expected {', '.join(kinds)}")
    if spec.name == "mgtta":
        make = OPTIMIZERS.get(kind or "mgg", partial(meta_gradient_generator))
        return partial(make, rate or PAPER_LEARNING_RATE)
    tent = spec.name == "tent"
    usual, presets = ("sgd", TENT_PRESETS) if tent else ("adamw", BATCLIP_PRESETS)
    preset = presets[config.preset].optimizer
    if rate is None and kind is None:
        return preset
    return partial(OPTIMIZERS[kind or usual], rate or preset.args[0])


def identity_of(
    spec: AdapterSpec, config: AdapterConfig, canvas: int | None = None
) -> dict[str, Any]:
    """What decides an adapter's results: settings, and digests of files and of its source."""
    own: dict[str, Any] = {"name": spec.name}
    if spec.needs_originals:
        own["canvas"] = canvas
    if spec.function is not None:
        module = sys.modules.get(getattr(spec.function, "__module__", ""))
        source = _digest(getattr(module, "__file__", None))
        return own | {"settings": dict(spec.settings), "source": source}
    if spec.name == "tnt":
        settings = dataclasses.asdict(tnt_config_of(spec, config))
        return own | {"tnt": {k: v for k, v in settings.items() if k not in SPEED_ONLY}}
    if spec.name == "zero_shot":
        return own
    made = _optimizer_of(spec, config)
    given = [str(made.args[0]), *(f"{key}={value}" for key, value in made.keywords.items())]
    own["optimizer"] = f"{made.func.__name__}({', '.join(given)})"
    if spec.name == "mgtta":
        settings = _mgtta_config_of(spec, config)
        own |= {"weight": settings.weight, "tower": settings.tower}
        own["statistics"] = _digest(settings.statistics)
        if made.func is meta_gradient_generator:
            own["phi"] = _digest(settings.phi)
    return own


def _digest(path: str | Path | None) -> str | None:
    """A digest of a file's content; None for a function without a source file."""
    return digest_files([Path(path)]).partition(" ")[2] if path else None
