"""An adapter of any objective, any choice of parameters and any optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtta import tree
from jaxtta.adapters.base import (
    Adapter,
    Array,
    Metrics,
    Objective,
    Prediction,
    State,
    image_check,
    require_state,
)
from jaxtta.adapters.online_checks import checked, require_same_adapter
from jaxtta.models import Batch, as_batch
from jaxtta.optim import require_optimizer

USES = {
    "objective": "objective(params, context, batch) -> (loss, (logits, metrics))",
    "context": "lambda params: model.init_context(params, task)",
}


class Sharpness(NamedTuple):
    """The gradient is taken nearby, where the loss is higher: at θ + radius · g/‖g‖.

    Attributes:
        radius: ρ.
        objective: of this second gradient, `objective(params, context, batch, memory, first)` with
            the memory that the first pass gave and its prediction; it gives what an objective with
            a memory does. None for the objective itself, which then runs twice on all images.
    """

    radius: float = 0.05
    objective: Callable[..., Any] | None = None


def online(
    objective: Objective | Callable[..., Any],
    context: Callable[[Any], Any],
    trainable: tree.Trainable,
    optimizer: optax.GradientTransformation,
    *,
    memory: Callable[[Any, Any, Array], Any] | None = None,
    sharpness: Sharpness | None = None,
    restore: Callable[[State, State], tuple[State, Metrics]] | None = None,
) -> Adapter:
    """Take one optimiser step per batch; predictions are those before the step.

    A fully masked batch leaves the state as it was, bit for bit, and so does a step whose loss or
    update is not finite, or whose optimiser state overflows (`metrics["skipped"]` is true then).
    An objective of selected images says in `metrics["selected"]` how many they are: where there are
    none there is no step at all, and only its memory and the count of images go on.

    Args:
        objective: `objective(params, context, batch) -> (loss, (logits, metrics))`, or the model's
            outputs in the logits' place; the predictions then have them too.
        context: `context(params)`, evaluated once in `init` and kept in the state.
        trainable: which parameters to adapt, a predicate on paths.
        optimizer: any optax transformation.
        memory: `memory(params, context, key)`, what a method remembers at first, arrays of fixed
            shapes; the objective is then `objective(params, context, batch, memory) -> (loss,
            (logits, metrics, memory))`. None for an objective without.
        sharpness: take the step along the gradient of a second pass nearby. Its metrics are said
            too, as `loss_perturbed` and so on, and whether it selects any decides on the step.
        restore: `restore(state, source) -> (state, metrics)`, after the step: a new `adapted`,
            `optimizer` or `memory`, from those now and those of a new stream; metrics are flags.

    Returns:
        The adapter. Its `init` raises a ValueError if `trainable` chooses nothing. Its step raises
        a TypeError or ValueError for arguments in another order, the state of another adapter and
        an objective that gives something else. Images that are not in [0, 1] are warned of in the
        first step outside `jit`, where values can be seen.

    Raises:
        TypeError: if the objective or context is not a function, `trainable` not a predicate or
            `optimizer` no optax transformation.

    Examples:
        A method of one's own, with the names of `jaxtta.load`'s example:

        >>> def objective(params, context, batch):
        ...     logits = model(params, context, batch).logits
        ...     loss = jaxtta.losses.masked_mean(jaxtta.losses.entropy(logits), batch.mask)
        ...     return loss, (logits, {"entropy": loss})
        >>> trainable = jaxtta.tree.normalisation_parameters("image")
        >>> context = jaxtta.models.context_of(model, task, trainable)
        >>> adapter = jaxtta.adapters.online(objective, context, trainable, optax.sgd(1e-3))
    """
    for name, function in (("objective", objective), ("context", context)):
        if not callable(function):
            given = type(function).__name__
            raise TypeError(f"{name} is a {given}, expected a function: {USES[name]}")
    tree.require_trainable(trainable)
    require_optimizer(optimizer)
    check_values, remembers = image_check(), memory is not None

    def first_memory(params: Any, own: Any, key: Array | None = None) -> Any:
        if memory is None:
            return ()
        return memory(params, own, jax.random.key(0) if key is None else key)

    def init(params: Any, key: Array | None = None) -> State:
        tree.require_params(params)
        adapted = tree.adapted_part(params, trainable)
        own = jax.tree.map(jnp.copy, context(params))
        return State(
            adapted,
            optimizer.init(adapted),
            own,
            jnp.zeros((), jnp.int32),
            tree.fingerprint(params),
            # Of a dtype of its own, not weakly that of a Python number: one compilation a stream.
            jax.tree.map(lambda x: jnp.array(x, x.dtype), first_memory(params, own, key)),
        )

    def step(params: Any, state: State, batch: Batch | Array) -> tuple[State, Prediction]:
        require_state(State, params, state)
        require_same_adapter(params, state, trainable, optimizer.init, first_memory)
        batch = as_batch(batch, state.seen)
        check_values(batch.images)

        def loss_of(adapted: Any, *first: Any) -> tuple[Array, tuple[Prediction, Any]]:
            function: Any = sharpness.objective if first and sharpness else objective
            remembered = first or ((state.memory,) if remembers else ())
            result = function(tree.merge(params, adapted), state.context, batch, *remembered)
            return checked(result, bool(remembered))

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (prediction, memory_after)), gradients = gradient(state.adapted)
        losses, metrics = loss, {**prediction.metrics, "loss": loss}
        selected = metrics.get("selected")
        if sharpness is not None:
            scale = sharpness.radius / (optax.tree.norm(gradients) + 1e-12)
            nearby = jax.tree.map(lambda x, g: x + scale * g, state.adapted, gradients)
            first = (memory_after, prediction) if sharpness.objective else ()
            (perturbed, (second, after)), gradients = gradient(nearby, *first)
            memory_after = after if first and remembers else memory_after
            said = {**second.metrics, "loss": perturbed}
            metrics |= {f"{name}_perturbed": value for name, value in said.items()}
            losses, selected = loss + perturbed, second.metrics.get("selected")
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.adapted)
        # A gradient can be finite and its square, in the optimiser's moments, no longer.
        finite = (
            jnp.isfinite(losses)
            & tree.all_finite(updates)
            & tree.stays_finite(state.optimizer, optimizer_state)
        )
        if remembers:
            finite &= tree.stays_finite(state.memory, memory_after)
        valid = batch.mask.sum(dtype=jnp.int32)
        norm = optax.tree.norm(updates)
        if selected is not None:
            norm = jnp.where(selected > 0, norm, 0)
        metrics |= {"update_norm": norm, "skipped": (valid > 0) & ~finite}
        taken = finite & (valid > 0)
        moved = taken if selected is None else taken & (selected > 0)
        adapted = optax.apply_updates(state.adapted, updates)
        after = state._replace(adapted=adapted, optimizer=optimizer_state, memory=memory_after)
        if restore is not None:
            start = tree.adapted_part(params, trainable)
            source = State(
                start, optimizer.init(start), (), 0, None, first_memory(params, state.context)
            )
            after, said = restore(after, source)
            metrics |= {name: moved & flag for name, flag in said.items()}
        # Neither context nor fingerprint takes part: under vmap they need no stream axis.
        adapted, optimizer_state, memory_after = optax.tree.where(
            moved,
            (after.adapted, after.optimizer, after.memory),
            (state.adapted, state.optimizer, memory_after),
        )
        memory_after, seen = optax.tree.where(
            taken, (memory_after, state.seen + valid), (state.memory, state.seen)
        )
        changed = {"adapted": adapted, "optimizer": optimizer_state, "memory": memory_after}
        return state._replace(seen=seen, **changed), prediction._replace(metrics=metrics)

    return Adapter(init, step)
