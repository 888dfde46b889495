"""Methods that adapt the image tower anew for every batch, from the weights as they were loaded.

A method says how a batch moves the adapted parameters, and what it predicts with them; beside them
it may remember something along the stream:

    def adapt(params, start, context, memory, batch):
        descent, _ = descend(loss, start, optimizer, optimizer.init(start), iterations)
        return descent, memory

    adapter = per_batch(adapt, predict, context, trainable)

The text is encoded once, in `init`: the text tower's parameters are not adapted.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import (
    Adapter,
    Array,
    Prediction,
    Preset,
    State,
    image_check,
    require_state,
)
from jaxtta.adapters.descent import Descent
from jaxtta.adapters.image_views import require_cosines
from jaxtta.adapters.on_features import scaled_logits
from jaxtta.adapters.online_checks import alike
from jaxtta.models import (
    Batch,
    Classifier,
    Outputs,
    as_batch,
    l2_normalize,
    with_batch_norm_statistics,
)
from jaxtta.optim import require_optimizer

Adapt = Callable[[Any, Any, Any, Any, Batch], tuple[Descent, Any]]
"""(params, start, context, memory, batch) to where the batch leads, and the memory."""
Predict = Callable[[Any, Any, Any, Batch], tuple[Outputs, Any]]
"""(params, context, memory, batch), with the adapted parameters, to outputs and the memory."""


def per_batch(
    adapt: Adapt,
    predict: Predict,
    context: Callable[[Any], Any],
    trainable: tree.Trainable,
    *,
    remember: Callable[[Any, Any, Any], Any] = lambda params, start, context: (),
    kinds: tuple[type, type] = (object, tuple),
    method: str = "this method",
) -> Adapter:
    """Adapt to each batch from the same start, and predict it with what it was adapted to.

    A batch whose losses or adapted parameters are not finite is predicted with the parameters as
    they are; what is remembered stays bit for bit, as it does in a fully masked batch.

    Args:
        adapt: moves the adapted parameters.
        predict: predicts with them.
        context: `context(params)`, evaluated once in `init`.
        trainable: which parameters to adapt, a predicate on paths.
        remember: `remember(params, start, context)` gives the memory of a new stream; start holds
            the parameters that are to be adapted.
        kinds: of the context and the memory, by which another adapter's state is refused.
        method: its name, for errors.

    Returns:
        The adapter. Its state adapts nothing; `State.memory` is what the method remembers. Metrics
        are the first and the last loss, the norm of the whole update, and `skipped`. Its `init`
        raises a ValueError if `trainable` chooses nothing, or a parameter of the text tower.

    Raises:
        TypeError: if `trainable` is not a predicate.
    """
    tree.require_trainable(trainable)
    check_values = image_check()

    def init(params: Any, key: Array | None = None) -> State:
        del key  # nothing random here
        tree.require_params(params)
        start = tree.adapted_part(params, trainable)
        if text := sorted(p for p in tree.paths_of(start) if p.startswith("text_")):
            raise ValueError(f"{method} adapts the image tower alone; trainable chooses {text[0]}")
        held = jax.tree.map(jnp.copy, context(params))
        memory, seen = remember(params, start, held), jnp.zeros((), jnp.int32)
        return State({}, (), held, seen, tree.fingerprint(params), memory)

    def step(params: Any, state: State, batch: Batch | Array) -> tuple[State, Prediction]:
        require_state(State, params, state)
        start = tree.adapted_part(params, trainable)

        of_kind = all(map(isinstance, (state.context, state.memory), kinds))
        if not (of_kind and alike(lambda: remember(params, start, state.context), state.memory)):
            raise ValueError(
                f"the state is another adapter's, expected {method}'s from init(params)"
            )
        batch = as_batch(batch, state.seen)
        check_values(batch.images)
        descent, memory = adapt(params, start, state.context, state.memory, batch)
        finite = jnp.isfinite(descent.losses).all() & tree.all_finite(descent.adapted)
        finite &= tree.stays_finite(state.memory, memory)
        adapted, memory = optax.tree.where(finite, (descent.adapted, memory), (start, state.memory))
        outputs, memory = predict(tree.merge(params, adapted), state.context, memory, batch)
        finite &= tree.stays_finite(state.memory, memory)
        valid = batch.mask.sum(dtype=jnp.int32)
        metrics = {
            "loss": descent.losses.ravel()[0],
            "last_loss": descent.losses.ravel()[-1],
            "update_norm": optax.tree.norm(optax.tree.sub(adapted, start)),
            "skipped": (valid > 0) & ~finite,
        }
        memory, seen = optax.tree.where(
            finite & (valid > 0),
            (memory, state.seen + valid),
            (state.memory, state.seen),
        )
        outputs = outputs._replace(layer_features=None)
        prediction = Prediction(outputs.logits, metrics, outputs)
        return state._replace(memory=memory, seen=seen), prediction

    return Adapter(init, step)


def choices(
    method: str,
    model: Classifier,
    optimizer: optax.GradientTransformation | None,
    trainable: tree.Trainable | None,
    preset: Preset,
) -> tuple[Classifier, optax.GradientTransformation, tree.Trainable]:
    """A method's model, optimiser and parameters, with the defaults in the place of None.

    Batch norms use each batch's own statistics, and the image tower's norms are adapted.

    Raises:
        TypeError: if the model is not a classifier, or the optimizer no optax transformation.
        ValueError: if the model's logits are not scaled cosines.
    """
    require_cosines(model, method)
    if optimizer is None:
        optimizer = preset.optimizer()
    require_optimizer(optimizer)
    if trainable is None:
        trainable = tree.normalisation_parameters("image")
    return with_batch_norm_statistics(model, "batch"), optimizer, trainable


def class_predictions(model: Classifier, scale: float | None) -> Predict:
    """Predict with `context.classes`, at the model's own scale or another; nothing to remember."""

    def predict(params: Any, context: Any, memory: Any, batch: Batch) -> tuple[Outputs, Any]:
        outputs = model(params, context.classes, batch)
        if scale is not None:
            unit = outputs._replace(embeddings=l2_normalize(outputs.embeddings))
            outputs = outputs._replace(logits=scaled_logits(unit, scale, "this method"))
        return outputs, memory

    return predict


def unit_embeddings(outputs: Outputs, mask: Array) -> Array:
    """A batch's embeddings (batch, projection), of unit norm, padding too, whatever it was."""
    return l2_normalize(jnp.where(mask[:, None], outputs.embeddings, 1))
