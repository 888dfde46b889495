"""A run's folder answers for its own inputs only: anything that decides a figure is noticed."""

import ast
import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jaxtta.data.memory import Arrays, InMemory, Part
from PIL import Image

from jaxtta import assets, data, evaluate
from jaxtta.adapters import Adapter, Prediction
from jaxtta.data.content import digest_files
from jaxtta.models import task_from_token_ids
from jaxtta.models.preprocess import Preprocessing

NAMES = ("cat", "dog")
PREPROCESS = Preprocessing(32, 32, (32, 32))


@pytest.fixture
def images(tmp_path):
    """Class folders with four images each."""
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        for n, file in enumerate(sorted((assets.IMAGES / name).iterdir())[:4]):
            shutil.copy(file, tmp_path / "images" / name / f"{n}{file.suffix}")
    return tmp_path / "images"


@pytest.fixture
def sweep(run_script, images, tmp_path):
    """Run a small sweep in one folder; returns code, the table's line and the errors."""

    def run(model, *options):
        arguments = ("--data", images, "--model", model, "--corruptions", "clean")
        arguments += ("--adapters", "zero_shot", "--workers", "0", "--batch-size", "8")
        code, out, err = run_script(
            "corruption_sweep.py", *arguments, "--output", tmp_path / "out", *options
        )
        return code, next((line for line in out.splitlines() if "clean  " in line), ""), err

    return run


