"""The `jaxtta` command, run as a user runs it: on real images, and on what users get wrong."""

import csv
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
from io import StringIO

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, errors_in, write_images
from PIL import Image

import jaxtta
from jaxtta import assets, cli, data, evaluate, io, report
from jaxtta.cli.main import COMMANDS
from jaxtta.report.examples import draw_examples

QUICK = ("--workers", "0", "--max-images", "20", "--batch-size", "10")
TWO = (*QUICK, "--corruptions", "fog", "clean")


def results_of(folder):
    """A folder's predictions by adapter and stream."""
    return {(each.adapter, each.stream): each for each in evaluate.load_predictions(folder)}


def test_the_list_of_commands_imports_nothing():
    code = (
        "import sys, jaxtta.cli.main; jaxtta.cli.main.main(['--help']); "
        "print(sorted({'jax', 'numpy', 'tyro', 'pandas', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = out.stdout.splitlines()
    assert lines[-1] == "[]"
    assert {line.split()[0] for line in lines if line.startswith("  ")} == COMMANDS.keys()
    for arguments, code in ((["sweeep"], 2), ([], 0)):
        command = [sys.executable, "-m", "jaxtta", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "classify" in done.stdout + done.stderr) == (code, True)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run_jaxtta, command):
    code, out, _ = run_jaxtta(command, "--help")
    assert code == 0
    assert f"\n    jaxtta {command} " in out  # an example on a line of its own
    assert "(default: )" not in out


