"""An adapter that is to be made, and the settings of those that have files or many settings."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxtta import assets
from jaxtta.adapters.base import Adapter
from jaxtta.adapters.tnt.config import TNTConfig


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

    `preset` names the papers' optimiser settings for a benchmark.
    """

    preset: str = "cifar10-c"
    tnt: TNTConfig = dataclasses.field(default_factory=TNTConfig)
    mgtta: MGTTAConfig = dataclasses.field(default_factory=MGTTAConfig)


class AdapterSpec(NamedTuple):
    """An adapter to be made: `make(model, task, **settings)`.

    Attributes:
        text: its name in tables.
        name: one of `METHODS`, or the function's module and name.
        settings: what the text says of settings.
        make: the function.
        own: whether it is a user's function.
        guard: whether it is guarded; name, settings and function are those of the adapter inside.
    """

    text: str
    name: str
    settings: Mapping[str, Any]
    make: Callable[..., Adapter]
    own: bool = True
    guard: bool = False

    @property
    def needs_originals(self) -> bool:
        """Whether it makes its own views, of full-size images."""
        make = getattr(self.make, "func", self.make)  # of a partial
        return bool(getattr(make, "needs_originals", False))


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
        if key != "temperature":
            require_type(spec, key, value, getattr(config, key))
    try:
        return dataclasses.replace(config, **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{spec.text}: {error}") from error


def require_type(spec: AdapterSpec, key: str, value: Any, default: Any) -> None:
    """Raise a ValueError for a setting of another type than its default's."""
    kind = type(default)
    wanted = (int, float) if kind is float else kind
    fits = isinstance(value, wanted) and isinstance(value, bool) == (kind is bool)
    if default is not None and not fits:
        raise ValueError(f"{spec.text}: {key} is {value!r}, expected type {kind.__name__}")
