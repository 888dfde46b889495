"""Running adapters over streams, continual learning experiments, and result files."""

from jaxtta.evaluate.checkpoint import restore_step, save_step
from jaxtta.evaluate.checks import check_choices, check_limits, check_rates, severity_of
from jaxtta.evaluate.choose import Choice, choose_learning_rate
from jaxtta.evaluate.continual import Bench, Course, check_course, check_methods, teach
from jaxtta.evaluate.factory import (
    ADAPTERS,
    MGTTA,
    Setup,
    check_adapters,
    check_files,
    has_rate,
    is_tnt,
    make_adapter,
    own_settings,
    task_for,
    tuning_of,
)
from jaxtta.evaluate.provenance import about, fingerprints
from jaxtta.evaluate.record import Record, Scores, gain, outcomes, paired, score
from jaxtta.evaluate.results import Cell, Results, agree
from jaxtta.evaluate.run import peak_memory_gb, run

__all__ = [
    "ADAPTERS",
    "MGTTA",
    "Bench",
    "Cell",
    "Choice",
    "Course",
    "Record",
    "Results",
    "Scores",
    "Setup",
    "about",
    "agree",
    "check_adapters",
    "check_choices",
    "check_course",
    "check_files",
    "check_limits",
    "check_methods",
    "check_rates",
    "choose_learning_rate",
    "fingerprints",
    "gain",
    "has_rate",
    "is_tnt",
    "make_adapter",
    "outcomes",
    "own_settings",
    "paired",
    "peak_memory_gb",
    "restore_step",
    "run",
    "save_step",
    "score",
    "severity_of",
    "task_for",
    "teach",
    "tuning_of",
]
