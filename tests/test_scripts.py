"""The scripts, run as a user runs them: on real images, and on what users get wrong."""

import csv
import json
import logging
import re
import runpy
import shutil
import sys
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXPERIMENTS, GOLDEN, errors_in, save_vit
from PIL import Image

import jaxtta
from jaxtta import assets, evaluate, io, report
from jaxtta.cli import script

QUICK = ("--workers", "0", "--limit", "20", "--batch-size", "10", "--corruptions", "fog", "clean")


def cell_of(folder, adapter, stream):
    return json.loads((folder / "cells" / f"{adapter}--{stream}--seed1.json").read_text())


def test_the_main_job_end_to_end(run_script, short, tmp_path):
    options = (*QUICK, "--model", short, "--output", tmp_path / "a")
    code, out, _ = run_script("corruption_sweep.py", *options)
    assert code == 0
    for name in ("zero_shot", "tent", "batclip"):
        for corruption in ("fog-1", "clean"):
            cell = cell_of(tmp_path / "a", name, corruption)
            (row,) = cell["segments"]
            assert (cell["adapter"], row["corruption"], row["images"]) == (
                name,
                corruption.removesuffix("-1"),
                20,
            )
            assert 0 <= row["top1"] <= row["top5"] <= 1
            assert cell["skipped_steps"] == row["unreadable"] == []
            assert cell["about"]["data"] == str(assets.IMAGES)
            assert cell["settings"]["class_names"][:2] == ["airplane", "automobile"]
            assert cell["about"]["versions"]["jaxtta"] == jaxtta.__version__
    assert (tmp_path / "a" / "table.txt").read_text().strip() in out
    assert Image.open(tmp_path / "a" / "accuracy.png").size[0] > 500
    assert "data:image/png;base64" in (tmp_path / "a" / "report.html").read_text()
    with (tmp_path / "a" / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    # adapted predictions differ from zero-shot's once a step was taken
    zero, adapted = (
        cell_of(tmp_path / "a", name, "fog-1")["segments"][0]["nll"]
        for name in ("zero_shot", "batclip")
    )
    assert zero != adapted


def test_the_same_seed_gives_the_same_figures(run_script, short, tmp_path):
    figures = []
    for folder, workers in (("a", "0"), ("b", "1")):
        options = [*QUICK[2:-1], "--model", short, "--adapters", "batclip", "--workers", workers]
        code, _, _ = run_script("corruption_sweep.py", *options, "--output", tmp_path / folder)
        assert code == 0
        cell = cell_of(tmp_path / folder, "batclip", "fog-1")
        figures.append((cell["segments"], cell["running"]))
    assert figures[0] == figures[1]


def test_ready_arrays_and_a_partly_unreadable_folder_run(run_script, short, tmp_path):
    images = tmp_path / "images"
    for name in ("cat", "dog"):
        (images / name).mkdir(parents=True)
        for file in sorted((assets.IMAGES / name).iterdir())[:3]:
            shutil.copyfile(file, images / name / file.name)
    broken = images / "cat" / "0001.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    common = ("--model", short, "--adapters", "batclip", "--batch-size", "4")
    code, out, _ = run_script(
        *("corruption_sweep.py", *common, "--data", images, "--corruptions", "clean"),
        *("--workers", "1", "--output", tmp_path / "a"),
    )
    assert code == 0
    assert "1 images could not be read" in out
    assert "0001.jpg" in out
    (row,) = cell_of(tmp_path / "a", "batclip", "clean")["segments"]
    assert row["images"] == 5
    assert row["unreadable"] == [str(broken)]

    listed = jaxtta.data.image_folder(assets.IMAGES)
    arrays = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in listed.files[::100]])
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "haze.npy", arrays)
    np.save(tmp_path / "arrays" / "labels.npy", listed.labels[::100])
    code, out, _ = run_script(
        *("corruption_sweep.py", *common, "--layout", "arrays", "--data", tmp_path / "arrays"),
        *("--corruptions", "haze", "--class-names", *listed.class_names),
        *("--workers", "0", "--output", tmp_path / "b"),
    )
    assert code == 0
    assert cell_of(tmp_path / "b", "batclip", "haze")["images"] == 20


