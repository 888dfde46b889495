"""TENT: fully test-time adaptation by entropy minimisation.

The loss is the mean entropy of a batch's predictions,

    L = mean_i H(p_i),   H(p) = −Σ_k p_k log p_k,

minimised over the scales and biases of the image tower's normalisation layers, one step per batch.

References:
    Wang et al., ICLR 2021, https://arxiv.org/abs/2006.10726
"""

from functools import partial
from typing import Any

import optax

from jaxtta.adapters.base import Adapter, Objective, ObjectiveValue, Preset
from jaxtta.adapters.online import online
from jaxtta.losses import entropy, masked_mean
from jaxtta.models import Batch, Classifier, Task, context_of, with_batch_norm_statistics
from jaxtta.tree import Trainable, normalisation_parameters

TENT_PRESETS = {
    "cifar10-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 200),
    "cifar100-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 200),
    "imagenet-c": Preset(partial(optax.sgd, 2.5e-4, momentum=0.9, nesterov=True), 64),
}
"""ImageNet-C as in BATCLIP's reference implementation; the others as in the bundled model's."""


def tent_objective(model: Classifier) -> Objective:
    """Minimise the mean entropy of the predictions.

    Args:
        model: any classifier; its own context is the objective's.

    Returns:
        The objective.
    """

    def objective(params: Any, context: Any, batch: Batch) -> ObjectiveValue:
        outputs = model(params, context, batch)
        loss = masked_mean(entropy(outputs.logits), batch.mask)
        return loss, (outputs, {"entropy": loss})

    return objective


def tent(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Trainable | None = None,
) -> Adapter:
    """Minimise prediction entropy, by default over the image tower's normalisation layers.

    Batch norms use each batch's own statistics.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        optimizer: an optax transformation; None for `TENT_PRESETS["imagenet-c"]`.
        trainable: which parameters to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`.

    Returns:
        The adapter.

    Raises:
        TypeError: if an argument is of another kind: a learning rate for the optimizer, a list for
            `trainable`, class names for the task.
        ValueError: if the model needs a task and there is none; in `init`, if no parameter is
            chosen.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.tent(model, task, optimizer=optax.sgd(1e-3, momentum=0.9))
        >>> state, step = adapter.init(params), jax.jit(adapter.step, donate_argnums=1)
        >>> for batch in (images[:4], images[4:]):
        ...     state, prediction = step(params, state, batch)
        >>> prediction.logits.shape, sorted(prediction.metrics)
        ((4, 10), ['entropy', 'loss', 'skipped', 'update_norm'])
    """
    model = with_batch_norm_statistics(model, "batch")
    if trainable is None:
        trainable = normalisation_parameters("image")
    if optimizer is None:
        optimizer = TENT_PRESETS["imagenet-c"].optimizer()
    return online(tent_objective(model), context_of(model, task, trainable), trainable, optimizer)
