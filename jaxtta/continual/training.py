"""Training on one task: the settings, the augmentation and the loop over batches.

params = train(model, params, batches, classes, TrainingConfig(), VARIANTS["gnsp"], grams=grams)
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta import tree, views
from jaxtta.continual.gnsp import (
    GNSPConfig,
    ReferenceBatch,
    TaskBatch,
    TrainState,
    task_optimizer,
    train_step,
)
from jaxtta.continual.gram import Grams, check_rho, null_space_projectors
from jaxtta.models import CLIP, Params, Prompts

CROP = (0.9, 1.0)  # fraction of the area that the training crop keeps


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training settings.

    Attributes:
        iterations: training steps per task (paper: 100 to 1000).
        warmup: warm-up steps per task (paper: 100; default: a tenth of the steps).
        batch_size: images per step.
        learning_rate: peak learning rate of AdamW (paper: 1e-5 to 5e-5 on CLIP).
        rho: fraction of the sum of singular values that is treated as the null space.
        gram_images: training images per task for its Gram matrices (paper and default: all).
        first_task: parameters trained on the first task: the same kernels as for the others, or all
            except the logit scale, as in the reference implementation.
        task_zero: whether the first task is projected, for the reference images; not in the
            reference implementation.
        reference_images: number of reference images.
        reference_batch: reference pairs per step.
        wise_share: weight of the fine-tuned parameters in wise-ft's average.
        max_images: use at most so many test images of each task.
        workers: processes that read images, started for every set; 0 to read in the main process.
    """

    iterations: int = 300
    warmup: int | None = None
    batch_size: int = 64
    learning_rate: float = 5e-5
    rho: float = 0.15
    gram_images: int | None = None
    first_task: Literal["same", "all"] = "same"
    task_zero: bool = True
    reference_images: int = 1000
    reference_batch: int = 64
    wise_share: float = 0.5
    max_images: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        """Validate the settings."""
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected a positive number")
        if self.first_task not in ("same", "all"):
            raise ValueError(f"first_task is {self.first_task!r}, expected same or all")
        least = {"warmup": 0, "workers": 0, "reference_images": 2, "reference_batch": 2}
        for name in ("iterations", "batch_size", "gram_images", "max_images", *least):
            value, lowest = getattr(self, name), least.get(name, 1)
            if value is not None and value < lowest:
                raise ValueError(f"{name} is {value}, expected at least {lowest}")
        if self.warmup is not None and self.warmup > self.iterations:
            raise ValueError(
                f"warmup is {self.warmup}, expected at most the {self.iterations} iterations"
            )
        check_rho(self.rho)
        if not 0 <= self.wise_share <= 1:
            raise ValueError(f"wise_share is {self.wise_share}, expected 0 to 1")

    @property
    def schedule(self) -> tuple[float, int, int]:
        """Learning rate, iterations and warm-up steps of every task; see `task_optimizer`."""
        warmup = self.iterations // 10 if self.warmup is None else self.warmup
        return self.learning_rate, self.iterations, warmup


@jax.jit
def random_crops(key: jax.Array, images: jax.Array | np.ndarray) -> jax.Array:
    """The training augmentation: crops of images (batch, side, side, 3) uint8, in [0, 1]."""
    side = images.shape[1]

    def crop(key: jax.Array, image: jax.Array) -> jax.Array:
        box = views.random_boxes(key, jnp.array(image.shape[:2]), 1, CROP)
        return views.crop_and_resize(image, jax.tree.map(lambda x: x[0], box), side)

    keys = jax.random.split(key, len(images))
    return jax.vmap(crop)(keys, jnp.asarray(images, jnp.float32) / 255)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _step(
    model: CLIP,
    method: GNSPConfig,
    schedule: tuple[float, int, int],
    params: Params,
    projectors: dict[str, Any],
    state: TrainState,
    key: jax.Array,
    batch: TaskBatch,
    pairs: ReferenceBatch | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    # The projectors are arguments, so that they are not compiled in as constants.
    optimizer = task_optimizer(method, projectors, *schedule)
    batch = batch._replace(images=random_crops(key, batch.images))
    return train_step(model, method, optimizer)(params, state, batch, pairs)


def train(
    model: CLIP,
    config: TrainingConfig,
    method: GNSPConfig,
    params: Params,
    trainable: tree.Trainable,
    batches: Iterable[Any],
    classes: jax.Array | Prompts,
    pairs: ReferenceBatch | None = None,
    grams: Grams | None = None,
    *,
    rng: np.random.Generator,
    key: jax.Array,
) -> Params:
    """Train on one task.

    Args:
        model: CLIP with a vision transformer.
        config: the training settings.
        method: of `VARIANTS`, or another.
        params: the parameters before the task.
        trainable: predicate on the paths of the parameters that are trained.
        batches: such as `StreamBatch`, one per iteration.
        classes: embeddings of the classes, or their prompts if the text tower is trained.
        pairs: reference pairs, for methods with distillation or alignment.
        grams: Gram matrices of what is to be preserved; empty for no projection.
        rng: draws the reference pairs of each step.
        key: PRNG key of the crops.

    Returns:
        The parameters after the task.

    Raises:
        FloatingPointError: if the loss is no longer finite.
        ValueError: if no image of a batch could be read.
    """
    trained, _ = tree.partition(params, trainable)
    projectors = null_space_projectors(grams, config.rho) if grams else {}
    optimizer = task_optimizer(method, projectors, *config.schedule)
    state = TrainState(jax.tree.map(jnp.copy, trained), optimizer.init(trained))
    metrics: dict[str, Any] = {}
    for number, batch in enumerate(batches):
        if not batch.mask.any():
            raise ValueError("none of the images of a batch could be read")
        # Others of the batch stand in for unreadable images.
        others = rng.choice(np.flatnonzero(batch.mask), len(batch.mask))
        rows = np.where(batch.mask, np.arange(len(batch.mask)), others)
        images, labels = jnp.asarray(batch.images[rows]), jnp.asarray(batch.labels[rows])
        drawn = None
        if pairs is not None:
            chosen = rng.integers(0, len(pairs.images), config.reference_batch)
            drawn = jax.tree.map(lambda x, chosen=chosen: x[chosen], pairs)
        state, metrics = _step(
            *(model, method, config.schedule, params, projectors, state),
            *(jax.random.fold_in(key, number), TaskBatch(images, labels, classes), drawn),
        )
        if number % 50 == 0 and not np.isfinite(metrics["loss"]):
            break
    if not np.isfinite(metrics["loss"]):
        raise FloatingPointError("the loss is no longer finite; try a lower learning rate")
    return tree.merge(params, state.trained)
