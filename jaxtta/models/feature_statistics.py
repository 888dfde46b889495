"""Mean and standard deviation of a model's layer features over a stream of images.

    statistics = feature_statistics(model, params, batches)     # clean images; a few dozen will do
    save_statistics("source.safetensors", statistics)

The moments are the same for any division into batches.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxtta.io import load_arrays, save_arrays
from jaxtta.models.classifier import Batch, Classifier, as_batch, images_and_mask

Array = jax.Array


class FeatureStatistics(NamedTuple):
    """Moments of the layer features of some images.

    Attributes:
        count: () number of images.
        mean: (layers, width).
        squares: (layers, width), sum of the squared deviations from the mean.
    """

    count: Array | np.ndarray
    mean: Array | np.ndarray
    squares: Array | np.ndarray

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

    Examples:
        >>> features = jnp.arange(8.0).reshape(4, 1, 2)  # (batch, layers, width)
        >>> jaxtta.models.statistics_of(features).mean.tolist()
        [[3.0, 4.0]]
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

    Examples:
        >>> of = jaxtta.models.statistics_of
        >>> first, second = of(jnp.full((2, 1, 1), 1.0)), of(jnp.full((2, 1, 1), 3.0))
        >>> both = jaxtta.models.merge_statistics(first, second)
        >>> both.count.item(), both.mean.tolist(), both.squares.tolist()
        (4.0, [[2.0]], [[4.0]])
    """
    count = first.count + second.count
    share = second.count / jnp.maximum(count, 1)
    apart = second.mean - first.mean
    squares = first.squares + second.squares + apart**2 * first.count * share
    return FeatureStatistics(count, first.mean + apart * share, squares)


def feature_statistics(
    model: Classifier, params: Any, batches: Iterable[Any], context: Any = None
) -> FeatureStatistics:
    """Gather the moments of the layer features over images.

    Args:
        model: the model.
        params: its parameters.
        batches: images (batch, height, width, 3), uint8 or float in [0, 1]; or anything with
            `images` and `mask`, as a stream's batches. All of one shape compile once.
        context: of the model's calls; None for a model without text, and for CLIP, whose image
            tower needs none.

    Returns:
        The moments, the same for any division into batches.

    Raises:
        ValueError: if there are fewer than two images, they are not as a model takes them, the
            features of one are not finite, or the model has no layer features (a ResNet).

    Examples:
        With `model`, `params` and `images` of `jaxtta.load`'s example:

        >>> statistics = jaxtta.models.feature_statistics(model, params, [images[:4], images[4:]])
        >>> statistics.count.item(), statistics.std.shape == model.feature_shape
        (8.0, True)
    """
    if context is None and not hasattr(model, "image_features"):
        context = model.init_context(params, None)

    @jax.jit
    def add(
        params: Any, context: Any, so_far: FeatureStatistics, images: Array, mask: Array
    ) -> FeatureStatistics:
        batch = as_batch(Batch(images, mask, jnp.arange(len(images))))
        if context is None:
            encoder: Any = model
            features = encoder.image_features(
                params, encoder.normalize(batch.images)
            ).layer_features
        else:
            features = model(params, context, batch).layer_features
        features = cast(Array, features)  # None only if feature_shape is
        return merge_statistics(so_far, statistics_of(features, mask))

    shape = model.feature_shape
    if shape is None:
        raise ValueError(
            "this model has no layer features (feature_shape is None): a ResNet, or SigLIP, has no "
            "class token"
        )
    found = FeatureStatistics(jnp.zeros(()), jnp.zeros(shape), jnp.zeros(shape))
    for batch in batches:
        images, mask = images_and_mask(batch)
        found = add(params, context, found, images, mask)
    require_statistics(found)
    return found


def require_statistics(statistics: Any) -> None:
    """Refuse moments that have no standard deviation.

    Args:
        statistics: the moments; nothing is asked of traced ones.

    Raises:
        TypeError: if they are not `FeatureStatistics`.
        ValueError: if they are of fewer than two images, not finite or below 0, or do not match.
    """
    if not isinstance(statistics, FeatureStatistics):
        raise TypeError(
            f"statistics is a {type(statistics).__name__}, expected FeatureStatistics: "
            "feature_statistics makes them, load_statistics gives them first"
        )
    if any(isinstance(x, Tracer) for x in statistics):
        return
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
    if (squares < 0).any():
        raise ValueError("source statistics with sums of squares below 0")


def save_statistics(
    path: str | Path, statistics: FeatureStatistics, about: dict[str, Any] | None = None
) -> None:
    """Save moments.

    Args:
        path: of the `.safetensors` file.
        statistics: what to save.
        about: of which model and images, kept as JSON in the file's metadata.

    Raises:
        TypeError: if they are not `FeatureStatistics`.
        ValueError: if they have no standard deviation.

    Examples:
        >>> statistics = jaxtta.models.statistics_of(jnp.arange(8.0).reshape(4, 1, 2))
        >>> jaxtta.models.save_statistics("source.safetensors", statistics, {"images": "4 made up"})
        >>> statistics, about = jaxtta.models.load_statistics("source.safetensors")
        >>> int(statistics.count), about
        (4, {'images': '4 made up'})
    """
    require_statistics(statistics)
    save_arrays(path, statistics._asdict(), about)


def load_statistics(path: str | Path) -> tuple[FeatureStatistics, dict[str, Any]]:
    """Load what `save_statistics` saved.

    Args:
        path: of the file.

    Returns:
        The moments, and of which model and images they are.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else.

    Examples:
        >>> statistics, _ = jaxtta.models.load_statistics(jaxtta.assets.STATISTICS)
        >>> statistics.mean.shape  # (layers, width) of the bundled model
        (6, 192)
    """
    arrays, about = load_arrays(path)
    if arrays.keys() != set(FeatureStatistics._fields):
        raise ValueError(
            f"{path}: holds {', '.join(sorted(arrays)[:5])}, expected feature statistics"
        )
    statistics = FeatureStatistics(**arrays)
    try:
        require_statistics(statistics)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return statistics, about
