"""What a guarded adapter answered beside zero-shot on the same images, and measures of both.

    shadow = Shadow(reference, served, labels)  # probabilities of both; labels are -1 if not known
    gain_of(shadow)  # in accuracy, with its 95 % interval

Where all images have a label, the interval is a paired bootstrap over images. Where some have, only
those tell something on which the two models differ: each is a bet on who is right, and a confidence
sequence of these bets holds however often one looks.
"""

from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from scipy.stats import kstest

from jaxtta.adapters.guard.labels import Pairs, bounds, count_pairs
from jaxtta.bootstrap import LEVEL, bootstrap, interval

_anytime = jax.jit(bounds)
BINS = 15  # of confidence, for the calibration error


class Estimate(NamedTuple):
    """A number, None where only its bounds are known, and its 95 % interval where there is one."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval of an estimate that has one."""
        assert self.low is not None and self.high is not None
        return self.low, self.high

    @classmethod
    def percent(cls, value: float | None, low: float, high: float) -> "Estimate":
        """A share in per cent, or a difference of shares in points."""
        return cls(None if value is None else 100 * value, 100 * low, 100 * high)


class Shadow(NamedTuple):
    """What both models answered, in the order of the stream.

    Attributes:
        reference: (images, classes) probabilities of zero-shot.
        served: (images, classes) probabilities of the guarded adapter, as users would get them;
            None if only zero-shot was asked.
        labels: (images,) integers; -1 where not known.
        seconds: (steps,) that a step took, the first not among them.
        batch_size: images of a full step.
        stopped: why the guard stopped adapting for good; "" if it did not.
    """

    reference: np.ndarray
    served: np.ndarray | None
    labels: np.ndarray
    seconds: np.ndarray = np.zeros(0)
    batch_size: int = 1
    stopped: str = ""

    @property
    def chosen(self) -> np.ndarray:
        """(images, 2) the labels of zero-shot and of the guarded adapter."""
        both = self.reference, self.reference if self.served is None else self.served
        return np.stack([one.argmax(1) for one in both], 1)

    @property
    def differ(self) -> np.ndarray:
        """(images,) whether the two labels differ."""
        return self.chosen[:, 0] != self.chosen[:, 1]

    @property
    def labelled(self) -> str:
        """Whether "all", "some" or "none" of the images have a label."""
        known = self.labels >= 0
        return "all" if known.all() else "some" if known.any() else "none"

    @property
    def marginals(self) -> np.ndarray:
        """(2, classes) the mean probabilities of zero-shot and of the guarded adapter."""
        both = self.reference, self.reference if self.served is None else self.served
        return np.stack([one.astype(float).mean(0) for one in both])

    def right(self) -> np.ndarray:
        """(images, 2) whether zero-shot and the guarded adapter are right; false if not known."""
        return self.chosen == self.labels[:, None]


class Trial(NamedTuple):
    """A run of a guarded adapter in shadow mode, or of zero-shot alone.

    Attributes:
        shadow: the answers, in the order of the stream.
        numbers: (images,) integers, each image's number in its folder.
        step_of: (images,) integers, the step that answered it, from 0.
        steps: a row a step: images, seconds and the guard's metrics.
        unreadable: what is wrong with the images that could not be read.
        not_finite: number of images without a finite answer, which are left out.
        zero_shot_ms: milliseconds an image that zero-shot alone takes; None if not timed.
    """

    shadow: Shadow
    numbers: np.ndarray
    step_of: np.ndarray
    steps: pd.DataFrame
    unreadable: tuple[str, ...] = ()
    not_finite: int = 0
    zero_shot_ms: float | None = None


class Fit(NamedTuple):
    """Whether zero-shot can tell these images apart at all.

    Attributes:
        information: mutual information of image and answer, as a share of the most possible, the
            logarithm of the number of classes.
        entropy: mean of the answers, as such a share.
        confidence: mean probability of the predicted class.
        predicted: (classes,) how often each is predicted, as a share.
        recall: mean over the labelled classes, per cent; None where labels do not tell.
    """

    information: float
    entropy: float
    confidence: float
    predicted: np.ndarray
    recall: Estimate | None = None


def fit_of(shadow: Shadow) -> Fit:
    """Whether zero-shot can tell the images of a stream apart."""
    answers = shadow.reference.astype(float)
    count, classes = answers.shape
    entropy, most = entropy_of(answers).mean(), np.log(classes)
    labels, right = answers.argmax(1), shadow.right()[:, 0]
    recall, weights = None, _weights(shadow)
    if weights is not None:
        known = shadow.labels >= 0
        given, weights, right = shadow.labels[known], weights[known], right[known]
        of_class = np.bincount(given, weights, classes)
        weights /= of_class[given] * (of_class > 0).sum()
        value = float((weights * right).sum())
        recall = Estimate.percent(value, *_bounds(_bootstrapped(len(given) * weights * right)))
    predicted = np.bincount(labels, minlength=classes) / count
    information = (entropy_of(answers.mean(0)) - entropy) / most
    measured = float(information), float(entropy / most), float(answers.max(1).mean())
    return Fit(*measured, predicted, recall)


