"""What a model is to an adapter: the `Classifier` protocol, its batches and outputs.

    class Mine:  # a user's model
        image_size, mixes_batch, feature_shape = 32, False, None

        def init_context(self, params, task):
            return ()

        def __call__(self, params, context, batch):
            features = encode(params, batch.images)
            return Outputs(features @ params["head"], features)

The mask is in the batch, so that no objective can forget it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.models.checks import require_images, require_model

Array = jax.Array
Params = dict[str, Any]


class Batch(NamedTuple):
    """One batch of a stream; the last one of a stream is padded to the same shape.

    Attributes:
        images: (batch, height, width, 3), uint8 or float in [0, 1], at the model's resolution; with
            `sizes`, full-size images zero-padded to a common canvas.
        mask: (batch,) bool, false for padding.
        index: (batch,) integers, each image's number in its stream, which keys its randomness.
        sizes: (batch, 2) integers, the true height and width of full-size images; None otherwise.
    """

    images: Array | np.ndarray
    mask: Array | np.ndarray
    index: Array | np.ndarray
    sizes: Array | np.ndarray | None = None

    @classmethod
    def padded(cls, images: Any, size: int, start: int | Array = 0) -> "Batch":
        """Pad a batch with black images, so that all batches of a stream have one shape.

        Args:
            images: (images, height, width, 3), at most `size` of them.
            size: images of the padded batch.
            start: number of the first image in its stream.

        Returns:
            A batch of `size` images; the mask is false for the padding.

        Raises:
            ValueError: if there are more images than `size`, or they are not as `require_images`
                says.

        Examples:
            >>> images = np.zeros((3, 32, 32, 3), np.uint8)  # the last three of a stream
            >>> batch = jaxtta.Batch.padded(images, 4, start=96)
            >>> batch.images.shape, batch.mask.tolist(), batch.index.tolist()
            ((4, 32, 32, 3), [True, True, True, False], [96, 97, 98, 99])
        """
        xp = jnp if isinstance(images, jax.Array) else np
        images = xp.asarray(images)
        require_images(images)
        count = len(images)
        if count > size:
            raise ValueError(f"{count} images, expected at most {size}")
        images = xp.pad(images, ((0, size - count), (0, 0), (0, 0), (0, 0)))
        return cls(images, np.arange(size) < count, start + np.arange(size))


def images_and_mask(batch: Any) -> tuple[Array, Array]:
    """The images of a bare array, or of anything with `images` and `mask`, and the mask.

    Args:
        batch: images (batch, height, width, 3), or an object that has them.

    Returns:
        The images, their padding black, and the mask (batch,).

    Raises:
        TypeError: for anything else.
        ValueError: as `require_images`.
    """
    if hasattr(batch, "images"):  # a stream's batch has labels too
        batch = Batch(batch.images, batch.mask, np.arange(len(batch.images)))
    batch = as_batch(batch)  # its padding may have been anything
    require_images(batch.images)
    return batch.images, batch.mask


def as_batch(batch: Batch | Any, seen: Any = 0) -> Batch:
    """Make a batch of a bare array of images, all valid and numbered from `seen`.

    Args:
        batch: a batch, or (batch, height, width, 3) images.
        seen: number of images that the stream has given so far.

    Returns:
        The batch, its padding black: a NaN there would reach the gradients through the weights,
        masked loss or not.

    Raises:
        TypeError: for anything but a batch or an array: a list of images, say.
        ValueError: if mask, index or sizes have another length than the images.

    Examples:
        >>> batch = jaxtta.models.as_batch(np.zeros((2, 32, 32, 3), np.uint8), seen=96)
        >>> batch.mask.tolist(), batch.index.tolist()
        ([True, True], [96, 97])
    """
    array = batch.images if isinstance(batch, Batch) else batch
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise TypeError(
            f"batch holds a {type(array).__name__}, expected an array (batch, height, width, 3): "
            "model.preprocess makes one of PIL images, np.stack of arrays"
        )
    if not isinstance(batch, Batch):
        images = jnp.asarray(batch)
        return Batch(images, jnp.ones(len(images), bool), seen + jnp.arange(len(images)))
    count = len(batch.images)
    for name, wanted in (("mask", (count,)), ("index", (count,)), ("sizes", (count, 2))):
        given = getattr(batch, name)
        if given is not None and jnp.shape(given) != wanted:
            raise ValueError(f"{name} has shape {jnp.shape(given)} for {count} images")
    mask = jnp.asarray(batch.mask, bool)
    images = jnp.where(mask.reshape(-1, *[1] * (jnp.ndim(batch.images) - 1)), batch.images, 0)
    return batch._replace(images=images.astype(batch.images.dtype), mask=mask)


class Outputs(NamedTuple):
    """What an objective sees of a model.

    Attributes:
        logits: (batch, classes), unnormalised log-probabilities.
        embeddings: (batch, projection), unnormalised.
        class_embeddings: (classes, projection), of unit norm; None where there are none.
        layer_features: (batch, layers, width); None where there are none.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> outputs = jax.jit(model)(params, model.init_context(params, task), images)
        >>> outputs.logits.shape, outputs.embeddings.shape, outputs.class_embeddings.shape
        ((8, 10), (8, 128), (10, 128))
    """

    logits: Array
    embeddings: Array
    class_embeddings: Array | None = None
    layer_features: Array | None = None


class Classifier(Protocol):
    """All that an adapter knows of a model.

    CLIP with a ViT or a ResNet, SigLIP, a supervised ViT and a user's own object are Classifiers.

    Attributes:
        image_size: side of the images in pixels.
        mixes_batch: whether an image's logits depend on the other images of its batch.
        feature_shape: (layers, width) of the layer features; None where there are none.

    A model may also have `prompts(task)`, packed prompts that it takes as a context and encodes at
    every call, `with_batch_norm_statistics(which)`, and `class_names`, if its classes are its own.
    """

    @property
    def image_size(self) -> int: ...  # noqa: D102

    @property
    def mixes_batch(self) -> bool: ...  # noqa: D102

    @property
    def feature_shape(self) -> tuple[int, int] | None: ...  # noqa: D102

    def init_context(self, params: Any, task: Any) -> Any:
        """Compute what calls need beside parameters and batch: class embeddings, or ()."""
        ...

    def __call__(self, params: Any, context: Any, batch: Batch) -> Outputs:
        """Classify a batch; padding must not change the outputs of the other images."""
        ...


C = TypeVar("C", bound=Classifier)


def with_batch_norm_statistics(model: C, which: str) -> C:
    """Normalise with each batch's own statistics ("batch") or the checkpoint's ("running").

    Args:
        model: any classifier.
        which: "batch" or "running".

    Returns:
        A model of the same parameters; the model itself where it has no batch norms.
    """
    change = getattr(model, "with_batch_norm_statistics", None)
    return model if change is None else change(which)


def context_of(model: Classifier, task: Any, trainable: Callable[[str], bool]) -> Callable:
    """Say how a method that adapts some parameters gets its context.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        trainable: which parameters the method adapts, a predicate on paths.

    Returns:
        `context(params)`: the model's own context, computed once with the parameters of `init`;
        or the packed prompts, where `trainable` chooses parameters of the text tower, so that the
        text is encoded at every step.

    Raises:
        TypeError: if the model is not a classifier, or the task not one that it takes.
        ValueError: if the model needs a task and there is none.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example; a method that leaves the text
        tower as it is encodes the classes once:

        >>> trainable = jaxtta.tree.normalisation_parameters("image")
        >>> context = jaxtta.models.context_of(model, task, trainable)
        >>> context(params).shape
        (10, 128)
    """
    require_model(model)
    pack = getattr(model, "prompts", None)
    prompts = None if pack is None else pack(task)

    def context(params: Any) -> Any:
        paths = (
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree.leaves_with_path(params)
        )
        if prompts is not None and any(p.startswith("text_") and trainable(p) for p in paths):
            return prompts
        return model.init_context(params, task)

    return context
