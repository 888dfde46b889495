"""continual_mtil.py and protect_batclip.py, run as a user runs them, and their images."""

import json
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import EXPERIMENTS, GOLDEN, errors_in
from jaxtta.data.memory import Arrays, InMemory, Part, every
from PIL import Image

import jaxtta
from jaxtta import assets, data
from jaxtta.data.tasks import in_memory
from jaxtta.evaluate.continual import FIGURES, alignment, read
from jaxtta.optim import project_out

SMALL = [
    *("--iterations", "2", "--batch-size", "8", "--reference-images", "24"),
    *("--limit", "16", "--reference-batch", "6", "--gram-images", "16", "--workers", "0"),
    *("--learning-rate", "1e-3"),
]


def result_of(folder, method):
    return json.loads((folder / method / "seed1" / "result.json").read_text())


@pytest.fixture(scope="module")
def script():
    """The names in continual_mtil.py."""
    return runpy.run_path(str(EXPERIMENTS / "continual_mtil.py"))


def counted(patch, name, stop_at=None):
    """Count the calls of one of continual's functions, and interrupt one of them."""
    real, calls = getattr(jaxtta.continual, name), []

    def count(*arguments, **options):
        calls.append(arguments)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    patch.setattr(jaxtta.continual, name, count)
    return calls


