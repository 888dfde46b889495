"""Adapters: pairs of pure functions `init(params)` and `step(params, state, batch)`."""

from jaxtta.adapters.base import Adapter, Metrics, Objective, Prediction, Preset, State
from jaxtta.adapters.batclip import BATCLIP_PRESETS, adam_with_l2, batclip, batclip_objective
from jaxtta.adapters.by_name import parse_adapter
from jaxtta.adapters.mgtta import MGTTAContext, mgtta, mgtta_objective, mgtta_training
from jaxtta.adapters.named import make_adapter
from jaxtta.adapters.online import online
from jaxtta.adapters.specs import AdapterConfig, AdapterSpec, MGTTAConfig, tnt_config_of
from jaxtta.adapters.tent import TENT_PRESETS, tent, tent_objective
from jaxtta.adapters.tnt.adapter import TNTState, tnt, tnt_image
from jaxtta.adapters.tnt.config import TNT_PRESETS, TNTConfig, load_noise, save_noise
from jaxtta.adapters.tnt.optimize import TNTOutput, optimize_noise
from jaxtta.adapters.zero_shot import zero_shot

__all__ = [
    "BATCLIP_PRESETS",
    "TENT_PRESETS",
    "TNT_PRESETS",
    "Adapter",
    "AdapterConfig",
    "AdapterSpec",
    "MGTTAConfig",
    "MGTTAContext",
    "Metrics",
    "Objective",
    "Prediction",
    "Preset",
    "State",
    "TNTConfig",
    "TNTOutput",
    "TNTState",
    "adam_with_l2",
    "batclip",
    "batclip_objective",
    "load_noise",
    "make_adapter",
    "mgtta",
    "mgtta_objective",
    "mgtta_training",
    "online",
    "optimize_noise",
    "parse_adapter",
    "save_noise",
    "tent",
    "tent_objective",
    "tnt",
    "tnt_config_of",
    "tnt_image",
    "zero_shot",
]
