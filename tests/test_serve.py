"""serve.py: what it says of every image, what it refuses, and how it ends."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import EXPERIMENTS
from PIL import Image

import jaxtta
from jaxtta import assets

LINE = re.compile(r"(.+?)  +(.+?)  +(\S+%)(?:  updates (\d+))?")
"""File, label, confidence and updates."""


def images_of(name, count):
    return sorted((assets.IMAGES / name).iterdir())[:count]


@pytest.fixture
def folder(tmp_path):
    """Six cats and six ships."""
    (tmp_path / "in").mkdir()
    for name in ("cat", "ship"):
        for file in images_of(name, 6):
            shutil.copyfile(file, tmp_path / "in" / f"{name}-{file.name}")
    return tmp_path / "in"


def answers(out):
    return [LINE.fullmatch(line).groups() for line in out.splitlines()]


def test_every_image_has_a_line_with_the_updates_behind_it(run_script, folder):
    options = ["--batch-size", "5"]
    code, out, err = run_script("serve.py", folder, *options)
    assert code == 0
    files, labels, _, updates = zip(*answers(out), strict=True)
    assert [*files] == [str(file) for file in sorted(folder.iterdir())]
    assert sum(f"/{label}-" in file for file, label in zip(files, labels, strict=True)) >= 9
    # the first batch is zero-shot's; the last, of two images, is adapted to by none
    assert [*updates] == ["0"] * 5 + ["1"] * 5 + ["2"] * 2
    assert "compiling batclip" in err
    code, plain, err = run_script("serve.py", folder, *options, "--adapter", "zero_shot")
    assert (code, {updates for *_, updates in answers(plain)}) == (0, {None})
    assert "adapted" not in plain + err
    for line, other in zip(answers(out)[:5], answers(plain)[:5], strict=True):
        assert line[:3] == other[:3]
    assert answers(out)[5][2] != answers(plain)[5][2]


@pytest.mark.parametrize("adapter", ["tent", "batclip"])
def test_few_images_are_answered_but_not_adapted_to(run_script, folder, adapter):
    """One by one, BATCLIP lost 21 points; padding hid that there was one image."""
    plain = run_script("serve.py", folder, "--adapter", "zero_shot", "--batch-size", "2")[1]
    for batch, least, adapts in (("2", "4", False), ("2", "2", True), ("4", "4", True)):
        options = ["--adapter", adapter, "--batch-size", batch, "--min-adapt", least]
        options += ["--learning-rate", "0.01"]
        code, out, err = run_script("serve.py", folder, *options)
        assert code == 0
        updates = [int(number) for *_, number in answers(out)]
        assert updates == [n // int(batch) * adapts for n in range(12)]
        said = f"the model is not adapted: --batch-size {batch} is below --min-adapt {least}"
        assert (said in err) == (not adapts)
        same = [a[:3] == b[:3] for a, b in zip(answers(out), answers(plain), strict=True)]
        assert all(same) != adapts


def test_a_skipped_step_is_no_update(run_script, folder, short, monkeypatch):
    options = ["--batch-size", "4", "--model", short]
    real = jaxtta.models.CLIP.normalize
    monkeypatch.setattr(jaxtta.models.CLIP, "normalize", lambda self, x: real(self, x) * 1e38)
    code, out, err = run_script("serve.py", folder, *options)
    assert {number for *_, number in answers(out)} == {"0"}
    assert {label for _, label, *_ in answers(out)} == {"(not finite)"}
    assert (code, "12 of 12 images have no finite answer" in err) == (3, True)


def test_unreadable_images_are_named_counted_and_in_the_exit_code(run_script, folder, tmp_path):
    zero_shot = ("--adapter", "zero_shot")
    (folder / "broken.png").write_bytes(b"no image")
    code, out, err = run_script("serve.py", folder, *zero_shot)
    assert (code, len(answers(out))) == (3, 12)
    assert f"{folder}/broken.png: cannot be decoded" in err
    assert err.endswith("1 of 13 images could not be read\n")
    code, out, err = run_script("serve.py", folder / "broken.png", *zero_shot)
    assert (code, out) == (1, "")
    assert err.endswith("error: none of the 1 images could be read\n")


def test_class_names_from_files(run_script, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\nship\n")
    (tmp_path / "names.json").write_text(json.dumps(["cat", "ship"]))
    options = ["--adapter", "zero_shot", "--class-names"]
    said = [
        run_script("serve.py", folder, *options, *given)[1]
        for given in (("cat", "ship"), (names,), (tmp_path / "names.json",))
    ]
    assert said[0] == said[1] == said[2]
    assert {label for _, label, *_ in answers(said[0])} == {"cat", "ship"}


def test_other_scripts_read_class_names_from_the_same_files(run_script, short, folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\nship\n")
    data = tmp_path / "data"
    for name in ("a", "b"):
        shutil.copytree(folder, data / name)
    common = ["--model", short, "--data", data, "--class-names", names, "--workers", "0"]
    for script, options in (
        (
            "pretrain_mgg.py",
            ["--epochs", "1", "--images", "4", "--held-out", "4"],
        ),
        (
            "protect_batclip.py",
            ["--corruptions", "fog", "--protecting", "8", "--ranks", "4"],
        ),
    ):
        code, _, err = run_script(script, *common, *options, "--output", tmp_path / script)
        assert code == 0, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no images: give files or folders before the options"),
        (("--class-names", "cat", "dog"), "no images: give files or folders before the options"),
        (
            ("--class-names", "cat", "big dog", "{folder}"),
            "no images: --class-names took {folder} for a name; give the images first: "
            "serve.py {folder} --class-names cat 'big dog'",
        ),
        (
            ("--class-names", "{names}", "{folder}", "{folder}/cat-0000.jpg"),
            "give the images first: serve.py {folder} {folder}/cat-0000.jpg --class-names {names}",
        ),
        (
            ("{folder}/cat-0000.jpg", "--class-names", "cat", "ship", "{folder}"),
            "--class-names took {folder} for a name; give all images before it",
        ),
        (("--class-names", "{names}"), "no images: give files or folders before the options"),
        (("{folder}", "--class-names", "gone.txt"), "gone.txt: cannot be read as class names"),
        (("{folder}/nothing",), "nothing: no such file or folder"),
        (("{folder}", "--batch-size", "0"), "--batch-size is 0, expected at least 1"),
        (("{folder}", "--min-adapt", "0"), "--min-adapt is 0, expected at least 1"),
        (("{folder}", "--noise", "{names}"), "--noise and --learn-noise are for --adapter tnt"),
        (
            ("{folder}", "--adapter", "tnt", "--learn-noise", "{folder}/no/x.safetensors"),
            "{folder}/no: no such folder",
        ),
    ],
)
def test_bad_input_is_one_sentence(run_script, folder, tmp_path, options, message):
    places = {"folder": folder, "names": tmp_path / "names.txt"}
    places["names"].write_text("cat\nship\n")
    options = [option.format(**places) for option in options]
    code, out, err = run_script("serve.py", *options)
    assert (code, out) == (1, "")
    assert message.format(**places) in err
    assert len(err.splitlines()) == 1


def test_a_noise_map_is_learnt_and_applied(run_script, short, tmp_path):
    tnt = [*images_of("cat", 3), "--batch-size", "2", "--adapter", "tnt", "--model", short]
    code, out, _ = run_script("serve.py", *tnt, "--learn-noise", tmp_path / "camera.safetensors")
    assert (code, [number for *_, number in answers(out)]) == (0, ["1", "2", "3"])
    noise, tuning = jaxtta.adapters.load_noise(tmp_path / "camera.safetensors")
    assert tuning.online
    assert 0 < np.abs(noise).max() <= tuning.epsilon
    code, out, _ = run_script("serve.py", *tnt, "--noise", tmp_path / "camera.safetensors")
    assert (code, [number for *_, number in answers(out)]) == (0, [None] * 3)
    code, _, err = run_script("serve.py", *tnt, "--noise", tmp_path / "other")
    assert code == 1
    assert "other: no such file" in err


def test_each_image_has_its_own_noise_map(run_script, short):
    """TNT adapts to single images: no batch is too small for it."""
    options = ["--batch-size", "1", "--adapter", "tnt", "--model", short]
    code, out, err = run_script("serve.py", *images_of("cat", 2), *options)
    assert (code, [number for *_, number in answers(out)]) == (0, ["1", "1"])
    assert "not adapted" not in err


def serve(*arguments, **options):
    command = [sys.executable, EXPERIMENTS / "serve.py", *arguments, "--adapter", "zero_shot"]
    return subprocess.run(command, capture_output=True, timeout=300, check=False, **options)


def test_odd_file_names_are_printed_escaped(tmp_path):
    """As bytes that are no UTF-8 and with a line break, readable and broken."""
    odd = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    shutil.copyfile(images_of("cat", 1)[0], odd)
    shutil.copyfile(images_of("cat", 1)[0], tmp_path / "two\nlines.jpg")
    for name in (b"/torn\xe9.jpg", b"/torn\n2.jpg"):
        Path(os.fsdecode(os.fsencode(tmp_path) + name)).write_bytes(b"no image")
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = serve(tmp_path, env=strict)
    assert done.returncode == 3
    files = [file for file, *_ in answers(done.stdout.decode())]
    assert files == [f"{tmp_path}/{name}" for name in (r"caf\xe9.jpg", r"two\nlines.jpg")]
    lines = done.stderr.decode().splitlines()
    assert sum(line.startswith(rf"{tmp_path}/torn\xe9.jpg: cannot be decoded") for line in lines)
    assert sum(line.startswith(rf"{tmp_path}/torn\n2.jpg: cannot be decoded") for line in lines)
    # an encoding that lacks the letters of a class name
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = serve(tmp_path, "--class-names", "Käfer", "Kühe", env=ascii_only)
    assert done.returncode == 3
    assert {label for _, label, *_ in answers(done.stdout.decode())} <= {r"K\xe4fer", r"K\xfche"}


def test_it_ends_quietly_when_nobody_reads_on():
    script = f"""{sys.executable} {EXPERIMENTS / "serve.py"} {assets.IMAGES / "cat"} \
        --adapter zero_shot --batch-size 4 | head -n 1; echo ${{PIPESTATUS[0]}}"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, timeout=300, check=False)
    line, code = done.stdout.decode().splitlines()
    assert (LINE.fullmatch(line)[2], code) == ("cat", "141")
    assert b"Error" not in done.stderr and b"error" not in done.stderr


def test_images_of_a_camera_are_looked_at_upright(run_script, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise when shown
    for n, file in enumerate(images_of("ship", 6)):
        with Image.open(file) as image:
            image.convert("RGB").save(tmp_path / f"a{n}.png")
            turned = image.convert("RGB").transpose(Image.Transpose.ROTATE_90)
            turned.save(tmp_path / f"b{n}.png", exif=exif)
    found = answers(run_script("serve.py", tmp_path, "--adapter", "zero_shot")[1])
    assert [line[1:] for line in found[:6]] == [line[1:] for line in found[6:]]
