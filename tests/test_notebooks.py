"""The notebooks are stored without outputs; `make docs` runs them."""

import json

import pytest
from conftest import EXPERIMENTS

ROOT = EXPERIMENTS.parent
FOLDER = ROOT / "docs" / "notebooks"
NAMES = ("diagnose", "first_steps", "guard", "own_method")


def cells_of(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    return notebook["cells"]


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
