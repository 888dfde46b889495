"""Methods on features and logits, on top of the model or of any adapter.

A method without training sees a batch's unit image embeddings, logits and class embeddings, and may
remember some of them. `on_features` puts one on top of an adapter, which runs the model:

    adapter = jaxtta.adapters.tda(model, task)                        # on the model as it is
    adapter = jaxtta.adapters.tda(model, task, on=jaxtta.adapters.batclip(model, task))

The features are those of the pass that the adapter below predicts with, so that there is no second
one. A stacked adapter has outputs again, with its own logits: methods can be piled up further.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtta.adapters.base import Adapter, Array, Prediction, require_state
from jaxtta.adapters.zero_shot import zero_shot
from jaxtta.models import Batch, Classifier, Outputs, Task, as_batch
from jaxtta.models.checks import require_model


class FeatureMethod(NamedTuple):
    """A method on the features and logits of a batch.

    Attributes:
        init: `init(outputs) -> memory`, of outputs that have shapes and dtypes alone; () for none.
        apply: `apply(params, memory, outputs, mask) -> (memory, logits)`. The embeddings have unit
            norm; the mask leaves out padding and images that are not finite, whose rows are 0.
    """

    init: Callable[[Outputs], Any]
    apply: Callable[[Any, Any, Outputs, Array], tuple[Any, Array]]


class StackedState(NamedTuple):
    """What a method on features carries from batch to batch.

    Attributes:
        below: the state of the adapter that runs the model.
        memory: what the method remembers; () for none.
    """

    below: Any
    memory: Any

    @property
    def seen(self) -> Any:
        """Number of valid images so far."""
        return getattr(self.below, "seen", 0)


def on_features(
    model: Classifier, task: Task | None, method: FeatureMethod, on: Adapter | None = None
) -> Adapter:
    """Put a method on features on top of a model, or of an adapter of it.

    Padding and images whose features or logits are not finite take no part in it; their logits are
    those from below, and `metrics["skipped"]` says if there were any of the latter.

    Args:
        model: the classifier.
        task: the classes; None for a model that has its own.
        method: the method.
        on: an adapter of this model and task whose predictions have `outputs`; None for the model
            as it is.

    Returns:
        The adapter. Its `init` raises a ValueError if the predictions of the one below have no
        outputs, or lack what the method needs.

    Raises:
        TypeError: if the model is not a classifier, the task not a `Task` or `on` no adapter.
        ValueError: if the model needs a task and there is none.

    Examples:
        A method that sharpens predictions and remembers nothing, with the names of `jaxtta.load`'s
        example:

        >>> def apply(params, memory, outputs, mask):
        ...     return memory, 2 * outputs.logits
        >>> method = jaxtta.adapters.FeatureMethod(lambda outputs: (), apply)
        >>> adapter = jaxtta.adapters.on_features(model, task, method)
    """
    require_model(model)
    below = zero_shot(model, task) if on is None else on
    if not (hasattr(below, "init") and hasattr(below, "step")):
        raise TypeError(
            f"on is a {type(below).__name__}, expected an adapter: tent(model, task), for one"
        )

    def init(params: Any, key: Array | None = None) -> StackedState:
        state = below.init(params, key)
        # Several images: some methods refuse a batch of one.
        images = np.zeros((16, model.image_size, model.image_size, 3), np.uint8)
        _, prediction = jax.eval_shape(below.step, params, state, images)
        outputs = _outputs_of(prediction)
        memory, mask = method.init(outputs), jax.ShapeDtypeStruct((16,), bool)
        jax.eval_shape(method.apply, params, memory, outputs, mask)  # for its errors
        return StackedState(state, memory)

    def step(
        params: Any, state: StackedState, batch: Batch | Array
    ) -> tuple[StackedState, Prediction]:
        require_state(StackedState, params, state)
        batch = as_batch(batch, state.seen)
        own, prediction = below.step(params, state.below, batch)
        outputs, valid = gathered((_outputs_of(prediction), batch.mask))
        features = unit(outputs.embeddings)
        finite = jnp.isfinite(features).all(-1) & jnp.isfinite(outputs.logits).all(-1)
        mask = valid & finite
        rows = mask[:, None]
        clean = outputs._replace(
            logits=jnp.where(rows, outputs.logits, 0), embeddings=jnp.where(rows, features, 0)
        )
        memory, logits = method.apply(params, state.memory, clean, mask)
        logits = jnp.where(rows, logits, outputs.logits)
        skipped = prediction.metrics.get("skipped", False) | (valid & ~finite).any()
        metrics = {**prediction.metrics, "skipped": skipped}
        prediction = Prediction(logits, metrics, outputs._replace(logits=logits))
        return StackedState(own, memory), prediction

    return Adapter(init, step)


def _outputs_of(prediction: Prediction) -> Outputs:
    """The features and logits from below, or their shapes, in one dtype: at least float32."""
    if prediction.outputs is None:
        raise ValueError(
            "the predictions of the adapter below have no outputs, which a method on features needs"
        )
    outputs = prediction.outputs._replace(logits=prediction.logits)
    dtype = jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(outputs)))

    def cast(x: Any) -> Any:
        shape_alone = isinstance(x, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, dtype) if shape_alone else x.astype(dtype)

    return jax.tree.map(cast, outputs)


def gathered(x: Any) -> Any:
    """A tree of arrays, whole on every device if it is split over explicit mesh axes.

    Methods on features compare all images of a batch.
    """

    def gather(leaf: Array) -> Array:
        sharding = jax.typeof(leaf).sharding
        if all(axis is None for axis in sharding.spec):
            return leaf
        return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, PartitionSpec()))

    return jax.tree.map(gather, x)


def unit(x: Array) -> Array:
    """Scale vectors (…, size) to unit norm; those of norm 0 stay 0."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm == 0, 1, norm)


def class_embeddings(outputs: Outputs, method: str) -> Array:
    """Class embeddings (classes, projection), or a ValueError in a method's name."""
    if outputs.class_embeddings is None:
        raise ValueError(f"{method} needs class embeddings, which this model's outputs lack")
    return outputs.class_embeddings


def scaled_logits(outputs: Outputs, scale: float | None, method: str) -> Array:
    """Logits (batch, classes): the model's own, or for a scale the scaled cosines."""
    if scale is None:
        return outputs.logits
    texts = class_embeddings(outputs, method)
    return scale * jnp.matmul(outputs.embeddings, texts.T, precision="highest")


def nearest(features: Array, mask: Array, count: int) -> tuple[Array, Array]:
    """Which other images are the nearest ones of each.

    Args:
        features: (batch, projection), of unit norm; padding in zeros.
        mask: (batch,) bool, false for padding, which is no neighbour and has none.
        count: how many; fewer where there are fewer images.

    Returns:
        (batch, batch) bool, row i true for the neighbours of image i, and the cosines
        (batch, batch).
    """
    cosines = jnp.matmul(features, features.T, precision="highest")
    size = len(features)
    pairs = mask & mask[:, None] & ~jnp.eye(size, dtype=bool)
    _, places = jax.lax.top_k(jnp.where(pairs, cosines, -jnp.inf), min(count, size - 1))
    chosen = (places[:, :, None] == jnp.arange(size)).any(1)
    return chosen & pairs, cosines
