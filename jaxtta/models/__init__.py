"""CLIP in Flax: checkpoints, towers, prompts and pixels."""

from jaxtta.models.checkpoints.transformers import from_config, save
from jaxtta.models.classifier import ImageClassifier, classifier_from_config, load_classifier
from jaxtta.models.clip import CLIP, ImageFeatures, Outputs, Params, unit
from jaxtta.models.feature_statistics import (
    FeatureStatistics,
    feature_shape,
    feature_statistics,
    load_statistics,
    merge_statistics,
    save_statistics,
    statistics_of,
)
from jaxtta.models.load import load
from jaxtta.models.prompts import Prompts, Task, task_from_token_ids
from jaxtta.models.zero_shot import zero_shot_task

__all__ = [
    "CLIP",
    "FeatureStatistics",
    "ImageClassifier",
    "ImageFeatures",
    "Outputs",
    "Params",
    "Prompts",
    "Task",
    "classifier_from_config",
    "feature_shape",
    "feature_statistics",
    "from_config",
    "load",
    "load_classifier",
    "load_statistics",
    "merge_statistics",
    "save",
    "save_statistics",
    "statistics_of",
    "task_from_token_ids",
    "unit",
    "zero_shot_task",
]
