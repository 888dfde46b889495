"""Whether to switch adaptation on: a guarded adapter beside zero-shot, judged by thresholds.

    found = judge(Shadow(reference, served, labels), Thresholds(least_gain=1.0))
    found.verdict, found.criteria  # "go", and each threshold with what was measured

No rule without labels can tell which of two models is right: signals alone allow "no-go" or
"undecided", unless the user says otherwise.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxtta.bootstrap import accuracy_interval
from jaxtta.deploy.shadow import (
    Estimate,
    Fit,
    Shadow,
    accuracies_of,
    calibration_of,
    entropy_of,
    fit_of,
    gain_of,
    ms_of,
    spread_of,
)

VERDICTS = {"go": 0, "no-go": 3, "undecided": 4}
"""By verdict, the exit code of `jaxtta pilot`."""
LEAST_INFORMATION, LEAST_ENTROPY = 0.1, 0.3  # of the logarithm of the number of classes
STATUSES = {"failed": "no-go", "open": "undecided", "met": "go"}
"""Of a criterion, with the verdict that it gives if none before it occurs."""
DISAGREEMENT, NARROWING, MISCALIBRATION = 30.0, 0.1, 1.0  # per cent, nats, points
UNEVEN = 1e-3  # p-value
LEAST_SKILL = 0.1  # of the way from guessing (0) to no error (1)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What switching adaptation on must bring, and may cost.

    Attributes:
        least_gain: in accuracy over zero-shot, points.
        most_loss: in accuracy, points; the interval of the gain must exclude more.
        most_disagreement: images with another label than zero-shot's, per cent; None for no limit
            where there are labels, and without for 30, beyond which they are asked for.
        most_narrowing: entropy of the shares of the classes that adaptation takes away, nats; None
            for no limit where there are labels, and without for 0.1.
        most_calibration_error: per cent; None for zero-shot's and one point more, where all images
            have labels.
        most_ms: milliseconds an image; None for no limit.
        least_images: fewer decide nothing.
    """

    least_gain: float = 0.5
    most_loss: float = 0.0
    most_disagreement: float | None = None
    most_narrowing: float | None = None
    most_calibration_error: float | None = None
    most_ms: float | None = None
    least_images: int = 200

    def check(self) -> None:
        """Raise a ValueError for numbers out of range, and for those that contradict each other."""
        ranges = {
            "least_gain": (-100, 100),
            "most_loss": (0, 100),
            "most_disagreement": (0, 100),
            "most_narrowing": (0, np.inf),
            "most_calibration_error": (0, 100),
            "most_ms": (0, np.inf),
            "least_images": (1, np.inf),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value:g}, expected {low:g} to {high:g}")
        if self.least_gain < -self.most_loss:
            raise ValueError(
                f"least_gain {self.least_gain:g} and most_loss {self.most_loss:g} contradict: a "
                f"loss of {-self.least_gain:g} points would be enough gain and too much loss"
            )
        if self.most_disagreement is not None and self.least_gain > self.most_disagreement:
            raise ValueError(
                f"least_gain {self.least_gain:g} and most_disagreement "
                f"{self.most_disagreement:g} contradict: accuracy changes only where labels do"
            )


class Criterion(NamedTuple):
    """A threshold and what was measured.

    Attributes:
        name: of the threshold, or of another condition.
        status: "met", "failed" or "open".
        measured: with its interval, in `unit`; None where it is not known.
        threshold: in `unit`; None for a condition without a number.
        unit: points, %, nats, ms or images.
        why: a sentence, where the numbers do not say it.
    """

    name: str
    status: str
    measured: Estimate | None = None
    threshold: float | None = None
    unit: str = ""
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """The verdict and what it rests on; shares are in per cent, differences of them in points.

    Attributes:
        verdict: "go", "no-go" or "undecided".
        criteria: each threshold or condition, the failed ones first, then the open ones.
        labelled: whether "all", "some" or "none" of the images have a label.
        images: number of images that both models answered.
        labels: number of those with a label.
        differing: number of those with a label on which the models differ.
        fit: whether zero-shot fits the images.
        accuracy: of zero-shot and of the guarded adapter; None where the labels do not tell.
        gain: in accuracy, of the guarded adapter; None if nothing was adapted.
        disagreement: share of the images with another label than zero-shot's.
        narrowing: nats.
        calibration: error of zero-shot, of the guarded adapter, and the difference; None unless all
            have labels.
        ms: milliseconds an image; None if not timed.
        without_labels: whether "go" may rest on no labels.
    """

    verdict: str
    criteria: list[Criterion]
    labelled: str
    images: int
    labels: int
    differing: int
    fit: Fit
    accuracy: tuple[Estimate, Estimate] | None = None
    gain: Estimate | None = None
    disagreement: Estimate | None = None
    narrowing: Estimate | None = None
    calibration: tuple[Estimate, Estimate, Estimate] | None = None
    ms: float | None = None
    without_labels: bool = False