def test_a_sweep_end_to_end(run_jaxtta, short, tmp_path):
    code, out, _ = run_jaxtta("sweep", *TWO, "--model", short, "--output", tmp_path)
    assert code == 0
    results = results_of(tmp_path)
    names = ("zero_shot", "tent", "batclip")
    assert results.keys() == {(name, stream) for name in names for stream in ("fog-1", "clean")}
    for result in results.values():
        assert len(result.rows) == 20 and result.rows["seen"].all()
        assert not result.steps["skipped"].any()
        assert result.unreadable == ()
        assert result.about["data"] == str(assets.IMAGES)
        assert result.class_names[:2] == ("airplane", "automobile")
        assert result.about["versions"]["jaxtta"] == jaxtta.__version__
    # adapted predictions differ from zero-shot's once a step was taken
    nll = [results[name, "fog-1"].rows["nll"] for name in ("zero_shot", "batclip")]
    assert not np.allclose(*nll)
    assert (tmp_path / "table.txt").read_text().strip() in out
    assert Image.open(tmp_path / "gain.png").size[0] > 500
    assert "data:image/png;base64" in (tmp_path / "report.html").read_text()
    with (tmp_path / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6


def test_a_report_is_made_again_and_sweeps_are_compared(run_jaxtta, short, tmp_path):
    for name, adapter in (("a", "tent:lr=0.01"), ("b", "batclip")):
        adapters = ("--adapters", "zero_shot", adapter, "--output", tmp_path / name)
        assert run_jaxtta("sweep", *TWO, "--model", short, *adapters)[0] == 0
    files = {name: (tmp_path / "a" / name).read_text() for name in ("table.txt", "summary.csv")}
    for name in (*files, "report.html"):
        (tmp_path / "a" / name).unlink()
    code, out, _ = run_jaxtta("report", tmp_path / "a")
    assert code == 0
    assert {name: (tmp_path / "a" / name).read_text() for name in files} == files
    assert (tmp_path / "a" / "report.html").exists()
    both = (tmp_path / "a", tmp_path / "b", "--output", tmp_path / "both")
    code, out, _ = run_jaxtta("report", *both)
    assert code == 0
    assert "tent:lr=0.01" in out and "batclip" in out
    code, _, err = run_jaxtta("report", tmp_path / "nowhere")
    assert code == 1
    assert "nowhere" in err and errors_in(err) == 1


def test_shards_together_are_the_whole(run_jaxtta, short, tmp_path):
    common = ("sweep", *TWO, "--model", short, "--adapters", "zero_shot", "tent", "--output")
    whole = run_jaxtta(*common, tmp_path / "whole")[1]
    for shard in ("0/2", "1/2"):
        code, out, _ = run_jaxtta(*common, tmp_path / "parts", "--shard", shard)
        assert (code, "without --shard" in out) == (0, True)
    code, out, _ = run_jaxtta(*common, tmp_path / "none", "--shard", "2/3")
    assert (code, "shard 2/3: no results" in out) == (0, True)
    code, out, _ = run_jaxtta("shifts", "--output", tmp_path / "none", "--shard", "1/2")
    assert (code, "shard 1/2: no results" in out) == (0, True)
    code, out, _ = run_jaxtta(*common, tmp_path / "parts")
    assert code == 0
    measured = r".*(second|memory).*\n"
    assert re.sub(measured, "", out).replace("parts", "whole") == re.sub(measured, "", whole)


def test_a_dry_run_says_what_it_takes_and_writes_nothing(run_jaxtta, short, tmp_path):
    common = ("sweep", *TWO, "--model", short, "--output", tmp_path / "a", "--adapters")
    code, out, _ = run_jaxtta(*common, "zero_shot", "tent", "--dry-run")
    assert code == 0
    assert re.search("tent: 2 steps of .* s on 8 devices", out)  # of both streams at once
    code, out, _ = run_jaxtta(*common, "zero_shot", "tent", "--dry-run", "--devices", 1)
    assert code == 0
    assert "fog-1, seed 1: 20 images, 2 steps of 10" in out
    assert "tent: 4 steps of" in out and "estimate" in out and "GB" in out
    assert not (tmp_path / "a").exists()


def test_a_method_of_ones_own(run_jaxtta, short, tmp_path, monkeypatch):
    (tmp_path / "ownmethod.py").write_text(
        "import optax, jaxtta\n"
        "def no_adapter(model, task): return 3\n"
        "def make(model, task, lr=1e-3):\n"
        "    return jaxtta.adapters.tent(model, task, optimizer=optax.lion(lr))\n"
    )
    monkeypatch.chdir(tmp_path)
    adapters = ("--adapters", "zero_shot", "ownmethod:make", "ownmethod:make:lr=0.1")
    code, out, _ = run_jaxtta("sweep", *TWO, "--model", short, *adapters, "--output", "out")
    assert code == 0
    assert "ownmethod:make:lr=0.1" in out
    assert "ownmethod:make:lr=0.1" in (tmp_path / "out" / "report.html").read_text()
    none = ("--adapters", "ownmethod:no_adapter", "--output", "none")
    code, _, err = run_jaxtta("sweep", *TWO, "--model", short, *none)
    assert (code, "ownmethod:no_adapter: gives 3, expected an Adapter" in err) == (1, True)
    code, out, _ = run_jaxtta(
        *("classify", write_images(tmp_path / "in", 1, ["cat"]), "--model", short),
        *("--adapter", "ownmethod:make", "--min-adapt", "1"),
    )
    assert (code, "updates 0" in out) == (0, True)


def test_a_guarded_method_is_swept(run_jaxtta, short, tmp_path):
    names = ("zero_shot", "guarded:batclip:lr=1e-2")
    options = ("--model", short, "--corruptions", "fog", "--adapters", *names)
    code, _, err = run_jaxtta("sweep", *QUICK, *options, "--output", tmp_path)
    assert code == 0, err
    results = results_of(tmp_path)
    assert results.keys() == {(name, "fog-1") for name in names}
    guarded = results[names[1], "fog-1"].rows
    assert len(guarded) == 20 and guarded["seen"].all() and np.isfinite(guarded["nll"]).all()
    assert names[1] in (tmp_path / "report.html").read_text()


def test_results_are_logged(run_jaxtta, short, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboardX")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = ("--adapters", "zero_shot", "--log", "tensorboard", "wandb", "--output", tmp_path)
    assert run_jaxtta("sweep", *TWO, "--model", short, *options)[0] == 0
    assert [*tmp_path.rglob("events.out.tfevents*")] and [*tmp_path.rglob("*.wandb")]


def test_layouts_workers_and_unreadable_images(run_jaxtta, short, tmp_path):
    """The same images as files and as an array, read by another process or here."""
    images = write_images(tmp_path / "images", 2)
    dataset = data.open_dataset("folder", images)
    (tmp_path / "arrays").mkdir()
    np.save(tmp_path / "arrays" / "clean.npy", np.stack([dataset[n] for n in range(len(dataset))]))
    np.save(tmp_path / "arrays" / "labels.npy", dataset.labels)
    common = ("sweep", "--model", short, "--adapters", "batclip", "--batch-size", "8")
    common += ("--corruptions", "clean", "--class-names", *dataset.class_names)
    found = []
    for layout, workers in (("folder", "0"), ("folder", "1"), ("arrays", "0")):
        folder = tmp_path / f"{layout}-{workers}"
        place = ("--layout", layout, "--data", images if layout == "folder" else tmp_path / layout)
        code, out, _ = run_jaxtta(*common, *place, "--workers", workers, "--output", folder)
        assert (code, "could not be read" in out) == (0, False)
        found.append(results_of(folder)["batclip", "clean"].rows)
    assert found[0].equals(found[1]) and found[0].equals(found[2])
    broken = images / "cat" / "0001.png"
    broken.write_bytes(broken.read_bytes()[:300])
    options = ("--data", images, "--workers", "1", "--output", tmp_path / "broken")
    code, out, _ = run_jaxtta(*common, *options)
    assert code == 0
    assert "1 image could not be read" in out and "0001.png" in out
    result = results_of(tmp_path / "broken")["batclip", "clean"]
    assert result.unreadable == (str(broken),)
    assert result.rows["seen"].sum() == 19
    for file in images.rglob("*.png"):
        file.write_bytes(b"no image")
    code, _, err = run_jaxtta(*common, "--data", images, "--output", tmp_path / "none")
    assert (code, "none of the images could be read" in err) == (1, True)


def test_a_step_with_a_nan_loss_is_skipped_counted_and_named(
    run_jaxtta, short, tmp_path, monkeypatch
):
    """A model whose weights overflow on some images: the run goes on and says which steps."""
    real = jaxtta.models.CLIP.normalize

    def normalize(self, images):  # NaN where an image is black
        return jnp.where((images == 0).all((1, 2, 3), keepdims=True), jnp.nan, real(self, images))

    monkeypatch.setattr(jaxtta.models.CLIP, "normalize", normalize)
    dark = np.full((6, 32, 32, 3), 100, np.uint8)
    dark[3] = 0
    np.save(tmp_path / "dark.npy", dark)
    np.save(tmp_path / "labels.npy", np.zeros(6, int))
    code, out, _ = run_jaxtta(
        *("sweep", "--adapters", "zero_shot", "batclip", "--batch-size", "2", "--workers", "0"),
        *("--order", "stored", "--layout", "arrays", "--data", tmp_path, "--model", short),
        *("--corruptions", "dark", "--class-names", "cat", "dog", "--output", tmp_path / "a"),
    )
    assert code == 0
    assert "batclip: 1 step skipped" in out and "dark" in out
    result = results_of(tmp_path / "a")["batclip", "dark"]
    assert result.steps["skipped"].tolist() == [False, True, False]
    assert (result.rows["prediction"] == -1).sum() == 1


def test_a_learning_rate_is_selected_and_said(run_jaxtta, short, tmp_path):
    options = (*QUICK[:-4], "--max-images", "10", "--batch-size", "10", "--corruptions", "fog")
    options += ("--adapters", "zero_shot", "batclip", "--tune-learning-rates", "1e-3", "1e-2")
    code, out, _ = run_jaxtta("sweep", *options, "--model", short, "--output", tmp_path)
    assert code == 0
    assert "chosen on gaussian_blur, saturate, spatter, speckle_noise; 10 images each" in out
    assert "the test images, with their labels" in out
    (name,) = {adapter for adapter, _ in results_of(tmp_path)} - {"zero_shot"}
    chosen = results_of(tmp_path)[name, "fog-1"].about["chosen"]["batclip"]
    assert name == f"batclip:lr={chosen['rate']}"
    assert set(chosen["accuracies"]) == {"0.001", "0.01"}


def test_natural_shifts_end_to_end(run_jaxtta, short, tmp_path, monkeypatch):
    for number, name in enumerate(("cat", "dog", "frog")):
        for file in (write_images(tmp_path / "shop", 2 + number, [name]) / name).iterdir():
            Image.open(file).resize((60 - 10 * number, 40)).save(file)
    drawn = []
    monkeypatch.setattr(
        report.write, "draw_examples", lambda x: (drawn.extend(x), draw_examples(x))[1]
    )
    options = ("--max-images", "8", "--batch-size", "4", "--workers", "0", "--model", short)
    options += ("--datasets", f"cifar10={assets.IMAGES}", f"shop={tmp_path / 'shop'}")
    options += ("--tnt.views", "4", "--tnt.scale", "0.5", "1", "--output", tmp_path / "out")
    code, out, _ = run_jaxtta("shifts", *options, "--save-examples", "3")
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
    results = results_of(tmp_path / "out")
    for name, classes, canvas in (("cifar10", 10, 32), ("shop", 3, 60)):
        for adapter in ("zero_shot", "tnt"):
            result = results[adapter, name]
            assert (len(result.rows), len(result.class_names)) == (8, classes)
            used = result.settings["adapter"].get("canvas")
            assert used == (canvas if adapter == "tnt" else None)
    assert (tmp_path / "out" / "table.txt").read_text().startswith("dataset ")
    # again: nothing is computed twice, and other settings are refused
    assert run_jaxtta("shifts", *options)[1] == out
    code, _, err = run_jaxtta("shifts", *options, "--tnt.epsilon", "0.01")
    assert code == 1
    assert "tnt.epsilon 0.00392156862745098 (this run: 0.01)" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--adapters tnet", "'tnet', expected zero_shot, tent"),
        ("--adapters tent:lr=fast", "lr is fast, expected a positive number"),
        ("--adapters zero_shot:lr=0.1", "unknown setting 'lr'"),
        ("--adapters nomodule:make", "nomodule:make: the module cannot be imported"),
        ("--adapters tent tent", "one or more adapters of distinct names"),
        ("--corruptions rain", "unknown corruption 'rain'"),
        ("--severities 9", "of severity 9, expected one of"),
        ("--seeds 1 1", "one or more streams of distinct names"),
        ("--batch-size 0", "batch_size is 0, expected at least 1"),
        ("--max-images 0", "limit 0 and concentration 0.1 must be above 0"),
        ("--class-names /nowhere.json", "/nowhere.json: cannot be read as class names"),
        ("--class-names cat dog", "2 class names for 10 classes"),
        ("--data /nowhere/at/all", "/nowhere/at/all: No such f"),
        ("--layout cifar", "unknown layout 'cifar', expected one of folder"),
        ("--layout arrays --data /nowhere --class-names a b", "/nowhere"),
        ("--shard 2/2", "--shard is '2/2', expected i/n with i below n"),
        ("--tune-learning-rates -1", "lr is -1.0, expected a positive number"),
        ("--tune-learning-rates 0.1 --corruptions spatter", "select learning rates"),
        ("--tune-adapters tent", "--tune-adapters and --validation need --tune-learning-rates"),
        ("--tune-learning-rates 0.1 --save-examples 1", "needs zero_shot and tnt"),
        ("--tune-learning-rates 0.1 --tune-adapters tnt", "'tnt', which is not one of --adapters"),
        (
            "--tune-learning-rates 0.1 --adapters zero_shot --tune-adapters zero_shot",
            "zero_shot:lr=0.1: unknown setting 'lr'",
        ),
        ("--model /nowhere/model", "is neither a local folder"),
        (f"--model {GOLDEN / 'tiny-clip'}", "has no tokenizer"),
        ("--save-examples 1", "needs zero_shot and tnt"),
        ("shifts --datasets shop", "--datasets has shop, expected NAME=FOLDER"),
        ("shifts --datasets a=x a=y", "--datasets has a=x a=y, expected NAME=FOLDER"),
        ("shifts --datasets imagenet-a=/nowhere", "/nowhere: No such file"),
        ("shifts --adapters tnt --save-examples 1", "needs zero_shot and tnt"),
        ("shifts --tnt.online --save-examples 1", "needs zero_shot and tnt"),
    ],
)
def test_bad_options_are_one_sentence(run_jaxtta, tmp_path, options, message):
    command = options.split() if options.startswith("shifts") else ["sweep", *options.split()]
    code, _, err = run_jaxtta(*command, "--output", tmp_path / "a")
    assert code == 1
    assert message in err
    assert errors_in(err) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "a").exists()


