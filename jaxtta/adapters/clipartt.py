"""CLIPArTT: text made of each image's likeliest classes, which the image tower is adapted to.

Each image has a prompt of its own, "a photo of a X or Y or Z", of its three likeliest classes in
order. With unit embeddings f_i of the images and t_i of these prompts, and the model's factor s,

    Q = softmax_j (f_i·f_j + t_i·t_j)/(2·0.01),   L_ij = s f_i·t_j,
    loss = −mean_i Σ_j Q_ji log softmax_j L_ij,

ten steps of Adam from the source weights for every batch; gradients flow through Q too. Image i is
held against column i of Q, as published. Classes and prompts are chosen anew for every step.

Cost per image: 11 image passes forward and 10 backward, and 10 prompts forward. The published code
has 20 and one: it chooses the classes in passes of their own, with the same weights.

References:
    Hakim et al., WACV 2025, https://arxiv.org/abs/2405.00754
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import Adapter, Array, Preset, dot
from jaxtta.adapters.combined_prompts import (
    ClassWords,
    combined_length,
    combined_prompts,
    words_for,
)
from jaxtta.adapters.descent import Descent, descend
from jaxtta.adapters.per_batch import (
    Adapt,
    choices,
    class_predictions,
    per_batch,
    unit_embeddings,
)
from jaxtta.adapters.settings import at_least
from jaxtta.models import Batch, Classifier, Task, l2_normalize

CLIPARTT_PRESETS: dict[str, Preset] = dict.fromkeys(
    ("cifar10-c", "cifar100-c", "imagenet-c"), Preset(partial(optax.adam, 1e-3), 128)
)
"""The published settings, which were used on CIFAR."""


class CLIPArTTContext(NamedTuple):
    """The context in CLIPArTT's state.

    Attributes:
        classes: (classes, projection) class embeddings of the task, of unit norm.
        words: what the images' prompts are made of.
    """

    classes: Array
    words: ClassWords


def clipartt_loss(
    features: Array, texts: Array, scale: Array, mask: Array, temperature: float = 0.01
) -> Array:
    """Hold a batch's images against their texts, with targets from the similarities of both.

    Args:
        features: (batch, projection), of unit norm.
        texts: (batch, projection), each image's own text, of unit norm.
        scale: () the model's factor on the cosines.
        mask: (batch,) bool, false for padding, which takes no part.
        temperature: of the targets.

    Returns:
        A scalar.
    """
    least = jnp.finfo(features.dtype).min / 2  # finite: no NaN where nothing is valid
    similarity = (dot(features, features.T) + dot(texts, texts.T)) / 2
    targets = jax.nn.softmax(jnp.where(mask, similarity / temperature, least))
    log_p = jax.nn.log_softmax(jnp.where(mask, scale * dot(features, texts.T), least))
    terms = jnp.where(mask & mask[:, None], -targets.T * log_p, 0)
    return terms.sum() / jnp.maximum(mask.sum(), 1)


def clipartt_adaptation(
    model: Any,
    optimizer: optax.GradientTransformation,
    length: int,
    *,
    iterations: int = 10,
    labels: int = 3,
    temperature: float = 0.01,
) -> Adapt:
    """Adapt to a batch from fresh moments of the optimiser.

    Args:
        model: CLIP.
        optimizer: an optax transformation.
        length: of the longest prompt (`combined_length`).
        iterations: steps of the optimiser.
        labels: classes that a prompt names.
        temperature: of the targets.

    Returns:
        `adapt(params, start, context, memory, batch)`, the context a `CLIPArTTContext`.
    """

    def adapt(
        params: Any, start: Any, context: CLIPArTTContext, memory: tuple[()], batch: Batch
    ) -> tuple[Descent, tuple[()]]:
        mask = jnp.asarray(batch.mask)

        def loss(adapted: Any) -> Array:
            merged = tree.merge(params, adapted)
            outputs = model(merged, context.classes, batch)
            _, likeliest = jax.lax.top_k(jax.lax.stop_gradient(outputs.logits), labels)
            prompts = combined_prompts(context.words, likeliest, length)
            texts = l2_normalize(model.encode_text(params, prompts))
            features = unit_embeddings(outputs, mask)
            return clipartt_loss(features, texts, model.logit_scale(merged), mask, temperature)

        descent, _ = descend(loss, start, optimizer, optimizer.init(start), iterations)
        return descent, memory

    return adapt


def clipartt(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: tree.Trainable | None = None,
    iterations: int = 10,
    labels: int = 3,
    temperature: float = 0.01,
    template: str = "a photo of a {}",
    words: ClassWords | None = None,
    scale: float | None = None,
) -> Adapter:
    """Adapt the image tower to prompts of each image's likeliest classes, anew for every batch.

    Args:
        model: CLIP; batch norms use each batch's own statistics. SigLIP reads its prompts whole.
        task: the classes, which are predicted and chosen by its own prompts. The published code's
            are "a photo of a {}", with no full stop.
        optimizer: an optax transformation, begun anew for every batch; None for
            `CLIPARTT_PRESETS["imagenet-c"]`.
        trainable: which parameters of the image tower to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`.
        iterations: steps of the optimiser for each batch.
        labels: classes that a prompt names.
        temperature: of the targets Q.
        template: of the images' prompts.
        words: tokens of the images' prompts; None to tokenise the task's class names.
        scale: of the cosines in the prediction; None for the model's own. The reference
            implementation's 100 is CLIP's.

    Returns:
        The adapter. Its state remembers nothing but the number of images.

    Raises:
        FileNotFoundError: if class names are to be tokenised and the model has no tokenizer.
        TypeError: if the model, task, optimizer or trainable is something else.
        ValueError: if a setting makes no sense, the model needs a task and there is none, has no
            text tower or one that reads prompts whole, the task has no class names or fewer
            classes than `labels`, or the prompts are too long; in `init`, if no parameter is
            chosen, or one of the text tower.

    Examples:
        >>> adapter = jaxtta.adapters.clipartt(model, task)  # names: see `jaxtta.load`
        >>> state = adapter.init(params)
    """
    at_least(1, iterations=iterations, labels=labels)
    require_temperature(temperature)
    defaults = optimizer, trainable, CLIPARTT_PRESETS["imagenet-c"]
    model, optimizer, trainable = choices("CLIPArTT", model, *defaults)
    words = words_for(model, task, labels, template, words)
    length = combined_length(words, labels)

    def context(params: Any) -> CLIPArTTContext:
        return CLIPArTTContext(model.init_context(params, task), words)

    settings = {"iterations": iterations, "labels": labels, "temperature": temperature}
    adapt = clipartt_adaptation(model, optimizer, length, **settings)
    predict = class_predictions(model, scale)
    known = {"kinds": (CLIPArTTContext, tuple), "method": "CLIPArTT"}
    return per_batch(adapt, predict, context, trainable, **known)


def require_temperature(temperature: float) -> None:
    """Raise a ValueError for one that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")
