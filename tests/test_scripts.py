"""The scripts, run as a user runs them: on real images, and on what users get wrong."""

import json
import re
import runpy

import jax
import jax.numpy as jnp
import pytest
from conftest import EXPERIMENTS, bundled_image

import jaxtta
from jaxtta import assets, io

QUICK = (
    "--workers",
    "0",
    "--max-images",
    "20",
    "--batch-size",
    "10",
    "--corruptions",
    "fog",
    "clean",
)


@pytest.mark.parametrize("script", sorted(p.name for p in EXPERIMENTS.glob("*.py")))
def test_help_teaches(run_script, script):
    code, out, _ = run_script(script, "--help")
    assert code == 0
    assert f"python experiments/{script}" in out.replace("\n", " ")


def test_a_small_clip_is_trained_and_loads(run_script, tmp_path):
    tower = "--vision.layers 1 --vision.width 24 --vision.heads 2 --text.layers 1 --text.width 16"
    options = [
        *("pretrain_tiny_clip.py", "--train", assets.IMAGES, "--test", assets.IMAGES),
        *("--limit", "40", "--epochs", "2", "--batch", "20", "--text.heads", "2"),
        *(*tower.split(), "--output", tmp_path / "model"),
    ]
    code, out, _ = run_script(*options)
    assert code == 0
    assert "test accuracy" in out
    model, params = jaxtta.load(tmp_path / "model")
    adapter = jaxtta.adapters.zero_shot(model, jaxtta.zero_shot_task(model, ["cat", "dog"]))
    images = [bundled_image("cat", number) for number in range(2)]
    _, prediction = adapter.step(params, adapter.init(params), model.preprocess(images))
    assert prediction.logits.shape == (2, 2)
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert len(record["loss"]) == len(record["test_accuracy"]) == 2
    code, _, err = run_script(*options)
    assert code == 1
    assert "already has a checkpoint" in err
    code, _, err = run_script("pretrain_tiny_clip.py", "--train", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere: no such folder" in err


@pytest.mark.slow
def test_the_benchmark_measures_each_row_in_its_own_process(run_script, tmp_path):
    options = ["--model", "tiny", "--classes", "10", "--frameworks", "jax", "--steps", "1"]
    adapters = ["zero_shot", "mgtta", "tnt-3"]
    options += ["--views", "4", "--adapters", *adapters]
    options += ["--projectors"]
    code, out, _ = run_script("benchmark.py", *options, "--output", tmp_path / "rows.json")
    assert code == 0
    assert re.search(r"projectors \(3 of 64 inputs, 2 of 256 inputs\): [\d.e-]+ s", out)
    assert re.search(r"free directions: [\d.]+%", out)
    assert re.search(r"training step: [\d.e-]+ s, with the projection [\d.e-]+ s \([+-]", out)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["adapter"] for row in rows] == adapters
    assert all(row["gflop"] > 0 and row["peak_memory_gb"] > 0 for row in rows)
    assert out.count("packed") == len(adapters)
    code, _, err = run_script("benchmark.py", "--classes", "1")
    assert code == 1
    assert "--classes must be at least 2, not 1" in err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "row.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        io.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["row.json"]


def test_operations_are_counted_with_all_turns_of_a_loop():
    flops = runpy.run_path(str(EXPERIMENTS / "benchmark.py"))["jax_flops"]

    @jax.jit
    def program(a, b):
        turned = jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), a, length=5)[0]
        mapped = jax.lax.map(lambda row: b @ row, turned)
        return jax.checkpoint(lambda x: jnp.einsum("nij,njk->nik", x, x))(jnp.stack([b, b])), mapped

    traced = program.trace(jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert flops(traced.jaxpr.jaxpr) == 5 * 2 * 3 * 4 * 4 + 3 * 2 * 4 * 4 + 2 * 2 * 4 * 4 * 4
