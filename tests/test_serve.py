"""`jaxtta classify` and `serve`: what they say of every image, refuse, and how they end."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import EXPERIMENTS, errors_in, write_images
from PIL import Image

import jaxtta
from jaxtta.adapters.guard import DECISIONS
from jaxtta.deploy.audit import read_log

LINE = re.compile(r"(.+?)  +(.+?)  +(\S+%)(?:  updates (\d+))?(?:  [a-z_]+)?")
"""File, label, confidence and updates; the guard's decision may follow."""


@pytest.fixture
def folder(tmp_path):
    """Six cats and six ships."""
    for file in write_images(tmp_path / "by-class", 6, ("cat", "ship")).rglob("*.png"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copyfile(file, tmp_path / "in" / f"{file.parent.name}-{file.name}")
    return tmp_path / "in"


def answers(out):
    return [LINE.fullmatch(line).groups() for line in out.splitlines()]


def test_most_images_are_answered_rightly(run_jaxtta, folder):
    code, out, _ = run_jaxtta("classify", folder)
    assert code == 0
    files, labels, *_ = zip(*answers(out), strict=True)
    assert sum(f"/{label}-" in file for file, label in zip(files, labels, strict=True)) >= 9


def test_every_image_has_a_line_with_the_updates_behind_it(run_jaxtta, folder, short):
    options = ("--batch-size", "5", "--model", short)
    code, out, err = run_jaxtta("serve", folder, *options, "--adapter", "batclip")
    assert code == 0
    files, _, _, updates = zip(*answers(out), strict=True)
    assert [*files] == [str(file) for file in sorted(folder.iterdir())]
    # the first batch is zero-shot's; the last, of two images, is adapted to by none
    assert [*updates] == ["0"] * 5 + ["1"] * 5 + ["2"] * 2
    assert "compiling batclip" in err
    code, plain, err = run_jaxtta("classify", folder, *options)
    assert (code, {updates for *_, updates in answers(plain)}) == (0, {None})
    assert "adapted" not in plain + err
    for line, other in zip(answers(out)[:5], answers(plain)[:5], strict=True):
        assert line[:3] == other[:3]
    assert answers(out)[5][2] != answers(plain)[5][2]


def test_a_guard_is_the_default_and_says_what_it_decides(run_jaxtta, folder, short):
    common = ("serve", folder, "--batch-size", "6", "--model", short, "--format")
    code, lines, err = run_jaxtta(*common, "jsonl")
    assert (code, "compiling guarded:batclip" in err) == (0, True)
    found = [json.loads(line) for line in lines.splitlines()]
    assert {line["decision"] for line in found} <= {*DECISIONS}
    assert all(0 <= line["share"] <= 1 for line in found) and found[0]["updates"] == 0
    rows = [*csv.DictReader(run_jaxtta(*common, "csv")[1].splitlines())]
    assert [*rows[0]] == ["file", "label", "score", "updates", "decision", "share"]
    text = run_jaxtta(*common, "text")[1].splitlines()
    for line, row, said in zip(found, rows, text, strict=True):
        assert row["decision"] == line["decision"] == said.split()[-1]
        assert float(row["share"]) == line["share"]


def test_text_json_lines_and_csv_say_the_same(run_jaxtta, folder, short):
    common = ("classify", folder, "--model", short, "--top-k", "2")
    common += ("--adapter", "tent:lr=0.01", "--format")
    text, lines, table = (run_jaxtta(*common, kind)[1] for kind in ("text", "jsonl", "csv"))
    found = [json.loads(line) for line in lines.splitlines()]
    rows = [*csv.DictReader(table.splitlines())]
    assert len(found) == len(rows) == len(text.splitlines()) == 12
    assert [*rows[0]] == ["file", "label", "score", "label_2", "score_2", "updates"]
    for line, row, said in zip(found, rows, text.splitlines(), strict=True):
        assert line["file"] == row["file"]
        assert line["labels"] == [row["label"], row["label_2"]]
        assert line["scores"] == [float(row["score"]), float(row["score_2"])]
        assert 1 >= line["scores"][0] > line["scores"][1] > 0
        label, score = line["labels"][1], line["scores"][1]
        assert re.search(rf"{label} +{score:.1%}  updates {line['updates']}$", said)
    few = ("--class-names", "cat", "ship", "--top-k", "9")
    few = run_jaxtta("classify", folder, "--model", short, *few)[1]
    assert few.splitlines()[0].count("%") == 2


@pytest.mark.parametrize("adapter", ["tent", "batclip"])
def test_few_images_are_answered_but_not_adapted_to(run_jaxtta, folder, short, adapter):
    """One by one, BATCLIP lost 21 points; padding hid that there was one image."""
    plain = run_jaxtta("classify", folder, "--model", short)[1]
    for batch, least, adapts in (("2", "4", False), ("2", "2", True), ("4", "4", True)):
        options = ["--adapter", f"{adapter}:lr=0.01", "--batch-size", batch, "--min-adapt", least]
        code, out, err = run_jaxtta("serve", folder, "--model", short, *options)
        assert code == 0
        assert ("--batch-size is below --min-adapt" in err) != adapts
        updates = [int(number) for *_, number in answers(out)]
        assert updates == [n // int(batch) * adapts for n in range(12)]
        same = [a[:3] == b[:3] for a, b in zip(answers(out), answers(plain), strict=True)]
        assert all(same) != adapts


def test_a_skipped_step_is_no_update(run_jaxtta, folder, short, monkeypatch):
    options = ["--batch-size", "4", "--model", short]
    real = jaxtta.models.CLIP.normalize
    monkeypatch.setattr(jaxtta.models.CLIP, "normalize", lambda self, x: real(self, x) * 1e38)
    code, out, err = run_jaxtta("serve", folder, *options)
    assert {(label, number) for _, label, _, number in answers(out)} == {("(not finite)", "0")}
    assert (code, "12 of 12 images have no answer" in err) == (3, True)
    code, out, _ = run_jaxtta("classify", folder, *options, "--format", "csv")
    assert (code, out.splitlines()[1]) == (3, f"{min(folder.iterdir())},,")


def test_unreadable_images_are_named_counted_and_in_the_exit_code(run_jaxtta, folder, short):
    (folder / "broken.png").write_bytes(b"no image")
    code, out, err = run_jaxtta("classify", folder, "--model", short)
    assert (code, len(answers(out))) == (3, 12)
    assert f"{folder}/broken.png: cannot be decoded" in err
    assert err.endswith("1 of 13 images have no answer\n")
    code, out, err = run_jaxtta("classify", folder / "broken.png", "--model", short)
    assert (code, out) == (1, "")
    assert err.endswith("error: none of the 1 images could be read\n")


def test_class_names_from_files(run_jaxtta, folder, short, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("cat\nship\n")
    (tmp_path / "names.json").write_text(json.dumps(["cat", "ship"]))
    said = [
        run_jaxtta("classify", folder, "--model", short, "--class-names", *given)[1]
        for given in (("cat", "ship"), (names,), (tmp_path / "names.json",))
    ]
    assert said[0] == said[1] == said[2]
    assert {label for _, label, *_ in answers(said[0])} == {"cat", "ship"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "files or folders before --class-names"),
        (("--class-names", "cat", "big dog", "{folder}"), "files or folders before --class-names"),
        (
            ("{folder}/cat-0000.png", "--class-names", "cat", "ship", "{folder}"),
            "files or folders before --class-names",
        ),
        (
            ("{folder}", "--class-names", "cat", "alone.png"),
            "files or folders before --class-names",
        ),
        (("{folder}", "--class-names", "gone.txt"), "gone.txt: cannot be read as class names"),
        (("{folder}", "--batch-size", "0"), "--batch-size is 0, expected at least 1"),
        (("{folder}", "--top-k", "0"), "--top-k is 0, expected at least 1"),
        (("{folder}", "--noise", "{names}"), "--noise and --learn-noise are for --adapter tnt"),
        (("{folder}", "--adapter", "tnt", "--noise", "gone"), "gone: no such file"),
    ],
)
def test_bad_input_is_one_sentence(run_jaxtta, folder, tmp_path, monkeypatch, options, message):
    places = {"folder": folder, "names": tmp_path / "names.txt"}
    places["names"].write_text("cat\nship\n")
    options = [option.format(**places) for option in options]
    monkeypatch.chdir(tmp_path)
    Path("alone.png").touch()
    code, out, err = run_jaxtta("serve", *options)
    assert (code, out) == (1, "")
    assert message.format(**places) in err
    assert errors_in(err) == 1


def test_noise_maps(run_jaxtta, folder, short, tmp_path):
    """One is learnt over all images and applied; else each image has its own."""
    cats = sorted(folder.glob("cat*"))[:3]
    tnt = (*cats, "--batch-size", "2", "--adapter", "tnt:views=8", "--model", short)
    code, out, _ = run_jaxtta("serve", *tnt, "--learn-noise", tmp_path / "camera.safetensors")
    assert (code, [number for *_, number in answers(out)]) == (0, [None] * 3)
    noise, tuning = jaxtta.adapters.load_noise(tmp_path / "camera.safetensors")
    assert tuning.online
    assert 0 < np.abs(noise).max() <= tuning.epsilon
    code, out, _ = run_jaxtta("serve", *tnt, "--noise", tmp_path / "camera.safetensors")
    assert (code, [number for *_, number in answers(out)]) == (0, [None] * 3)
    # TNT adapts to single images: no batch is too small for it
    assert run_jaxtta("serve", *tnt)[0] == 0


def classify(*arguments, **options):
    command = [sys.executable, "-m", "jaxtta", "classify", *arguments]
    return subprocess.run(command, capture_output=True, timeout=300, check=False, **options)


def test_odd_file_names_are_printed_escaped(run_jaxtta, folder, short, tmp_path):
    """As bytes that are no UTF-8 and with a line break, readable and broken."""
    cat, odd = min(folder.iterdir()), tmp_path / "odd"
    odd.mkdir()
    shutil.copyfile(cat, os.fsencode(odd) + b"/caf\xe9.jpg")
    shutil.copyfile(cat, odd / "two\nlines.jpg")
    for name in (b"/torn\xe9.jpg", b"/torn\n2.jpg"):
        Path(os.fsdecode(os.fsencode(odd) + name)).write_bytes(b"no image")
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    odd_folder = (odd, "--model", short)
    done = classify(*odd_folder, env=strict)
    assert done.returncode == 3
    files = [file for file, *_ in answers(done.stdout.decode())]
    assert files == [f"{odd}/{name}" for name in (r"caf\xe9.jpg", r"two\nlines.jpg")]
    lines = done.stderr.decode().splitlines()
    assert sum(line.startswith(rf"{odd}/torn\xe9.jpg: cannot be decoded") for line in lines)
    assert sum(line.startswith(rf"{odd}/torn\n2.jpg: cannot be decoded") for line in lines)
    names = [rf"{odd}/caf\xe9.jpg", f"{odd}/two\nlines.jpg"]
    lines = run_jaxtta("classify", *odd_folder, "--format", "jsonl")[1].splitlines()
    assert [json.loads(line)["file"] for line in lines] == names
    table = run_jaxtta("classify", *odd_folder, "--format", "csv")[1]
    assert pd.read_csv(StringIO(table))["file"].tolist() == names
    # an encoding that lacks the letters of a class name
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    done = classify(*odd_folder, "--class-names", "Käfer", "Kühe", env=ascii_only)
    assert done.returncode == 3
    assert {label for _, label, *_ in answers(done.stdout.decode())} <= {r"K\xe4fer", r"K\xfche"}


@pytest.mark.parametrize(
    "arguments", ["classify {folder} --batch-size 4 --model {short}", "sweep --help"]
)
def test_it_ends_quietly_when_nobody_reads_on(folder, short, arguments):
    command = f"{sys.executable} -m jaxtta {arguments.format(folder=folder, short=short)}"
    command += " | head -n 1; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, timeout=300, check=False)
    line, code = done.stdout.decode().splitlines()
    assert "cat" in line or "usage" in line
    assert code == "141" or "--help" in arguments  # a short text may be read before head ends
    assert b"Error" not in done.stderr and b"error" not in done.stderr


def test_images_of_a_camera_are_looked_at_upright(run_jaxtta, folder, short, tmp_path):
    exif, cameras = Image.Exif(), tmp_path / "cameras"
    exif[0x0112] = 6  # to be turned clockwise when shown
    cameras.mkdir()
    for n, file in enumerate(sorted(folder.glob("ship*"))):
        with Image.open(file) as image:
            image.save(cameras / f"a{n}.png")
            image.transpose(Image.Transpose.ROTATE_90).save(cameras / f"b{n}.png", exif=exif)
    found = answers(run_jaxtta("classify", cameras, "--model", short)[1])
    assert [line[1:] for line in found[:6]] == [line[1:] for line in found[6:]]


def test_a_run_goes_on_where_it_was(run_jaxtta, folder, short, tmp_path):
    """With the state and the answers of the run before; none is answered twice."""
    files = sorted(folder.iterdir())
    adapter = ["--adapter", "tent:lr=0.01", "--batch-size", "4", "--model", short]
    common = [*adapter, "--format", "jsonl", "--append", tmp_path / "answers.jsonl"]
    kept = ["--state", tmp_path / "state", "--audit", tmp_path / "log.jsonl"]
    whole = run_jaxtta("serve", folder, *adapter, "--format", "jsonl")[1].splitlines()
    code, out, _ = run_jaxtta("serve", *files[:8], *common, *kept)
    assert (code, out) == (0, "")
    (tmp_path / "answers.jsonl").open("a").write('{"file": "torn')
    code, _, err = run_jaxtta("serve", folder, *common, *kept)
    assert code == 0
    assert "goes on after 2 steps and 8 images" in err
    assert "8 images were answered before" in err
    assert (tmp_path / "answers.jsonl").read_text().splitlines() == whole
    header, events = read_log(tmp_path / "log.jsonl")
    assert [(e["event"], e.get("step", e.get("steps"))) for e in [header, *events]] == [
        ("start", 0),
        ("step", 0),
        ("step", 1),
        ("start", 2),
        ("step", 2),
    ]
    assert events[2]["state_digest"] == events[1]["state_digest"]
    code, _, err = run_jaxtta("serve", folder, *common, *kept)
    assert (code, "12 images were answered before" in err) == (0, True)
    code, _, err = run_jaxtta("serve", folder, *common, *kept, "--class-names", "cat", "ship")
    assert (code, "state: has class names ['airplane'" in err) == (1, True)


def test_files_that_come_to_a_watched_folder(run_jaxtta, folder, short, tmp_path):
    """One is moved in, one is written slowly, one stays broken; Ctrl-C ends it with all saved."""
    watched, answers = tmp_path / "watched", tmp_path / "answers.csv"
    watched.mkdir()
    files = sorted(folder.iterdir())
    content = files[2].read_bytes()

    def bring():
        shutil.copyfile(files[0], watched / "first.png")
        (watched / "half.png").write_bytes(content[:300])
        lines_of(2)
        files[1].rename(watched / "moved.png")
        lines_of(3)
        (watched / "half.png").write_bytes(content)
        lines_of(4)
        os.kill(os.getpid(), signal.SIGINT)

    def lines_of(count):
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if answers.exists() and answers.read_text().count("\n") >= count:
                return
            time.sleep(0.02)

    common = ["--adapter", "zero_shot", "--model", short, "--append", answers, "--format", "csv"]
    options = ["--watch", watched, *common, "--max-wait", "0", "--state", tmp_path / "state"]
    thread = threading.Thread(target=bring)
    thread.start()
    code, out, err = run_jaxtta("serve", *options)
    thread.join()
    assert (code, out) == (130, "")
    assert err.endswith("interrupted\n")
    rows = [*csv.DictReader(answers.open())]
    assert [Path(row["file"]).name for row in rows] == ["first.png", "moved.png", "half.png"]
    assert {row["file"]: row["label"] for row in rows}.keys() == {
        str(path) for path in watched.iterdir()
    }
    code, out, _ = run_jaxtta("classify", watched, "--model", short, "--format", "csv")
    classified = {row["file"]: row for row in csv.DictReader(out.splitlines())}
    assert len(classified) == len(rows)
    for row in rows:  # in batches of another size, whose products round differently
        assert row["label"] == classified[row["file"]]["label"]
        assert float(row["score"]) == pytest.approx(
            float(classified[row["file"]]["score"]), rel=1e-5
        )
    assert (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-", "{folder}"), "- stands for a list of paths on stdin"),
        (("--watch", "gone"), "gone: no such folder"),
        (("{folder}", "--append", "a.jsonl"), "--append needs --format jsonl or csv"),
        (("{folder}", "--state", "gone/state"), "gone: no such folder"),
        (("--http", "web"), "--http is 'web', expected [HOST:]PORT"),
        (("--http", "0.0.0.0:0"), "is open to other machines and needs a token"),
        (("--watch", "{folder}", "--review", "{folder}/review"), "would be answered again"),
        (("{folder}", "--max-wait", "-1"), "--max-wait is -1.0, expected seconds"),
        (("{folder}", "--share", "2"), "--share is 2.0, expected 0 to 1"),
        (("{folder}", "--share", "0.5", "--adapter", "tent"), "--adapter guarded:tent"),
        (("{folder}", "--share", "0.5", "--roll-out"), "--share and --roll-out both say a share"),
        (
            ("{folder}", "--bundle", "gone", "--noise", "map"),
            "--bundle has class names and a noise",
        ),
        (("{folder}", "--bundle", "gone"), "gone: no such"),
        (("{folder}", "--save-every", "0"), "--save-every is 0, expected at least 1"),
        (("{folder}", "--state", "{names}"), "names.txt: is damaged or no safetensors file"),
        (("{folder}", "--audit", "{names}"), "names.txt: is no log of jaxtta"),
    ],
)
def test_bad_options_of_a_server(
    run_jaxtta, folder, short, tmp_path, monkeypatch, options, message
):
    places = {"folder": folder, "names": tmp_path / "names.txt"}
    places["names"].write_text("cat\nship\n")
    monkeypatch.chdir(tmp_path)
    options = [option.format(**places) for option in options]
    adapter = [] if "--adapter" in options or "--share" in options else ["--adapter", "zero_shot"]
    code, out, err = run_jaxtta("serve", *options, *adapter, "--model", short)
    assert (code, out) == (1, "")
    assert message in err
    assert errors_in(err) == 1


