"""The diagnosis of one model: on a base set, and on shifted sets of the same or other images.

found, base_features = diagnose_model("CLIP", sets, Settings())
found.sets["clean"].accuracy, found.base.outlier_axes, found.shifted.accuracy
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta import metrics
from jaxtta.bootstrap import accuracy_interval
from jaxtta.diagnose.concepts import concept_detectors
from jaxtta.diagnose.directions import privileged_directions, pruned_accuracy
from jaxtta.diagnose.features import FeatureSet, logits_of
from jaxtta.diagnose.outliers import activation_kurtosis, outlier_features
from jaxtta.io import error_context

TOLERANCE = 0.01  # accuracy that a sufficient pruned head may lose
LARGEST = 5  # number of axes of the top direction to list


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        fractions: fractions of the head's directions to keep.
        outlier_threshold: threshold for outlier dimensions, in standard deviations of an image's
            features.
        detect_with: directions tested as class detectors: the coordinate axes or the head's
            singular vectors.
        precision: threshold on average precision for a class to count as detected.
    """

    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    outlier_threshold: float = 6.0
    detect_with: Literal["axes", "directions"] = "axes"
    precision: float = 0.9

    def check(self) -> None:
        """Raise a ValueError for a fraction or precision that is none."""
        for name, given in (("fractions", self.fractions), ("precision", (self.precision,))):
            if not given or len({*given}) < len(given) or not all(0 < x <= 1 for x in given):
                raise ValueError(
                    f"{name} is {[*given]}, expected distinct numbers above 0, at most 1"
                )


class LabelledSet(NamedTuple):
    """A set of images and a head for its classes.

    Attributes:
        name: of the set.
        head: (classes, d), the classes' text embeddings.
        class_names: names of the classes.
        features: of the images.
    """

    name: str
    head: jax.Array
    class_names: Sequence[str]
    features: FeatureSet


@dataclasses.dataclass(frozen=True)
class BaseMetrics:
    """What depends on the head and the base set only.

    Attributes:
        outlier_axes: axes that are outliers in most images.
        largest_outlier_share: the largest share of the images in which an axis is an outlier.
        importance: of the head's directions, the most important first.
        top_direction: the largest entries of the first direction, each an axis and its weight.
        overlap: of each direction with the outlier axes; None without such axes.
        chance_overlap: that of a random direction.
        spread: coefficient of variation of the importance.
        modality_gap: distance between the mean image and the mean text.
        classes: names of the classes that have images.
        detected: names of those that a single direction detects.
        most_by_one_direction: the most classes that one direction detects.
    """

    outlier_axes: list[int]
    largest_outlier_share: float
    importance: list[float]
    top_direction: list[tuple[int, float]]
    overlap: list[float] | None
    chance_overlap: float
    spread: float
    modality_gap: float
    classes: list[str]
    detected: list[str]
    most_by_one_direction: int


@dataclasses.dataclass(frozen=True)
class SetMetrics:
    """Metrics of one set.

    Attributes:
        images: number of images that were read.
        unreadable: names of the others.
        accuracy: top-1.
        interval: its 95 % interval.
        kurtosis: of the features.
        pruned: accuracies of heads with the fractions of directions.
    """

    images: int
    unreadable: list[str]
    accuracy: float
    interval: tuple[float, float]
    kurtosis: float
    pruned: list[float]


@dataclasses.dataclass(frozen=True)
class ShiftedMeans:
    """Means over the shifted sets; see `SetMetrics`."""

    accuracy: float
    kurtosis: float
    pruned: list[float]


@dataclasses.dataclass(frozen=True)
class ModelDiagnosis:
    """The diagnosis of one model.

    Attributes:
        preprocessing: of its images.
        base: what depends on the head and the base set only.
        sets: metrics by set, the base set first.
        shifted: means over the other sets; None if there are none.
        sufficient_fraction: the smallest fraction of the directions that keeps the accuracy on the
            base set; None if none does.
    """

    preprocessing: str
    base: BaseMetrics
    sets: dict[str, SetMetrics]
    shifted: ShiftedMeans | None
    sufficient_fraction: float | None

    @property
    def base_name(self) -> str:
        """Name of the base set."""
        return next(iter(self.sets))

    @property
    def base_accuracy(self) -> float:
        """Accuracy on the base set."""
        return self.sets[self.base_name].accuracy

    @property
    def worst_shift(self) -> str:
        """Name of the shifted set of the lowest accuracy."""
        return min([*self.sets][1:], key=lambda name: self.sets[name].accuracy)


