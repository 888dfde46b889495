"""Adapters by name, as scripts offer them."""

import dataclasses
import re
from typing import Any

import optax

from jaxtta import adapters
from jaxtta.adapters import BATCLIP_PRESETS, TENT_PRESETS, Adapter, Tuning
from jaxtta.clip import CLIP, Task

ADAPTERS = ("zero_shot", "tent", "batclip", "tnt")
"""What `make_adapter` knows; TNT also as "tnt-3", with so many steps."""
WITH_RATE = ("tent", "batclip")
"""Those with a learning rate to choose."""


def check_adapters(names: tuple[str, ...]) -> None:
    """Raise a ValueError for a name that `make_adapter` does not know."""
    for name in names:
        if name not in ADAPTERS and not re.fullmatch(r"tnt-\d+", name):
            known = ", ".join(ADAPTERS)
            raise ValueError(f"unknown adapter {name!r}, expected one of {known} (or tnt-STEPS)")


def is_tnt(name: str) -> bool:
    """Whether an adapter cuts its own views, and so needs originals."""
    return name.partition("-")[0] == "tnt"


def tuning_of(name: str, tuning: Tuning) -> Tuning:
    """TNT's settings under a name that may give the number of steps."""
    steps = name.partition("-")[2]
    return dataclasses.replace(tuning, steps=int(steps)) if steps else tuning


def make_adapter(
    name: str, model: CLIP, task: Task, preset: str, rate: float | None, tuning: Tuning
) -> Adapter:
    """Make an adapter.

    Args:
        name: one of `ADAPTERS`, or "tnt-3".
        model: the model.
        task: the classes.
        preset: whose published optimiser TENT and BATCLIP take.
        rate: a learning rate in its place: TENT with SGD and momentum, BATCLIP with AdamW.
        tuning: TNT's settings.

    Returns:
        The adapter.
    """
    if name == "zero_shot":
        return adapters.zero_shot(model, task)
    if is_tnt(name):
        return adapters.tnt(model, task, tuning_of(name, tuning))
    if name == "tent":
        sgd = TENT_PRESETS[preset].optimizer() if rate is None else optax.sgd(rate, momentum=0.9)
        return adapters.tent(model, task, sgd)
    adamw = optax.adamw(rate, weight_decay=1e-2) if rate else BATCLIP_PRESETS[preset].optimizer()
    return adapters.batclip(model, task, adamw)


def own_settings(
    name: str, rate: float | None, tuning: Tuning, canvas: int | None
) -> dict[str, Any]:
    """What decides one adapter's figures alone, for its cells."""
    if not is_tnt(name):
        return {} if rate is None else {"learning_rate": rate}
    settings = dataclasses.asdict(tuning_of(name, tuning)) | {"canvas": canvas}
    return {"tnt": {k: v for k, v in settings.items() if k not in ("chunk", "pictures")}}