def test_two_layouts_of_the_same_images_give_the_same_predictions(run_script, short, tmp_path):
    listed = jaxtta.data.image_folder(assets.IMAGES)
    files, labels = listed.files[::100], listed.labels[::100]
    for file in files:
        copy = tmp_path / "folder" / file.parent.name / file.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    (tmp_path / "arrays").mkdir()
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    np.save(tmp_path / "arrays" / "clean.npy", np.stack(images))
    np.save(tmp_path / "arrays" / "labels.npy", labels)
    common = ("--model", short, "--workers", "0", "--batch-size", "10")
    common += ("--corruptions", "clean", "--adapters")
    segments = []
    for layout in ("folder", "arrays"):
        code, _, _ = run_script(
            *("corruption_sweep.py", *common, "batclip", "--layout", layout),
            *("--data", tmp_path / layout, "--class-names", *listed.class_names),
            *("--output", tmp_path / f"{layout}-results", "--save-predictions"),
        )
        assert code == 0
        results = tmp_path / f"{layout}-results"
        segments.append(cell_of(results, "batclip", "clean")["segments"])
        saved = np.load(results / "predictions" / "batclip--clean--seed1.npz")
        segments[-1].append(saved["prediction"].tolist())
    assert segments[0] == segments[1]


def test_a_step_with_a_nan_loss_is_skipped_counted_and_named(
    run_script, short, tmp_path, monkeypatch
):
    """A model whose weights overflow on some images: the run goes on and says which steps."""
    real = jaxtta.models.CLIP.normalize

    def normalize(self, images):  # NaN where an image is black
        return jnp.where((images == 0).all((1, 2, 3), keepdims=True), jnp.nan, real(self, images))

    monkeypatch.setattr(jaxtta.models.CLIP, "normalize", normalize)
    (tmp_path / "arrays").mkdir()
    dark = np.full((6, 32, 32, 3), 100, np.uint8)
    dark[3] = 0
    np.save(tmp_path / "arrays" / "dark.npy", dark)
    np.save(tmp_path / "arrays" / "labels.npy", np.zeros(6, int))
    code, out, _ = run_script(
        *("corruption_sweep.py", "--adapters", "zero_shot", "batclip", "--batch-size", "2"),
        *("--workers", "0", "--order", "stored", "--layout", "arrays"),
        *("--model", short, "--data", tmp_path / "arrays"),
        *("--corruptions", "dark", "--class-names", "cat", "dog", "--output", tmp_path / "a"),
    )
    assert code == 0
    assert "batclip on dark: 1 steps skipped" in out
    cell = cell_of(tmp_path / "a", "batclip", "dark")
    assert cell["skipped_steps"] == [1]
    assert cell["segments"][0]["without_prediction"] == 1
    assert cell["images"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--adapters", "tnet"],
            "unknown adapter 'tnet', expected one of zero_shot, tent",
        ),
        (["--corruptions", "rain"], "unknown corruption 'rain', expected one of gaussian_noise"),
        (["--corruptions", "fog", "fog"], "--corruptions needs one or more"),
        (["--severities", "9"], "severity is 9, expected 1 to 5"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--limit", "0"], "limit is 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan, expected a positive number"),
        (["--class-names", "/nowhere.json"], "/nowhere.json: cannot be read as class names"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["--layout", "cifar"], "unknown layout 'cifar', expected one of folder"),
        (["--checkpoint-every", "0"], "--checkpoint-every is 0, expected at least 1"),
        (["--worker", "2/2"], "--worker is '2/2', expected i/n with i below n"),
        (["--seeds", "1", "1"], "--seeds needs one or more"),
        (["--choose-learning-rate", "-1"], "--choose-learning-rate is -1.0, expected a positive"),
        (["--setting", "gradual", "--severities", "3"], "--setting gradual has"),
        (["--severities", "5", "5"], "--severities needs one or more"),
        (
            ["--choose-learning-rate", "0.1", "--corruptions", "spatter"],
            "the validation corruptions",
        ),
        (["--choose-learning-rate", "0.1", "--worker", "0/2"], "one machine"),
        (["--choose-for", "tent"], "--choose-for tent needs --choose-learning-rate"),
        (["--adapters", "tent@fast"], "unknown adapter 'tent@fast', expected one of zero_shot"),
        (["--adapters", "zero_shot@0.1"], "unknown adapter 'zero_shot@0.1', expected one of"),
        (["--model", "/nowhere/model"], "is neither a local folder"),
        (["--model", str(GOLDEN / "tiny-clip")], "has no tokenizer"),
        (["--class-names", "cat", "dog"], "2 class names for 10 classes"),
        (["--layout", "arrays", "--data", "/nowhere", "--class-names", "a", "b"], "/nowhere"),
    ],
)
def test_bad_options_are_one_sentence(run_script, tmp_path, options, message):
    code, _, err = run_script("corruption_sweep.py", "--output", tmp_path / "a", *options)
    assert code == 1
    assert message in err
    assert errors_in(err) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_debug_shows_the_traceback(run_script, tmp_path):
    with pytest.raises(ValueError, match="severity is 9"):
        run_script("corruption_sweep.py", "--output", tmp_path, "--severities", "9", "--debug")


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


