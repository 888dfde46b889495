"""The scripts, run as a user runs them: on real images, and on what users get wrong."""

import json
import re
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERIMENTS, errors_in, save_vit
from PIL import Image

import jaxtta
from jaxtta import assets, evaluate, io

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
    images = [Image.open(f) for f in sorted((assets.IMAGES / "cat").iterdir())[:2]]
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


def test_a_generator_is_trained_and_a_killed_run_goes_on(run_script, short, tmp_path, monkeypatch):
    options = [
        *("--model", short, "--workers", "0"),
        *("--images", "8", "--held-out", "6", "--test-batch", "3", "--source-images", "6"),
        *("--corruptions", "speckle_noise", "saturate", "--severity", "1", "--hidden", "2"),
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, _ = run_script("pretrain_mgg.py", *options, "--epochs", "2", "--output", whole)
    assert code == 0
    record = json.loads((whole / "training.json").read_text())
    assert [len(record[name]) for name in ("loss", "held_out_loss", "accuracy")] == [2, 2, 2]
    assert record["accuracy"][record["chosen_epoch"] - 1] == max(record["accuracy"])
    assert f"epoch {record['chosen_epoch']} of 2, chosen by accuracy" in out
    phi, about = jaxtta.optim.load_mgg(whole / "phi.safetensors")
    assert (jaxtta.optim.check_mgg_params(phi), about["epoch"]) == (2, record["chosen_epoch"])
    assert jaxtta.models.load_statistics(whole / "statistics.safetensors")[0].count == 6
    assert Image.open(whole / "training.png").size[0] > 500
    # killed in the second epoch, between weights and checkpoint; then the same command again
    before, calls = evaluate.checkpoint._manager, []

    def stop(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return before(folder)

    options += ["--epochs", "2", "--output", parts]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.checkpoint, "_manager", stop)
        assert run_script("pretrain_mgg.py", *options)[0] == 130
    assert run_script("pretrain_mgg.py", *options)[0] == 0
    for file in ("phi.safetensors", "statistics.safetensors"):
        assert (parts / file).read_bytes() == (whole / file).read_bytes()
    again = json.loads((parts / "training.json").read_text())
    for name in ("loss", "held_out_loss", "accuracy"):
        np.testing.assert_allclose(again[name], record[name], rtol=1e-6)
    code, _, err = run_script("pretrain_mgg.py", *options, "--seed", "1")
    assert code == 1
    assert "parts: has results with seed 0 (this run: 1)" in err


@pytest.fixture
def supervised(tmp_path):
    """A supervised ViT's checkpoint with three classes, and a folder of their images."""
    from transformers import ViTConfig

    names = ["cat", "dog", "ship"]
    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = jaxtta.models.classifier_from_config(config)
    save_vit(tmp_path / "vit", config, model.init(jax.random.key(0)))
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        for file in sorted((assets.IMAGES / name).iterdir())[:6]:
            shutil.copy(file, tmp_path / "images" / name)
    return tmp_path / "vit", tmp_path / "images"


def test_the_papers_table_of_mgtta_on_a_supervised_vit(run_script, supervised, tmp_path):
    """The README's two commands: a generator and statistics, then no adaptation, TENT, MGTTA."""
    model, images = supervised
    code, _, err = run_script(
        *("pretrain_mgg.py", "--model", model, "--data", images, "--workers", "0"),
        *("--images", "8", "--held-out", "6", "--test-batch", "3", "--source-images", "6"),
        *("--corruptions", "saturate", "--severity", "1", "--hidden", "2", "--batch", "2"),
        *("--epochs", "1", "--output", tmp_path / "mgg"),
    )
    assert code == 0, err
    options = [
        *("corruption_sweep.py", "--model", model, "--data", images, "--workers", "0"),
        *("--corruptions", "fog", "contrast", "--severities", "1", "--batch-size", "6"),
        *("--adapters", "zero_shot", "tent", "mgtta"),
        *("--mgtta.phi", tmp_path / "mgg" / "phi.safetensors"),
        *("--mgtta.statistics", tmp_path / "mgg" / "statistics.safetensors"),
    ]
    code, out, err = run_script(*options, "--output", tmp_path / "run")
    assert code == 0, err
    row = next(line for line in out.splitlines() if line.startswith("mean"))
    assert len(re.findall(r"\d+\.\d\d", row)) >= 3
    assert len(list((tmp_path / "run" / "cells").iterdir())) == 6
    # the same classes in another order would give wrong figures: refused
    (tmp_path / "names.txt").write_text("ship\ncat\ndog\n")
    names = ("--class-names", tmp_path / "names.txt")
    code, _, err = run_script(*options, *names, "--output", tmp_path / "odd")
    assert code == 1
    assert "cat" in err
    code, _, err = run_script(*options, "--class-names", "a", "b", "--output", tmp_path / "odd")
    assert code == 1


def test_a_generator_for_both_towers_through_several_updates(
    run_script, run_jaxtta, short, tmp_path
):
    options = [
        *("--model", short, "--workers", "0"),
        *("--images", "12", "--held-out", "0", "--choose", "loss", "--source-images", "6"),
        *("--corruptions", "saturate", "--hidden", "2", "--epochs", "1", "--batch", "2"),
        *("--truncation", "3", "--tower", "both"),  # five batches after the first: 3 and 2
    ]
    code, out, _ = run_script("pretrain_mgg.py", *options, "--output", tmp_path / "a")
    assert code == 0
    assert "no held-out images" in out
    files = [f"--mgtta.{name} {tmp_path}/a/{name}.safetensors" for name in ("phi", "statistics")]
    options = [*QUICK, "--model", short, "--mgtta.tower", "both", *" ".join(files).split()]
    adapters = (
        "zero_shot",
        "mgtta",
        "mgtta:lr=1e-2",
        "mgtta:optimizer=sgd",
        "mgtta:optimizer=adam",
    )
    folder = tmp_path / "b"
    code, out, _ = run_jaxtta("sweep", *options, "--adapters", *adapters, "--output", folder)
    assert code == 0
    found = {each.adapter: each for each in evaluate.load_predictions(folder)}
    assert found["mgtta"].settings["adapter"]["tower"] == "both"
    assert "0.01" in found["mgtta:lr=1e-2"].settings["adapter"]["optimizer"]
    assert "phi" not in found["mgtta:optimizer=sgd"].settings["adapter"]
    nll = [found[name].rows["nll"].mean() for name in adapters]
    assert len(set(nll)) == len(nll)  # every one did something else


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--held-out", "0"], "--choose accuracy needs --held-out images"),
        (["--images", "2"], "--images is 2, expected at least 4"),
        (["--images", "3000"], "has 2000 images, expected at least 3256 for --images 3000"),
        (["--learning-rate", "-1"], "--learning-rate is -1.0, expected a positive number"),
        (["--corruptions", "rain"], "unknown corruption 'rain'"),
    ],
)
def test_bad_options_of_meta_training(run_script, tmp_path, options, message):
    code, _, err = run_script("pretrain_mgg.py", "--output", tmp_path / "a", *options)
    assert code == 1
    assert message in err
    assert errors_in(err) == 1
    assert not (tmp_path / "a").exists()


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