def change_pixels(images, model):
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
    "pixels": (change_pixels, "was made from other images"),
    "one byte": (change_one_byte_and_no_time, "was made from other images"),
    "mean": (
        edit("preprocessor_config.json", image_mean=[0.5, 0.5, 0.5]),
        r"model_settings.preprocessing.mean \[0.48",
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
    _, first, _ = sweep(short)
    moved = tmp_path / "moved"
    shutil.copytree(images, moved, copy_function=shutil.copyfile)  # other times, other folder
    code, again, _ = sweep(short, "--data", moved)
    assert (code, again) == (0, first)


def test_trusted_data_are_not_looked_at(sweep, images, short):
    _, first, _ = sweep(short)
    change_pixels(images, None)
    code, again, _ = sweep(short, "--trust-data")
    assert (code, again) == (0, first)


def test_results_made_on_trust_do_not_answer_a_run_that_checks(sweep, short):
    assert sweep(short, "--trust-data")[0] == 0
    code, _, err = sweep(short)
    assert code == 1
    assert "does not say which images it was made from" in err


def arrays(folder):
    rng = np.random.default_rng(0)
    for name in ("fog", "snow"):
        np.save(folder / f"{name}.npy", rng.integers(0, 256, (6, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.arange(6) % 2)
    return data.open_source("arrays", folder, PREPROCESS, NAMES)


def imagenet_c(folder):
    for corruption in ("fog", "snow"):
        for name in NAMES:
            (folder / corruption / "5" / name).mkdir(parents=True)
            file = sorted((assets.IMAGES / name).iterdir())[0]
            shutil.copy(file, folder / corruption / "5" / name / file.name)
    return data.open_source("imagenet-c", folder, PREPROCESS, NAMES)


@pytest.mark.parametrize("make", [arrays, imagenet_c])
def test_each_domain_has_its_own_digest(make, tmp_path):
    source = make(tmp_path)
    severity = 0 if make is arrays else 5
    fog, snow = domains = [data.Domain(name, severity) for name in ("fog", "snow")]
    before = data.contents_of(source, domains)
    for file in [tmp_path / "fog.npy", *(tmp_path / "fog").rglob("*.*")]:
        if file.is_file():
            file.write_bytes(file.read_bytes() + b"0")
    after = data.contents_of(source, domains)
    assert after[fog] != before[fog]
    assert after[snow] == before[snow]
    # a view of the source tells the same
    part = Part(source, np.arange(2))
    assert data.contents_of(part, domains) == after


def test_many_bytes_are_told_apart_by_size_and_time(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"one")
    os.utime(file, (0, 0))
    before = digest_files([file], read_up_to=2)
    assert before.startswith("sizes and times")
    file.write_bytes(b"two")
    os.utime(file, (0, 0))
    assert digest_files([file], read_up_to=2) == before  # documented: not read
    os.utime(file, (9, 9))
    assert digest_files([file], read_up_to=2) != before
    assert digest_files([file]) != digest_files([tmp_path / "missing"])


def test_a_model_is_described_without_where_it_lies(tiny):
    model, _ = tiny
    told = evaluate.model_settings(model)
    assert told == evaluate.model_settings(dataclasses.replace(model, source="elsewhere"))
    assert told == json.loads(json.dumps(told))
    other = dataclasses.replace(model, preprocessing=model.preprocessing._replace(resample=2))
    assert told != evaluate.model_settings(other)
    assert told["vision"]["arch"]["activation"] == model.vision.arch.activation


def test_other_tokens_are_another_run(tiny):
    model, params = tiny
    tokens = np.array([[1, 5, 2], [1, 6, 2]])
    source = data.CorruptedOnTheFly(
        Arrays(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), NAMES, "image"),
        PREPROCESS,
    )
    one, two = (
        evaluate.fingerprints(source, params, model, task_from_token_ids(ids))
        for ids in (tokens, tokens + 1)
    )
    assert {name for name in one if one[name] != two[name]} == {"tokens"}


def test_a_list_of_images_chooses_them_in_its_order(tmp_path):
    source = imagenet_c(tmp_path / "data")
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(reversed(source.files)))
    part = data.listed_part(source, listed)
    assert part.labels.tolist() == [1, 0]
    assert part.class_names == NAMES
    fog = data.Domain("fog", 5)
    np.testing.assert_array_equal(part.read(fog, 0, 0), source.read(fog, 1, 0))
    found = [evaluate.fingerprints(x, {})["images"] for x in (source, part)]
    assert found[0] != found[1]
    listed.write_text("cat/nothing.jpg\n")
    with pytest.raises(ValueError, match=r"list.txt: lists 1 images, .* lack 1, such as cat/nothi"):
        data.listed_part(source, listed)
    with pytest.raises(ValueError, match="lists 5000 images"):
        data.listed_part(source, "imagenet-c-5000")


def test_a_name_that_is_there_twice_is_not_guessed(tmp_path):
    for place in ("cat/2020", "dog/2020", "cat/2021"):
        folder = tmp_path / "data" / place
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
    source = data.open_source("folder", tmp_path / "data", PREPROCESS)
    listed = tmp_path / "list.txt"
    listed.write_text("cat/2021/1.png \r\n\n")
    assert data.listed_part(source, listed).labels.tolist() == [0]
    listed.write_text("cat/2020/1.png\n")
    with pytest.raises(ValueError, match=r"list.txt: 2020/1.png is 2 times in the folder"):
        data.listed_part(source, listed)
    listed.write_text("2021/1.png\n2021/1.png\n")
    with pytest.raises(ValueError, match=r"list.txt: 2021/1.png is 2 times in the list"):
        data.listed_part(source, listed)


@pytest.mark.parametrize(
    "view", [lambda part: data.Named(part, "shift"), InMemory], ids=["named", "in memory"]
)
def test_another_part_is_told_apart_in_other_views(view, tmp_path):
    images = Arrays(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4) % 2, NAMES, "image")
    source = data.CorruptedOnTheFly(images, PREPROCESS)
    first, last = (Part(source, np.array(numbers)) for numbers in ([0, 1], [2, 3]))
    found = [evaluate.fingerprints(view(part), {})["images"] for part in (first, last)]
    assert found[0] != found[1]
    assert found == [evaluate.fingerprints(part, {})["images"] for part in (first, last)]


def test_a_file_of_five_severities_is_read_once(tmp_path, monkeypatch):
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(2))
    source = data.corrupted_arrays(tmp_path, PREPROCESS, NAMES, stacked=True)
    read = []
    monkeypatch.setattr(
        data.sources, "digest_files", lambda files: read.append(files) or digest_files(files)
    )
    domains = [data.Domain("fog", severity) for severity in range(1, 6)]
    assert len(set(source.contents(domains).values())) == 1
    assert len(read) == 1


def test_rates_are_chosen_anew_for_other_settings_of_the_adapter(run_script, tmp_path):
    options = ("--adapters", "mgtta", "--choose-learning-rate", "1e-3", "--corruptions", "fog")
    options += ("--limit", "10", "--workers", "0", "--output", tmp_path)
    assert run_script("corruption_sweep.py", *options)[0] == 0
    code, _, err = run_script("corruption_sweep.py", *options, "--mgtta.weight", "0.1")
    assert code == 1
    assert re.search(r"validation/.*mgtta.weight 0.4 \(this run: 0.1\)", err)


