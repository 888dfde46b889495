"""Tables, plots and HTML reports of results."""

from jaxtta.report.examples import Example, check_examples, draw_examples, find_examples
from jaxtta.report.html import write_report
from jaxtta.report.outputs import conclude, samples_of
from jaxtta.report.plots import save_all
from jaxtta.report.summary import DATASETS, aligned, answer, summary_csv, table

__all__ = [
    "DATASETS",
    "Example",
    "aligned",
    "answer",
    "check_examples",
    "conclude",
    "draw_examples",
    "find_examples",
    "samples_of",
    "save_all",
    "summary_csv",
    "table",
    "write_report",
]