def test_debug_shows_the_traceback(run_jaxtta, tmp_path):
    with pytest.raises(ValueError, match="of severity 9, expected one of"):
        run_jaxtta("sweep", "--output", tmp_path, "--severities", "9", "--debug")


@dataclasses.dataclass
class NoOptions:
    """A script without options of its own."""


def raising(error):
    raise error


@pytest.mark.parametrize(
    ("allocate", "asked"),
    [
        (
            lambda: jnp.zeros((10**6, 10**7)).block_until_ready(),
            "Out of memory allocating 4e+04 GB",
        ),
        (lambda: np.zeros((10**9, 10**9)), "Unable to allocate"),
        (lambda: raising(MemoryError()), "error: memory is short: use a smaller"),
    ],
)
def test_memory_that_is_not_there_is_said_in_one_sentence(capsys, allocate, asked):
    with pytest.raises(SystemExit, match="1"):
        cli.run_script(NoOptions, lambda _: allocate(), __doc__, [])
    err = capsys.readouterr().err
    assert errors_in(err) == 1
    assert asked in err
    assert "--batch-size" in err
    with pytest.raises((RuntimeError, MemoryError)):
        cli.run_script(NoOptions, lambda _: allocate(), __doc__, ["--debug"])


@pytest.mark.parametrize("what", ["bug", "RESOURCE_EXHAUSTED: open() failed: Too many open files"])
def test_other_errors_at_run_time_keep_their_traceback(what):
    with pytest.raises(RuntimeError, match=re.escape(what)):
        cli.run_script(NoOptions, lambda _: raising(RuntimeError(what)), __doc__, [])