def test_tasks_are_learnt_one_after_another(run_script, short, tmp_path, monkeypatch):
    options = [
        *SMALL,
        "--model",
        short,
        "--tasks",
        "digits",
        "turned-digits",
        "--methods",
        "gnsp",
        "--output",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with monkeypatch.context() as patch:
        gathered = counted(patch, "task_grams")
        optimizers = counted(patch, "task_optimizer")
        code, out, _ = run_script("continual_mtil.py", *options, whole)
    assert code == 0
    assert len(gathered) == 2  # of the reference and of the first task, none after the last
    found = result_of(whole, "gnsp")
    assert found["tasks"] == ["digits", "turned-digits"]
    assert [set(row) for row in found["rows"]] == [set(found["rows"][0])] * 3
    assert found["rows"][0] != found["rows"][2]
    assert 0 <= found["transfer"] <= 1
    head = out.splitlines()[2].split()
    assert head[:6] == ["method", "digits", "turned-digits", "last", "average", "transfer"]
    names = [line.split()[0] for line in out.splitlines() if line.startswith(("before", "gnsp"))]
    assert names == ["before", "gnsp"]
    for name in ("matrix.png", "curves.png"):
        assert Image.open(whole / name).size[0] > 500
    # stopped in the second task: what was saved after the first is gone on with
    with monkeypatch.context() as patch:
        counted(patch, "null_space_projectors", stop_at=2)
        assert run_script("continual_mtil.py", *options, parts)[0] == 130
    assert not (parts / "gnsp" / "seed1" / "result.json").exists()
    with monkeypatch.context() as patch:
        projectors = counted(patch, "null_space_projectors")
        again = counted(patch, "task_optimizer")
        assert run_script("continual_mtil.py", *options, parts)[0] == 0
    assert len(projectors) == 1
    assert 0 < len(again) < len(optimizers)  # the first task is not learnt anew
    assert result_of(parts, "gnsp")["rows"] == found["rows"]
    code, _, err = run_script("continual_mtil.py", *options, parts, "--rho", "0.5")
    assert code == 1
    assert "rho 0.15 (this run: 0.5)" in err


def test_the_published_first_task_and_the_baselines(run_script, short, tmp_path, monkeypatch):
    options = [*SMALL, "--model", short, "--tasks", "digits", "--first-task", "all"]
    options += ["--no-task-zero", "--wise-share", "0", "--output", tmp_path]
    with monkeypatch.context() as patch:
        gathered = counted(patch, "task_grams")
        code, out, _ = run_script(
            "continual_mtil.py", *options, "--methods", "distillation", "gnsp", "wise-ft"
        )
    assert code == 0
    assert gathered == []  # nothing is protected from the first task, and there is no second one
    rows = {name: result_of(tmp_path, name)["rows"] for name in ("distillation", "gnsp", "wise-ft")}
    # without a projection GNSP is distillation and alignment
    assert rows["gnsp"] == rows["distillation"]
    assert rows["gnsp"][1]["modality gap"] != rows["gnsp"][0]["modality gap"]
    assert rows["wise-ft"][1] == pytest.approx(rows["wise-ft"][0], rel=1e-5)
    tuned = result_of(tmp_path, "fine-tuning")["rows"]
    assert tuned[0] == rows["wise-ft"][0]
    assert tuned[1]["modality gap"] != tuned[0]["modality gap"]
    assert [line.split()[0] for line in out.splitlines()[3:6]] == ["before", "distillation", "gnsp"]

    # what a method does not use does not force it anew, and what fails does not lose the others
    def fail(*arguments):
        raise FloatingPointError("no longer finite")

    options.remove("--no-task-zero")
    with monkeypatch.context() as patch:
        patch.setattr(jaxtta.continual, "task_grams", fail)
        patch.setattr(jaxtta.continual, "task_optimizer", fail)
        code, out, err = run_script(
            *("continual_mtil.py", *options, "--rho", "0.3"),
            *("--methods", "projection-after", "wise-ft"),
        )
    assert code == 1
    assert err.splitlines()[-1].endswith("no longer finite")
    assert [line.split()[0] for line in out.splitlines()[3:5]] == ["before", "wise-ft"]


def test_kept_shares(script):
    """(method − fine-tuning) / (start − fine-tuning), of means over seeds."""
    figures = dict.fromkeys(FIGURES, 0.5)

    def run(method, seed, before, after):
        rows = [figures | {"digits": 0.1, "kept": kept} for kept in (before, after)]
        return {"method": method, "seed": seed, "rows": rows, "last": 0.1, "average": 0.2}

    results = [
        run("fine-tuning", 1, 0.9, 0.5),
        run("fine-tuning", 2, 0.7, 0.3),
        run("gnsp", 1, 0.9, 0.8),
        run("gnsp", 2, 0.7, 0.6),
        run("distillation", 2, 0.7, 0.5),  # a seed short
    ]
    text = script["table"](["digits"], ["kept"], results)
    lines = [line.split("  ") for line in text.split("\n")]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0][:6] == ["method", "digits", "last", "average", "kept", "share of kept"]
    shares = {line[0]: line[cells[0].index("share of kept")] for line in cells[1:]}
    expected = {"before": "1.00", "fine-tuning": "0.00", "gnsp": "0.75", "distillation": "0.50"}
    assert shares == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "magic"], "unknown method 'magic', expected one of fine-tuning"),
        (["--tasks", "chess"], "unknown task 'chess', expected NAME=FOLDER or one of order-1"),
        (["--tasks", "dtd"], "dtd needs --data"),
        (["--rho", "1"], "rho is 1.0, expected a number between 0 and 1"),
        (["--warmup", "301"], "--warmup is 301, expected at most the 300 --iterations"),
        (["--reference", "FOLDER"], "--reference is 'FOLDER', expected LAYOUT=FOLDER"),
        (["--kept", "FOLDER"], "--kept is 'FOLDER', expected LAYOUT=FOLDER"),
        (["--tasks", "own=/nowhere"], "/nowhere/train: no such folder"),
        (["--reference", "captions=/nowhere"], "/nowhere: no such folder"),
        (["--reference-classes", "11"], "--reference-classes is 11, expected 2 to 10"),
        (["--reference-classes", "0"], "--reference-classes is 0, expected 2 to 10"),
        (
            ["--reference-images", "2", "--seeds", "1", "2"],
            "--reference-images of seed 2 are of one",
        ),
        (["--seeds", "-1"], "--seeds is -1, expected at least 0"),
        (
            ["--model", str(GOLDEN / "openclip-resnet")],
            "CLIP with a vision transformer, not a ResNet",
        ),
        (
            ["--reference", "folder=A", "--kept", "folder=A"],
            "--kept is the same as --reference (folder=A)",
        ),
    ],
)
def test_bad_options_of_continual_learning(run_script, tmp_path, options, message):
    code, _, err = run_script("continual_mtil.py", "--output", tmp_path / "a", *options)
    assert code == 1
    assert message in err
    assert errors_in(err) == 1


def folder_of(root, *names):
    """A folder with an embedded image a class."""
    image = next((assets.IMAGES / "cat").iterdir())
    for name in names:
        (root / name).mkdir(parents=True)
        shutil.copy(image, root / name)


