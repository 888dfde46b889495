"""Reading a model for robustness: what its features look like before anything is adapted.

`modality_gap` looks at means alone: where images stream, the mean of their features as a single
row, (1, d), gives the same.
"""

from jaxtta.diagnose.concepts import (
    ConceptDetectors,
    concept_detectors,
    shared_concepts,
    unique_concepts,
)
from jaxtta.diagnose.directions import (
    PrivilegedDirections,
    cosine_sums,
    head_directions,
    privileged_directions,
    prune_directions,
    pruned_accuracy,
    pruning_sums,
    rank_directions,
)
from jaxtta.diagnose.field import (
    ClassPairs,
    Discrepancy,
    confused_classes,
    field_discrepancy,
    mean_discrepancy,
)
from jaxtta.diagnose.outliers import (
    OutlierFeatures,
    activation_kurtosis,
    kurtosis_sums,
    outlier_axes,
    outlier_features,
    outlier_sums,
)
from jaxtta.diagnose.robustness import LogitLine, effective_robustness, fit_logit_line
from jaxtta.diagnose.similarity import CrossMoments, cross_moments, linear_cka
from jaxtta.diagnose.sums import ImageSums
from jaxtta.metrics import modality_gap

__all__ = [
    "ClassPairs",
    "ConceptDetectors",
    "CrossMoments",
    "Discrepancy",
    "ImageSums",
    "LogitLine",
    "OutlierFeatures",
    "PrivilegedDirections",
    "activation_kurtosis",
    "concept_detectors",
    "confused_classes",
    "cosine_sums",
    "cross_moments",
    "effective_robustness",
    "field_discrepancy",
    "fit_logit_line",
    "head_directions",
    "kurtosis_sums",
    "linear_cka",
    "mean_discrepancy",
    "modality_gap",
    "outlier_axes",
    "outlier_features",
    "outlier_sums",
    "privileged_directions",
    "prune_directions",
    "pruned_accuracy",
    "pruning_sums",
    "rank_directions",
    "shared_concepts",
    "unique_concepts",
]