class Told:
    """A source that tells whether its images changed; reading the `fatal`-th time ends the run."""

    labels, class_names, preprocess = np.arange(8) % 2, NAMES, Preprocessing(4)

    def __init__(self, content, fatal=None):
        self.content, self.fatal, self.reads = content, fatal, 0

    def name(self, domain, number):
        return str(number)

    def contents(self, domains):
        return dict.fromkeys(domains, self.content)

    def read(self, domain, number, seed):
        self.reads += 1
        if self.reads == self.fatal:
            raise KeyboardInterrupt
        return np.full((4, 4, 3), number, np.uint8)

    def run(self, folder, **options):
        adapter = Adapter(
            lambda *_: {}, lambda p, s, b: (s, Prediction(b.images[:, 0, 0, :2] / 255, {}))
        )
        streams = data.make_streams("reset_each_shift", ("fog",), (5,), self.labels)
        batches, results = data.Batches(self, tuple(streams), 2), evaluate.Results(folder, {})
        with pytest.raises(KeyboardInterrupt) if self.fatal else contextlib.nullcontext():
            evaluate.run({"a": adapter}, {}, batches, results, checkpoint_every=1, **options)
        return self.reads


@pytest.mark.parametrize(
    ("earlier", "now", "trusted", "goes_on"),
    [
        ("one", "one", False, True),
        ("one", "two", False, False),
        ("one", "two", True, True),
        (None, "two", False, False),
    ],
)
def test_a_stream_goes_on_with_its_own_images_only(tmp_path, earlier, now, trusted, goes_on):
    Told(earlier, fatal=7).run(tmp_path)
    reads = Told(now).run(tmp_path, trust_data=trusted)
    assert (reads < 8) == goes_on


def test_a_source_that_cannot_tell_says_so(tmp_path, caplog):
    assert Told(None).run(tmp_path) == 8
    assert not caplog.text
    assert Told(None).run(tmp_path) == 0
    assert "Told cannot tell whether its images have changed" in caplog.text


def test_results_of_an_earlier_version_are_refused_in_few_words(tmp_path):
    evaluate.agree(tmp_path / "settings.json", {"batch_size": 8})
    now = {"batch_size": 9, "model_settings": {"vision": {"width": 1}}, "tokens": "0"}
    said = r"no record of model_settings, tokens, batch_size 8 \(this run: 9\); choose"
    with pytest.raises(ValueError, match=said):
        evaluate.agree(tmp_path / "settings.json", now)


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
    "pretrain_mgg.py": [
        *("--data", "IMAGES", "--images", "2", "--held-out", "2", "--batch", "1"),
        *("--source-images", "4", "--epochs", "1", "--hidden", "2", "--corruptions", "saturate"),
    ],
    "protect_batclip.py": [
        *("--data", "IMAGES", "--protecting", "4", "--ranks", "1", "--limit", "2"),
        *("--corruptions", "fog"),
    ],
    "continual_mtil.py": [
        *("--tasks", "digits", "--methods", "fine-tuning", "--iterations", "1", "--limit", "4"),
        *("--reference", "folder=IMAGES", "--reference-images", "8"),
    ],
}


@pytest.mark.parametrize("script", TRAINED)
def test_trained_results_are_of_their_images(run_script, images, short, tmp_path, script):
    options = [option.replace("IMAGES", str(images)) for option in TRAINED[script]]
    options += ["--model", short, "--output", tmp_path / "out"]
    assert run_script(script, *options, "--workers", "0")[0] == 0
    change_pixels(images, None)
    code, _, err = run_script(script, *options, "--workers", "0")
    assert code == 1
    assert "was made from other images" in err
    assert run_script(script, *options, "--workers", "1", "--trust-data")[0] == 0
    told = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("*.json")]
    about, *_ = (each.get("about", each) for each in told if "'date'" in str(each))
    assert {"command", "date", "preprocessing"} <= about.keys()


def test_images_that_are_read_otherwise_are_others(images):
    upright = data.image_folder(images)
    others = upright._replace(raw=True), upright._replace(border=1)
    assert len({folder.content() for folder in (upright, *others)}) == 3


def test_a_domain_that_is_not_there_is_one_sentence(tmp_path):
    source = imagenet_c(tmp_path)
    with pytest.raises(ValueError, match="unknown corruption 'rain'"):
        source.contents([data.Domain("rain", 5)])


def test_any_field_of_a_model_is_told_apart():
    @dataclasses.dataclass
    class Model:
        field: object

    values = ({"a": 1}, {"a": 2}, np.zeros(2), np.ones(2), np.float32(1), np.sin, np.exp, np.int8)
    values += (json.dumps, json.loads, jax.nn.gelu, jax.nn.relu, (1, 2), None)
    told = [json.dumps(evaluate.model_settings(Model(value))) for value in values]
    assert len(set(told)) == len(values)
