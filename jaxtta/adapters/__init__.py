"""Adapters: pairs of pure functions `init(params)` and `step(params, state, batch)`."""

from jaxtta.adapters.base import Adapter, Answers, Metrics, Objective, Prediction, Preset, State
from jaxtta.adapters.batclip import BATCLIP_PRESETS, adam_with_l2, batclip, batclip_objective
from jaxtta.adapters.by_name import parse_adapter
from jaxtta.adapters.clipartt import CLIPARTT_PRESETS, clipartt, clipartt_loss
from jaxtta.adapters.combined_prompts import ClassWords
from jaxtta.adapters.deyo import DEYO_PRESETS, deyo
from jaxtta.adapters.eata import EATA_PRESETS, EATA_SETTINGS, eata, eta
from jaxtta.adapters.fisher import eata_fisher
from jaxtta.adapters.guard import (
    DECISIONS,
    REASONS,
    Canary,
    GuardState,
    Policy,
    guarded,
    review,
    stream_axes,
)
from jaxtta.adapters.lame import lame, lame_affinity, lame_log_probabilities
from jaxtta.adapters.mgtta import MGTTAContext, mgtta, mgtta_objective, mgtta_training
from jaxtta.adapters.mint import MINT_PRESETS, mint
from jaxtta.adapters.mta import mean_shift, mta
from jaxtta.adapters.named import make_adapter
from jaxtta.adapters.of_views import of_views
from jaxtta.adapters.on_features import FeatureMethod, StackedState, on_features
from jaxtta.adapters.online import Sharpness, online
from jaxtta.adapters.roid import ROID_PRESETS, roid
from jaxtta.adapters.rotta import ROTTA_PRESETS, rotta
from jaxtta.adapters.sar import SAR_PRESETS, sar
from jaxtta.adapters.specs import AdapterConfig, AdapterSpec, MGTTAConfig, tnt_config_of
from jaxtta.adapters.stata import stata, stata_fit
from jaxtta.adapters.t3a import t3a
from jaxtta.adapters.tda import TDA_PRESETS, tda
from jaxtta.adapters.tent import TENT_PRESETS, tent, tent_objective
from jaxtta.adapters.tnt.adapter import TNTState, tnt
from jaxtta.adapters.tnt.config import TNT_PRESETS, TNTConfig, load_noise, save_noise
from jaxtta.adapters.tnt.image import tnt_image
from jaxtta.adapters.tnt.optimize import TNTOutput, optimize_noise
from jaxtta.adapters.tpt import ctpt, tpt
from jaxtta.adapters.transclip import transclip, transclip_fit
from jaxtta.adapters.vte import vte, vte_logits
from jaxtta.adapters.watt import WATT_PRESETS, WATT_TEMPLATES, watt
from jaxtta.adapters.zero import zero, zero_soft_votes, zero_votes
from jaxtta.adapters.zero_shot import zero_shot

__all__ = [
    "BATCLIP_PRESETS",
    "CLIPARTT_PRESETS",
    "DECISIONS",
    "DEYO_PRESETS",
    "EATA_PRESETS",
    "EATA_SETTINGS",
    "MINT_PRESETS",
    "REASONS",
    "ROID_PRESETS",
    "ROTTA_PRESETS",
    "SAR_PRESETS",
    "TDA_PRESETS",
    "TENT_PRESETS",
    "TNT_PRESETS",
    "WATT_PRESETS",
    "WATT_TEMPLATES",
    "Adapter",
    "AdapterConfig",
    "AdapterSpec",
    "Answers",
    "Canary",
    "ClassWords",
    "FeatureMethod",
    "GuardState",
    "MGTTAConfig",
    "MGTTAContext",
    "Metrics",
    "Objective",
    "Policy",
    "Prediction",
    "Preset",
    "Sharpness",
    "StackedState",
    "State",
    "TNTConfig",
    "TNTOutput",
    "TNTState",
    "adam_with_l2",
    "batclip",
    "batclip_objective",
    "clipartt",
    "clipartt_loss",
    "ctpt",
    "deyo",
    "eata",
    "eata_fisher",
    "eta",
    "guarded",
    "lame",
    "lame_affinity",
    "lame_log_probabilities",
    "load_noise",
    "make_adapter",
    "mean_shift",
    "mgtta",
    "mgtta_objective",
    "mgtta_training",
    "mint",
    "mta",
    "of_views",
    "on_features",
    "online",
    "optimize_noise",
    "parse_adapter",
    "review",
    "roid",
    "rotta",
    "sar",
    "save_noise",
    "stata",
    "stata_fit",
    "stream_axes",
    "t3a",
    "tda",
    "tent",
    "tent_objective",
    "tnt",
    "tnt_config_of",
    "tnt_image",
    "tpt",
    "transclip",
    "transclip_fit",
    "vte",
    "vte_logits",
    "watt",
    "zero",
    "zero_shot",
    "zero_soft_votes",
    "zero_votes",
]