def test_compiled_programs_are_kept_for_the_next_run(tmp_path):
    script = (
        "import dataclasses, jax, jax.numpy as jnp\n"
        "from jaxtta import cli\n"
        "@dataclasses.dataclass\n"
        "class Options:\n    pass\n"
        "def main(options):\n"
        "    x = jnp.ones((8, 8))\n"
        "    jax.jit(lambda x: [x := jnp.linalg.svd(x + n)[0] @ x for n in range(200)])(x)\n"
        "cli.run_script(Options, main, None)\n"
    )
    given = ("JAX_COMPILATION", "JAX_PERSISTENT")  # the tests have a cache of their own
    env = {name: x for name, x in os.environ.items() if not name.startswith(given)}
    for options, kept in (["--no-cache"], False), ([], True):
        command = [sys.executable, "-c", script, *options]
        subprocess.run(command, env=env | {"XDG_CACHE_HOME": str(tmp_path)}, check=True)
        assert any((tmp_path / "jaxtta").glob("*-cache")) == kept
    (tmp_path / "file").touch()  # where no folder can be made
    command = [sys.executable, "-c", script]
    nowhere = env | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    assert not subprocess.run(command, env=nowhere, check=True, stderr=subprocess.PIPE).stderr
    elsewhere = env | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    elsewhere |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    subprocess.run(command, env=elsewhere, check=True)
    assert [*(tmp_path / "own").glob("*-cache")]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--tnt.epsilon -1", "epsilon is -1.0, expected a positive number"),
        ("--tnt.scale 0.5 2", "scale is 0.5 to 2.0, expected positive numbers in order"),
        ("--tnt.select-fraction 0", "select_fraction is 0.0, expected above 0"),
    ],
)
def test_options_of_tnt_are_checked_as_they_are_read(run_jaxtta, tmp_path, option, message):
    code, _, err = run_jaxtta("shifts", "--output", tmp_path, *option.split())
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_files_of_another_model(run_jaxtta, tmp_path):
    about = {"weights": "of another model"}
    statistics, _ = jaxtta.models.load_statistics(assets.STATISTICS)
    phi, _ = jaxtta.optim.load_mgg(assets.PHI)
    jaxtta.models.save_statistics(tmp_path / "s", statistics, about)
    jaxtta.optim.save_mgg(tmp_path / "p", phi, about)
    run = ("sweep", *TWO, "--adapters", "mgtta", "--output", tmp_path / "a")
    code, _, err = run_jaxtta(*run, "--mgtta.statistics", tmp_path / "s")
    assert (code, "s: was made with another model; run jaxtta pretrain-mgg" in err) == (1, True)
    code, _, err = run_jaxtta(*run, "--mgtta.phi", tmp_path / "p")
    assert (code, "p: was made with another model" in err) == (0, True)


def test_what_the_package_logs_is_printed_once(capsys):
    log, others = logging.getLogger("jaxtta.test"), StringIO()
    handler = logging.StreamHandler(others)
    with cli._notes():
        logging.root.addHandler(handler)  # by a library that is imported late
        log.info("a note")
        logging.root.removeHandler(handler)
    assert (capsys.readouterr().err, others.getvalue()) == ("a note\n", "")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "row.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        io.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["row.json"]