def test_tasks_that_cannot_be_learnt_are_named(run_script, tmp_path):
    folder_of(tmp_path / "one" / "train", "cat")
    folder_of(tmp_path / "two" / "train", "cat", "dog")
    folder_of(tmp_path / "two" / "test", "cat", "wolf")
    for task, message in (
        ("one", "the task own: one/train: has 1 class folders, expected at least two"),
        ("two", "the task own has different training and test classes: dog, wolf"),
    ):
        options = ["--output", tmp_path / "a", "--tasks", f"own={tmp_path}/{task}"]
        code, _, err = run_script("continual_mtil.py", *options)
        assert code == 1
        assert message in err.replace(f"{tmp_path}/", "")
        assert errors_in(err) == 1
    folder_of(tmp_path / "two" / "test", "dog")
    shutil.rmtree(tmp_path / "two" / "test" / "wolf")
    twice = ["--tasks", "digits", f"digits={tmp_path}/two"]
    code, _, err = run_script("continual_mtil.py", "--output", tmp_path / "a", *twice)
    assert code == 1
    assert "digits is used twice" in err


def captions_of(folder, images, size, encoding="utf-8"):
    """A folder with a captions.csv."""
    folder.mkdir(exist_ok=True)
    rows = ["file,caption"]
    for number, image in enumerate(images):
        shutil.copy(image, folder / f"{number}{image.suffix}")
        rows.append(f"{number}{image.suffix},a {size} {image.parent.name}")
    (folder / "captions.csv").write_text("\n".join(rows), encoding=encoding)


def test_pairs_of_images_and_captions_are_a_reference(run_script, short, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    table = folder / "captions.csv"
    options = [*SMALL, "--model", short, "--tasks", "digits", "--methods", "gnsp"]
    options += ["--reference", f"captions={folder}"]
    for lines, message in (
        ([], "has no captions.csv, with columns file and caption"),
        (["image,text"], "captions.csv: has no columns file and caption"),
        (["file,caption"], "captions.csv: lists no image"),
        (["file,caption", "no.jpg,a cat"], "line 2: no such image: 'no.jpg'"),
        (["file,caption", "0.jpg,"], "captions.csv: 0.jpg has no caption"),
        (["file,caption", "0.jpg,a cat"], "has one caption for all images, expected at least"),
    ):
        if lines:
            table.write_text("\n".join(lines))
        (folder / "0.jpg").touch()
        code, _, err = run_script("continual_mtil.py", *options, "--output", tmp_path / "a")
        assert code == 1
        assert message in err
    images = sorted(assets.IMAGES.glob("*/*"))
    captions_of(folder, images[::100], "small", encoding="utf-8-sig")
    captions_of(tmp_path / "kept", images[1::90], "large")
    options += ["--kept", f"captions={tmp_path}/kept", "--output", tmp_path / "b"]
    code, _, _ = run_script("continual_mtil.py", *options)
    assert code == 0
    row = result_of(tmp_path / "b", "gnsp")["rows"][1]
    assert set(row) == {"digits", "kept", "modality gap", "image to text", "text to image"}
    assert row["kept"] <= row["image to text"] + 1e-6  # among all captions, and those shown


def images_of(task):
    """Which files a task is tested on."""
    clean = data.Domain(data.CLEAN)
    return {task.test.name(clean, number) for number in range(len(task.test.labels))}


def test_no_image_serves_two_ends(script, embedded):
    """Reference, what is measured, what settings are chosen on: all different, and all used."""
    model, found, tasks = embedded[0], {}, {}
    for validate in (False, True):
        options = script["Options"](Path("nowhere"), tasks=("digits",), validate=validate)
        kept, reference = script["open_reference"](options, model)
        assert [task.name for task in kept] == ["kept-inside", "kept-outside"]
        for task in kept:
            assert (task.test.labels < 5).all() if task is kept[0] else (task.test.labels > 4).all()
            found[task.name, validate] = images_of(task)
        found["reference"] = images_of(reference)
        (tasks[validate],) = script["open_tasks"](options, model)
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 2000
    assert len(found["kept-outside", False]) == 800
    test, tuning, trained = (
        images_of(task)
        for task in (tasks[False], tasks[True], tasks[True]._replace(test=tasks[True].train))
    )
    assert not test & tuning
    assert not test & trained
    assert not tuning & trained
    assert len(tuning | trained | test) == 1797


def test_kept_images_have_classes_of_their_own(script, embedded, tmp_path):
    folder_of(tmp_path, "cat", "dog", "wolf")
    options = script["Options"](Path("nowhere"), kept=f"folder={tmp_path}")
    (kept,), reference = script["open_reference"](options, embedded[0])
    assert kept.name == "kept"
    assert kept.test.class_names == ("cat", "dog", "wolf")
    assert len(reference.test.labels) == 5 * 200  # nothing of it is held out then


def test_images_in_memory_are_read_once(embedded):
    images = np.random.default_rng(0).integers(0, 255, (6, 32, 32, 3), np.uint8)
    opened = []

    class Counted(Arrays):
        def open(self, number):
            opened.append(number)
            if number == 2:
                raise data.UnreadableImageError("no image")
            return super().open(number)

    counted = Counted(images, np.array([0, 1, 2, 0, 1, 2]), ("a", "b", "c"), "image")
    source = data.CorruptedOnTheFly(counted, embedded[0].preprocessing)
    kept = InMemory(Part(source, np.array([5, 4, 3, 2])))
    np.testing.assert_array_equal(kept.labels, [2, 1, 0, 2])
    for _ in range(2):
        numbers = np.array([3, 0, 0, 1])
        batches = [*read(kept, numbers, 3, 0, "reading")]
        assert [batch.mask.tolist() for batch in batches] == [[False, True, True], [True, 0, 0]]
        np.testing.assert_array_equal(batches[0].images[1], images[5])
        np.testing.assert_array_equal(batches[1].images[0], images[4])
    clean = data.Domain(data.CLEAN)
    np.testing.assert_array_equal(kept.read(clean, 2, 0), images[3])  # not read ahead
    assert sorted(opened) == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="only clean images are kept in memory, not fog-1"):
        kept.check(data.Domain("fog", 1))
    assert every(np.array([1, 0, 1, 0, 2]), 2).tolist() == [True, True, False, False, True]


