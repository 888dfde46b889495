"""Adapters: pairs of pure functions `init(params)` and `step(params, state, batch)`."""

from jaxtta.adapters.base import Adapter, Prediction, State
from jaxtta.adapters.batclip import batclip
from jaxtta.adapters.online import online
from jaxtta.adapters.tent import tent
from jaxtta.adapters.zero_shot import zero_shot

__all__ = ["Adapter", "Prediction", "State", "batclip", "online", "tent", "zero_shot"]
