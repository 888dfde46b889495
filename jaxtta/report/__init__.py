"""Tables, plots and HTML reports of results."""

from jaxtta.report.examples import Example, check_examples, find_examples
from jaxtta.report.plots import figures
from jaxtta.report.summary import DATASETS, summarise
from jaxtta.report.text import answer, text_table
from jaxtta.report.write import compare, samples_of, write_report

__all__ = [
    "DATASETS",
    "Example",
    "answer",
    "check_examples",
    "compare",
    "figures",
    "find_examples",
    "samples_of",
    "summarise",
    "text_table",
    "write_report",
]
