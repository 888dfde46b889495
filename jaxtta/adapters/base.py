"""What an adapter is: a pair of pure functions, like an optax transformation."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxtta import tree
from jaxtta.models import Batch, Outputs
from jaxtta.models.checks import out_of_range

log = logging.getLogger(__name__)
Array = jax.Array
dot = partial(jnp.matmul, precision="highest")
"""Matrix product in full precision, on every backend."""
Metrics = dict[str, Array]
ObjectiveValue = tuple[Array, tuple[Array | Outputs, Metrics]]
"""(loss, (logits (batch, classes), named scalars)); with the model's outputs in the logits' place,
methods on features can be put on top (`on_features`)."""
Objective = Callable[[Any, Any, Batch], ObjectiveValue]
"""(params, context, batch) to an `ObjectiveValue`."""


M = TypeVar("M", bound=Callable[..., "Adapter"])


class Answers(NamedTuple):
    """What the two models of a guarded adapter say of a batch (`guarded`).

    Attributes:
        reference: the frozen model's logits (batch, classes).
        adapted: the adapted model's logits (batch, classes).
    """

    reference: Array
    adapted: Array


class Prediction(NamedTuple):
    """What a step predicts for its batch.

    Attributes:
        logits: (batch, classes), unnormalised log-probabilities.
        metrics: named scalars: loss terms, update norm, and `skipped`, true where the state is
            unchanged because the loss or update was not finite.
        outputs: what the model gave in the pass that the logits are from, without layer features;
            methods on features read it (`on_features`). None where the method keeps none.
        answers: both models' logits, of a guarded adapter; None of any other.
    """

    logits: Array
    metrics: Metrics
    outputs: Outputs | None = None
    answers: Answers | None = None


class State(NamedTuple):
    """What an adapter carries from batch to batch; donate it to the jitted step.

    Attributes:
        adapted: the adapted parameters, a sub-tree with the same paths as in `params`.
        optimizer: the optimiser's state.
        context: what the objective needs beside parameters and batch: class embeddings, packed
            prompts, source statistics. `init` computes it and no step writes it, so that `vmap`
            over streams may broadcast it: `in_axes=State(0, 0, None, 0)`.
        seen: () number of valid images so far.
        fingerprint: () uint32 checksum of the frozen parameters, by which `load_state` refuses the
            state of another model.
        memory: what the method remembers of the images so far; () for one that does not. Under
            `vmap` over streams it has an axis as `adapted` has.
    """

    adapted: Any
    optimizer: Any
    context: Any
    seen: Any
    fingerprint: Any = None
    memory: Any = ()


class Init(Protocol):
    """The first function of an adapter."""

    def __call__(self, params: Any, key: Array | None = None) -> Any:
        """Make the state of a new stream."""
        ...


class Adapter(NamedTuple):
    """A test-time adaptation method.

    Attributes:
        init: `init(params, key=None) -> state`.
        step: `step(params, state, batch) -> (state, prediction)`. `params` is the whole frozen
            tree; it is neither stored in the state nor changed, and must not be donated. `batch`
            is a `Batch` or a bare array of images.

    Examples:
        The frozen model as an adapter, with the names of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.zero_shot(model, task)
        >>> state = adapter.init(params)  # once a stream
        >>> state, prediction = jax.jit(adapter.step)(params, state, images)  # once a batch
        >>> prediction.logits.shape, int(state.seen)
        ((8, 10), 8)
    """

    init: Init
    step: Callable[[Any, Any, Any], tuple[Any, Prediction]]


def require_state(kind: type, params: Any, state: Any) -> None:
    """Raise a TypeError for a state of another kind, swapped arguments and params that are none.

    Args:
        kind: what the adapter's `init` gives.
        params: the first argument of its step.
        state: the second.
    """
    if isinstance(params, kind):
        raise TypeError("params and state are swapped, expected step(params, state, batch)")
    if not isinstance(state, kind):
        raise TypeError(
            f"state is a {type(state).__name__}, expected this adapter's {kind.__name__}, from "
            "init(params) or the first of what step gives"
        )
    tree.require_params(params)


def image_check() -> Callable[[Any], None]:
    """Make a check of the first images that it is given outside `jit`; there it does nothing.

    Returns:
        `check(images)`, which warns of float images far outside [0, 1].
    """
    done = False

    def check(images: Any) -> None:
        nonlocal done
        if not done and not isinstance(images, Tracer):
            done = True
            if problem := out_of_range(images):
                log.warning(problem)

    return check


def cuts_views(method: M) -> M:
    """Mark a method that cuts its own views: streams give it full-size images."""
    vars(method)["needs_originals"] = True
    return method


class Preset(NamedTuple):
    """Published settings for one benchmark.

    Attributes:
        optimizer: makes the optimiser; a `functools.partial`, so that a report can say which.
        batch_size: images per batch.
    """

    optimizer: partial[optax.GradientTransformation]
    batch_size: int
