"""Make a sweep's report again, or put sweeps side by side.

    jaxtta report runs/demo                 # table, plots and report.html
    jaxtta report runs/demo runs/continual  # one table of both

It needs the stored predictions alone: the page has no sample images and examples of noise maps.
"""

from pathlib import Path
from typing import Annotated

import tyro

from jaxtta import evaluate, report
from jaxtta.cli.options import group


@group
class Options:
    """Report on results that are stored.

    Attributes:
        folders: folders of jaxtta sweep or shifts, or their URLs.
        output: folder for the comparison of several.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path(),)
    output: Path = Path("comparison")


def run(options: Options) -> None:
    """Print tables and write reports."""
    if len(options.folders) != 1:
        return report.compare(options.folders, options.output)
    (folder,) = options.folders
    report.write_report(evaluate.load_predictions(folder), folder, folder.resolve().name)
