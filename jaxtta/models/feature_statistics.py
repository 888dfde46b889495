"""Mean and standard deviation of a model's layer features over a stream of images.

statistics = feature_statistics(model, params, batches)     # clean images; a few dozen will do
save_statistics("source.safetensors", statistics)
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.models.classifier import ImageClassifier
from jaxtta.models.clip import CLIP, Params
from jaxtta.models.transformer import VisionTransformer

Array = jax.Array


class FeatureStatistics(NamedTuple):
    """Moments of the layer features of some images.

    Attributes:
        count: () number of images.
        mean: (layers, width).
        squares: (layers, width), sum of the squared deviations from the mean.
    """

    count: Array
    mean: Array
    squares: Array

    @property
    def std(self) -> Array:
        """Unbiased standard deviation (layers, width); needs two images."""
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
    """Moments of two sets of images together, as if they had been one.

    Args:
        first: of some images; may be of none.
        second: of others.

    Returns:
        Of all.
    """
    count = first.count + second.count
    share = second.count / jnp.maximum(count, 1)
    apart = second.mean - first.mean
    squares = first.squares + second.squares + apart**2 * first.count * share
    return FeatureStatistics(count, first.mean + apart * share, squares)


def feature_shape(model: CLIP | ImageClassifier) -> tuple[int, int]:
    """(Layers, width) of a model's layer features; a ValueError if its tower is a ResNet."""
    if not isinstance(model.vision, VisionTransformer):
        raise ValueError("layer features are those of a vision transformer, not of a ResNet")
    return model.vision.arch.layers, model.vision.arch.width


def feature_statistics(
    model: CLIP | ImageClassifier, params: Params, batches: Iterable[Any]
) -> FeatureStatistics:
    """Gather the moments of the layer features over images.

    Args:
        model: the model.
        params: its parameters.
        batches: images (batch, height, width, 3), uint8 or float in [0, 1]; or anything with
            `images` and `mask`, as a stream's batches. All of one shape compile once.

    Returns:
        The moments, the same for any division into batches.

    Raises:
        ValueError: if there are fewer than two images, the features of one are not finite, or the
            model is a ResNet.
    """

    @jax.jit
    def add(
        params: Params, so_far: FeatureStatistics, images: Array, mask: Array
    ) -> FeatureStatistics:
        # Padding may hold anything; what it holds is not looked at.
        images = jnp.where(mask[:, None, None, None], images, 0).astype(images.dtype)
        features = model.image_features(params, model.normalize(images)).layer_features
        return merge_statistics(so_far, statistics_of(features, mask))

    shape = feature_shape(model)
    found = FeatureStatistics(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))
    for batch in batches:
        images = jnp.asarray(getattr(batch, "images", batch))
        mask = jnp.asarray(getattr(batch, "mask", np.ones(len(images), bool)))
        found = add(params, found, images, mask)
    _check(found)
    return found


def _check(statistics: FeatureStatistics) -> None:
    """Raise a ValueError for moments that have no standard deviation."""
    count, mean, squares = map(np.asarray, statistics)
    if count.shape or mean.ndim != 2 or mean.shape != squares.shape:
        raise ValueError(
            f"source statistics of shapes {count.shape}, {mean.shape} and {squares.shape}, "
            "expected a number and twice (layers, width)"
        )
    if not count >= 2:
        raise ValueError(f"source statistics of {count:g} images, expected at least two")
    if not (np.isfinite(mean).all() and np.isfinite(squares).all()):
        raise ValueError("source statistics that are not finite")


def save_statistics(
    path: str | Path, statistics: FeatureStatistics, about: dict[str, Any] | None = None
) -> None:
    """Save moments.

    Args:
        path: of the `.safetensors` file.
        statistics: what to save.
        about: of which model and images, kept as JSON in the file's metadata.
    """
    from safetensors.numpy import save_file

    arrays = {name: np.asarray(x) for name, x in statistics._asdict().items()}
    save_file(arrays, str(path), {"about": json.dumps(about or {})})


def load_statistics(path: str | Path) -> tuple[FeatureStatistics, dict[str, Any]]:
    """Load what `save_statistics` saved.

    Args:
        path: of the file.

    Returns:
        The moments, and of which model and images they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(str(path), "np") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if arrays.keys() != set(FeatureStatistics._fields):
            raise ValueError(f"holds {', '.join(sorted(arrays)[:5])} and no feature statistics")
        statistics = FeatureStatistics(**arrays)
        _check(statistics)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return statistics, about
