"""Models side by side: their similarity, and their effective robustness."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtta.diagnose.concepts import shared_concepts, unique_concepts
from jaxtta.diagnose.model import ModelDiagnosis
from jaxtta.diagnose.robustness import LogitLinearBaseline, effective_robustness, fit_baseline
from jaxtta.diagnose.similarity import linear_cka
from jaxtta.io import error_context


@dataclasses.dataclass(frozen=True)
class ModelPair:
    """Similarity of two models on the base set.

    Attributes:
        models: their names.
        linear_cka: of their features.
        detected_by_both: names of the classes that a direction of either detects.
        only_by_first: names of those that only the first model's directions detect.
        only_by_second: names of those that only the second's do.
    """

    models: tuple[str, str]
    linear_cka: float
    detected_by_both: list[str]
    only_by_first: list[str]
    only_by_second: list[str]


@dataclasses.dataclass(frozen=True)
class Robustness:
    """Effective robustness by model, or the reason why there is none.

    Attributes:
        values: by model.
        line: the baseline that was fitted to the points.
        points: base and shifted accuracies of the reference models.
        reason: why there are no values; empty if there are.
    """

    values: dict[str, float] = dataclasses.field(default_factory=dict)
    line: LogitLinearBaseline | None = None
    points: Sequence[tuple[float, float]] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of one or more models: by model, by pair, and their effective robustness."""

    models: dict[str, ModelDiagnosis]
    pairs: list[ModelPair]
    robustness: Robustness


def compare_models(
    models: Mapping[str, ModelDiagnosis], features: Mapping[str, np.ndarray]
) -> list[ModelPair]:
    """Compare every two models, diagnosed on one base set, by its features (images, d)."""
    pairs = []
    for a, b in itertools.combinations(models, 2):
        classes = np.array(models[a].base.classes)
        first, second = (np.isin(classes, models[name].base.detected) for name in (a, b))
        with error_context(f"{a} and {b}"):
            cka = linear_cka(features[a], features[b])
        found = (
            shared_concepts(first, second),
            unique_concepts(first, second),
            unique_concepts(second, first),
        )
        pairs.append(ModelPair((a, b), cka, *(classes[chosen].tolist() for chosen in found)))
    return pairs


def measure_robustness(
    models: Mapping[str, ModelDiagnosis],
    points: Sequence[tuple[float, float]] = (),
    references: Sequence[str] = (),
) -> Robustness:
    """Effective robustness by model, or the reason why there is none.

    Args:
        models: diagnoses by model.
        points: base and shifted accuracies of models that are not robust.
        references: instead of points, names of those models that are not robust.
    """
    pairs = {
        name: (each.base_accuracy, each.shifted.accuracy)
        for name, each in models.items()
        if each.shifted
    }
    if len(pairs) < len(models):
        return Robustness(reason="there are no shifted sets")
    points = points if len(points) else [pairs[name] for name in references]
    if not len(points):
        return Robustness(
            reason="it takes models that are not robust, by --reference-points or --references"
        )
    try:
        base, shifted = np.transpose(points)
        line = fit_baseline(base, shifted)
        base, shifted = np.transpose([*pairs.values()])
        values = effective_robustness(base, shifted, line)
    except ValueError as error:  # report the other metrics
        return Robustness(reason=str(error))
    return Robustness(dict(zip(pairs, values.tolist(), strict=True)), line, points)
