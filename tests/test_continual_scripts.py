"""jaxtta continual, run as a user runs it, and its images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import GOLDEN, errors_in, write_images
from PIL import Image

import jaxtta
from jaxtta import data, evaluate, metrics
from jaxtta.cli import continual as command

SMALL = [
    *("--iterations", "2", "--batch-size", "8", "--reference-images", "24"),
    *("--max-images", "16", "--reference-batch", "6", "--gram-images", "16"),
    *("--learning-rate", "1e-3"),
]


def results_of(folder):
    """The values by method and step, a column for each set."""
    rows = pd.read_csv(folder / "results.csv")
    return rows.pivot_table("value", ["method", "step"], "set")


def counted(patch, name, stop_at=None, place=evaluate.continual):
    """Count the calls of one of continual's functions, and interrupt one of them."""
    real, calls = getattr(place, name), []

    def count(*arguments, **options):
        calls.append(arguments)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    patch.setattr(place, name, count)
    return calls


def first_words(out):
    """The first words of the table's lines."""
    return [line.split()[0] for line in out.split("\n\n")[1].splitlines()]


def test_tasks_are_learnt_one_after_another(run_jaxtta, short, tmp_path, monkeypatch):
    options = ["continual", *SMALL, "--model", short, "--tasks", "digits", "turned-digits"]
    options += ["--methods", "gnsp", "--output"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with monkeypatch.context() as patch:
        gathered = counted(patch, "task_grams", place=jaxtta.continual)
        trained = counted(patch, "train_task")
        code, out, err = run_jaxtta(*options, whole)
    assert code == 0
    assert "gnsp seed 1: digits" in err
    # of the reference and of the first task, none after the last
    assert (len(gathered), len(trained)) == (2, 2)
    found = results_of(whole)
    assert found.index.tolist() == [("gnsp", step) for step in range(3)]
    sets = {"digits", "turned-digits", "retention-inside", "retention-outside"}
    assert set(found.columns) == sets | set(metrics.ALIGNMENT)
    assert not found.isna().to_numpy().any()
    assert found.nunique().max() == 3
    head = out.splitlines()[2].split()
    assert head[:6] == ["method", "digits", "turned-digits", "last", "average", "transfer"]
    assert first_words(out) == ["method", "before", "gnsp"]
    assert Image.open(whole / "curves.png").size[0] > 500
    # stopped in the second task: what was saved after the first is gone on with
    with monkeypatch.context() as patch:
        counted(patch, "train_task", stop_at=2)
        assert run_jaxtta(*options, parts)[0] == 130
    assert not (parts / "results.csv").exists()
    with monkeypatch.context() as patch:
        trained = counted(patch, "train_task")
        assert run_jaxtta(*options, parts)[0] == 0
    assert len(trained) == 1
    pd.testing.assert_frame_equal(results_of(parts), found, check_exact=True)
    with monkeypatch.context() as patch:  # and once it is finished nothing is computed again
        counted(patch, "evaluate_tasks", 1)
        assert run_jaxtta(*options, parts)[0] == 0
    pd.testing.assert_frame_equal(results_of(parts), found, check_exact=True)
    code, _, err = run_jaxtta(*options, parts, "--rho", "0.5")
    assert code == 1
    assert "training.rho 0.15 (this run: 0.5)" in err


def test_the_published_first_task_and_the_baselines(run_jaxtta, short, tmp_path, monkeypatch):
    options = ["continual", *SMALL, "--model", short, "--tasks", "digits", "--first-task", "all"]
    options += ["--no-task-zero", "--wise-share", "0", "--output", tmp_path]
    methods = ("distillation", "gnsp", "wise-ft")
    with monkeypatch.context() as patch:
        gathered = counted(patch, "task_grams", place=jaxtta.continual)
        code, out, _ = run_jaxtta(*options, "--methods", *methods)
    assert code == 0
    assert gathered == []  # nothing is protected from the first task, and there is no second one
    rows = results_of(tmp_path)
    # without a projection GNSP is distillation and alignment
    pd.testing.assert_frame_equal(rows.loc["gnsp"], rows.loc["distillation"], check_exact=True)
    gap = rows["modality gap"]
    assert gap["gnsp", 1] != gap["gnsp", 0]
    np.testing.assert_allclose(rows.loc["wise-ft", 1], rows.loc["wise-ft", 0], rtol=1e-5)
    assert first_words(out) == ["method", "before", *methods]
    tuned = pd.DataFrame(
        json.loads((tmp_path / "fine-tuning/seed1/result.json").read_text())["rows"]
    )
    tuned = tuned[tuned.set == "modality gap"].set_index(["method", "step"]).value
    assert tuned["fine-tuning", 0] == tuned["wise-ft", 0] == gap["wise-ft", 0]
    assert tuned["fine-tuning", 1] != tuned["fine-tuning", 0]

    # what a method does not use does not force it anew, and what fails does not lose the others
    def fail(model, method, schedule, state, *inputs):
        return state, {"loss": np.nan}

    options.remove("--no-task-zero")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate.continual, "_step", fail)
        methods = ("projection-after", "wise-ft")
        code, out, err = run_jaxtta(*options, "--rho", "0.3", "--methods", *methods)
    assert code == 1
    assert "projection-after seed 1: digits: the loss is no longer finite" in err.splitlines()[-1]
    assert first_words(out) == ["method", "before", "wise-ft"]


