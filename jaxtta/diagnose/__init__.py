"""Robustness diagnosis of a model from its features, before adaptation.

`modality_gap` depends on mean features only: for streamed images, pass their mean feature as a
single row (1, d).
"""

from jaxtta.diagnose.check import Answers, TargetCheck, check_target
from jaxtta.diagnose.compare import (
    Diagnosis,
    Robustness,
    compare_models,
    measure_robustness,
)
from jaxtta.diagnose.concepts import (
    ConceptDetectors,
    concept_detectors,
    shared_concepts,
    unique_concepts,
)
from jaxtta.diagnose.directions import (
    PrivilegedDirections,
    cosine_stats,
    head_directions,
    privileged_directions,
    prune_directions,
    pruned_accuracy,
    pruning_stats,
    rank_directions,
)
from jaxtta.diagnose.features import FeatureSet, head_of, read_features, truncate
from jaxtta.diagnose.model import LabelledSet, ModelDiagnosis, Settings, diagnose_model
from jaxtta.diagnose.outliers import (
    OutlierFeatures,
    activation_kurtosis,
    kurtosis_stats,
    outlier_axes,
    outlier_features,
    outlier_stats,
)
from jaxtta.diagnose.robustness import LogitLinearBaseline, effective_robustness, fit_baseline
from jaxtta.diagnose.similarity import CrossMoments, cross_moments, linear_cka
from jaxtta.diagnose.sums import RunningMean
from jaxtta.diagnose.target import (
    ConfusablePairs,
    Discrepancy,
    confused_classes,
    mmd,
    mmd_to_reference,
    neighbour_distances,
)
from jaxtta.metrics import modality_gap

__all__ = [
    "Answers",
    "ConceptDetectors",
    "ConfusablePairs",
    "CrossMoments",
    "Diagnosis",
    "Discrepancy",
    "FeatureSet",
    "LabelledSet",
    "LogitLinearBaseline",
    "ModelDiagnosis",
    "OutlierFeatures",
    "PrivilegedDirections",
    "Robustness",
    "RunningMean",
    "Settings",
    "TargetCheck",
    "activation_kurtosis",
    "check_target",
    "compare_models",
    "concept_detectors",
    "confused_classes",
    "cosine_stats",
    "cross_moments",
    "diagnose_model",
    "effective_robustness",
    "fit_baseline",
    "head_directions",
    "head_of",
    "kurtosis_stats",
    "linear_cka",
    "measure_robustness",
    "mmd",
    "mmd_to_reference",
    "modality_gap",
    "neighbour_distances",
    "outlier_axes",
    "outlier_features",
    "outlier_stats",
    "privileged_directions",
    "prune_directions",
    "pruned_accuracy",
    "pruning_stats",
    "rank_directions",
    "read_features",
    "shared_concepts",
    "truncate",
    "unique_concepts",
]
