"""Models: CLIP, SigLIP, a supervised ViT, and what an adapter asks of any."""

from jaxtta.models.checkpoints.save import save
from jaxtta.models.checkpoints.siglip import from_config as siglip_from_config
from jaxtta.models.checkpoints.transformers import from_config
from jaxtta.models.checkpoints.vit import from_config as classifier_from_config
from jaxtta.models.checks import require_images
from jaxtta.models.classifier import (
    Batch,
    Classifier,
    Outputs,
    Params,
    as_batch,
    context_of,
    with_batch_norm_statistics,
)
from jaxtta.models.clip import CLIP, ImageFeatures, l2_normalize
from jaxtta.models.feature_statistics import (
    FeatureStatistics,
    feature_statistics,
    load_statistics,
    merge_statistics,
    save_statistics,
    statistics_of,
)
from jaxtta.models.load import load, load_clip, with_fused_attention
from jaxtta.models.preprocess import Preprocessing, describe_preprocessing
from jaxtta.models.prompts import Prompts
from jaxtta.models.settings import model_settings
from jaxtta.models.supervised import ImageClassifier
from jaxtta.models.task import Task, task_for, task_from_token_ids, zero_shot_task

__all__ = [
    "CLIP",
    "Batch",
    "Classifier",
    "FeatureStatistics",
    "ImageClassifier",
    "ImageFeatures",
    "Outputs",
    "Params",
    "Preprocessing",
    "Prompts",
    "Task",
    "as_batch",
    "classifier_from_config",
    "context_of",
    "describe_preprocessing",
    "feature_statistics",
    "from_config",
    "l2_normalize",
    "load",
    "load_clip",
    "load_statistics",
    "merge_statistics",
    "model_settings",
    "require_images",
    "save",
    "save_statistics",
    "siglip_from_config",
    "statistics_of",
    "task_for",
    "task_from_token_ids",
    "with_batch_norm_statistics",
    "with_fused_attention",
    "zero_shot_task",
]
