"""A run's folder answers for its own inputs only: anything that decides a figure is noticed."""

import ast
import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from jaxtta import assets, data, evaluate, io, models, optim
from jaxtta.adapters import TNTConfig
from jaxtta.evaluate import provenance
from jaxtta.models import task_from_token_ids

NAMES = ("cat", "dog")


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", 4, NAMES)


@pytest.fixture
def sweep(run_jaxtta, images, tmp_path):
    """Run a small sweep in one folder; returns code, the table's line and the errors."""

    def run(model, *options):
        arguments = ("--data", images, "--model", model, "--corruptions", "clean")
        arguments += ("--adapters", "zero_shot", "--workers", "0", "--batch-size", "8")
        code, out, err = run_jaxtta("sweep", *arguments, "--output", tmp_path / "out", *options)
        return code, next((line for line in out.splitlines() if "clean  " in line), ""), err

    return run


def turn_pixels(images, model):
    for file in images.rglob("*.*"):
        with Image.open(file) as image:
            turned = image.convert("RGB").transpose(Image.Transpose.ROTATE_180)
        turned.save(file)


def change_one_byte_and_no_time(images, model):
    file = next(iter(sorted(images.rglob("*.*"))))
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def edit(name, **values):
    def change(images, model):
        path = model / name
        content = json.loads(path.read_text())
        for key, value in values.items():
            tower, _, key = key.rpartition("__")
            (content[tower] if tower else content)[key] = value
        path.write_text(json.dumps(content))

    return change


