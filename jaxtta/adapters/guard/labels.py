"""Is the adapted model less accurate than the frozen one? Tests with a few labels, valid anytime.

    pairs = add(pairs, count_pairs(adapted_right, frozen_right))   # labels as they arrive
    if is_worse(pairs, alpha=0.05): ...          # wrongly, ever, with probability at most alpha
    lower, upper = bounds(pairs)                 # of the difference in accuracy, likewise

A bet on each labelled image pays where the adapted model is wrong and the frozen one right. As long
as the adapted one is no less accurate, the wealth is a supermartingale, so that it ever exceeds
1/alpha with probability at most alpha (Ville), whenever one looks and however the next image is
chosen, if only the choice knows no label. An image on which both are right or both wrong pays
nothing. Labels may therefore be asked for where the answers differ alone, of images drawn from all
of those: the difference in accuracy there is that over all images, divided by how often the answers
differ, and has the same sign. Images chosen in another way, such as those of low confidence, say
which model is better on such images.

References:
    Waudby-Smith and Ramdas 2020, https://arxiv.org/abs/2010.09686 (betting with a grid of stakes)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtta.adapters.base import Array

ArrayLike = jax.typing.ArrayLike
STAKES = (0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.4, 0.55, 0.7, 0.82, 0.92, 0.98)
"""Shares of the wealth that a bet can lose, each with an equal part of the wealth at first."""


class Pairs(NamedTuple):
    """How often the adapted model and the frozen one were right on labelled images, int32 each.

    Attributes:
        wins: only the adapted one.
        ties: both or none.
        losses: only the frozen one.
    """

    wins: Array
    ties: Array
    losses: Array


def no_pairs() -> Pairs:
    """The counts before the first label."""
    return Pairs(*jnp.zeros((3,), jnp.int32))


def count_pairs(
    adapted_right: ArrayLike, frozen_right: ArrayLike, mask: ArrayLike | None = None
) -> Pairs:
    """Count the pairs of answers to labelled images.

    Args:
        adapted_right: (images,) bool.
        frozen_right: (images,) bool.
        mask: (images,) bool, false for images that do not count; None for none.
    """
    adapted, frozen = jnp.asarray(adapted_right, bool), jnp.asarray(frozen_right, bool)
    valid = jnp.ones(adapted.shape, bool) if mask is None else jnp.asarray(mask, bool)
    each = (adapted & ~frozen, adapted == frozen, ~adapted & frozen)
    return Pairs(*((kind & valid).sum(-1, dtype=jnp.int32) for kind in each))


def add(pairs: Pairs, more: Pairs) -> Pairs:
    """The sum of two counts."""
    return jax.tree.map(jnp.add, pairs, more)


def log_evidence(pairs: Pairs, difference: ArrayLike = 0.0) -> Array:
    """The log of the wealth of bets against "the accuracies differ by so much, or more".

    Args:
        pairs: all counts so far, scalars.
        difference: adapted minus frozen, in [-1, 1).

    Returns:
        A scalar, in nats. If the statement is true, it ever reaches log(1/alpha) with probability
        at most alpha. It grows with `difference`.
    """
    wins, ties, losses = (jnp.asarray(x, float) for x in pairs)
    difference = jnp.asarray(difference, float)
    stakes = jnp.asarray(STAKES) / (1 - difference)  # such that no factor is negative
    wealth = sum(
        # Nothing times the log of nothing is nothing.
        jnp.where(count > 0, count * jnp.log1p(-stakes * (outcome - difference)), 0)
        for count, outcome in ((wins, 1), (ties, 0), (losses, -1))
    )
    return jax.nn.logsumexp(wealth) - jnp.log(len(STAKES))


def is_worse(pairs: Pairs, alpha: float = 0.05, margin: float = 0.0) -> Array:
    """Whether the adapted model is less accurate than the frozen one by more than a margin.

    Args:
        pairs: all counts so far, scalars.
        alpha: probability of ever saying so, over all times that one looks, if it is not.
        margin: loss in accuracy that is accepted, in [0, 1].

    Returns:
        A scalar bool. Ask after each label or batch; what was once said stays true.
    """
    return log_evidence(pairs, -margin) >= -jnp.log(alpha)


def bounds(pairs: Pairs, alpha: float = 0.05) -> tuple[Array, Array]:
    """Bounds of the difference in accuracy, adapted minus frozen: a confidence sequence.

    Args:
        pairs: all counts so far, scalars. If labels were asked for only where the answers differ,
            the bounds are of the difference there; multiplied by how often they differ, of all.
        alpha: probability that the difference is outside at any of the times that one looks.

    Returns:
        The lower and the upper bound, scalars in [-1, 1].
    """
    turned = Pairs(pairs.losses, pairs.ties, pairs.wins)
    return -_upper(turned, alpha / 2), _upper(pairs, alpha / 2)


def _upper(pairs: Pairs, alpha: float) -> Array:
    """The smallest difference that the bets have ruled out, or 1, by bisection."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        out = log_evidence(pairs, middle) >= -jnp.log(alpha)
        return jnp.where(out, ends[0], middle), jnp.where(out, middle, ends[1])

    return jax.lax.fori_loop(0, 24, halve, (-jnp.ones(()), jnp.ones(())))[1]


def sign_test(pairs: Pairs) -> Array:
    """The p-value of "no less accurate" for a fixed number of labels, exact.

    Args:
        pairs: counts, scalars. Of those that are no ties, losses are at most as likely as wins.
    """
    losses = jnp.maximum(pairs.losses, 1)
    tail = jax.scipy.special.betainc(losses * 1.0, pairs.wins + 1.0, 0.5)
    return jnp.where(pairs.losses > 0, tail, 1.0)