def diagnose_model(
    name: str, sets: Iterable[LabelledSet], settings: Settings, preprocessing: str = ""
) -> tuple[ModelDiagnosis, np.ndarray]:
    """Diagnose a model.

    Args:
        name: the model's name, for messages.
        sets: the base set, then the shifted ones; they are taken one at a time.
        settings: what is measured.
        preprocessing: of the model's images, for the result.

    Returns:
        The diagnosis, and the features of the base set, (images, d).

    Raises:
        ValueError: if settings are invalid, all images of the base set are of one class, or
            features are constant or not finite; it names the model and the set.

    Examples:
        >>> from jaxtta.diagnose import FeatureSet, LabelledSet, Settings, diagnose_model
        >>> labels = np.arange(40) % 2
        >>> noise = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
        >>> features = FeatureSet(noise + 5 * np.eye(2, 64, dtype=np.float32)[labels], labels, [])
        >>> clean = LabelledSet("clean", jnp.eye(2, 64), ["cat", "dog"], features)
        >>> diagnosis, _ = diagnose_model("mine", [clean], Settings())
        >>> diagnosis.sets["clean"].accuracy
        1.0
    """
    settings.check()
    found: dict[str, SetMetrics] = {}
    sets = iter(sets)
    first_set = next(sets)
    head, rows = first_set.head, first_set.features.rows
    with error_context(f"{name} on {first_set.name}"):
        base, directions = base_metrics(head, first_set.features, first_set.class_names, settings)
    for each in itertools.chain([first_set], sets):
        with error_context(f"{name} on {each.name}"):
            if each.head is not head:  # ranked on the base set, whatever the head's classes
                head, directions = each.head, privileged_directions(each.head, rows).directions
            found[each.name] = set_metrics(head, directions, each.features, settings.fractions)
    first, *shifts = found.values()
    enough = sufficient_fraction(first.accuracy, settings.fractions, first.pruned)
    return ModelDiagnosis(preprocessing, base, found, _means(shifts), enough), rows


def _means(shifts: Sequence[SetMetrics]) -> ShiftedMeans | None:
    if not shifts:
        return None
    accuracy = float(np.mean([each.accuracy for each in shifts]))
    kurtosis = float(np.mean([each.kurtosis for each in shifts]))
    return ShiftedMeans(accuracy, kurtosis, np.mean([each.pruned for each in shifts], 0).tolist())


def base_metrics(
    head: jax.Array, features: FeatureSet, class_names: Sequence[str], settings: Settings
) -> tuple[BaseMetrics, jax.Array]:
    """Metrics of the head and the base set, and the head's directions (r, d) by importance.

    Raises:
        ValueError: if all images are of one class, or features are constant or not finite.
    """
    rows, present = features.rows, np.unique(features.labels)
    if len(present) < 2:
        raise ValueError(f"all images are of class {class_names[present[0]]}, expected two or more")
    outliers = outlier_features(rows, settings.outlier_threshold)
    ranked = privileged_directions(head, rows, outliers.axes)
    top = np.asarray(ranked.directions[0])
    largest = np.argsort(-np.abs(top))[:LARGEST]
    top = top * np.sign(top[largest[0]])  # a direction's sign is arbitrary
    by_axes = settings.detect_with == "axes"
    scores = rows if by_axes else np.asarray(logits_of(rows, ranked.directions))
    truth = features.labels[:, None] == present
    detectors = concept_detectors(scores, truth, settings.precision)
    found = BaseMetrics(
        outlier_axes=outliers.axes.tolist(),
        largest_outlier_share=float(outliers.shares.max()),
        importance=np.asarray(ranked.importance).tolist(),
        top_direction=[(int(axis), float(top[axis])) for axis in largest],
        overlap=np.asarray(ranked.overlap).tolist() if outliers.axes.size else None,
        chance_overlap=outliers.axes.size / rows.shape[1],
        spread=float(ranked.spread),
        modality_gap=float(metrics.modality_gap(jnp.asarray(rows), head)),
        classes=[class_names[int(label)] for label in present],
        detected=[class_names[int(label)] for label in present[detectors.encoded]],
        most_by_one_direction=int(detectors.per_direction.max()),
    )
    return found, ranked.directions


def set_metrics(
    head: jax.Array, directions: jax.Array, features: FeatureSet, fractions: Sequence[float]
) -> SetMetrics:
    """Metrics of one set, for a head and its directions (r, d), the most important first."""
    rows, labels = features.rows, features.labels
    kurtosis = activation_kurtosis(rows)
    right = np.asarray(metrics.top_k(logits_of(rows, head), jnp.asarray(labels)))
    return SetMetrics(
        images=len(rows),
        unreadable=features.unreadable,
        accuracy=float(right.mean()),
        interval=accuracy_interval(right),
        kurtosis=kurtosis,
        pruned=pruned_accuracy(head, directions, rows, labels, fractions).tolist(),
    )


def sufficient_fraction(
    accuracy: float, fractions: Sequence[float], accuracies: Sequence[float]
) -> float | None:
    """Smallest fraction from which pruned heads lose at most `TOLERANCE` accuracy.

    Args:
        accuracy: of the full head.
        fractions: (prunings,), of the directions kept.
        accuracies: (prunings,), of the pruned heads.

    Returns:
        None if the largest fraction is not sufficient.
    """
    pairs = sorted(zip(fractions, accuracies, strict=True), reverse=True)
    good = itertools.takewhile(lambda pair: pair[1] >= accuracy - TOLERANCE, pairs)
    return min((fraction for fraction, _ in good), default=None)