CHANGES = {
    "pixels": (turn_pixels, "was made from other images"),
    "one byte": (change_one_byte_and_no_time, "was made from other images"),
    "mean": (
        edit("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
        r"model.model_settings.preprocessing.mean \[0.48",
    ),
    "filter": (
        edit("preprocessor_config.json", resample=0),
        r"model_settings.preprocessing.resample 3 \(this run: 0\)",
    ),
    "activation": (
        edit("config.json", vision_config__hidden_act="relu"),
        r"model_settings.vision.arch.activation .* \(this run: 'relu'\)",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_inputs_are_refused_by_name(sweep, images, short, tmp_path, what):
    model = tmp_path / "model"
    shutil.copytree(short, model)
    code, first, _ = sweep(model)
    assert code == 0 and first
    change, said = CHANGES[what]
    change(images, model)
    code, again, err = sweep(model)
    assert (code, again) == (1, "")
    assert re.search(said, err)


def test_the_same_inputs_elsewhere_are_the_same(sweep, images, short, tmp_path):
    code, first, _ = sweep(short)
    assert code == 0
    moved = tmp_path / "moved"
    shutil.copytree(images, moved, copy_function=shutil.copyfile)  # other times, other folder
    assert sweep(short, "--data", moved)[:2] == (0, first)
    turn_pixels(images, None)
    assert sweep(short, "--trust-data")[:2] == (0, first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-images", "4"), r"streams.max_images None \(this run: 4\)"),
        (("--order", "stored"), r"streams.order 'shuffled' \(this run: 'stored'\)"),
        (("--order", "dirichlet", "--concentration", "9"), "no record of streams.concentration"),
        (("--batch-size", "4"), r"streams.batch_size 8 \(this run: 4\)"),
        (("--templates", "my {}."), r"model.tokens .*, model.templates \['a photo of a {}.'\]"),
        (("--class-names", "dog", "cat"), r"data.class_names \['cat', 'dog'\]"),
        (("--compute-dtype", "bfloat16"), r"compute_dtype 'float32' \(this run: 'bfloat16'\)"),
    ],
)
def test_other_options_are_refused_by_name(sweep, short, options, said):
    assert sweep(short)[0] == 0
    code, _, err = sweep(short, *options)
    assert code == 1
    assert re.search(said, err)


def test_rates_are_chosen_anew_for_other_settings_of_the_adapter(run_jaxtta, short, tmp_path):
    model, params = models.load(short)
    bundled = data.open_dataset("folder", assets.IMAGES)
    clean = np.stack([bundled[number] for number in range(0, 2000, 200)])
    statistics = models.feature_statistics(model, params, [clean])
    about = {"weights": io.digest_leaves(params)}
    models.save_statistics(tmp_path / "clean.safetensors", statistics, about)
    options = ("--adapters", "mgtta", "--tune-learning-rates", "1e-3", "--corruptions", "fog")
    options += ("--max-images", "10", "--workers", "0", "--output", tmp_path / "out")
    options += ("--model", short, "--mgtta.statistics", tmp_path / "clean.safetensors")
    code, out, _ = run_jaxtta("sweep", *options)
    assert code == 0
    assert "learning rate 0.001, chosen on" in out
    code, _, err = run_jaxtta("sweep", *options, "--mgtta.weight", "0.1")
    assert code == 1
    assert re.search(r"validation/.*adapter.weight 0.4 \(this run: 0.1\)", err)


def test_adapters_are_identified_by_what_decides_their_results(tmp_path):
    def identity(text, canvas=None, **config):
        spec = evaluate.parse_adapter(text)
        return provenance.identity_of(spec, evaluate.AdapterConfig(**config), canvas)

    assert identity("zero_shot", preset="imagenet-c") == identity("zero_shot")
    assert identity("tent") == identity("tent:lr=1e-3") == identity("tent:optimizer=sgd")
    assert identity("tent") != identity("tent", preset="imagenet-c")
    assert identity("batclip:lr=1e-3") == identity("batclip", preset="cifar10-c")
    assert identity("batclip")["optimizer"] == "adamw(0.001, weight_decay=0.01)"
    assert identity("mgtta:optimizer=sgd,lr=0.1")["optimizer"] == "sgd(0.1, momentum=0.9)"
    assert "phi" in identity("mgtta") and "phi" not in identity("mgtta:optimizer=adam")
    copied = shutil.copy(assets.STATISTICS, tmp_path / "elsewhere")
    assert identity(f"mgtta:statistics={copied}") == identity("mgtta")
    assert identity("mgtta:tower=both") != identity("mgtta") != identity("mgtta:weight=0.1")
    assert identity("tnt:steps=3") == identity("tnt", tnt=TNTConfig(steps=3))
    assert identity("tnt:images_per_map=4") == identity("tnt")  # as fast, not as good
    assert identity("tnt", 224) != identity("tnt", 512)


def test_files_of_mgtta_made_for_another_model(tmp_path, embedded, caplog):
    model, _ = embedded
    task = evaluate.task_for(model, NAMES, ("a photo of a {}.",))
    spec = evaluate.parse_adapter("mgtta")
    evaluate.make_adapter(spec, model, task)
    assert not caplog.text
    with pytest.raises(ValueError, match=r"was made with another model; run jaxtta pretrain-mgg"):
        evaluate.make_adapter(spec, model, task, weights="other")
    phi, about = optim.load_mgg(assets.PHI)
    optim.save_mgg(tmp_path / "phi", phi, {**about, "weights": "other"})
    weights = about["weights"]
    spec = evaluate.parse_adapter(f"mgtta:phi={tmp_path / 'phi'}")
    evaluate.make_adapter(spec, model, task, weights=weights)
    assert "phi: was made with another model" in caplog.text
    with pytest.raises(FileNotFoundError, match="missing"):
        evaluate.make_adapter(evaluate.parse_adapter("mgtta:phi=missing"), model, task)


def test_a_model_is_described_without_where_it_lies(tiny):
    model, _ = tiny
    told = models.model_settings(model)
    assert told == models.model_settings(dataclasses.replace(model, source="elsewhere"))
    assert told == json.loads(json.dumps(told))
    other = dataclasses.replace(model, preprocessing=model.preprocessing._replace(resample=2))
    assert told != models.model_settings(other)
    assert told["vision"]["arch"]["activation"] == model.vision.arch.activation


def test_any_field_of_a_model_is_told_apart():
    @dataclasses.dataclass
    class Model:
        field: object

    def enclosing(rate):
        return lambda: rate

    values = ({"a": 1}, {"a": 2}, np.zeros(2), np.ones(2), np.float32(1), np.sin, np.exp, np.int8)
    values += (json.dumps, json.loads, jax.nn.gelu, jax.nn.relu, (1, 2), None, dict, Model)
    values += tuple(functools.partial(jax.nn.gelu, approximate=x) for x in (True, False))
    values += tuple(map(enclosing, (1, 2)))
    values += tuple(types.SimpleNamespace(scale=x, dtype=np.dtype("int8")) for x in (1, 2))

    def recursive():
        return recursive

    values += (recursive, "".join, values[0].get)
    told = [json.dumps(models.model_settings(Model(value))) for value in values]
    assert len(set(told)) == len(values)


def test_other_tokens_and_other_images_are_another_run(tiny):
    model, params = tiny
    tokens = np.array([[1, 5, 2], [1, 6, 2]])
    dataset = data.ArrayDataset(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2, NAMES)

    def prints(dataset, tokens=tokens):
        return evaluate.fingerprints(dataset, params, model, task_from_token_ids(tokens))

    base, other = prints(dataset), prints(dataset, tokens + 1)
    assert {name for name in base if base[name] != other[name]} == {"tokens"}
    first, last = (data.Subset(dataset, np.array(numbers)) for numbers in ([0, 1], [2, 3]))
    fog = [
        data.corrupted(part, model.preprocessing)[data.Domain("fog", 5)] for part in (first, last)
    ]
    assert prints(first)["images"] != prints(last)["images"] != prints(dataset)["images"]
    assert [prints(part) for part in fog] == [prints(first), prints(last)]


def test_a_command_can_be_pasted(tmp_path):
    odd = ["it's $HOME", "new\nline", "\udcffa", "Ünï", "", "back\\slash\t'"]
    module = tmp_path / "odd.py"
    module.write_text(
        "import sys\nfrom jaxtta.evaluate import about\nprint(ascii(sys.argv[1:]))\n"
        "print(ascii(about()['command']))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    given = [sys.executable, "-m", "odd", *odd]
    said = subprocess.run(given, capture_output=True, check=True, env=environment).stdout
    arguments, command = map(ast.literal_eval, said.decode().splitlines())
    assert arguments == odd
    assert command.startswith("python -m odd ")
    pasted = command.replace("python", shlex.quote(sys.executable), 1)
    again = subprocess.run(
        ["bash", "-c", os.fsencode(pasted)], capture_output=True, check=True, env=environment
    )
    assert again.stdout == said


TRAINED = {
    "pretrain-mgg": [
        *("--data", "IMAGES", "--images", "2", "--val-images", "2", "--batch", "1"),
        *("--source-images", "4", "--epochs", "1", "--hidden", "2", "--corruptions", "saturate"),
    ],
    "continual": [
        *("--tasks", "digits", "--methods", "fine-tuning", "--iterations", "1", "--max-images"),
        *("4", "--reference", "folder=IMAGES", "--reference-images", "8"),
    ],
}


@pytest.mark.parametrize("command", TRAINED)
def test_trained_results_are_of_their_images(run_jaxtta, images, short, tmp_path, command):
    options = [option.replace("IMAGES", str(images)) for option in TRAINED[command]]
    options += ["--model", short, "--output", tmp_path / "out"]
    assert run_jaxtta(command, *options, "--workers", "0")[0] == 0
    turn_pixels(images, None)
    code, _, err = run_jaxtta(command, *options, "--workers", "0")
    assert code == 1
    assert "was made from other images" in err
    assert run_jaxtta(command, *options, "--workers", "1", "--trust-data")[0] == 0
    told = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("*.json")]
    about, *_ = (each.get("about", each) for each in told if "'date'" in str(each))
    assert {"command", "date", "preprocessing"} <= about.keys()


def test_the_command_is_said_as_it_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/jaxtta", "sweep", "--data", "my images"])
    assert provenance.about()["command"] == "jaxtta sweep --data 'my images'"
    monkeypatch.setattr("sys.argv", ["a.py"])
    monkeypatch.setattr("sys.orig_argv", ["/somewhere/python", "a.py", "--b"])
    assert provenance.about()["command"] == "python a.py --b"
