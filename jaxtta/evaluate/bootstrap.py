"""Bootstrap confidence intervals; they are in `jaxtta.bootstrap`."""

from jaxtta.bootstrap import LEVEL, RESAMPLES, bootstrap, interval

__all__ = ["LEVEL", "RESAMPLES", "bootstrap", "interval"]
