"""TNT: settings (`config`), the optimisation (`optimize`), and the adapter (`adapter`)."""

from jaxtta.adapters.tnt.adapter import TNTState, tnt, tnt_image
from jaxtta.adapters.tnt.config import TNT_PRESETS, TNTConfig, load_noise, save_noise
from jaxtta.adapters.tnt.optimize import TNTOutput, optimize_noise

__all__ = [
    "TNT_PRESETS",
    "TNTConfig",
    "TNTOutput",
    "TNTState",
    "load_noise",
    "optimize_noise",
    "save_noise",
    "tnt",
    "tnt_image",
]
