"""The state of a guarded adapter, and which parts of a state no step writes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtta.adapters.guard.image_statistics import Environment
from jaxtta.adapters.guard.labels import Pairs, add, count_pairs
from jaxtta.adapters.guard.signals import Averages

FIXED = ("context", "fingerprint")
"""Fields of states that no step writes."""


class GuardContext(NamedTuple):
    """What no step writes.

    Attributes:
        reference: the state of the frozen model's adapter: its class embeddings.
        source: what the adapter inside changes, as it was in the beginning.
        canary: (images,) bool, on which of the canary's images the frozen model is right; () for
            no canary.
    """

    reference: Any
    source: Any
    canary: Any = ()


class GuardState(NamedTuple):
    """What a guard carries from batch to batch; donate it to the jitted step.

    Attributes:
        inner: the state of the adapter inside.
        context: what no step writes; `vmap` over streams may broadcast it (`stream_axes`).
        snapshots: earlier states of the adapter inside, without what no step writes, the oldest
            first: each leaf has an axis more.
        averages: of both models' answers.
        environment: the statistics of the images.
        checks: what the canary has shown (`labels.Checks`); () for no canary.
        review: what labels of earlier images have shown in this environment (`review`).
        strikes: () int32, failures in this environment.
        stopped: () bool, whether adaptation has ended.
        updates: () int32, batches learnt from since the last reset.
        seen: () int32, valid images so far.
        fingerprint: () uint32, as in `adapters.State`.
    """

    inner: Any
    context: Any
    snapshots: Any
    averages: Averages
    environment: Environment
    checks: Any
    review: Pairs
    strikes: Any
    stopped: Any
    updates: Any
    seen: Any
    fingerprint: Any = None


def changing(state: Any) -> Any:
    """A state without the fields that no step writes."""
    if not hasattr(state, "_fields"):
        return state
    fields = {name: changing(value) for name, value in state._asdict().items()}
    return state._replace(**{name: () if name in FIXED else x for name, x in fields.items()})


def put_back(state: Any, part: Any) -> Any:
    """A state with what `changing` gave, of it or of an earlier one, in its place."""
    if not hasattr(state, "_fields"):
        return part
    fields = zip(state._fields, state, part, strict=True)
    return state._replace(**{n: x if n in FIXED else put_back(x, y) for n, x, y in fields})


def repeated(part: Any, times: int) -> Any:
    """A tree with an axis more, along which it is the same."""
    return jax.tree.map(lambda x: jnp.stack([x] * times), part)


def pushed(snapshots: Any, part: Any) -> Any:
    """The snapshots without the oldest, and a new one last."""
    return jax.tree.map(lambda old, x: jnp.concatenate([old[1:], x[None]]), snapshots, part)


def stream_axes(state: Any) -> Any:
    """Axes for `vmap` over streams: 0, and None for what no step writes, which all share.

    Args:
        state: any adapter's, from `init(params)`.

    Returns:
        The state with an axis in the place of each leaf.
    """
    own = jax.tree.map(lambda x: 0, changing(state))
    return put_back(jax.tree.map(lambda x: None, state), own)


def review(state: GuardState, adapted_right: Any, reference_right: Any) -> GuardState:
    """Tell a guard how both models did on images that somebody has labelled since.

    The images may have been chosen by anything but their labels: those that the models disagree on
    say most. A guard that learns so that the adapted model is less accurate stops it; one that
    learns that it is more accurate heeds no alarm that has no labels.

    Args:
        state: the guard's, of one stream.
        adapted_right: (images,) bool, whether `Prediction.answers.adapted` was right.
        reference_right: (images,) bool, the same of the frozen model.

    Returns:
        The state for the next step.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> reference = jaxtta.adapters.zero_shot(model, task)
        >>> adapter = jaxtta.guarded(jaxtta.adapters.tent(model, task), reference)
        >>> state = jax.jit(adapter.init)(params)
        >>> state = jaxtta.adapters.review(state, np.array([True, False]), np.array([True, True]))
    """
    more = count_pairs(adapted_right, reference_right)
    return state._replace(review=add(state.review, more))
