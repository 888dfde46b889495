"""Mean and standard deviation of a model's layer features over a stream of pictures.

statistics = feature_statistics(model, params, batches)     # clean pictures; a few dozen will do
save_statistics("source.safetensors", statistics)
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.clip.classifier import ImageClassifier
from jaxtta.clip.model import CLIP, Params

Array = jax.Array


class FeatureStatistics(NamedTuple):
    """Moments of the layer features of some pictures.

    Attributes:
        count: () number of pictures.
        mean: (layers, width).
        squares: (layers, width), sum of the squared deviations from the mean.
    """

    count: Array
    mean: Array
    squares: Array

    @property
    def std(self) -> Array:
        """Unbiased standard deviation (layers, width); needs two pictures."""
        return jnp.sqrt(self.squares / (self.count - 1))


def statistics_of(features: Array, mask: Array | None = None) -> FeatureStatistics:
    """Moments of one batch.

    Args:
        features: (batch, layers, width).
        mask: (batch,) bool, false for padding; None for none.

    Returns:
        The moments, in at least float32.
    """
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    mask = jnp.ones(len(features), bool) if mask is None else jnp.asarray(mask, bool)
    rows = mask[:, None, None]
    count = mask.sum(dtype=features.dtype)
    mean = jnp.where(rows, features, 0).sum(0) / jnp.maximum(count, 1)
    squares = (jnp.where(rows, features - mean, 0) ** 2).sum(0)
    return FeatureStatistics(count, mean, squares)


def merge_statistics(first: FeatureStatistics, second: FeatureStatistics) -> FeatureStatistics:
    """Moments of two sets of pictures together, as if they had been one.

    Args:
        first: of some pictures; may be of none.
        second: of others.

    Returns:
        Of all.
    """
    count = first.count + second.count
    share = second.count / jnp.maximum(count, 1)
    apart = second.mean - first.mean
    squares = first.squares + second.squares + apart**2 * first.count * share
    return FeatureStatistics(count, first.mean + apart * share, squares)


def feature_statistics(
    model: CLIP | ImageClassifier, params: Params, batches: Iterable[Any]
) -> FeatureStatistics:
    """Gather the moments of the layer features over pictures.

    Args:
        model: the model.
        params: its parameters.
        batches: pictures (batch, height, width, 3), uint8 or float in [0, 1]; or anything with
            `images` and `mask`, as a stream's batches. All of one shape compile once.

    Returns:
        The moments, the same for any division into batches.

    Raises:
        ValueError: if there are fewer than two pictures.
    """

    @jax.jit
    def add(
        params: Params, so_far: FeatureStatistics, images: Array, mask: Array
    ) -> FeatureStatistics:
        # Padding may hold anything; what it holds is not looked at.
        images = jnp.where(mask[:, None, None, None], images, 0).astype(images.dtype)
        features = model.image_features(params, model.normalize(images)).layer_features
        return merge_statistics(so_far, statistics_of(features, mask))

    shape = (model.vision.arch.layers, model.vision.arch.width)
    found = FeatureStatistics(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))
    for batch in batches:
        images = jnp.asarray(getattr(batch, "images", batch))
        mask = jnp.asarray(getattr(batch, "mask", np.ones(len(images), bool)))
        found = add(params, found, images, mask)
    if found.count < 2:
        raise ValueError(f"source statistics of {int(found.count)} pictures, expected at least two")
    return found


def save_statistics(path: str | Path, statistics: FeatureStatistics) -> None:
    """Save moments as safetensors.

    Args:
        path: of the file.
        statistics: what to save.
    """
    from safetensors.numpy import save_file

    save_file({name: np.asarray(x) for name, x in statistics._asdict().items()}, str(path))


def load_statistics(path: str | Path) -> FeatureStatistics:
    """Load what `save_statistics` saved.

    Args:
        path: of the file.

    Returns:
        The moments.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return FeatureStatistics(**load_file(str(path)))
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{path}: holds no feature statistics ({error})") from error