def test_table():
    """Kept shares are (method − fine-tuning) / (start − fine-tuning), of means over seeds."""
    figures = dict.fromkeys(metrics.ALIGNMENT, 0.5)

    def run(method, seed, before, after):
        return [
            {"method": method, "seed": seed, "step": step, "set": where, "value": value}
            for step, kept in enumerate((before, after))
            for where, value in {**figures, "digits": 0.1 * seed, "kept": kept}.items()
        ]

    rows = [
        *(*run("fine-tuning", 1, 0.9, 0.5), *run("fine-tuning", 2, 0.7, 0.3)),
        *(*run("gnsp", 1, 0.9, 0.8), *run("gnsp", 2, 0.7, 0.6)),
        *run("distillation", 2, 0.7, 0.5),  # a seed short
    ]
    text = command.table(pd.DataFrame(rows), ["digits"], ["kept"])
    text = text.replace(" ± ", "±").replace("share of ", "share-")
    lines = [line.split() for line in text.splitlines()]
    cells = pd.DataFrame(lines[1:]).set_index(0)
    assert lines[0][3:7] == ["average", "transfer", "kept", "share-kept"]
    assert cells[6].to_dict() == {
        **{"before": "1.00", "fine-tuning": "0.00", "gnsp": "0.75", "distillation": "0.50"}
    }
    assert cells[1].tolist() == ["15.00±7.07"] * 3 + ["20.00"]
    assert cells[3].tolist() == ["–", "15.00±7.07", "15.00±7.07", "20.00"]
    assert set(cells[7]) == {"0.500"}  # the modality gap


def test_a_task_has_any_other_name():
    """The table's own columns are not confused with sets of their names."""
    rows = pd.DataFrame(
        [
            {"method": "gnsp", "seed": 1, "step": step, "set": set_, "value": 0.25}
            for step in range(2)
            for set_ in ("method", "seed", *metrics.ALIGNMENT)
        ]
    )
    assert "25.00" in command.table(rows, ["method"], ["seed"])


def test_only_images_that_a_method_uses_force_it_anew(embedded, tmp_path, monkeypatch):
    """The Python interface: a folder as text, content by set."""
    figures = dict.fromkeys(metrics.ALIGNMENT, 0.5)
    sequence = evaluate.continual
    monkeypatch.setattr(sequence, "evaluate_tasks", lambda *given: figures)
    monkeypatch.setattr(sequence, "train_task", lambda e, params, n, name, grams: (params, grams))
    options = command.Options(tmp_path, tasks=("digits",))
    sets = [command.open_task("digits")], *command.open_reference(options)
    config, names = jaxtta.continual.TrainingConfig(), ("digits", "retention-inside")

    def run(name, reference):
        content = dict.fromkeys((*names, "retention-outside"), "a") | {"reference": reference}
        experiment = sequence.Experiment(*embedded, *sets, config, content=content)
        return sequence.run_sequence(experiment, name, str(tmp_path))

    for name in ("fine-tuning", "gnsp"):
        assert len(run(name, "b")) == (12 if name == "fine-tuning" else 6)  # wise-ft, too
    run("fine-tuning", "c")
    with pytest.raises(ValueError, match="made from other images"):
        run("gnsp", "c")