@pytest.mark.slow
def test_it_survives_a_kill_at_any_point(folder, short, tmp_path):
    """Of a watched folder: every image is answered once, the state goes on, the log is whole."""
    watched, answers, log = (tmp_path / name for name in ("watched", "answers.jsonl", "log.jsonl"))
    watched.mkdir()
    image = min(folder.iterdir()).read_bytes()
    for n in range(72):
        (watched / f"{n:03}.png").write_bytes(image)
    command = [sys.executable, "-m", "jaxtta", "serve", "--watch", watched, "--append", answers]
    command += ["--format", "jsonl", "--adapter", "guarded:tent", "--model", short, "--audit", log]
    command += ["--state", tmp_path / "state", "--save-every", "1", "--batch-size", "4"]
    command += ["--max-wait", "0.2"]
    for _ in range(3):
        done = answers.read_text().count("\n") if answers.exists() else 0
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            until = time.monotonic() + 120
            while time.monotonic() < until and process.poll() is None:
                count = answers.read_text().count("\n") if answers.exists() else 0
                if count >= min(done + 17, 72):
                    break
                time.sleep(0.001)
            process.kill()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while time.monotonic() < until and answers.read_text().count("\n") < 72:
            time.sleep(0.05)
        process.terminate()
        assert "goes on after" in process.stderr.read()
    assert process.returncode == 0
    names = [json.loads(line)["file"] for line in answers.read_text().splitlines()]
    assert sorted(names) == [str(path) for path in sorted(watched.iterdir())]
    header, events = read_log(log)
    logged = [name for event in events if event["event"] == "step" for name in event["images"]]
    # A kill may come before a batch's answers are written, which then is answered again, or before
    # its record is.
    assert set(logged) <= set(names)
    assert len(set(names) - set(logged)) <= 3 * 4
    assert sum(event["event"] == "start" for event in events) == 3
    assert header["state_digest"]


@pytest.mark.slow
def test_it_serves_under_load():
    script = EXPERIMENTS / "serve_load.py"
    command = [sys.executable, script, "--requests", "120", "--clients", "8", "--limit", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "wrong: none" in done.stdout


def test_it_starts_from_a_bundle(run_jaxtta, folder, short, tmp_path):
    """Its settings and state, not those of the options."""
    files, names = sorted(folder.iterdir()), ["--class-names", "cat", "ship"]
    adapter = ["--adapter", "tent:lr=0.01", "--batch-size", "4", "--model", short]
    whole = run_jaxtta("serve", *files, *adapter, *names)[1].splitlines()
    run_jaxtta("serve", *files[:8], *adapter, "--state", tmp_path / "state", *names)
    code, _, err = run_jaxtta("bundle", "create", tmp_path / "state", tmp_path / "bundles")
    assert code == 0, err
    (bundle,) = filter(Path.is_dir, (tmp_path / "bundles").iterdir())  # beside its lock
    code, out, err = run_jaxtta("serve", *files[8:], "--bundle", bundle)
    assert (code, out.splitlines()) == (0, whole[8:])
    assert "tent:lr=0.01, after 8 images" in err
