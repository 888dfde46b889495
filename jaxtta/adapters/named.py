"""Making adapters of the named methods, from a text's settings."""

import dataclasses
import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import optax

from jaxtta.adapters.base import Adapter
from jaxtta.adapters.guard import guarded
from jaxtta.adapters.methods import METHODS
from jaxtta.adapters.mgtta import PAPER_LEARNING_RATE, check_statistics, mgtta
from jaxtta.adapters.specs import (
    AdapterConfig,
    AdapterSpec,
    MGTTAConfig,
    mgtta_config_of,
    require_type,
    tnt_config_of,
)
from jaxtta.adapters.tnt.adapter import tnt
from jaxtta.adapters.tnt.config import TNTConfig
from jaxtta.adapters.zero_shot import zero_shot
from jaxtta.models import Classifier, Task, load_statistics
from jaxtta.optim import load_mgg, meta_gradient_generator
from jaxtta.tree import normalisation_parameters

log = logging.getLogger(__name__)


NO_SETTINGS = ("optimizer", "trainable", "on", "words", "objective", "fisher", "permute", "augment")
OPTIMIZERS = {
    "sgd": partial(optax.sgd, momentum=0.9),
    "adam": partial(optax.adam),
    "adamw": partial(optax.adamw, weight_decay=1e-2),
}


def known_settings(name: str) -> tuple[str, ...]:
    """The settings that may follow a method's name."""
    method = METHODS[name]
    if name == "tnt":
        return tuple(field.name for field in dataclasses.fields(TNTConfig))
    if name == "mgtta":
        return ("lr", "optimizer", *(field.name for field in dataclasses.fields(MGTTAConfig)))
    own = [*default_settings(method.make)]
    return ("lr", "optimizer", *own) if method.presets else tuple(own)


def default_settings(make: Callable[..., Adapter]) -> dict[str, Any]:
    """A method's keywords with their defaults, but for those that are functions or arrays."""
    keywords = inspect.signature(make).parameters.values()
    named = (each for each in keywords if each.kind is each.KEYWORD_ONLY)
    return {e.name: e.default for e in named if e.name not in NO_SETTINGS}


def settings_of(spec: AdapterSpec, config: AdapterConfig) -> dict[str, Any]:
    """A method's settings: those of its text, then its paper's for the benchmark, then defaults.

    Raises:
        ValueError: for a setting of another type.
    """
    own = {key: value for key, value in spec.settings.items() if key not in ("lr", "optimizer")}
    defaults, keywords = default_settings(spec.make), inspect.signature(spec.make).parameters
    for key, value in own.items():
        default = defaults[key]
        if default is None:
            default = get_args(keywords[key].annotation)[0]()  # of a type that may be None
        require_type(spec, key, value, default)
    return defaults | {**METHODS[spec.name].settings.get(config.preset, {})} | own


def check_settings(spec: AdapterSpec) -> None:
    """Raise a ValueError for settings that a named adapter cannot have."""
    known = known_settings(spec.name)
    if unknown := [key for key in spec.settings if key not in known]:
        listed = ", ".join(known) or "none"
        said = f"unknown setting {unknown[0]!r}, {spec.name} has {listed}"
        raise ValueError(f"{spec.text}: {said}")
    if spec.name == "tnt":
        tnt_config_of(spec, AdapterConfig())
    elif spec.name == "mgtta":
        mgtta_config_of(spec, AdapterConfig())
    else:
        settings_of(spec, AdapterConfig())
    if "lr" in known:
        optimizer_of(spec, AdapterConfig())


def make_adapter(
    spec: AdapterSpec,
    model: Classifier,
    task: Task | None,
    config: AdapterConfig = AdapterConfig(),  # noqa: B008
    weights: str | None = None,
) -> Adapter:
    """Make an adapter; `weights`, a digest, tells whether MGTTA's files are the model's.

    Examples:
        With `model` and `task` of `jaxtta.load`'s example:

        >>> spec = jaxtta.adapters.parse_adapter("tent:lr=1e-4")
        >>> adapter = jaxtta.adapters.make_adapter(spec, model, task)
    """
    if spec.guard:
        inner = make_adapter(spec._replace(guard=False), model, task, config, weights)
        return guarded(inner, zero_shot(model, task))
    if spec.own:
        made = spec.make(model, task, **spec.settings)
        if not (hasattr(made, "init") and hasattr(made, "step")):
            raise ValueError(f"{spec.text}: gives {made!r:.80}, expected an Adapter")
        return made
    if spec.name == "tnt":
        return tnt(model, task, config=tnt_config_of(spec, config))
    if spec.name == "mgtta":
        return _make_mgtta(spec, model, task, config, weights)
    optimizer = {}
    if METHODS[spec.name].presets:
        optimizer["optimizer"] = optimizer_of(spec, config)()
    return spec.make(model, task, **optimizer, **settings_of(spec, config))


def _make_mgtta(
    spec: AdapterSpec, model: Classifier, task: Any, config: AdapterConfig, weights: str | None
) -> Adapter:
    make = optimizer_of(spec, config)
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


def optimizer_of(spec: AdapterSpec, config: AdapterConfig) -> partial:
    """Makes a method's optimiser; its first argument is the learning rate."""
    rate, kind = spec.settings.get("lr"), spec.settings.get("optimizer")
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
        raise ValueError(f"{spec.text}: lr is {rate}, expected a positive number")
    kinds = [*OPTIMIZERS, *(("mgg",) if spec.name == "mgtta" else ())]
    if kind is not None and kind not in kinds:
        raise ValueError(f"{spec.text}: optimizer is {kind}, expected {', '.join(kinds)}")
    if spec.name == "mgtta":
        make = OPTIMIZERS.get(kind or "mgg", partial(meta_gradient_generator))
        return partial(make, rate or PAPER_LEARNING_RATE)
    presets = METHODS[spec.name].presets
    if config.preset not in presets:
        raise ValueError(f"preset is {config.preset!r}, expected {', '.join(presets)}")
    preset = presets[config.preset].optimizer
    if kind is not None:
        return partial(OPTIMIZERS[kind], rate or preset.args[0])
    return partial(preset.func, rate or preset.args[0], **preset.keywords)
