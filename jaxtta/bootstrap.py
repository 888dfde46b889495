"""Bootstrap confidence intervals, paired for adapters that saw the same images."""

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


def bootstrap(
    totals: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Bootstrap means over images.

    All columns share the resamples, so differences of two columns are paired.

    Args:
        totals: (images, columns) sums of a quantity over all times that an image was seen.
        counts: (images, columns) how often the image was seen.
        resamples: number of resamples.
        seed: random seed.

    Returns:
        (resamples, columns) means; NaN for resamples without a seen image.

    Examples:
        >>> from jaxtta.bootstrap import bootstrap, interval
        >>> right = np.array([[1, 0], [1, 1], [0, 0], [1, 1]])  # images by two adapters
        >>> means = bootstrap(right, np.ones_like(right))
        >>> means.shape
        (1000, 2)
        >>> low, high = interval(means[:, 0] - means[:, 1])  # of the gain, paired
        >>> low <= 0.25 <= high
        True
    """
    rng = np.random.default_rng(seed)
    images = len(totals)
    both = np.concatenate([totals, counts], 1).astype(float)
    # Images with equal values are interchangeable; accuracies take only a few values.
    kinds, how_many = np.unique(both, axis=0, return_counts=True)
    if len(kinds) < images / 4:
        draws = rng.multinomial(images, how_many / images, resamples) @ kinds
    else:
        draws = np.empty((resamples, both.shape[1]))
        for row in draws:
            drawn = np.bincount(rng.integers(0, images, images), minlength=images)
            row[:] = drawn @ both
    total, count = np.split(draws, 2, axis=1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def interval(means: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval of bootstrapped means (resamples,), or None if there is none.

    Examples:
        >>> from jaxtta.bootstrap import interval
        >>> low, high = interval(np.linspace(0, 1, 1001))
        >>> round(low, 3), round(high, 3)
        (0.025, 0.975)
    """
    if np.isnan(means).all():
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return float(low), float(high)


def accuracy_interval(right: np.ndarray) -> tuple[float, float]:
    """95 % interval of an accuracy; exact at 0 and 1, where the bootstrap has no width.

    Args:
        right: (images,) bool, at least one image.

    Returns:
        Its bounds.

    Examples:
        >>> from jaxtta.bootstrap import accuracy_interval
        >>> low, high = accuracy_interval(np.ones(100, bool))  # all right
        >>> round(low, 3), high
        (0.964, 1.0)
    """
    if right.any() and not right.all():
        bounds = interval(bootstrap(right[:, None], np.ones((len(right), 1)))[:, 0])
        assert bounds is not None  # every resample has images
        return bounds
    bound = ((1 - LEVEL) / 2) ** (1 / len(right))
    return (bound, 1.0) if right.all() else (0.0, 1 - bound)