def test_settings_have_ranges():
    with pytest.raises(ValueError, match=r"^rho is 2, expected"):
        jaxtta.continual.TrainingConfig(rho=2)
    with pytest.raises(ValueError, match=r"^max_images is 0, expected 1 to inf"):
        jaxtta.continual.TrainingConfig(max_images=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods magic", "unknown method 'magic', expected one of fine-tuning"),
        ("--tasks chess", "unknown task 'chess', expected NAME=FOLDER or one of order-1"),
        ("--tasks dtd", "split_zhou_DescribableTextures.json"),
        ("--rho 1", "rho is 1.0, expected a number between 0 and 1"),
        ("--warmup 301", "warmup is 301, expected 0 to 300"),
        ("--learning-rate -1", "learning_rate is -1.0, expected 0 to inf"),
        ("--reference-batch 1", "reference_batch is 1, expected 2 to inf"),
        ("--wise-share 2", "wise_share is 2.0, expected 0 to 1"),
        ("--reference FOLDER", "unknown layout 'FOLDER', expected one of folder"),
        ("--retention FOLDER", "unknown layout 'FOLDER', expected one of folder"),
        ("--tasks own=/nowhere", "/nowhere/train: No such file"),
        ("--reference captions=/nowhere", "/nowhere/captions.csv: no such file"),
        ("--reference-classes 1", "--reference-classes is 1, expected 2 to 10"),
        ("--reference-classes 11", "--reference-classes is 11, expected 2 to 10"),
        ("--reference-images 2 --seeds 1 2", "--reference-images of seed 2 are of one"),
        ("--seeds -1", "expected non-negative integer"),
        (f"--model {GOLDEN / 'openclip-resnet'}", "CLIP with a vision transformer, not a ResNet"),
        ("--reference folder=A --retention folder=A", "same as --reference (folder=A)"),
    ],
)
def test_bad_options_of_continual_learning(run_jaxtta, tmp_path, options, message):
    code, _, err = run_jaxtta("continual", "--output", tmp_path / "a", *options.split())
    assert code == 1
    assert message in err
    assert errors_in(err) == 1
    assert not (tmp_path / "a").exists()


def test_tasks_that_cannot_be_learnt_are_named(run_jaxtta, tmp_path):
    write_images(tmp_path / "one" / "train", 1, ["cat"])
    write_images(tmp_path / "two" / "train", 1, ["cat", "dog"])
    write_images(tmp_path / "two" / "test", 1, ["cat", "ship"])
    options = ["continual", "--output", tmp_path / "a", "--tasks"]
    for task, message in (
        ("own=one", "the task own: one/train: expected at least two class folders"),
        ("own=two", "the task own: training and test classes or their order differ: dog, ship"),
    ):
        code, _, err = run_jaxtta(*options, task.replace("=", f"={tmp_path}/"))
        assert code == 1
        assert message in err.replace(f"{tmp_path}/", "")
        assert errors_in(err) == 1
    shutil.copytree(tmp_path / "two" / "train", tmp_path / "two" / "test", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "two" / "test" / "ship")
    for name in ("digits", "reference", "average", "modality gap"):
        code, _, err = run_jaxtta(*options, "digits", f"{name}={tmp_path}/two")
        assert code == 1
        assert f"{name} is used twice" in err


def captions_of(folder, numbers, size, encoding="utf-8"):
    """A folder with a captions.csv."""
    folder.mkdir(exist_ok=True)
    bundled, rows = data.open_dataset("folder", jaxtta.assets.IMAGES), ["file,caption"]
    for number in numbers:
        Image.fromarray(bundled[number]).save(folder / f"{number}.png")
        rows.append(f"{number}.png,a {size} {bundled.class_names[bundled.labels[number]]}")
    (folder / "captions.csv").write_text("\n".join(rows), encoding=encoding)


