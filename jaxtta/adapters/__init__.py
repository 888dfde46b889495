"""Adapters: pairs of pure functions `init(params)` and `step(params, state, batch)`."""

from jaxtta.adapters.base import Adapter, Prediction, Preset, State
from jaxtta.adapters.batclip import BATCLIP_PRESETS, adam_l2, batclip
from jaxtta.adapters.mgtta import MGTTA_PRESETS, mgtta
from jaxtta.adapters.online import online
from jaxtta.adapters.tent import TENT_PRESETS, tent
from jaxtta.adapters.tnt import (
    TNT_PRESETS,
    Tuned,
    Tuning,
    load_noise,
    save_noise,
    tnt,
    tune,
    tune_image,
)
from jaxtta.adapters.zero_shot import zero_shot

__all__ = [
    "BATCLIP_PRESETS",
    "MGTTA_PRESETS",
    "TENT_PRESETS",
    "TNT_PRESETS",
    "Adapter",
    "Prediction",
    "Preset",
    "State",
    "Tuned",
    "Tuning",
    "adam_l2",
    "batclip",
    "load_noise",
    "mgtta",
    "online",
    "save_noise",
    "tent",
    "tnt",
    "tune",
    "tune_image",
    "zero_shot",
]
