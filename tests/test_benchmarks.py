"""The benchmarks of speed, on a tiny model."""

import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import EXPERIMENTS

from jaxtta.flops import count_flops

BENCHMARKS = EXPERIMENTS.with_name("benchmarks")
RUN = "../benchmarks/run.py"
TINY = {"model": "tiny", "classes": 10, "steps": 1, "views": 4}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The files import each other as modules of their folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.slow
def test_each_row_is_measured_in_a_process_of_its_own(run_script):
    options = [part for name, value in TINY.items() for part in (f"--{name}", value)]
    adapters = ["zero_shot", "mgtta", "tnt:steps=3"]
    options += ["--frameworks", "jax", "--projectors"]
    code, out, _ = run_script(RUN, *options, "--adapters", *adapters)
    assert code == 0
    assert out.count("packed") == len(adapters)
    for name in ("5 projectors on the host", "5 projectors on the device", "with projection"):
        assert name in out
    columns, *rows = (line.split() for line in out.splitlines()[: len(adapters) + 1])
    assert [row[0] for row in rows] == adapters
    assert all(float(value) > 0 for row in rows for value in row[4:7])  # s/step, peak GB, GFLOP
    assert {"GFLOP", "peak", "generator"} <= {*columns}


@pytest.mark.slow
def test_steps_run_without_the_harness_libraries():
    hidden = "import sys; sys.modules.update(dict.fromkeys(['tyro', 'grain', 'pandas', 'ftfy'])); "
    code = hidden + "import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    script = BENCHMARKS / "jax_steps.py"
    command = [sys.executable, "-c", code, str(script), "batclip", "packed", json.dumps(TINY)]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, check=True)
    assert json.loads(done.stdout)["GFLOP"] == pytest.approx(0.0935, rel=0.01)


def test_rows_that_fail_are_told(run_script):
    code, _, err = run_script(RUN, "--model", "tiny", "--frameworks", "jax", "--adapters", "tnt-3")
    assert code == 1
    assert "no row could be measured" in err


def test_operations_are_counted_with_all_turns_of_a_loop():
    @jax.jit
    def program(a, b):
        turned = jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), a, length=5)[0]
        mapped = jax.lax.map(lambda row: b @ row, turned)
        return jax.checkpoint(lambda x: jnp.einsum("nij,njk->nik", x, x))(jnp.stack([b, b])), mapped

    traced = program.trace(jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert count_flops(traced.jaxpr.jaxpr) == 5 * 2 * 3 * 4 * 4 + 3 * 2 * 4 * 4 + 2 * 2 * 4 * 4 * 4


def test_operations_of_a_condition_are_those_of_its_largest_branch():
    @jax.jit
    def program(a):
        return jax.lax.cond(a.sum() > 0, lambda a: a @ a, lambda a: a @ a @ a, a)

    assert count_flops(program.trace(jnp.ones((4, 4))).jaxpr.jaxpr) == 2 * 2 * 4 * 4 * 4


def test_a_diagnosis_of_synthetic_features_is_timed(run_script):
    sizes = ("--images", 1000, "--classes", 51, "--size", 128)  # odd: halves have all classes
    code, out, _ = run_script("../benchmarks/diagnosis.py", *sizes)
    assert code == 0
    found = re.match(
        r"outlier axes \[0\], accuracy (.*), CKA (.*), p-value (.*): [\d.]+ s, [\d.]+ GB", out
    )
    accuracy, cka, p_value = map(float, found.groups())
    assert 0.2 < accuracy <= 1 and 0.1 < cka < 0.99 and p_value > 0.01
