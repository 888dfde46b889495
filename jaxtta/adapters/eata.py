"""EATA and ETA: entropy minimisation on images that are reliable and not redundant.

With p̄ the moving average of the selected images' probabilities and E₀ a margin,

    S = {i: H(p_i) < E₀ and |cos(p̄, p_i)| < ε},
    L = mean_{i∈S} exp(E₀ − H(p_i)) H(p_i) + β Σ_j F_j (θ_j − θ⁰_j)²,

weights without gradient. F says how much the source's predictions depend on each parameter, of
clean images; ETA is EATA without that term. One forward and one backward pass an image.

References:
    Niu et al., ICML 2022, https://arxiv.org/abs/2204.02610
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtta import tree
from jaxtta.adapters.base import Adapter, Array, Preset
from jaxtta.adapters.filters import (
    MakeObjective,
    log_classes,
    logits_of_one,
    loss_of_selected,
    moving_average,
    reliable,
    require_context,
    require_range,
    weighted_entropy,
)
from jaxtta.adapters.fisher import EATAContext, fisher_distance
from jaxtta.adapters.online import online
from jaxtta.losses import entropy
from jaxtta.models import Batch, Classifier, Task, context_of, with_batch_norm_statistics
from jaxtta.tree import Trainable, normalisation_parameters

EATA_PRESETS = {
    "cifar10-c": Preset(partial(optax.adam, 1e-3), 200),
    "cifar100-c": Preset(partial(optax.adam, 1e-3), 200),
    "imagenet-c": Preset(partial(optax.sgd, 1e-3, momentum=0.9), 64),
}
"""ImageNet-C for ViTs, 2.5e-4 for ResNets; CIFAR as in the multi-method repository."""
EATA_SETTINGS = {
    "cifar10-c": {"similarity": 0.4, "fisher_weight": 1.0},
    "cifar100-c": {"similarity": 0.1, "fisher_weight": 1.0},
    "imagenet-c": {"similarity": 0.05, "fisher_weight": 2000.0},
}
"""ε and β that go with the presets; ETA has the first alone."""


def eata_objective(
    model: Classifier,
    margin: float = 0.4,
    similarity: float = 0.05,
    fisher_weight: float = 2000.0,
    objective: MakeObjective | None = None,
) -> Callable[..., Any]:
    """Minimise the weighted entropy of selected images, and stay near the source.

    Args:
        model: any classifier; the context is an `EATAContext`.
        margin: of entropy, part of log C.
        similarity: ε.
        fisher_weight: β.
        objective: makes another objective of the selected images, without weights.

    Returns:
        An objective for `online`; its memory is p̄, (classes,), infinite at first.
    """

    def apply(params: Any, context: EATAContext, batch: Batch, average: Array) -> Any:
        outputs = model(params, context.classes, batch)
        logits, mean = outputs.logits, jnp.where(jnp.isinf(average), 0, average)
        p = jax.nn.softmax(logits)
        norms = jnp.linalg.norm(p, axis=-1) * jnp.linalg.norm(mean)
        cosines = jnp.matmul(p, mean, precision="highest") / jnp.where(norms > 0, norms, 1)
        sure = reliable(logits, batch.mask, margin)
        selected = sure & (jnp.isinf(average[0]) | (jnp.abs(cosines) < similarity))
        if objective is None:
            weights = jnp.exp(margin * log_classes(logits) - entropy(logits))
            loss, metrics = weighted_entropy(logits, weights, selected)
        else:
            loss, metrics = loss_of_selected(
                objective, outputs, params, context.classes, batch, selected
            )
        mean = jnp.where(selected[:, None], p, 0).sum(0) / jnp.maximum(selected.sum(), 1)
        average = moving_average(average, mean, 0.9, selected.any())
        distance = fisher_weight * fisher_distance(params, context)
        metrics |= {"fisher": distance, "reliable": sure.sum()}
        loss += jnp.where(selected.any(), distance, 0)
        return loss, (outputs, metrics, average)

    return apply


def eata(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Trainable | None = None,
    objective: MakeObjective | None = None,
    fisher: Any = None,
    margin: float = 0.4,
    similarity: float = 0.05,
    fisher_weight: float = 2000.0,
) -> Adapter:
    """Minimise the entropy of reliable images that are not like those before.

    Batch norms use each batch's own statistics. Where no image is selected there is no step, and
    the average stays as it is.

    Args:
        model: any classifier.
        task: the classes; None for a model that has its own.
        optimizer: an optax transformation; None for `EATA_PRESETS["imagenet-c"]`.
        trainable: which parameters to adapt, a predicate on paths; None for
            `normalisation_parameters("image")`.
        objective: makes another objective of the selected images, `batclip_objective` for one; None
            for the weighted entropy.
        fisher: F, from `eata_fisher`.
        margin: E₀, part of log C.
        similarity: ε, greatest cosine of an image's probabilities and those of the images before;
            this and β are ImageNet's, see `EATA_SETTINGS`.
        fisher_weight: β.

    Returns:
        The adapter. Metrics have `reliable` and `selected`, numbers of images, and the loss's two
        terms, `entropy` and `fisher`.

    Raises:
        TypeError: as `tent`.
        ValueError: if there is no F, it is of other parameters than those adapted (said in `init`),
            a setting is out of range, or the model needs a task and there is none.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> fisher = jaxtta.adapters.eata_fisher(model, task, params, [images])  # of clean images
        >>> adapter = jaxtta.adapters.eata(model, task, fisher=fisher)  # or eta(model, task)
    """
    if not isinstance(fisher, Mapping) or not fisher:
        said = "from eata_fisher(model, task, params, clean_batches), or eta, which does without"
        raise ValueError(f"EATA needs fisher, {said}")
    own = {"margin": margin, "similarity": similarity, "fisher_weight": fisher_weight}
    return _make(model, task, optimizer, trainable, objective, fisher, **own)


def eta(
    model: Classifier,
    task: Task | None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    trainable: Trainable | None = None,
    objective: MakeObjective | None = None,
    margin: float = 0.4,
    similarity: float = 0.05,
) -> Adapter:
    """EATA without the term that holds it near the source; arguments as there.

    Examples:
        >>> adapter = jaxtta.adapters.eta(model, task)  # names: see `jaxtta.load`
    """
    own = {"margin": margin, "similarity": similarity, "fisher_weight": 0.0}
    return _make(model, task, optimizer, trainable, objective, {}, **own)


def _make(
    model: Any, task: Any, optimizer: Any, trainable: Any, objective: Any, fisher: Any, **own: float
) -> Adapter:
    require_range(0, np.inf, **own)
    model = with_batch_norm_statistics(model, "batch")
    trainable = normalisation_parameters("image") if trainable is None else trainable
    optimizer = EATA_PRESETS["imagenet-c"].optimizer() if optimizer is None else optimizer
    classes = context_of(model, task, trainable)

    def context(params: Any) -> EATAContext:
        source = tree.partition(params, trainable)[0] if fisher else {}
        shapes = [jax.tree.map(jnp.shape, x) for x in (fisher, source)]
        if shapes[0] != shapes[1]:
            raise ValueError("fisher is of other parameters than those that are adapted")
        source = jax.tree.map(lambda x, f: x.astype(f.dtype), source, fisher)
        return EATAContext(classes(params), fisher, source)

    def no_average(params: Any, context: EATAContext, key: Array) -> Array:
        del key  # nothing random here
        require_context(context, EATAContext, "EATA")
        logits = logits_of_one(model, params, context.classes)
        return jnp.full(logits.shape[1], jnp.inf, logits.dtype)

    loss = eata_objective(model, objective=objective, **own)
    return online(loss, context, trainable, optimizer, memory=no_average)
