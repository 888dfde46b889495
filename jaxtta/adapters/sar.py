"""SAR: sharpness-aware entropy minimisation on reliable images, with a recovery of the model.

Only images with entropy below a margin count, and the gradient is taken where their loss is higher,

    R = {i: H(p_i) < E₀},   θ' = θ + ρ g/‖g‖,   g = ∇ mean_{i∈R} H(p_i) at θ,
    the step: ∇ mean_{i∈R'} H(p'_i) at θ',   R' = {i ∈ R: H(p'_i) < E₀}.

Where the moving average of the last mean falls below a threshold, the model is about to predict one
class for all, and returns to its source. Two forward and two backward passes an image.

References:
    Niu et al., ICLR 2023, https://arxiv.org/abs/2302.12400
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

from jaxtta.adapters.base import Adapter, Array, Metrics, Prediction, Preset, State
from jaxtta.adapters.filters import (
    MakeObjective,
    loss_of_selected,
    moving_average,
    reliable,
    require_range,
)
from jaxtta.adapters.online import Sharpness, online
from jaxtta.adapters.tent import tent_objective
from jaxtta.losses import entropy, masked_mean
from jaxtta.models import Batch, Classifier, Task, context_of, with_batch_norm_statistics
from jaxtta.tree import Trainable, normalisation_parameters

SAR_PRESETS = {
    "cifar10-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 200),
    "cifar100-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 200),
    "imagenet-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 64),
}
"""For ViTs; 2.5e-4 for ResNets. On ImageNet-C the rate is in proportion to the batch size, doubled
at a batch of one image."""


def sar_objectives(
    model: Classifier,
    margin: float = 0.4,
    objective: MakeObjective = tent_objective,
    reference_quirks: bool = False,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Minimise an objective on reliable images.

    Args:
        model: any classifier; its own context is the objectives'.
        margin: of entropy, part of log C.
        objective: makes the objective of the selected images.
        reference_quirks: whether there is a step too where none is selected.

    Returns:
        Two objectives with a memory for `online`: at the parameters, and nearby, of the images that
        are reliable at both. The memory is the moving average of the latter's entropy.
    """

    def first(params: Any, context: Any, batch: Batch, average: Array) -> Any:
        outputs = model(params, context, batch)
        chosen = reliable(outputs.logits, batch.mask, margin)
        loss, metrics = loss_of_selected(objective, outputs, params, context, batch, chosen)
        return loss, (outputs, metrics, average)

    def nearby(params: Any, context: Any, batch: Batch, average: Array, before: Prediction) -> Any:
        outputs = model(params, context, batch)
        chosen = reliable(before.logits, batch.mask, margin)
        chosen = reliable(outputs.logits, chosen, margin)
        loss, metrics = loss_of_selected(objective, outputs, params, context, batch, chosen)
        mean = masked_mean(entropy(outputs.logits), chosen)
        average = moving_average(average, mean, 0.9, chosen.any())
        if reference_quirks:
            del metrics["selected"]  # the momentum moves the parameters all the same
        return loss, (outputs, metrics, average)

    return first, nearby


def sar(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Trainable | None = None,
    objective: MakeObjective | None = None,
    margin: float = 0.4,
    radius: float = 0.05,
    recovery: float = 0.2,
    reference_quirks: bool = False,
) -> Adapter:
    """Minimise the entropy of reliable images in a neighbourhood of the parameters.

    Batch norms use each batch's own statistics. Where no image is reliable there is no step.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        optimizer: an optax transformation; None for `SAR_PRESETS["imagenet-c"]`.
        trainable: which parameters to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`. The reference implementation leaves out the last
            blocks of its ViT-B: `below_block(normalisation_parameters("image"), 9)`.
        objective: makes the objective of the reliable images, `batclip_objective` for one; None for
            the mean entropy.
        margin: E₀, part of log C.
        radius: ρ.
        recovery: entropy in nats; where the moving average falls below it, parameters, optimiser
            and average return to what they were at first. 0 for never.
        reference_quirks: as the reference implementation: a recovery leaves the average and the
            optimiser's state, and the optimiser makes a step too where no image is reliable.

    Returns:
        The adapter. Metrics have `selected` and `selected_perturbed`, the numbers of images in R
        and R' (the latter not with `reference_quirks`), and `reset`.

    Raises:
        TypeError: as `tent`.
        ValueError: if a setting is out of range, the model needs a task and there is none; in
            `init`, if no parameter is chosen.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.sar(model, task, optimizer=optax.sgd(1e-3, momentum=0.9))
        >>> state = adapter.init(params)
    """
    require_range(0, float("inf"), margin=margin, radius=radius, recovery=recovery)
    model = with_batch_norm_statistics(model, "batch")
    if trainable is None:
        trainable = normalisation_parameters("image")
    if optimizer is None:
        optimizer = SAR_PRESETS["imagenet-c"].optimizer()

    def restore(state: State, source: State) -> tuple[State, Metrics]:
        reset = state.memory < recovery
        if reference_quirks:
            adapted = optax.tree.where(reset, source.adapted, state.adapted)
            return state._replace(adapted=adapted), {"reset": reset}
        names = ("adapted", "optimizer", "memory")
        first, now = ({name: getattr(x, name) for name in names} for x in (source, state))
        return state._replace(**optax.tree.where(reset, first, now)), {"reset": reset}

    first, nearby = sar_objectives(model, margin, objective or tent_objective, reference_quirks)
    return online(
        first,
        context_of(model, task, trainable),
        trainable,
        optimizer,
        memory=lambda params, context, key: jnp.full((), jnp.inf),
        sharpness=Sharpness(radius, nearby),
        restore=restore,
    )
