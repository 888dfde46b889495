"""Training on one task after another: GNSP, and what it is compared with, as one step function.

    trained, frozen = tree.partition(params, gnsp_kernels)
    optimizer = task_optimizer(method, projectors, learning_rate=1e-5, iterations=1000)
    step = jax.jit(train_step(model, method, optimizer))
    state = TrainState(trained, optimizer.init(trained))
    state, metrics = step(frozen, state, batch, pairs)

Fine-tuning, distillation alone and projection alone are the same method with parts of it left out.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtta import losses, tree
from jaxtta.models import CLIP, Params, Prompts, l2_normalize
from jaxtta.optim import Projector, null_space_projection

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Method:
    """What keeps earlier knowledge while a task is learnt.

    Attributes:
        projection: of the gradient "before" the optimiser, as published; of the update "after" it,
            which is exact; or "none".
        distillation: weight of the initial model's matching of reference pairs; 0 for none.
        alignment: weight of the reference pairs' own matching; 0 for none.
        temperature: of the distillation.
        smoothing: of all targets.
    """

    projection: Literal["before", "after", "none"] = "before"
    distillation: float = 1.0
    alignment: float = 0.75
    temperature: float = 2.0
    smoothing: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
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


METHODS = {
    "fine-tuning": Method("none", distillation=0.0, alignment=0.0),
    "distillation": Method("none"),
    "projection-before": Method("before", distillation=0.0, alignment=0.0),
    "projection-after": Method("after", distillation=0.0, alignment=0.0),
    "gnsp": Method("before"),
    "gnsp-after": Method("after"),
}
"""GNSP as published, exact, and in parts."""


def gnsp_kernels(path: str) -> bool:
    """Whether GNSP trains a parameter: the image tower's MLP kernels and its projection.

    Args:
        path: the parameter's, "visual_projection/kernel".

    Returns:
        For `jaxtta.tree.partition`.
    """
    mlp = r"vision_model/encoder/layers/\d+/mlp/fc[12]/kernel"
    return path == "visual_projection/kernel" or re.fullmatch(mlp, path) is not None


def all_but_logit_scale(path: str) -> bool:
    """Whether the published code's first task, which nothing constrains, trains a parameter."""
    return path != "logit_scale"


class Examples(NamedTuple):
    """A batch of a task.

    Attributes:
        images: (batch, height, width, 3), uint8 or float in [0, 1].
        labels: (batch,) integers.
        classes: packed prompts, or ready class embeddings where the text tower is frozen.
    """

    images: Array
    labels: Array
    classes: Array | Prompts


class Pairs(NamedTuple):
    """A batch of reference pairs, and what the initial model makes of them.

    Attributes:
        images: (pairs, height, width, 3), uint8 or float in [0, 1].
        captions: (pairs, length) token ids.
        labels: (pairs,) integers, the same for pairs whose captions fit each other's images.
        teacher_images: (pairs, projection), of unit norm.
        teacher_texts: (pairs, projection), of unit norm.
        texts: (pairs, projection), of unit norm, what the trained model makes of the captions where
            its text tower is frozen; None to encode them.
    """

    images: Array
    captions: Array
    labels: Array
    teacher_images: Array
    teacher_texts: Array
    texts: Array | None = None


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
        trained: the parameters that are trained.
        optimizer: the optimiser's state.
    """

    trained: Any
    optimizer: Any


def continual_loss(
    model: CLIP, method: Method
) -> Callable[[Params, Examples, Pairs | None], tuple[Array, dict[str, Array]]]:
    """The loss of a task and of what is to be kept.

    Args:
        model: the model.
        method: what keeps earlier knowledge.

    Returns:
        `loss(params, examples, pairs) -> (loss, terms)`; pairs may be None where the method needs
        none.

    References:
        https://arxiv.org/abs/2507.19839
    """

    def loss(
        params: Params, examples: Examples, pairs: Pairs | None
    ) -> tuple[Array, dict[str, Array]]:
        logits = model(params, examples.classes, examples.images).logits
        terms = {"task": losses.classification(logits, examples.labels, method.smoothing)}
        if method.uses_pairs:
            images = l2_normalize(model.encode_image(params, model.normalize(pairs.images)))
            texts = pairs.texts
            if texts is None:
                texts = l2_normalize(model.encode_text(params, pairs.captions))
            scale = jnp.exp(params["logit_scale"])
            student = scale * jnp.matmul(images, texts.T, precision="highest")
            teacher = scale * jnp.matmul(
                pairs.teacher_images, pairs.teacher_texts.T, precision="highest"
            )
            both = ((student, teacher), (student.T, teacher.T))
            terms["distillation"] = sum(
                losses.contrastive_distillation(s, t, method.temperature) for s, t in both
            )
            terms["alignment"] = sum(
                losses.modality_alignment(s, pairs.labels, method.smoothing) for s, _ in both
            )
        weights = {
            "task": 1.0,
            "distillation": method.distillation,
            "alignment": method.alignment,
        }
        return sum(weights[name] * term for name, term in terms.items()), terms

    return loss


def task_optimizer(
    method: Method,
    projectors: Mapping[str, Projector],
    learning_rate: float,
    iterations: int,
    warmup: int = 100,
) -> optax.GradientTransformation:
    """A fresh AdamW for one task, with the method's projection.

    Args:
        method: what keeps earlier knowledge.
        projectors: of the earlier tasks; empty before the first, which nothing constrains.
        learning_rate: the highest; it rises linearly and falls along a cosine.
        iterations: steps of the task.
        warmup: how many of them it rises; with all of them it never falls.

    Returns:
        The optimiser.

    Raises:
        ValueError: if the warm-up is longer than the task.
    """
    if not 0 <= warmup <= iterations:
        raise ValueError(f"warmup is {warmup}, expected 0 to the {iterations} iterations of a task")

    def schedule(step: Array) -> Array:  # optax's warm-up begins at 0, the published one does not
        rising = (step + 1) / max(warmup, 1)
        falling = (1 + jnp.cos(jnp.pi * (step - warmup) / max(iterations - warmup, 1))) / 2
        return learning_rate * jnp.where(step < warmup, rising, falling)

    adamw = optax.adamw(schedule, b1=0.9, b2=0.999, weight_decay=0.0)
    if not projectors or method.projection == "none":
        return adamw
    projection = null_space_projection(projectors)
    chain = (projection, adamw) if method.projection == "before" else (adamw, projection)
    return optax.chain(*chain)


def train_step(
    model: CLIP, method: Method, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One step of training.

    Args:
        model: the model.
        method: what keeps earlier knowledge.
        optimizer: from `task_optimizer`.

    Returns:
        `step(params, state, examples, pairs) -> (state, metrics)`; `params` are the frozen
        parameters, or all of them.
    """
    loss_of = continual_loss(model, method)

    def step(
        params: Params, state: TrainState, examples: Examples, pairs: Pairs | None
    ) -> tuple[TrainState, dict[str, Array]]:
        def loss(trained: Any) -> tuple[Array, dict[str, Array]]:
            return loss_of(tree.merge(params, trained), examples, pairs)

        (value, terms), gradients = jax.value_and_grad(loss, has_aux=True)(state.trained)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(trained, optimizer_state), {**terms, "loss": value}

    return step


def average_weights(first: Any, second: Any, share: float = 0.5) -> Any:
    """WiSE-FT: a point on the line between two models' weights.

    Args:
        first: a tree.
        second: another of the same structure.
        share: of the second.

    Returns:
        The tree between them.

    References:
        https://arxiv.org/abs/2109.01903
    """
    return jax.tree.map(lambda a, b: (1 - share) * a + share * b, first, second)
