"""A guard around any adapter."""

from jaxtta.adapters.guard.guarded import GuardState, guarded, stream_axes
from jaxtta.adapters.guard.policy import DECISIONS, REASONS, Policy

__all__ = ["DECISIONS", "REASONS", "GuardState", "Policy", "guarded", "stream_axes"]