def gain_of(shadow: Shadow) -> Estimate:
    """The guarded adapter's gain in accuracy, in points.

    The interval is a bootstrap over images if a label is known wherever the models differ, and a
    confidence sequence for these images otherwise.
    """
    known, differ, right = shadow.labels >= 0, shadow.differ, shadow.right().astype(float)
    change = right[:, 1] - right[:, 0]
    if (known | ~differ).all():  # where they agree, labels change nothing
        low, high = _bounds(_bootstrapped(change))
        # What was never seen has no part in a resample, and may still occur as often as this.
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / len(change))
        low -= unseen * (not (change < 0).any())
        high += unseen * (not (change > 0).any())
        return Estimate.percent(float(change.mean()), low, high)
    share, pairs = float(differ.mean()), pairs_of(shadow)
    low, high = (share * float(bound) for bound in _anytime(pairs, 1 - LEVEL))
    count = sum(map(int, pairs))
    value = share * float(pairs.wins - pairs.losses) / count if count else None
    return Estimate.percent(value, low, high)


def pairs_of(shadow: Shadow) -> Pairs:
    """How often which model is right where the two differ and a label is known."""
    known = shadow.differ & (shadow.labels >= 0)
    zero_shot, guarded = shadow.right()[known].T
    return count_pairs(guarded, zero_shot)


def spread_of(shadow: Shadow) -> float:
    """A p-value of "the labels are spread evenly over the stream", where the models differ.

    Labels of its beginning alone, where the adapter has learnt little, say nothing of its end.
    """
    known = shadow.labels[shadow.differ] >= 0
    if not known.any():
        return 1.0
    places = (np.flatnonzero(known) + 0.5) / len(known)
    return float(kstest(places, "uniform").pvalue)


def accuracies_of(shadow: Shadow) -> tuple[Estimate, Estimate] | None:
    """Accuracies of zero-shot and of the guarded adapter, per cent; None if labels do not tell."""
    weights = _weights(shadow)
    if weights is None:
        return None
    known = shadow.labels >= 0
    shares = weights[known, None] / weights.sum()
    right = shares * shadow.right()[known]
    columns = [(float(one.sum()), *_bounds(_bootstrapped(len(one) * one))) for one in right.T]
    return Estimate.percent(*columns[0]), Estimate.percent(*columns[1])


def _weights(shadow: Shadow, least: int = 10) -> np.ndarray | None:
    """Of each label: how many images it stands for; None where labels do not tell.

    Labels may have been given to images on which the models differ alone; zero-shot is less
    accurate on these.
    """
    known, differ = shadow.labels >= 0, shadow.differ
    if shadow.served is None and not known.all():
        return None
    weights = np.zeros(len(known))
    for group in (differ, ~differ):
        if (known & group).sum() < min(least, group.sum()):
            return None
        weights[known & group] = group.sum() / max((known & group).sum(), 1)
    return weights


def calibration_of(shadow: Shadow) -> tuple[Estimate, Estimate, Estimate]:
    """Calibration error of zero-shot and of the guarded adapter in per cent, and the difference."""
    right, gaps = shadow.right(), []
    for number, answers in enumerate((shadow.reference, shadow.served)):
        assert answers is not None
        confidence = answers.max(1)
        which = np.clip(np.ceil(BINS * confidence).astype(int) - 1, 0, BINS - 1)
        gap = (confidence - right[:, number])[:, None] * (which[:, None] == np.arange(BINS))
        gaps.append(gap)
    both = np.concatenate(gaps, 1)
    errors = np.abs(bootstrap(both, np.ones_like(both)).reshape(-1, 2, BINS)).sum(2)
    first, second = np.abs(both.mean(0).reshape(2, BINS)).sum(1).tolist()
    drawn = ((first, errors[:, 0]), (second, errors[:, 1]))
    difference = (second - first, errors[:, 1] - errors[:, 0])
    found = [Estimate.percent(value, *_bounds(means)) for value, means in (*drawn, difference)]
    return found[0], found[1], found[2]


def ms_of(shadow: Shadow) -> float | None:
    """Median milliseconds an image; None if no step was timed."""
    if not len(shadow.seconds):
        return None
    return 1000 * float(np.median(shadow.seconds)) / shadow.batch_size


def to_label(shadow: Shadow, seed: int = 0) -> np.ndarray:
    """Numbers of the images without a label on which the models differ, in random order.

    The first few are a sample, so that one may stop labelling at any time.
    """
    open_ones = np.flatnonzero(shadow.differ & (shadow.labels < 0))
    return np.random.default_rng(seed).permutation(open_ones)


def _bootstrapped(values: np.ndarray) -> np.ndarray:
    """Bootstrapped means of (images,) numbers."""
    return bootstrap(values[:, None], np.ones((len(values), 1)))[:, 0]


def _bounds(means: np.ndarray) -> tuple[float, float]:
    bounds = interval(means)
    assert bounds is not None  # every resample has images
    return bounds


def entropy_of(probabilities: np.ndarray) -> np.ndarray:
    """Entropies along the last axis, in nats."""
    safe = np.where(probabilities > 0, probabilities, 1)
    return -(safe * np.log(safe)).sum(-1)