def test_natural_shifts_end_to_end(run_script, short, tmp_path, monkeypatch):
    for number, name in enumerate(("cat", "dog", "frog")):
        (tmp_path / "shop" / name).mkdir(parents=True)
        for file in sorted((assets.IMAGES / name).iterdir())[: 2 + number]:
            image = Image.open(file).resize((60 - 10 * number, 40))
            image.save(tmp_path / "shop" / name / file.name)
    options = [
        *("--limit", "8", "--batch-size", "4", "--workers", "0", "--output", tmp_path / "out"),
        *("--datasets", f"cifar10={assets.IMAGES}", f"shop={tmp_path / 'shop'}"),
        *("--tnt.views", "4", "--tnt.scale", "0.5", "1", "--model", short),
    ]
    drawn = []
    monkeypatch.setattr(
        "jaxtta.report.outputs.draw_examples",
        lambda examples: (drawn.extend(examples), report.draw_examples(examples))[1],
    )
    code, out, _ = run_script("natural_shifts.py", *options, "--save-examples", "3")
    assert code == 0
    # examples are tuned again, and are what they were in the sweep: answers that changed
    assert drawn
    for example in drawn:
        was, now = (x.argmax() == example.label for x in (example.before, example.after))
        assert was != now
        assert 0 < np.abs(example.noise).max() <= example.epsilon
    assert Image.open(tmp_path / "out" / "examples.png").size[0] > 500
    assert "Noise maps" in (tmp_path / "out" / "report.html").read_text()
    assert out.splitlines()[-1].endswith("report.html")
    cells = {
        (name, adapter): cell_of(tmp_path / "out" / name, adapter, name)
        for name in ("cifar10", "shop")
        for adapter in ("zero_shot", "tnt")
    }
    images = {name: cell["segments"][0]["images"] for (name, _), cell in cells.items()}
    assert images == {"cifar10": 8, "shop": 8}
    assert cells["shop", "tnt"]["settings"]["class_names"] == ["cat", "dog", "frog"]
    assert cells["shop", "tnt"]["settings"]["tnt"]["canvas"] == 60
    assert cells["cifar10", "tnt"]["settings"]["tnt"]["canvas"] == 32
    assert "tnt" not in cells["shop", "zero_shot"]["settings"]
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table.startswith("dataset ")
    assert "Averaged over 2 datasets" in out
    figures = sorted(file.name for file in (tmp_path / "out").iterdir() if file.is_file())
    assert {"accuracy.png", "report.html", "summary.csv"} <= set(figures)
    # again: nothing is computed twice, and other settings are refused
    code, again, _ = run_script("natural_shifts.py", *options)
    assert (code, again) == (0, out)
    code, _, err = run_script("natural_shifts.py", *options, "--tnt.epsilon", "0.01")
    assert code == 1
    assert "tnt.epsilon 0.00392156862745098 (this run: 0.01)" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--datasets", "shop"], "--datasets has 'shop', expected NAME=FOLDER"),
        (["--datasets", "a=x", "a=y"], "--datasets names a twice"),
        (["--datasets", "imagenet-a=/nowhere"], "/nowhere: no such folder"),
        (["--adapters", "tnt-x"], "unknown adapter 'tnt-x', expected one of zero_shot, tent"),
        (["--adapters", "tnt", "--save-examples", "1"], "compares tnt with zero_shot: run both"),
        (["--tnt.online", "--save-examples", "1"], "--tnt.online"),
        (["--canvas", "0"], "--canvas is 0, expected at least 1"),
    ],
)
def test_bad_options_of_natural_shifts(run_script, tmp_path, options, message):
    code, _, err = run_script("natural_shifts.py", "--output", tmp_path / "a", *options)
    assert code == 1
    assert message in err
    assert errors_in(err) == 1
    assert not (tmp_path / "a").exists()


def test_options_of_tnt_are_checked_as_they_are_read(run_script, tmp_path):
    for option, message in (
        (["--tnt.epsilon", "-1"], "epsilon is -1.0, expected a positive number"),
        (["--tnt.scale", "0.5", "2"], "scale is 0.5 to 2.0, expected positive numbers in order"),
        (["--tnt.select-fraction", "0"], "select_fraction is 0.0, expected above 0"),
    ):
        code, _, err = run_script("natural_shifts.py", "--output", tmp_path, *option)
        assert code == 2
        assert message in " ".join(err.replace("│", " ").split())


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


