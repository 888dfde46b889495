"""GNSP: continual learning by gradient null space projection, https://arxiv.org/abs/2507.19839.

For a kernel with inputs X, `jaxtta.continual.gram` sums G = Σ XᵀX / ‖XᵀX‖ over earlier tasks. With
V the eigenvectors of the smallest eigenvalues of G, whose sum stays below ρ times that of all, the
gradient g of the next task becomes V Vᵀ g. The loss of a task is, with label smoothing ε,

    L         = CE(logits, labels; ε) + λ_d L_distill + λ_a L_align
    L_distill = T² [CE(S/T, softmax(S₀/T)) + CE(Sᵀ/T, softmax(S₀ᵀ/T))]
    L_align   = CE(S, M; ε) + CE(Sᵀ, M; ε),        M = [label_i = label_j], rows scaled to sum to 1

where S and S₀ are the logits of reference images over reference texts, by the trained and the
initial model. Without some of its parts GNSP is fine-tuning, distillation or projection alone.

    trained, frozen = tree.partition(params, gnsp_kernels)
    optimizer = task_optimizer(config, projectors, learning_rate=1e-5, iterations=1000)
    step = jax.jit(train_step(model, config, optimizer))
    state = TrainState(trained, optimizer.init(trained))
    state, metrics = step(frozen, state, batch, pairs)
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from jaxtta import tree
from jaxtta.metrics import nll
from jaxtta.models import CLIP, Params, Prompts, l2_normalize
from jaxtta.optim import Projector, null_space_projection, require_optimizer

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class GNSPConfig:
    """Settings of GNSP.

    Attributes:
        projection: of the gradient "before" the optimiser (paper), of the update "after" the
            optimiser (exact), or "none".
        distillation: weight λ_d of the distillation loss; 0 for none.
        alignment: weight λ_a of the modality alignment loss; 0 for none.
        temperature: T of the distillation loss.
        smoothing: label smoothing ε of the task and alignment losses.

    Raises:
        ValueError: if a setting is out of range.

    Examples:
        >>> jaxtta.continual.GNSPConfig("after", distillation=0.0, alignment=0.0).uses_pairs
        False
    """

    projection: Literal["before", "after", "none"] = "before"
    distillation: float = 1.0
    alignment: float = 0.75
    temperature: float = 2.0
    smoothing: float = 0.2

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.projection not in ("before", "after", "none"):
            raise ValueError(f"projection is {self.projection!r}, expected before, after or none")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}, expected 0 to below 1")
        for name in ("distillation", "alignment"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, expected a positive number")

    @property
    def uses_pairs(self) -> bool:
        """Whether the loss needs reference pairs."""
        return self.distillation > 0 or self.alignment > 0


VARIANTS = {
    "fine-tuning": GNSPConfig("none", distillation=0.0, alignment=0.0),
    "distillation": GNSPConfig("none"),
    "projection-before": GNSPConfig("before", distillation=0.0, alignment=0.0),
    "projection-after": GNSPConfig("after", distillation=0.0, alignment=0.0),
    "gnsp": GNSPConfig("before"),
    "gnsp-after": GNSPConfig("after"),
}
"""GNSP with the projection of the paper and the exact one, and ablations."""


def gnsp_kernels(path: str) -> bool:
    """Whether GNSP trains a parameter: the image tower's MLP kernels and its projection.

    Args:
        path: of the parameter, "visual_projection/kernel".

    Returns:
        A bool; the function is a predicate for `jaxtta.tree.partition`.

    Examples:
        >>> jaxtta.continual.gnsp_kernels("visual_projection/kernel")
        True
        >>> jaxtta.continual.gnsp_kernels("vision_model/encoder/layers/0/layer_norm1/scale")
        False
    """
    mlp = r"vision_model/encoder/layers/\d+/mlp/fc[12]/kernel"
    return path == "visual_projection/kernel" or re.fullmatch(mlp, path) is not None


def everything_but_logit_scale(path: str) -> bool:
    """Whether the reference implementation trains a parameter in the first task."""
    return path != "logit_scale"


class TaskBatch(NamedTuple):
    """A batch of a task.

    Attributes:
        images: (batch, height, width, 3), uint8 or float in [0, 1].
        labels: (batch,) integers.
        classes: packed prompts, or class embeddings (classes, projection) if the text tower is
            frozen.
    """

    images: Array
    labels: Array
    classes: Array | Prompts


class ReferenceBatch(NamedTuple):
    """A batch of reference image-text pairs.

    Attributes:
        images: (pairs, height, width, 3), uint8 or float in [0, 1].
        captions: (pairs, length) token ids, unused if `texts` is given.
        labels: (pairs,) integers, equal for pairs whose captions match each other's images.
        teacher_images: (pairs, projection), the initial model's image embeddings, of unit norm.
        teacher_texts: (pairs, projection), its text embeddings, of unit norm.
        texts: (pairs, projection), the trained model's text embeddings, of unit norm, if its text
            tower is frozen; None to encode the captions.
    """

    images: Array | np.ndarray
    captions: Array | np.ndarray
    labels: Array | np.ndarray
    teacher_images: Array | np.ndarray
    teacher_texts: Array | np.ndarray
    texts: Array | np.ndarray | None = None


class TrainState(NamedTuple):
    """The state of training.

    Attributes:
        trained: the trained parameters.
        optimizer: the optimiser's state.
    """

    trained: Any
    optimizer: Any


def classification(logits: Array, labels: Array, smoothing: float = 0.2) -> Array:
    """Cross-entropy with label smoothing.

    Args:
        logits: (batch, classes).
        labels: (batch,) integers.
        smoothing: share of the target probability that is spread over all classes.

    Returns:
        A scalar; NaN if a label is not a class, under `jit`.

    Raises:
        TypeError: if the labels are not integers.
        ValueError: if they do not match the logits.
    """
    even = -jax.nn.log_softmax(logits).mean(-1)  # the loss of evenly spread targets
    return ((1 - smoothing) * nll(logits, labels) + smoothing * even).mean()


def contrastive_distillation(student: Array, teacher: Array, temperature: float = 2.0) -> Array:
    """Cross-entropy of a student's image-text matching with its teacher's.

    Args:
        student: (images, texts), logits.
        teacher: (images, texts), logits.
        temperature: divides both.

    Returns:
        A scalar, for images over texts; transpose the logits for texts over images.
    """
    targets = jax.nn.softmax(teacher / temperature)
    return temperature**2 * optax.softmax_cross_entropy(student / temperature, targets).mean()


def modality_alignment(logits: Array, labels: Array | np.ndarray, smoothing: float = 0.2) -> Array:
    """Cross-entropy with targets shared equally among pairs of the same label.

    Args:
        logits: (pairs, pairs), images over texts or texts over images.
        labels: (pairs,) integers, equal for pairs that match each other.
        smoothing: share of the target probability that is spread over all pairs.

    Returns:
        A scalar.
    """
    same = (labels[:, None] == labels).astype(logits.dtype)
    targets = optax.smooth_labels(same / same.sum(-1, keepdims=True), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


Loss = Callable[[Params, TaskBatch, ReferenceBatch | None], tuple[Array, dict[str, Array]]]


def continual_loss(model: CLIP, config: GNSPConfig) -> Loss:
    """The loss of GNSP.

    Args:
        model: the model.
        config: the settings.

    Returns:
        `loss(params, batch, pairs) -> (loss, terms)`; pairs may be None if both weights are 0.

    Raises:
        ValueError: in `loss`, if the pairs are None and a weight is not 0.

    References:
        https://arxiv.org/abs/2507.19839
    """

    def loss(
        params: Params, batch: TaskBatch, pairs: ReferenceBatch | None
    ) -> tuple[Array, dict[str, Array]]:
        logits = model(params, batch.classes, batch.images).logits
        task = classification(logits, batch.labels, config.smoothing)
        if not config.uses_pairs:
            return task, {"task": task}
        if pairs is None:
            raise ValueError("distillation and alignment need reference pairs")
        images, texts = (
            l2_normalize(model.encode_image(params, model.normalize(jnp.asarray(pairs.images)))),
            pairs.texts,
        )
        if texts is None:
            texts = l2_normalize(model.encode_text(params, pairs.captions))
        matmul = functools.partial(jnp.matmul, precision="highest")
        scale = jnp.exp(params["logit_scale"])
        student = scale * matmul(images, texts.T)
        teacher = scale * matmul(pairs.teacher_images, pairs.teacher_texts.T)
        distil = functools.partial(contrastive_distillation, temperature=config.temperature)
        align = functools.partial(modality_alignment, smoothing=config.smoothing)
        distillation = distil(student, teacher) + distil(student.T, teacher.T)
        alignment = align(student, pairs.labels) + align(student.T, pairs.labels)
        total = task + config.distillation * distillation + config.alignment * alignment
        return total, {"task": task, "distillation": distillation, "alignment": alignment}

    return loss


def task_optimizer(
    config: GNSPConfig,
    projectors: Mapping[str, Projector],
    learning_rate: float,
    iterations: int,
    warmup: int = 100,
) -> optax.GradientTransformation:
    """AdamW for one task, with the projection of GNSP.

    Args:
        config: the settings.
        projectors: for the earlier tasks, by path; empty for the first task.
        learning_rate: peak; linear warm-up, then cosine decay to 0.
        iterations: number of steps of the task.
        warmup: number of warm-up steps.

    Returns:
        The optimiser.

    Raises:
        ValueError: if the warm-up is longer than the task.

    Examples:
        >>> gnsp = jaxtta.continual.VARIANTS["gnsp"]
        >>> optimizer = jaxtta.continual.task_optimizer(gnsp, {}, 5e-5, iterations=300)  # the first
        >>> state = optimizer.init({"kernel": jnp.ones((2, 2))})
    """
    if not 0 <= warmup <= iterations:
        raise ValueError(f"warmup is {warmup}, expected 0 to the {iterations} iterations of a task")

    def schedule(step: jax.typing.ArrayLike) -> Array:
        step = jnp.asarray(step)  # the first rate is not 0, as it is in optax's warm-up
        rising = (step + 1) / max(warmup, 1)
        falling = (1 + jnp.cos(jnp.pi * (step - warmup) / max(iterations - warmup, 1))) / 2
        return learning_rate * jnp.where(step < warmup, rising, falling)

    adamw = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=0.0)
    if not projectors or config.projection == "none":
        return adamw
    projection = null_space_projection(projectors)
    chain = (projection, adamw) if config.projection == "before" else (adamw, projection)
    return optax.chain(*chain)


def train_step(
    model: CLIP, config: GNSPConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One training step.

    Args:
        model: the model.
        config: the settings.
        optimizer: from `task_optimizer`.

    Returns:
        `step(params, state, batch, pairs) -> (state, metrics)`; `params` are the frozen parameters,
        or all of them.

    Raises:
        TypeError: if the optimizer is not an optax transformation.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> from jaxtta.continual import VARIANTS, TaskBatch, TrainState, gnsp_kernels, train_step
        >>> trained, frozen = jaxtta.tree.partition(params, gnsp_kernels)
        >>> optimizer = optax.adamw(5e-5)
        >>> step = jax.jit(train_step(model, VARIANTS["fine-tuning"], optimizer))
        >>> batch = TaskBatch(images, jnp.arange(8), model.init_context(params, task))
        >>> state = TrainState(trained, optimizer.init(trained))
        >>> state, metrics = step(frozen, state, batch, None)
        >>> sorted(metrics)
        ['loss', 'task']
    """
    require_optimizer(optimizer)
    loss_of = continual_loss(model, config)

    def step(
        params: Params, state: TrainState, batch: TaskBatch, pairs: ReferenceBatch | None
    ) -> tuple[TrainState, dict[str, Array]]:
        def loss(trained: Any) -> tuple[Array, dict[str, Array]]:
            return loss_of(tree.merge(params, trained), batch, pairs)

        (value, terms), gradients = jax.value_and_grad(loss, has_aux=True)(state.trained)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(trained, optimizer_state), {**terms, "loss": value}

    return step


def wise_ft(first: Any, second: Any, share: float = 0.5) -> Any:
    """Weight-space ensemble of two models (WiSE-FT): linear interpolation of their weights.

    Args:
        first: a tree.
        second: another of the same structure.
        share: weight of the second, in [0, 1].

    Returns:
        The interpolated tree.

    Raises:
        ValueError: if the share is not in [0, 1].

    Examples:
        >>> before, after = {"kernel": jnp.zeros(2)}, {"kernel": jnp.ones(2)}
        >>> jaxtta.continual.wise_ft(before, after, share=0.25)["kernel"].tolist()
        [0.25, 0.25]

    References:
        https://arxiv.org/abs/2109.01903
    """
    if not isinstance(share, Tracer) and not 0 <= share <= 1:
        raise ValueError(f"share is {share}, expected a number in [0, 1]")
    return jax.tree.map(lambda a, b: (1 - share) * a + share * b, first, second)
