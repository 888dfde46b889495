"""No adaptation: the baseline of every other method, as an adapter."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtta import tree
from jaxtta.adapters.base import Adapter, Array, Prediction, State, image_check, require_state
from jaxtta.adapters.image_views import preprocessed
from jaxtta.models import Batch, Classifier, Task, as_batch, context_of


def zero_shot(model: Classifier, task: Task | None) -> Adapter:
    """Predict with the model as it is; full-size images (`Batch.sizes`) are preprocessed first.

    Args:
        model: the model.
        task: the classes; None for a model that has its own.

    Returns:
        The adapter; the class embeddings are encoded once, in `init`.

    Raises:
        TypeError: if the model is not a classifier, or the task not a `Task`.
        ValueError: if the model needs a task and there is none.

    Examples:
        With `model`, `params`, `task` and `images` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.zero_shot(model, task)
        >>> state, prediction = jax.jit(adapter.step)(params, adapter.init(params), images)
        >>> prediction.logits.shape
        (8, 10)
    """
    context = context_of(model, task, lambda path: False)
    check_values = image_check()

    def init(params: Any, key: Array | None = None) -> State:
        del key  # nothing random here
        tree.require_params(params)
        seen = jnp.zeros((), jnp.int32)
        # A copy: a donated state must not take a leaf of the parameters with it.
        copied = jax.tree.map(jnp.copy, context(params))
        return State({}, (), copied, seen, tree.fingerprint(params))

    def step(params: Any, state: State, batch: Batch | Array) -> tuple[State, Prediction]:
        require_state(State, params, state)
        if adapted := sorted(tree.paths_of(state.adapted)):
            raise ValueError(
                f"the state adapts {adapted[0]}, which zero_shot would not use: it is another "
                "adapter's"
            )
        batch = preprocessed(model, as_batch(batch, state.seen))
        check_values(batch.images)
        outputs = model(params, state.context, batch)._replace(layer_features=None)
        seen = state.seen + batch.mask.sum(dtype=jnp.int32)
        metrics = {"skipped": jnp.zeros((), bool)}
        return state._replace(seen=seen), Prediction(outputs.logits, metrics, outputs)

    vars(init)["image_size"] = model.image_size  # by which a guard learns what it gives
    return Adapter(init, step)
