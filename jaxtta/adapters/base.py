"""What an adapter is: a pair of pure functions, like an optax transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from jaxtta.objectives.base import Batch, Metrics

Array = jax.Array


class Prediction(NamedTuple):
    """What a step says of its batch.

    Attributes:
        logits: (batch, classes), unnormalised log-probabilities.
        metrics: named scalars: loss terms, update norm, and `skipped` where the step left the state
            as it was since its loss or update was not finite.
    """

    logits: Array
    metrics: Metrics


class State(NamedTuple):
    """What an adapter carries from batch to batch; donate it to the jitted step.

    Attributes:
        adapted: the adapted parameters, a sub-tree with the same paths as in `params`.
        optimizer: the optimiser's state.
        context: what the objective needs beside parameters and batch, and `init` computed once:
            packed prompts, class embeddings, source statistics.
        seen: () number of valid images so far.
    """

    adapted: Any
    optimizer: Any
    context: Any
    seen: Array


class Adapter(NamedTuple):
    """A test-time adaptation method.

    Attributes:
        init: `init(params, key=None) -> state`.
        step: `step(params, state, batch) -> (state, prediction)`. `params` is the whole frozen
            tree; it is neither stored in the state nor changed, and must not be donated. `batch`
            is a `Batch` or a bare array of images.
    """

    init: Callable[..., Any]
    step: Callable[[Any, Any, Batch | Array], tuple[Any, Prediction]]


class Preset(NamedTuple):
    """Published settings for one benchmark.

    Attributes:
        optimizer: makes the optimiser.
        batch_size: images a batch.
    """

    optimizer: Callable[[], optax.GradientTransformation]
    batch_size: int
