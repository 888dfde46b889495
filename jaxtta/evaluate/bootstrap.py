"""How sure a mean over images is: the bootstrap, paired where adapters saw the same images."""

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


def bootstrap(
    totals: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Draw images with replacement and average, many times.

    All columns share the draws, so that the difference of two columns is a paired one.

    Args:
        totals: (images, columns) sums of a quantity over the times that an image was seen.
        counts: (images, columns) how often that was.
        resamples: how many times.
        seed: of the draws.

    Returns:
        (resamples, columns) means; NaN where no image that was drawn had been seen.
    """
    rng = np.random.default_rng(seed)
    images = len(totals)
    both = np.concatenate([totals, counts], 1).astype(float)
    # Images with the same values are interchangeable: of accuracies there are only a few kinds.
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
    """The 95 % interval of bootstrapped means (resamples,), or None if there is none."""
    if np.isnan(means).all():
        return None
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return float(low), float(high)
