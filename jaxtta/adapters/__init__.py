"""Adapters: pairs of pure functions `init(params)` and `step(params, state, batch)`."""

from jaxtta.adapters.base import Adapter, Prediction, Preset, State
from jaxtta.adapters.batclip import BATCLIP_PRESETS, adam_l2, batclip
from jaxtta.adapters.online import online
from jaxtta.adapters.tent import TENT_PRESETS, tent
from jaxtta.adapters.zero_shot import zero_shot

__all__ = [
    "BATCLIP_PRESETS",
    "TENT_PRESETS",
    "Adapter",
    "Prediction",
    "Preset",
    "State",
    "adam_l2",
    "batclip",
    "online",
    "tent",
    "zero_shot",
]