def test_pairs_of_images_and_captions_are_a_reference(run_jaxtta, short, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    table = folder / "captions.csv"
    options = ["continual", *SMALL, "--model", short, "--tasks", "digits", "--methods", "gnsp"]
    options += ["--reference", f"captions={folder}"]
    for lines, message in (
        ([], "captions.csv: no such file"),
        (["image,text"], "captions.csv: has no columns file and caption"),
        (
            ["file,caption"],
            "captions.csv: expected a caption for each image, and at least two of them",
        ),
        (["file,caption", "no.jpg,a cat"], "captions.csv: no such image: 'no.jpg'"),
        (["file,caption", "0.jpg,"], "captions.csv: expected a caption for each image"),
        (["file,caption", "0.jpg,a cat"], "and at least two of them"),
    ):
        if lines:
            table.write_text("\n".join(lines))
        (folder / "0.jpg").touch()
        code, _, err = run_jaxtta(*options, "--output", tmp_path / "a")
        assert code == 1
        assert message in err
    captions_of(folder, range(0, 2000, 100), "small", encoding="utf-8-sig")
    captions_of(tmp_path / "kept", range(1, 2000, 90), "large")
    kept = ["--retention", f"captions={tmp_path}/kept"]
    assert run_jaxtta(*options, *kept, "--output", tmp_path / "b")[0] == 0
    row = results_of(tmp_path / "b").loc["gnsp", 1]
    assert set(row.index) == {"digits", "retention", *metrics.ALIGNMENT}
    # among all captions, and those shown
    assert row["retention"] <= row["image to text"] + 1e-6
    # without retention sets the pairs themselves measure gap and retrieval
    assert run_jaxtta(*options, "--output", tmp_path / "c")[0] == 0
    assert set(results_of(tmp_path / "c").columns) == {"digits", *metrics.ALIGNMENT}


def images_of(dataset):
    """Which images a dataset has."""
    return {data.name_of(dataset, number) for number in range(len(dataset))}


def test_no_image_serves_two_ends():
    """Reference, what is measured, what settings are chosen on: all different, and all used."""
    found, tasks = {}, {}
    for validate in (False, True):
        options = command.Options(Path("nowhere"), validate=validate)
        kept, reference = command.open_reference(options)
        assert [task.name for task in kept] == ["retention-inside", "retention-outside"]
        for task in kept:
            assert (task.test.labels < 5).all() if task is kept[0] else (task.test.labels > 4).all()
            found[task.name, validate] = images_of(task.test)
        found["reference"] = images_of(reference.test)
        tasks[validate] = command.open_task("digits", validate=validate)
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 2000
    assert len(found["retention-outside", False]) == 800
    parts = [images_of(each) for each in (tasks[False].test, tasks[True].test, tasks[True].train)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 1797


def test_retention_images_have_classes_of_their_own(tmp_path):
    write_images(tmp_path, 1, ["cat", "dog", "ship"])
    options = command.Options(Path("nowhere"), retention=f"folder={tmp_path}")
    (kept,), reference = command.open_reference(options)
    assert kept.name == "retention"
    assert kept.test.class_names == ("cat", "dog", "ship")
    assert len(reference.test) == 5 * 200  # nothing of it is held out then
    assert command.every_nth(np.array([1, 0, 1, 0, 2]), 2).tolist() == [
        True,
        True,
        False,
        False,
        True,
    ]


def test_retrieval_and_gap_of_retention_images():
    texts = np.eye(3, dtype=np.float32)
    labels = np.array([0, 0, 2])
    images = np.array([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 1]], np.float32)
    found = metrics.image_text_alignment(images, texts[labels], labels)
    gap = np.linalg.norm(images.mean(0) - texts[labels].mean(0))
    expected = dict(zip(metrics.ALIGNMENT, (gap, 2 / 3, 1.0), strict=True))
    assert found == pytest.approx(expected)
