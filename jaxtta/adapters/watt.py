"""WATT: weights of the image tower, averaged over text templates.

CLIPArTT's loss, an image's text being its likeliest class in one template; two steps of Adam for
each of eight templates in turn, whose results are averaged. The average is where the next round
begins, and after the last what is predicted with, the text being the mean over the templates. In
WATT-S a template goes on from the last one's weights, 5 rounds; in WATT-P each starts from the
round's start, 50 rounds. Every batch begins anew.

Adam is one for all templates and rounds, as in the published code: WATT-S never clears its moments,
WATT-P before each template of the first round alone.

Cost per image: 81 image passes forward and 80 backward (WATT-S), or 801 and 800 (WATT-P). The
published code has 161 and 1,601 forward, with passes of their own to choose the classes.

References:
    Osowiechi et al., NeurIPS 2024, https://arxiv.org/abs/2406.13875
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import Adapter, Array, Preset, dot
from jaxtta.adapters.clipartt import clipartt_loss, require_temperature
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

WATT_TEMPLATES = (
    "a photo of a {}",
    "itap of a {}",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""The published templates, for `zero_shot_task`."""

WATT_PRESETS: dict[str, Preset] = dict.fromkeys(
    ("cifar10-c", "cifar100-c", "imagenet-c"), Preset(partial(optax.adam, 1e-3), 128)
)
"""The published settings, which were used on CIFAR."""

WATT_ROUNDS = {"sequential": 5, "parallel": 50}
"""The published numbers of rounds, by mode."""


class WATTContext(NamedTuple):
    """The context in WATT's state; all embeddings have unit norm.

    Attributes:
        classes: (classes, projection), of the means over the templates.
        templates: (templates, classes, projection).
    """

    classes: Array
    templates: Array


def watt_adaptation(
    model: Any,
    optimizer: optax.GradientTransformation,
    *,
    parallel: bool = False,
    rounds: int = 5,
    iterations: int = 2,
    temperature: float = 0.01,
) -> Adapt:
    """Adapt to a batch from fresh moments of the optimiser.

    Args:
        model: CLIP or SigLIP.
        optimizer: an optax transformation.
        parallel: whether each template starts from the round's start, as in WATT-P.
        rounds: m, averages one after another.
        iterations: l, steps of the optimiser for each template.
        temperature: of the targets.

    Returns:
        As `clipartt_adaptation`; context a `WATTContext`, losses (rounds, templates, iterations).
    """

    def adapt(
        params: Any, start: Any, context: WATTContext, memory: tuple[()], batch: Batch
    ) -> tuple[Descent, tuple[()]]:
        mask, fresh = jnp.asarray(batch.mask), optimizer.init(start)
        share = 1 / len(context.templates)

        def loss(texts: Array, adapted: Any) -> Array:
            merged = tree.merge(params, adapted)
            features = unit_embeddings(model(merged, context.classes, batch), mask)
            own = texts[jax.lax.stop_gradient(dot(features, texts.T)).argmax(-1)]
            return clipartt_loss(features, own, model.logit_scale(merged), mask, temperature)

        def one_round(carry: Any, first: Array) -> Any:
            begin, moments = carry

            def one_template(carry: Any, texts: Array) -> Any:
                weights, moments, average = carry
                if parallel:
                    weights, moments = begin, optax.tree.where(first, fresh, moments)
                of_template = partial(loss, texts)
                found, moments = descend(of_template, weights, optimizer, moments, iterations)
                average = optax.tree.add_scale(average, share, found.adapted)
                return (found.adapted, moments, average), found.losses

            carry = begin, moments, optax.tree.zeros_like(begin)
            (_, moments, average), losses = jax.lax.scan(one_template, carry, context.templates)
            return (average, moments), losses

        (adapted, _), losses = jax.lax.scan(one_round, (start, fresh), jnp.arange(rounds) == 0)
        return Descent(adapted, losses), memory

    return adapt


def watt(
    model: Classifier,
    task: Task | None,
    *,
    mode: str = "sequential",
    optimizer: optax.GradientTransformation | None = None,
    trainable: tree.Trainable | None = None,
    rounds: int | None = None,
    iterations: int = 2,
    temperature: float = 0.01,
    scale: float | None = None,
) -> Adapter:
    """Average the image tower's weights over templates, anew for every batch.

    Args:
        model: CLIP or SigLIP; batch norms use each batch's own statistics.
        task: the classes with several templates, `WATT_TEMPLATES` in the published runs.
        mode: "sequential" for WATT-S, "parallel" for WATT-P.
        optimizer: an optax transformation, begun anew for every batch; None for
            `WATT_PRESETS["imagenet-c"]`.
        trainable: which parameters of the image tower to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`.
        rounds: m, averages one after another; None for `WATT_ROUNDS[mode]`.
        iterations: l, steps of the optimiser for each template.
        temperature: of the targets, as in `clipartt`.
        scale: of the cosines in the prediction; None for the model's own, CLIP's 100.

    Returns:
        The adapter. Its state remembers nothing but the number of images. `metrics["loss"]` and
        `metrics["last_loss"]` are those of the first and the last step, of two templates.

    Raises:
        TypeError: if the model, task, optimizer or trainable is something else.
        ValueError: if a setting makes no sense, the model needs a task and there is none, it has no
            text tower, or the task has one template; in `init`, if no parameter is chosen, or one
            of the text tower.

    Examples:
        >>> names, templates = dataset.class_names, jaxtta.adapters.WATT_TEMPLATES
        >>> task = jaxtta.zero_shot_task(model, names, templates)  # other names: see `jaxtta.load`
        >>> adapter = jaxtta.adapters.watt(model, task, mode="sequential")  # WATT-S
    """
    if mode not in WATT_ROUNDS:
        raise ValueError(f"mode is {mode!r}, expected {' or '.join(WATT_ROUNDS)}")
    number = WATT_ROUNDS[mode] if rounds is None else rounds
    at_least(1, rounds=number, iterations=iterations)
    require_temperature(temperature)
    defaults = optimizer, trainable, WATT_PRESETS["imagenet-c"]
    model, optimizer, trainable = choices("WATT", model, *defaults)
    if not hasattr(model, "prompts"):
        raise ValueError("WATT needs a text tower, for its templates; this model has none")
    cast(Any, model).prompts(task)  # for its errors
    classes, templates, length = cast(Task, task).token_ids.shape
    if templates < 2:
        hint = "zero_shot_task(model, class_names, WATT_TEMPLATES) has eight"
        raise ValueError(f"WATT averages over templates and the task has one: {hint}")
    # Each prompt a class of its own: one pass of the text tower, at any number of templates.
    single = cast(Task, task).token_ids.reshape(-1, 1, length)

    def context(params: Any) -> WATTContext:
        texts = model.init_context(params, Task(single)).reshape(classes, templates, -1)
        return WATTContext(l2_normalize(texts.mean(1)), texts.swapaxes(0, 1))

    settings = {"rounds": number, "iterations": iterations, "temperature": temperature}
    adapt = watt_adaptation(model, optimizer, parallel=mode == "parallel", **settings)
    predict = class_predictions(model, scale)
    known = {"kinds": (WATTContext, tuple), "method": "WATT"}
    return per_batch(adapt, predict, context, trainable, **known)
