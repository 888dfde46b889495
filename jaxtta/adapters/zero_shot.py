"""No adaptation: the baseline of everything else, in the same shape."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtta.adapters.base import Adapter, Array, Prediction, State
from jaxtta.models import CLIP, Task
from jaxtta.objectives.base import Batch, as_batch


def zero_shot(model: CLIP, task: Task) -> Adapter:
    """Predict with the model as it is.

    Args:
        model: the model.
        task: the classes.

    Returns:
        The adapter; the class embeddings are encoded once, in `init`.
    """
    prompts, encode = model.prompts(task), jax.jit(model.class_embeddings)

    def init(params: Any, key: Array | None = None) -> State:
        del key
        classes = encode(params, prompts)
        return State({}, (), classes, jnp.zeros((), jnp.int32))

    def step(params: Any, state: State, batch: Batch | Array) -> tuple[State, Prediction]:
        batch = as_batch(batch, state.seen)
        logits = model.forward(params, state.context, batch.images).logits
        seen = state.seen + batch.mask.sum(dtype=jnp.int32)
        return state._replace(seen=seen), Prediction(logits, {"skipped": jnp.zeros((), bool)})

    return Adapter(init, step)