def judge(
    shadow: Shadow, thresholds: Thresholds | None = None, *, without_labels: bool = False
) -> Judgement:
    """Judge a guarded adapter beside zero-shot.

    Any failed criterion gives "no-go", all met "go", anything else "undecided". Without labels the
    gain is between minus and plus the share of the images whose label changed, so that "go" is out
    of reach unless it is allowed to rest on no labels.

    Args:
        shadow: what both answered, finite numbers; of zero-shot alone, only the fit is judged.
        thresholds: defaults where None.
        without_labels: leave out gain and loss where there are no labels.

    Returns:
        The verdict and what it rests on.

    Raises:
        ValueError: if there are no images, arrays do not match, or thresholds contradict.

    Examples:
        >>> from jaxtta.deploy.pilot import judge
        >>> from jaxtta.deploy.shadow import Shadow
        >>> numbers = np.arange(1000)
        >>> served, wrong = np.eye(2)[numbers % 2] * 0.8 + 0.1, numbers % 5 == 0
        >>> reference = np.where(wrong[:, None], 1 - served, served)
        >>> judge(Shadow(reference, served, numbers % 2)).verdict  # right on 80 % and on all
        'go'
    """
    limits, count = thresholds or Thresholds(), len(shadow.labels)
    limits.check()
    shapes = {np.shape(x) for x in (shadow.reference, shadow.served) if x is not None}
    if len(shapes) != 1 or not count or len(shape := shapes.pop()) != 2 or shape[0] != count:
        raise ValueError(f"{count} labels, expected (images, classes) answers of both models")
    fit, differ, known = fit_of(shadow), shadow.differ, shadow.labels >= 0
    counts = count, int(known.sum()), int((known & differ).sum())
    criteria = [judge_fit(fit)]
    if shadow.served is None:
        status = "no-go" if criteria[0].status == "failed" else "undecided"
        return Judgement(status, criteria, shadow.labelled, *counts, fit, accuracies_of(shadow))
    gain, blind = gain_of(shadow), shadow.labelled == "none"
    disagreement = Estimate.percent(float(differ.mean()), *accuracy_interval(differ))
    narrowing = Estimate(float(np.subtract(*entropy_of(shadow.marginals))))
    calibration = calibration_of(shadow) if shadow.labelled == "all" else None
    if not (blind and without_labels) or gain.bounds[1] < limits.least_gain:
        criteria += judge_gain(gain, limits)
    if shadow.labelled == "some":
        spread = Criterion("labels from the whole stream", "met")
        if spread_of(shadow) < UNEVEN:
            why = "the labels are not spread evenly over the stream, so they may not stand for it"
            spread = spread._replace(status="open", why=why)
        criteria.append(spread)
    criteria.append(_at_least("images", Estimate(count), limits.least_images, "images"))
    if (most := limits.most_disagreement) is not None:
        criteria.append(_at_most("disagreement", disagreement, most, "%"))
    elif blind:
        unusual = _at_most("disagreement", disagreement, DISAGREEMENT, "%")
        criteria.append(unusual._replace(status="met" if unusual.status == "met" else "open"))
    if (most := limits.most_narrowing) is not None or blind:
        most = NARROWING if most is None else most
        criteria.append(_at_most("narrowing", narrowing, most, "nats"))
    if (most := limits.most_calibration_error) is not None:
        own = calibration[1] if calibration else None
        criteria.append(_at_most("calibration error", own, most, "%"))
    elif calibration:
        name = "rise of the calibration error"
        criteria.append(_at_most(name, calibration[2], MISCALIBRATION, "points"))
    ms = ms_of(shadow)
    if limits.most_ms is not None:
        measured = None if ms is None else Estimate(ms)
        criteria.append(_at_most("time an image", measured, limits.most_ms, "ms"))
    status = "failed" if shadow.stopped else "met"
    criteria.append(Criterion("the guard kept adapting", status, why=shadow.stopped))
    order = [*STATUSES]
    criteria.sort(key=lambda one: order.index(one.status))
    verdict, accuracy = STATUSES[criteria[0].status], accuracies_of(shadow)
    measured = accuracy, gain, disagreement, narrowing, calibration, ms, without_labels
    return Judgement(verdict, criteria, shadow.labelled, *counts, fit, *measured)


def judge_gain(gain: Estimate, limits: Thresholds) -> list[Criterion]:
    """Whether the gain is enough as measured, and its interval excludes too much loss."""
    (low, high), least, loss = gain.bounds, limits.least_gain, -limits.most_loss
    enough = gain.value is not None and gain.value >= least
    first = "failed" if high < least else "met" if enough else "open"
    second = "failed" if high < loss else "met" if low >= loss else "open"
    named = (("gain", first, least), ("loss", second, limits.most_loss))
    return [Criterion(name, status, gain, at, "points") for name, status, at in named]


def judge_fit(fit: Fit) -> Criterion:
    """Whether zero-shot tells the images apart; adaptation cannot mend a model that does not."""
    judged = Criterion("the model fits the images", "met")
    unfit = "the model does not fit them, as "
    if fit.recall is not None:
        value, bounds = fit.recall.value, fit.recall.bounds
        guessing = 100 / len(fit.predicted)
        least = guessing + LEAST_SKILL * (100 - guessing)
        if bounds[1] < least:
            found, low, high, guessed = (f"{x:.0f}" for x in (value, *bounds, guessing))
            why = (
                f"zero-shot recognises {found} % of a class on average (95 % interval {low} to "
                f"{high}), guessing {guessed} %"
            )
            return judged._replace(status="failed", why=unfit + why)
        if bounds[0] >= least:
            return judged
    if fit.information >= LEAST_INFORMATION:
        return judged
    why = (
        "zero-shot's answers hardly depend on the image and hold "
        f"{100 * fit.information:.1f} % of the information that tells all classes apart"
    )
    if fit.entropy >= LEAST_ENTROPY:
        return judged._replace(status="failed", why=unfit + why)
    return judged._replace(status="open", why=f"{why}, but are sure: all may be of one class")


def _at_least(name: str, measured: Estimate, least: float, unit: str) -> Criterion:
    enough = measured.value is not None and measured.value >= least
    return Criterion(name, "met" if enough else "open", measured, least, unit)


def _at_most(name: str, measured: Estimate | None, most: float, unit: str) -> Criterion:
    if measured is None or measured.value is None:
        return Criterion(name, "open", None, most, unit)
    surely = measured.value if measured.low is None else measured.low
    met = measured.value <= most
    status = "met" if met else "failed" if surely > most else "open"
    return Criterion(name, status, measured, most, unit)
