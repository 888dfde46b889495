"""A run's folder answers for its own inputs only: anything that decides a figure is noticed."""

import dataclasses
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from jaxtta import assets, data, evaluate
from jaxtta.data.content import digest_files
from jaxtta.data.memory import Arrays, Part
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


def test_a_list_that_could_mean_several_images_is_refused(tmp_path):
    for name in NAMES:
        (tmp_path / name / "day").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "day" / "0.png")
    source = data.open_source("folder", tmp_path, PREPROCESS)
    (tmp_path / "list.txt").write_text(f"{NAMES[0]}/day/0.png\n")
    with pytest.raises(ValueError, match=r"list\.txt: several files here end in day/0\.png"):
        data.listed_part(source, tmp_path / "list.txt")
