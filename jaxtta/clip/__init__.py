"""CLIP in Flax: checkpoints, towers, prompts and pixels."""

from jaxtta.clip.checkpoint import from_config, load, save
from jaxtta.clip.model import CLIP, ImageFeatures, Outputs, Params, unit
from jaxtta.clip.prompts import Prompts, Task, task_from_token_ids
from jaxtta.clip.tasks import zero_shot_task

__all__ = [
    "CLIP",
    "ImageFeatures",
    "Outputs",
    "Params",
    "Prompts",
    "Task",
    "from_config",
    "load",
    "save",
    "task_from_token_ids",
    "unit",
    "zero_shot_task",
]
