"""Running many streams through many adapters, and reporting what came of it."""

from jaxtta.sweep.checkpoint import restore_step, save_step
from jaxtta.sweep.choose import Choice, choose_learning_rate
from jaxtta.sweep.continual import Bench, Course, check_course, check_methods, teach
from jaxtta.sweep.examples import Example, check_examples, draw_examples, find_examples
from jaxtta.sweep.finish import conclude, samples_of
from jaxtta.sweep.lineup import (
    ADAPTERS,
    MGTTA,
    Setup,
    check_adapters,
    check_files,
    has_rate,
    is_tnt,
    make_adapter,
    own_settings,
    tuning_of,
)
from jaxtta.sweep.page import write_report
from jaxtta.sweep.plots import save_all
from jaxtta.sweep.provenance import about, fingerprints
from jaxtta.sweep.record import Record, Scores, gain, outcomes, paired, score
from jaxtta.sweep.report import DATASETS, aligned, answer, summary_csv, table
from jaxtta.sweep.results import Cell, Results, agree, whole, write_json
from jaxtta.sweep.run import run
from jaxtta.sweep.script import (
    check_choices,
    check_limits,
    check_rates,
    run_script,
    severity_of,
)

__all__ = [
    "ADAPTERS",
    "DATASETS",
    "MGTTA",
    "Bench",
    "Cell",
    "Choice",
    "Course",
    "Example",
    "Record",
    "Results",
    "Scores",
    "Setup",
    "about",
    "agree",
    "aligned",
    "answer",
    "check_adapters",
    "check_choices",
    "check_course",
    "check_examples",
    "check_files",
    "check_limits",
    "check_methods",
    "check_rates",
    "choose_learning_rate",
    "conclude",
    "draw_examples",
    "find_examples",
    "fingerprints",
    "gain",
    "has_rate",
    "is_tnt",
    "make_adapter",
    "outcomes",
    "own_settings",
    "paired",
    "restore_step",
    "run",
    "run_script",
    "samples_of",
    "save_all",
    "save_step",
    "score",
    "severity_of",
    "summary_csv",
    "table",
    "teach",
    "tuning_of",
    "whole",
    "write_json",
    "write_report",
]