def test_more_images_than_fit_are_streamed(script, embedded):
    options = script["Options"](Path("nowhere"), tasks=("digits", "turned-digits"))
    tasks = script["open_tasks"](options, embedded[0])
    first, second = in_memory(tasks, room=1500 * 32 * 32 * 3)  # a training set, and no second one
    assert isinstance(first.train, InMemory)
    assert isinstance(first.test, Part)
    assert isinstance(second.train, Part)


def test_retrieval_and_gap_of_kept_images():
    texts = np.eye(3, dtype=np.float32)
    labels = np.array([0, 0, 2])
    images = np.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]], np.float32)
    found = alignment(images, texts[labels], labels)
    assert found["image to text"] == pytest.approx(2 / 3)
    assert found["text to image"] == 1.0
    expected = np.linalg.norm(images.mean(0) - texts[labels].mean(0))
    assert found["modality gap"] == pytest.approx(expected)


def test_what_protection_costs_and_keeps(run_script, short, tmp_path, monkeypatch):
    options = ["--limit", "20", "--batch-size", "10", "--protecting", "6", "--workers", "0"]
    options += ["--corruptions", "fog", "--ranks", "2", "6", "--model", short]
    options += ["--output", tmp_path / "a"]
    real, shown, bases = data.stream_of, {}, []

    def remember(name, domains, images, seed):
        shown.setdefault((name, len(images)), set()).update(images.tolist())
        return real(name, domains, images, seed)

    def protect(basis):
        bases.append(basis)
        return project_out(basis)

    with monkeypatch.context() as patch:
        patch.setattr(data, "stream_of", remember)
        patch.setattr(jaxtta.optim, "project_out", protect)
        code, out, _ = run_script("protect_batclip.py", *options)
    assert code == 0
    assert [len(jax.tree.leaves(basis)[0]) for basis in bases] == [2, 6]
    parts = [shown["clean", 6], shown["clean", 20], shown["fog", 20]]
    assert len(set().union(*parts)) == 46  # protecting, tested and adapted to: all different
    saved = tmp_path / "a" / "rows.json"
    rows = json.loads(saved.read_text())
    assert [row[2] for row in rows] == [-1, 0, 2, 6]
    assert all(0 <= share <= 1 for row in rows for share in row[3:])
    assert Image.open(tmp_path / "a" / "clean.png").size[0] > 500
    saved.write_text(json.dumps(rows + [["fog", 9, row[2], 0.0, 0.0] for row in rows]))
    again = run_script("protect_batclip.py", *options)
    assert again[:2] == (0, out)  # from what is saved, without the seed that is not asked for


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "257"], "--ranks has 257, expected at most the --protecting 256 images"),
        (["--severity", "0"], "--severity is 0, expected at least 1"),
        (["--protecting", "1999"], "expected at least two less than the 2000 images"),
        (["--layout", "arrays", "--severity", "3"], "--layout arrays has a fixed severity"),
    ],
)
def test_bad_options_of_protection(run_script, tmp_path, options, message):
    code, _, err = run_script("protect_batclip.py", "--output", tmp_path / "a", *options)
    assert code == 1
    assert message in err
    assert errors_in(err) == 1