def test_a_generator_for_both_towers_through_several_updates(run_script, short, tmp_path):
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
    sweep_options = [
        *QUICK[:-2],
        "fog",
        "--model",
        short,
        "--mgtta.tower",
        "both",
        *" ".join(files).split(),
    ]
    adapters = ("zero_shot", "mgtta", "mgtta@1e-2", "mgtta-sgd", "mgtta-adam@1e-2")
    folder = tmp_path / "b"
    code, out, _ = run_script(
        "corruption_sweep.py", *sweep_options, "--adapters", *adapters, "--output", folder
    )
    assert code == 0
    losses = {name: cell_of(folder, name, "fog-1") for name in adapters}
    assert losses["mgtta"]["settings"]["mgtta"]["tower"] == "both"
    assert losses["mgtta@1e-2"]["settings"]["learning_rate"] == 1e-2
    assert "phi" not in losses["mgtta-sgd"]["settings"]["mgtta"]
    nll = [losses[name]["segments"][0]["nll"] for name in adapters]
    assert len(set(nll)) == len(nll)  # every one did something else


def test_files_of_another_model(run_script, tmp_path, caplog):
    statistics, _ = jaxtta.models.load_statistics(assets.STATISTICS)
    phi, _ = jaxtta.optim.load_mgg(assets.PHI)
    about = {"weights": "of another model"}
    jaxtta.models.save_statistics(tmp_path / "s", statistics, about)
    jaxtta.optim.save_mgg(tmp_path / "p", phi, about)
    run = ["corruption_sweep.py", *QUICK, "--adapters", "mgtta", "--output", tmp_path / "a"]
    code, _, err = run_script(*run, "--mgtta.statistics", tmp_path / "s")
    assert code == 1
    assert "s: was made with another model; run pretrain_mgg.py" in err
    code, _, err = run_script(*run, "--mgtta.phi", tmp_path / "p")
    assert code == 0
    assert "p: was made with another model" in caplog.text


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


def test_a_stream_without_one_readable_image_is_an_error(run_script, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "a.jpg").write_bytes(b"no image")
    code, _, err = run_script(
        *("corruption_sweep.py", "--data", tmp_path / "images", "--adapters", "zero_shot"),
        *("--batch-size", "2", "--workers", "0", "--output", tmp_path / "a"),
    )
    assert code == 1
    assert "none of the images could be read" in err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "row.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        io.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["row.json"]


def test_a_learning_rate_is_chosen_and_said(run_script, short, tmp_path):
    options = ["--workers", "0", "--limit", "10", "--batch-size", "10", "--corruptions", "fog"]
    options += ["--adapters", "batclip", "--choose-learning-rate", "1e-3", "1e-2"]
    options += ["--model", short]
    code, out, _ = run_script("corruption_sweep.py", *options, "--output", tmp_path / "a")
    assert code == 0
    assert "chosen on gaussian_blur, saturate, spatter, speckle_noise; 10 images each" in out
    assert "the test images, with their labels" in out
    cell = cell_of(tmp_path / "a", "batclip", "fog-1")
    chosen = cell["about"]["chosen"]["batclip"]
    assert cell["settings"]["learning_rate"] == chosen["rate"]
    assert chosen["rate"] in (1e-3, 1e-2)
    assert set(chosen["accuracies"]) == {"0.001", "0.01"}


def test_operations_are_counted_with_all_turns_of_a_loop():
    flops = runpy.run_path(str(EXPERIMENTS / "benchmark.py"))["jax_flops"]

    @jax.jit
    def program(a, b):
        turned = jax.lax.scan(lambda c, _: (jnp.tanh(c @ b), None), a, length=5)[0]
        mapped = jax.lax.map(lambda row: b @ row, turned)
        return jax.checkpoint(lambda x: jnp.einsum("nij,njk->nik", x, x))(jnp.stack([b, b])), mapped

    traced = program.trace(jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert flops(traced.jaxpr.jaxpr) == 5 * 2 * 3 * 4 * 4 + 3 * 2 * 4 * 4 + 2 * 2 * 4 * 4 * 4


def test_what_the_package_logs_is_printed_once(capsys, caplog):
    log, others = logging.getLogger("jaxtta.test"), StringIO()
    printing, writing = logging.StreamHandler(sys.stderr), logging.StreamHandler(others)
    with script._notes_on_stderr():
        for handler in (printing, writing):  # by a library that is imported late
            logging.root.addHandler(handler)
        log.info("a note")
        for handler in (printing, writing):
            logging.root.removeHandler(handler)
    assert capsys.readouterr().err == others.getvalue() == "a note\n"
    assert "a note" in caplog.text
