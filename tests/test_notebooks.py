"""The notebooks run offline, as they are stored."""

import json
import os
import resource
import subprocess
import sys

import pytest
from conftest import EXPERIMENTS

ROOT = EXPERIMENTS.parent
FOLDER = ROOT / "docs" / "notebooks"
NAMES = ("diagnose", "first_steps", "guard", "own_method")
SECONDS, CORES = 120, 2  # the most that a notebook may take


def cells_of(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return notebook["cells"]


def used():
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_all_are_listed():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == [*NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_stores_no_outputs(name):
    cells = cells_of(name)
    for cell in cells:
        assert cell["source"] and not cell["metadata"]  # no hidden cells
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
    assert cells[0]["cell_type"] == "markdown"
    assert cells[0]["source"][0].startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    folder, script = tmp_path / "empty", tmp_path / f"{name}.py"
    folder.mkdir()
    cells = [cell for cell in cells_of(name) if cell["cell_type"] == "code"]
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
    own = {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    before = used()
    done = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert not done.returncode, done.stderr
    assert "Warning" not in done.stderr  # readers would see it
    assert not [*folder.iterdir()]
    # Not by the clock: whatever else the machine does counts there.
    assert used() - before < SECONDS * CORES
