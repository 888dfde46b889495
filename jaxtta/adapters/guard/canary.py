"""A canary: a few labelled images that the adapted model is asked about again and again.

    canary = Canary(images, labels)         # 32 images of the place where the model works
    adapter = guarded(adapter, reference, policy, canary=canary)

Each look compares the adapted model with the frozen one on the same images, by an exact test; the
probability that a model which is no less accurate is ever found worse stays below alpha.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta import metrics
from jaxtta.adapters.base import Adapter, Array
from jaxtta.adapters.guard.labels import Pairs, count_pairs, no_pairs, sign_test


@dataclasses.dataclass(frozen=True, eq=False)
class Canary:
    """A few labelled images of the place where the model works, not of the stream itself.

    Args:
        images: (images, height, width, 3), uint8 or float in [0, 1], at the model's resolution.
        labels: (images,) integers, indices of the task's classes.

    Raises:
        TypeError: if the labels are no integers.
        ValueError: if there are no images, labels are missing, or the shapes do not fit.

    Examples:
        With `images` and `dataset` of `jaxtta.load`'s example:

        >>> canary = jaxtta.adapters.Canary(images, dataset.labels[:8])
        >>> len(canary.images)  # pass it to `jaxtta.guarded`
        8
    """

    images: Any
    labels: Any

    def __post_init__(self) -> None:
        shape, labels = np.shape(self.images), np.asarray(self.labels)
        if len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise ValueError(f"a canary's images have shape {shape}, expected (images, h, w, 3)")
        if labels.shape != shape[:1]:
            raise ValueError(
                f"a canary has {shape[0]} images and labels of shape {labels.shape}, expected one "
                "label for each image"
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"a canary's labels are {labels.dtype}, expected indices of classes")
        if labels.min() < 0:
            raise ValueError(f"a canary has the label {labels.min()}, expected 0 or more")

    def right(self, adapter: Adapter, params: Any, state: Any) -> Array:
        """Whether an adapter in this state is right on each image, (images,) bool.

        The state after this step is thrown away, and what only leads to it is not computed.

        Raises:
            ValueError: for a label that is no class of the adapter's, or images of another size
                than the model's.
        """
        _, prediction = adapter.step(params, state, jnp.asarray(self.images))
        return metrics.top_k(prediction.logits, np.asarray(self.labels))


class Checks(NamedTuple):
    """What looking at a canary again and again has shown; scalars.

    Attributes:
        number: of times that the adapted model was asked, int32.
        pairs: its last answers beside the frozen model's.
        p: their sign test.
        worse: whether the adapted model was ever found less accurate.
    """

    number: Array
    pairs: Pairs
    p: Array
    worse: Array


def no_checks() -> Checks:
    """Before the first look."""
    return Checks(jnp.zeros((), jnp.int32), no_pairs(), jnp.ones(()), jnp.zeros((), bool))


def check_again(checks: Checks, pairs: Pairs, alpha: float = 0.05) -> Checks:
    """Add one more look at the same labelled images, by a model that has changed since.

    Each look is a sign test of its own. The k-th may err with probability alpha / (k (k + 1)),
    which is alpha for all together, however many there are. This holds as long as no label of the
    canary acts on what is learnt: let it decide on nothing but the stop.
    """
    number, p = checks.number + 1, sign_test(pairs)
    return Checks(number, pairs, p, checks.worse | (p * number * (number + 1) <= alpha))


def check_canary(
    canary: Canary,
    frozen_right: Array,
    adapter: Adapter,
    params: Any,
    state: Any,
    checks: Checks,
    due: Array,
    alpha: float = 0.05,
) -> Checks:
    """Ask the adapted model about the canary if it is due, inside a step.

    This costs one pass of the canary's images, as `lax.cond` leaves it out otherwise: 32 images for
    every 64 of the stream are 13 % of a guarded TENT's time, at 16 images a step. Under `vmap` over
    streams both branches are computed, in every step.

    Args:
        canary: the labelled images.
        frozen_right: (images,) bool, `canary.right` of the frozen model, from `init`.
        adapter: the one that learns.
        params: the frozen parameters.
        state: the adapter's.
        checks: so far.
        due: scalar bool, such as `seen // 64 > before // 64`.
        alpha: probability of ever finding a model worse that is not.
    """

    def look() -> Checks:
        right = canary.right(adapter, params, state)
        return check_again(checks, count_pairs(right, frozen_right), alpha)

    return jax.lax.cond(due, look, lambda: checks)
