"""Running adapters over streams, continual learning experiments, and result files."""

from jaxtta.evaluate.adapters import AdapterSpec, parse_adapter
from jaxtta.evaluate.checkpoint import restore_step, save_step
from jaxtta.evaluate.checks import (
    default_severity,
    require_at_least,
    require_distinct,
    require_positive,
)
from jaxtta.evaluate.choose import Choice, choose_learning_rate, rate_names
from jaxtta.evaluate.continual import Bench, Course, check_course, check_methods, teach
from jaxtta.evaluate.factory import (
    ADAPTERS,
    AdapterConfig,
    MGTTAConfig,
    check_adapters,
    check_mgtta_files,
    has_rate,
    is_tnt,
    make_adapter,
    own_settings,
    task_for,
    tnt_config_of,
)
from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.provenance import about, fingerprints, model_settings
from jaxtta.evaluate.record import Record, Scores, gain, outcomes, paired, score
from jaxtta.evaluate.results import Cell, Results, agree, agree_on_images, digest_of
from jaxtta.evaluate.run import peak_memory_gb, run

__all__ = [
    "ADAPTERS",
    "AdapterConfig",
    "AdapterSpec",
    "Bench",
    "Cell",
    "Choice",
    "Course",
    "MGTTAConfig",
    "Predictions",
    "Record",
    "Results",
    "Scores",
    "about",
    "agree",
    "agree_on_images",
    "check_adapters",
    "check_course",
    "check_methods",
    "check_mgtta_files",
    "choose_learning_rate",
    "default_severity",
    "digest_of",
    "fingerprints",
    "gain",
    "has_rate",
    "is_tnt",
    "make_adapter",
    "model_settings",
    "outcomes",
    "own_settings",
    "paired",
    "parse_adapter",
    "peak_memory_gb",
    "rate_names",
    "require_at_least",
    "require_distinct",
    "require_positive",
    "restore_step",
    "run",
    "save_step",
    "score",
    "task_for",
    "teach",
    "tnt_config_of",
]
