"""A guard around any adapter."""

from jaxtta.adapters.guard.canary import Canary
from jaxtta.adapters.guard.guarded import guarded
from jaxtta.adapters.guard.policy import DECISIONS, REASONS, Policy
from jaxtta.adapters.guard.state import GuardState, review, stream_axes

__all__ = [
    "DECISIONS",
    "REASONS",
    "Canary",
    "GuardState",
    "Policy",
    "guarded",
    "review",
    "stream_axes",
]
