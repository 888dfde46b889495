"""What a guard decides: pure functions of named signals and of a policy's numbers."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxtta.adapters.base import Array, Metrics

DECISIONS = ("adapt", "skip", "forget", "roll_back", "stop", "stopped")
"""What is done with a batch: it is learnt from; its update is dropped; the source state is taken
because the environment changed; an earlier state is taken because adaptation failed; adaptation
ends; it ended before."""
REASONS = (
    "calm",
    "few_images",
    "few_classes",
    "not_finite",
    "environment_changed",
    "narrowing",
    "strikes",
    "labels",
    "stopped_before",
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The numbers of a guard.

    Attributes:
        share: of the adapted model in the mixture, where nothing speaks for more.
        disagreement: of the models' answers; the share grows to 1 as it falls from this to 0.
        widening: nats that adaptation adds to the class marginal's entropy, at which the share is
            1: classes that the frozen model had lost come back.
        narrowing: nats of the class marginal's entropy that adaptation may take away, or it has
            failed; the share has faded to 0 at half of it.
        variety: of the frozen model's classes, as much as is wanted; the share fades below it, and
            at two thirds of it nothing is served or learnt.
        strikes: failures in one environment that stop adaptation.
        environment: z of an image statistic at which the environment has changed.
        half_life: images after which an average has forgotten half.
        recent: the same for the image statistics of the last images.
        least_images: valid images that a batch must have to be learnt from.
        alpha: probability of ever stopping a model by labels that is no less accurate.
        canary_every: images between two looks at the canary.
        snapshots: states that are kept to go back to.
        snapshot_every: batches between them.

    Examples:
        >>> policy = jaxtta.adapters.Policy(share=0.2, least_images=8)  # the others as they are
        >>> policy.share, policy.strikes  # pass it to `jaxtta.guarded`
        (0.2, 3)
    """

    share: float = 0.4
    disagreement: float = 0.12
    widening: float = 0.06
    narrowing: float = 0.1
    variety: float = 0.75
    strikes: int = 3
    environment: float = 6.0
    half_life: float = 64.0
    recent: float = 24.0
    least_images: int = 4
    alpha: float = 0.05
    canary_every: int = 64
    snapshots: int = 2
    snapshot_every: int = 8

    def __post_init__(self) -> None:
        """Validate the settings."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            number = isinstance(value, int | float)
            if field.name in ("share", "alpha"):
                fits, expected = number and 0 <= value <= 1, "0 to 1"
            elif isinstance(field.default, int):
                fits, expected = isinstance(value, int) and value >= 1, "a whole number, at least 1"
            else:
                fits, expected = number and value > 0, "a positive number"
            if not fits:
                raise ValueError(f"{field.name} is {value!r}, expected {expected}")


class Verdict(NamedTuple):
    """What is decided for a batch.

    Attributes:
        decision: () int32, a place in `DECISIONS`.
        reason: () int32, a place in `REASONS`.
        share: () of the adapted model in the mixture.
        strikes: () int32, from now on.
        stopped: () bool, from now on.
    """

    decision: Array
    reason: Array
    share: Array
    strikes: Array
    stopped: Array


def share_of(signals: Metrics, policy: Policy) -> Array:
    """The adapted model's share of the mixture.

    More than `policy.share` where the models hardly differ, so that little can be lost, or where
    adaptation widens the class marginal; less with narrowing, and where the classes lack variety.
    """
    alike = 1 - signals["disagreement"] / policy.disagreement
    wider = -signals["narrowing"] / policy.widening
    share = policy.share + (1 - policy.share) * jnp.clip(jnp.maximum(alike, wider), 0, 1)
    calm = jnp.clip(1 - 2 * signals["narrowing"] / policy.narrowing, 0, 1)
    return share * calm * varied(signals, policy)


def varied(signals: Metrics, policy: Policy) -> Array:
    """From 1 to 0 as the variety of the classes falls from what is wanted to two thirds of it."""
    return jnp.clip(3 * signals["variety"] / policy.variety - 2, 0, 1)


def decide(signals: Metrics, strikes: Array, stopped: Array, policy: Policy) -> Verdict:
    """Decide on a batch.

    Args:
        signals: scalars by name: images (valid ones), finite (whether the update is), broken
            (whether the adapted model has no finite answer where the frozen one has), environment,
            narrowing, variety and disagreement; where there are labels also worse and better, what
            those of the stream say of the adapted model, and canary_worse.
        strikes: () int32, failures in this environment so far.
        stopped: () bool, whether adaptation has ended.
        policy: the numbers.
    """
    no = jnp.zeros((), bool)
    worse, better = signals.get("worse", no), signals.get("better", no)
    for_good = signals.get("canary_worse", no)
    changed = (signals["environment"] > policy.environment) & ~for_good
    labels = (worse & ~changed) | for_good
    failed = (signals["narrowing"] > policy.narrowing) & ~better | signals["broken"]
    last = failed & (strikes + 1 >= policy.strikes)
    few_classes = (varied(signals, policy) == 0) & ~better
    rules = (  # the first that holds
        (stopped & ~changed, "stopped", "stopped_before"),
        (labels, "stop", "labels"),
        (changed, "forget", "environment_changed"),
        (last, "stop", "strikes"),
        (signals["broken"], "roll_back", "not_finite"),
        (failed, "roll_back", "narrowing"),
        (signals["images"] < policy.least_images, "skip", "few_images"),
        (few_classes, "skip", "few_classes"),
        (~signals["finite"], "skip", "not_finite"),
    )
    decision = jnp.int32(DECISIONS.index("adapt"))
    reason = jnp.int32(REASONS.index("calm"))
    for holds, what, why in reversed(rules):
        decision = jnp.where(holds, DECISIONS.index(what), decision)
        reason = jnp.where(holds, REASONS.index(why), reason)
    strikes = jnp.where(changed, 0, strikes + (failed & ~stopped))
    stopped = ~changed & (stopped | last | labels)
    share = jnp.where(better, 1, share_of(signals, policy))
    share = jnp.where(stopped, 0, share)
    integers = [x.astype(jnp.int32) for x in (decision, reason, strikes)]
    return Verdict(integers[0], integers[1], share, integers[2], stopped)
