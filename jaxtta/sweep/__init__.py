"""Running many streams through many adapters, and reporting what came of it."""

from jaxtta.sweep.choose import Choice, choose_learning_rate
from jaxtta.sweep.page import write_report
from jaxtta.sweep.plots import save_all
from jaxtta.sweep.record import Record, Scores, gain, outcomes, paired, score
from jaxtta.sweep.report import answer, summary_csv, table
from jaxtta.sweep.results import Cell, Results, write_json
from jaxtta.sweep.run import run
from jaxtta.sweep.script import run_script

__all__ = [
    "Cell",
    "Choice",
    "Record",
    "Results",
    "Scores",
    "answer",
    "choose_learning_rate",
    "gain",
    "outcomes",
    "paired",
    "run",
    "run_script",
    "save_all",
    "score",
    "summary_csv",
    "table",
    "write_json",
    "write_report",
]
