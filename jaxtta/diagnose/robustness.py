"""Effective robustness: accuracy under shift beyond that expected from the base accuracy."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class LogitLinearBaseline(NamedTuple):
    """Expected shifted accuracy: linear in the logit of the base accuracy.

    Attributes:
        slope: of the line.
        intercept: of the line.
    """

    slope: float
    intercept: float

    def predict(self, base: ArrayLike) -> np.ndarray:
        """Shifted accuracies (models,) for base accuracies (models,) in (0, 1)."""
        return 1 / (1 + np.exp(-(self.slope * _logits(base) + self.intercept)))


def fit_baseline(base: ArrayLike, shifted: ArrayLike) -> LogitLinearBaseline:
    """Fit the baseline to reference models by least squares on logits.

    Args:
        base: (models,), accuracies on the base set in (0, 1).
        shifted: (models,), mean accuracies on the shifted sets in (0, 1).

    Returns:
        The baseline.

    Raises:
        ValueError: if there are fewer than two different base accuracies, or an accuracy is not
            between 0 and 1.

    Examples:
        >>> line = jaxtta.diagnose.fit_baseline(base=[0.5, 0.8], shifted=[0.3, 0.6])
        >>> round(float(line.predict(0.8)), 3)
        0.6

    References:
        Taori et al. 2020, https://arxiv.org/abs/2007.00644
    """
    x, y = _pairs(base, shifted)
    if len(np.unique(x)) < 2:
        raise ValueError("a line needs at least two reference points of different base accuracies")
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    return LogitLinearBaseline(slope, float(y.mean() - slope * x.mean()))


def effective_robustness(
    base: ArrayLike, shifted: ArrayLike, line: LogitLinearBaseline
) -> np.ndarray:
    """Shifted accuracy minus the expected one.

    Args:
        base: (models,), accuracies on the base set in (0, 1).
        shifted: (models,), mean accuracies on the shifted sets in (0, 1).
        line: baseline fitted to models that are not robust, on the same sets; see `fit_baseline`.

    Returns:
        (models,), above 0 for models that are more robust than the reference models.

    Raises:
        ValueError: if an accuracy is not between 0 and 1.

    Examples:
        >>> line = jaxtta.diagnose.fit_baseline(base=[0.5, 0.8], shifted=[0.3, 0.6])
        >>> jaxtta.diagnose.effective_robustness([0.8], [0.7], line).round(3).tolist()
        [0.1]

    References:
        Taori et al. 2020, https://arxiv.org/abs/2007.00644
    """
    _pairs(base, shifted)
    return np.asarray(shifted, np.float64) - line.predict(base)


def _logits(accuracies: ArrayLike) -> np.ndarray:
    accuracies = np.asarray(accuracies, np.float64)
    inside = (accuracies > 0) & (accuracies < 1)
    if not inside.all():
        outside = np.atleast_1d(accuracies)[~np.atleast_1d(inside)]
        raise ValueError(f"an accuracy is {outside[0]}, expected a number between 0 and 1")
    return np.log(accuracies) - np.log1p(-accuracies)


def _pairs(base: ArrayLike, shifted: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, y = _logits(base), _logits(shifted)
    if x.shape != y.shape:
        raise ValueError(f"base accuracies {x.shape} do not match shifted accuracies {y.shape}")
    return x, y
