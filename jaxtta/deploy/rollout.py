"""Staged roll-out: which images the guarded adapter answers, more of them as evidence grows.

    chosen("images/0042.png", 0.05)  # whether this image is among the 5 %
    state = Rollout()
    state = after_step(state, Plan(), images=16, decision="adapt", gain=None)
    state.share(Plan())  # 0.01 at first

The adapter learns from all images whatever the share, so that its evidence grows at any stage. It
returns to a share of 0 by itself, for good, when the guard stops or labels show a loss.
"""

import dataclasses
import hashlib
from typing import NamedTuple

ALARMS = ("forget", "roll_back")
"""Decisions of a guard after which calm images are counted anew."""
STOPS = ("stop", "stopped")
"""Decisions of a guard after which nothing is adapted any more."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of a roll-out and what moves it on.

    Attributes:
        shares: of the images that the adapter answers, at each stage, ascending.
        calm_images: so many images in a row without an alarm of the guard move it to the next
            stage.
        share_without_labels: without labels, it goes no further than this share.
        most_loss: in accuracy, points. Labels whose interval of the gain excludes more move it to
            the next stage once `labelled_images` more were seen; if all of it is beyond, it
            returns.
        labelled_images: so many images a stage, at least, where labels move it.
    """

    shares: tuple[float, ...] = (0.01, 0.05, 0.25, 1.0)
    calm_images: int = 2000
    share_without_labels: float = 0.25
    most_loss: float = 0.0
    labelled_images: int = 200

    def __post_init__(self) -> None:
        """Refuse stages out of order and numbers out of range."""
        ascending = all(low < high for low, high in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not ascending or not 0 < self.shares[0] <= self.shares[-1] <= 1:
            raise ValueError(f"shares are {self.shares}, expected ascending numbers in (0, 1]")
        for name in ("calm_images", "labelled_images"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        for name, high in (("share_without_labels", 1), ("most_loss", 100)):
            if not 0 <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} is {value}, expected 0 to {high}")


class Rollout(NamedTuple):
    """Where a roll-out is.

    Attributes:
        stage: number of the stage, from 0.
        images: number of images seen since it began, or since the last alarm in it.
        returned: why it returned to a share of 0; "" while it has not.
    """

    stage: int = 0
    images: int = 0
    returned: str = ""

    def share(self, plan: Plan) -> float:
        """The share of the images that the adapter answers now."""
        return 0.0 if self.returned else plan.shares[self.stage]


def chosen(name: str, share: float) -> bool:
    """Whether the adapter answers an image: a hash of its name decides, so it repeats anywhere.

    Args:
        name: the image's, as in answers and logs.
        share: of the images, 0 to 1. Images chosen at one share are chosen at all larger ones.

    Examples:
        >>> from jaxtta.deploy.rollout import chosen
        >>> names = [f"{number}.png" for number in range(1000)]
        >>> 200 < sum(chosen(name, 0.25) for name in names) < 300
        True
    """
    number = int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest())
    return number < share * 2**64


def after_step(
    state: Rollout,
    plan: Plan,
    *,
    images: int,
    decision: str,
    gain: tuple[float, float] | None = None,
) -> Rollout:
    """Where the roll-out is after a step of the guarded adapter.

    Args:
        state: where it was.
        plan: its stages.
        images: number of images of the step.
        decision: the guard's.
        gain: bounds of the gain in accuracy over zero-shot, in [-1, 1], that hold at all times (a
            confidence sequence of the labels so far); None without labels.

    Returns:
        The next state; one that has returned stays so until a new roll-out begins.
    """
    if state.returned:
        return state
    if decision in STOPS:
        return state._replace(returned="the guard stopped adapting")
    if gain is not None and 100 * gain[1] < -plan.most_loss:
        low, high = (f"{100 * bound:+.1f}" for bound in gain)
        return state._replace(returned=f"labels show a loss: a gain of {low} to {high} points")
    if decision in ALARMS:
        return state._replace(images=0)
    seen, next_stage = state.images + images, state.stage + 1
    if next_stage == len(plan.shares):
        return state._replace(images=seen)
    shown = gain is not None and 100 * gain[0] >= -plan.most_loss and seen >= plan.labelled_images
    calm = seen >= plan.calm_images and plan.shares[next_stage] <= plan.share_without_labels
    return Rollout(next_stage) if shown or calm else state._replace(images=seen)
