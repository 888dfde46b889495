"""Running many streams through many adapters, and reporting what came of it."""

from jaxtta.sweep.report import plot, table
from jaxtta.sweep.run import Record, Row, Scores, run, score, write_json
from jaxtta.sweep.script import run_script

__all__ = [
    "Record",
    "Row",
    "Scores",
    "plot",
    "run",
    "run_script",
    "score",
    "table",
    "write_json",
]
