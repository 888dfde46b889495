"""`jaxtta diagnose`, run as a user runs it, and the functions of its metrics and reports."""

import csv
import dataclasses
import json
import os
import re
import shutil
import types

import jax
import numpy as np
import pytest
from conftest import write_images
from safetensors.numpy import load_file, save_file

import jaxtta
from jaxtta import assets, bootstrap, data, diagnose, metrics, models
from jaxtta.cli import diagnose as command
from jaxtta.cli.options import DataOptions
from jaxtta.diagnose import check
from jaxtta.diagnose import model as diagnosis
from jaxtta.report import diagnosis as report

QUICK = ("--workers", "0", "--batch-size", "20", "--max-images", "40")
CLASSES = data.CIFAR10_CLASSES


@pytest.fixture
def run(run_jaxtta, tmp_path):
    """Run the command on few images; returns code, output, errors and result.json."""

    def run(*options):
        folder = tmp_path / "out"
        code, out, err = run_jaxtta("diagnose", *QUICK, *options, "--output", folder)
        result = folder / "result.json"
        return code, out, err, json.loads(result.read_text()) if result.exists() else None

    return run


def saved(folder, loaded, change):
    """A model with some of its leaves changed, as a checkpoint."""
    model, params = loaded
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(change(path[0].key, leaf)), params
    )
    jaxtta.models.save(folder, model, params)
    return folder


def features_of(model, params, corruption, root=assets.IMAGES):
    """Features and labels of the images that the command draws."""
    benchmark = data.open_benchmark("folder", root, model.preprocessing)
    labels = data.labels_of(benchmark)
    streams = data.make_streams("reset_each_shift", (corruption,), (1,), labels, seed=1, limit=40)
    batch = data.Batches(benchmark, tuple(streams), 40, model.preprocessing)[0]
    features = jax.jit(model.encode_image)(params, model.normalize(batch.images))
    return np.asarray(models.l2_normalize(features)), batch.labels


def head_of(model, params, names):
    return diagnose.head_of(model, params, jaxtta.zero_shot_task(model, names))


def test_metrics_are_those_of_direct_calls(run, tmp_path, short):
    model, params = loaded = jaxtta.load(short)
    own = write_images(tmp_path / "own", 14, ["cat", "dog", "ship"])
    rng = np.random.default_rng(0)
    noisy = saved(
        *(tmp_path / "noisy", loaded),
        lambda name, x: x if "text" in name else x * (1 + 0.1 * rng.normal(size=x.shape)),
    )
    points = tmp_path / "points.csv"
    points.write_text("base,shifted\n0.6,0.2\n0.9,0.5\n")
    code, out, _, found = run(
        *("--models", short, noisy, "--corruptions", "fog", "--precision", "0.5"),
        *("--fractions", "0.1", "0.5", "1", "--reference-points", points),
        *("--shifted", f"own=folder={own}"),
    )
    assert code == 0
    mine, other = (found["models"][n] for n in (short.name, "noisy"))
    base = mine["base"]
    clean, labels = features_of(model, params, "clean")
    fog, _ = features_of(model, params, "fog")
    head = head_of(model, params, CLASSES)

    outliers = diagnose.outlier_features(clean)
    ranked = diagnose.privileged_directions(head, clean, outliers.axes)
    np.testing.assert_allclose(base["importance"], ranked.importance, rtol=1e-4)
    assert (base["outlier_axes"], base["overlap"], base["chance_overlap"]) == ([], None, 0)
    axes, weights = zip(*base["top_direction"], strict=True)
    top = np.asarray(ranked.directions[0])
    np.testing.assert_array_equal(axes, np.argsort(-np.abs(top))[:5])
    np.testing.assert_allclose(weights, top[[*axes]] * np.sign(top[axes[0]]), atol=1e-4)
    assert base["spread"] == pytest.approx(float(ranked.spread), rel=1e-4)
    gap = float(diagnose.modality_gap(clean, head))
    assert base["modality_gap"] == pytest.approx(gap, rel=1e-4)
    present = np.unique(labels)
    detectors = diagnose.concept_detectors(clean, labels[:, None] == present, 0.5)
    assert base["detected"] == [CLASSES[label] for label in present[detectors.encoded]]
    assert base["most_by_one_direction"] == detectors.per_direction.max()
    others, own_labels = features_of(model, params, "clean", own)
    own_head = head_of(model, params, ["cat", "dog", "ship"])  # with its own directions
    own_ranked = diagnose.privileged_directions(own_head, clean)
    for key, rows, truth, weights, by in (
        ("clean", clean, labels, head, ranked),
        ("fog-1", fog, labels, head, ranked),
        ("own", others, own_labels, own_head, own_ranked),
    ):
        each = mine["sets"][key]
        right = metrics.top_k(rows @ weights.T, truth)
        kept = diagnose.pruned_accuracy(weights, by.directions, rows, truth, (0.1, 0.5, 1))
        assert each["pruned"][-1] == pytest.approx(each["accuracy"])
        assert each["kurtosis"] == pytest.approx(diagnose.activation_kurtosis(rows), rel=1e-4)
        assert each["accuracy"] == pytest.approx(float(right.mean()))
        np.testing.assert_allclose(each["pruned"], kept)
        assert each["interval"][0] <= each["accuracy"] <= each["interval"][1]
        assert each["images"] == 40
    for name in ("accuracy", "kurtosis", "pruned"):
        mean = np.mean([mine["sets"][key][name] for key in ("fog-1", "own")], 0)
        np.testing.assert_allclose(mine["shifted"][name], mean)
    line = diagnose.fit_baseline([0.6, 0.9], [0.2, 0.5])
    accuracies = [(m["sets"]["clean"]["accuracy"], m["shifted"]["accuracy"]) for m in (mine, other)]
    robust = diagnose.effective_robustness(*np.transpose(accuracies), line)
    np.testing.assert_allclose([*found["robustness"]["values"].values()], robust)
    (pair,) = found["pairs"]
    rows, _ = features_of(*jaxtta.load(noisy), "clean")
    assert pair["linear_cka"] == pytest.approx(diagnose.linear_cka(clean, rows), rel=1e-4)
    first, second = (set(m["base"]["detected"]) for m in (mine, other))
    assert set(pair["detected_by_both"]) == first & second
    assert set(pair["only_by_first"]) == first - second
    assert set(pair["only_by_second"]) == second - first

    folder = tmp_path / "out"
    assert (folder / "table.txt").read_text().strip() in out
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4
    assert 'src="http' not in page and "<script" not in page
    pngs = {path.stem for path in folder.glob("*.png")}
    assert pngs == {"kurtosis", "importance", "pruning", "robustness"}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Cats in a folder that is called otherwise, and dogs; cats without labels, one torn."""
    root = tmp_path_factory.mktemp("target")
    labelled = write_images(root / "labelled", 20, ["cat", "dog"])
    shutil.copytree(labelled / "cat", root / "flat")
    (labelled / "cat").rename(labelled / "felines")
    file = root / "flat" / "0000.png"
    (root / "flat" / "torn.png").write_bytes(file.read_bytes()[:300])
    return root


def test_target_images_without_labels(run, tmp_path, target, embedded):
    model, params = embedded
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nship\n")
    code, out, _, found = run("--target", target / "flat", "--class-names", names)
    assert code == 0
    (found,) = found["models"].values()
    assert found["labelled"] is None and not found["trial"]
    assert (found["target"]["images"], found["reference"]["images"]) == (20, 40)
    files = sorted((target / "flat").iterdir())[:20]  # the last is torn
    opened = [data.open_image(file) for file in files]
    images = model.normalize(model.preprocess(opened))
    rows = np.asarray(models.l2_normalize(jax.jit(model.encode_image)(params, images)))
    logits = np.exp(params["logit_scale"]) * rows @ head_of(model, params, ["cat", "dog", "ship"]).T
    probabilities, answers = np.asarray(jax.nn.softmax(logits)), np.asarray(logits.argmax(1))
    assert found["target"]["predicted"] == pytest.approx(np.bincount(answers, minlength=3) / 20)
    kurtosis = diagnose.activation_kurtosis(rows)
    assert found["target"]["kurtosis"] == pytest.approx(kurtosis, rel=1e-4)
    entropies = np.asarray(jaxtta.losses.entropy(logits))
    assert found["target"]["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-3)
    pairs = diagnose.confused_classes(probabilities)
    assert [pair["classes"] for pair in found["confused"]] == [
        [("cat", "dog", "ship")[c] for c in pair] for pair in pairs.classes
    ]
    # cats are nothing new among CIFAR-10's classes, but not all of them; halves are alike
    assert found["target"]["p_value"] < 0.05 < found["reference"]["p_value"]
    assert found["target"]["unreadable"] == [str(target / "flat" / "torn.png")]
    assert f"1 image could not be read: {target / 'flat' / 'torn.png'}." in out
    assert "accuracy, and whether an adapter helps (both need labels)" in out

    with (tmp_path / "out" / "images.csv").open(newline="") as lines:
        listed = list(csv.DictReader(lines))
    assert [*listed[0]] == ["file", "class", "confidence", "entropy", "distance"]
    columns = {name: np.array([row[name] for row in listed]) for name in listed[0]}
    assert [*columns["file"]] == [file.name for file in files]
    assert [*columns["class"]] == [("cat", "dog", "ship")[c] for c in answers]
    np.testing.assert_allclose(columns["confidence"].astype(float), probabilities.max(1), atol=1e-3)
    np.testing.assert_allclose(columns["entropy"].astype(float), entropies, atol=1e-3)
    distances = columns["distance"].astype(float)
    assert ((distances > 0) & (distances < 2)).all()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not measured" in page
    shown = re.findall(r"<figcaption>(\d+\.png): (\w+) (\d+) %", page)
    assert [file for file, *_ in shown] == [files[n].name for n in np.argsort(-entropies)[:12]]
    least = entropies.argmax()
    assert shown[0][1:] == (columns["class"][least], f"{100 * probabilities[least].max():.0f}")


def test_file_names_of_any_bytes_stop_no_report(run, short, tmp_path, target):
    root = tmp_path / "odd"
    root.mkdir()
    names = (b"caf\xe9 <b>.png", b"two\nlines.png", b"plain_name.png")
    for name, file in zip(names, sorted((target / "flat").iterdir()), strict=False):
        shutil.copyfile(file, os.fsencode(root) + b"/" + name)
    (root / os.fsdecode(b"torn\xe9.png")).write_bytes(b"no image")
    names = ("--class-names", "cat", "dog")
    code, out, *_ = run("--target", root, *names, "--models", short)
    assert code == 0
    assert "1 image could not be read: " in out
    with (tmp_path / "out" / "images.csv").open(newline="") as lines:
        rows = [row["file"] for row in csv.DictReader(lines)]
    assert rows == [r"caf\xe9 <b>.png", "plain_name.png", r"two\nlines.png"]
    page = (tmp_path / "out" / "report.html").read_text()
    for name in (r"caf\xe9 &lt;b&gt;.png", "plain_name.png", r"two\nlines.png"):
        assert f"<figcaption>{name}: " in page
    assert "1 image could not be read: " in page


def test_target_images_with_labels(run, short, target):
    code, out, _, found = run(
        *("--target", target / "labelled", "--try-adapters", "zero_shot", "batclip"),
        *("--class-names", "dog", "ships=ship", "felines=cat", "--models", short),
    )
    assert code == 0
    (found,) = found["models"].values()
    assert found["classes"] == ["dog", "ship", "cat"]
    known = found["labelled"]
    assert known["shares"] == [0.5, 0, 0.5]
    assert known["recall"][1] is None
    assert known["accuracy"] == pytest.approx(np.mean([known["recall"][n] for n in (0, 2)]))
    low, high = known["interval"]
    assert low <= known["accuracy"] <= high
    zero, batclip = found["trial"]
    assert (zero["top1"], zero["top1_low"]) == pytest.approx((known["accuracy"], low))
    assert zero["gain"] is None
    assert batclip["gain"] == pytest.approx(batclip["top1"] - zero["top1"])
    assert batclip["gain_low"] <= batclip["gain"] <= batclip["gain_high"]
    assert "% on 40 labelled images" in out and "adapters, 10 steps of 4 images: On target" in out
    assert "Not measured: whether later images" in out


def test_target_images_with_a_few_labels(run, short, tmp_path, target):
    names = sorted(path.name for path in (target / "flat").iterdir() if path.stem != "torn")
    labels = tmp_path / "few.csv"
    rows = [f"{name};{'käfer' if n < 2 else 'cat'}" for n, name in enumerate(names[:6])]
    text = "\r\n".join(["image;class", *rows]) + "\r\n"
    labels.write_bytes(text.encode("utf-8-sig"))  # a spreadsheet's
    options = ("--target", target / "flat", "--class-names", "cat", "käfer=dog", "--models", short)
    options += ("--target-labels", labels, "--try-adapters", "zero_shot")
    code, out, _, found = run(*options)
    assert code == 0
    (found,) = found["models"].values()
    known, (zero,) = found["labelled"], found["trial"]
    assert (found["target"]["images"], known["images"]) == (20, 6)
    assert known["shares"] == pytest.approx([2 / 3, 1 / 3])
    assert zero["top1"] == pytest.approx(known["accuracy"])
    assert (zero["top1_low"], zero["top1_high"]) == pytest.approx(known["interval"])
    assert "% on 6 labelled images" in out and "2 steps of 4 images" in out
    labels.write_bytes(text.encode("latin1"))
    code, _, err, _ = run(*options)
    assert (code, err.count("error: ")) == (1, 1)
    assert f"{labels}: is not UTF-8 text" in err


def test_a_labelled_folder_with_odd_names_and_system_folders(run, short, tmp_path, target):
    """A flat folder with a system's folder has no classes."""
    root, flat = tmp_path / "odd", tmp_path / "flat"
    for name in (b"felines\xe9", b"dogs", b"@eaDir", b"__MACOSX"):
        shutil.copytree(target / "labelled" / "dog", root / os.fsdecode(name))
    shutil.copytree(target / "flat", flat)
    shutil.copytree(root / "@eaDir", flat / "@eaDir")
    torn = root / os.fsdecode(b"felines\xe9") / os.fsdecode(b"\xe9.png")
    torn.write_bytes(b"no image")
    common = ("--max-images", "41", "--models", short, "--try-adapters", "zero_shot", "--target")
    code, _, err, _ = run(*common, root)
    assert code == 1
    assert r"class folder felines\xe9 means nothing to a model: set the class names" in err
    names = ("--class-names", os.fsdecode(b"felines\xe9=cat"), "dogs=dog")
    code, out, *_ = run(*common, root, *names)
    assert code == 0
    assert "on 40 labelled images" in out
    assert rf"1 image could not be read: {root}/felines\xe9/\xe9.png." in out
    code, *_, found = run(*common, flat, "--class-names", "cat", "dog")
    assert (code, found["models"]["clip"]["target"]["images"]) == (0, 20)


def test_a_trial_of_mgtta_needs_files_of_the_model(run, short, target):
    names = ("--class-names", "felines=cat", "dog")
    adapters = ("--try-adapters", "zero_shot", "mgtta")
    code, _, err, _ = run("--target", target / "labelled", *names, *adapters, "--models", short)
    assert code == 1
    assert "was made with another model" in err


def arrays(folder, images, labels):
    folder.mkdir()
    np.save(folder / "clean.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)


def test_images_and_models_without_a_diagnosis(run, tmp_path, short):
    loaded = jaxtta.load(short)
    labels = np.arange(20) % 2
    same = arrays(tmp_path / "same", np.repeat(NOISE[:1], 20, 0), labels)
    cats = arrays(tmp_path / "cats", NOISE, 0 * labels)
    good = arrays(tmp_path / "good", NOISE, labels)
    blind = saved(
        *(tmp_path / "blind", loaded),
        lambda name, x: 0 * x if name == "visual_projection" else x,
    )
    headless = saved(tmp_path / "headless", loaded, lambda _, x: x)
    weights = load_file(headless / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, headless / "model.safetensors")
    for images, model, message in (
        (same, short, "on clean: the features are"),
        (cats, short, "on clean: all images are of class cat, expected two or more"),
        (good, blind, "blind on clean: 20 of 20 images have features that are constant or not fi"),
        (good, headless, f"{headless}/model.safetensors: does not fit its config.json: visual_p"),
        (good, tmp_path, f"{tmp_path}: has no config.json"),
    ):
        code, _, err, _ = run(
            *("--layout", "arrays", "--class-names", "cat", "dog", "--data", images),
            *("--corruptions", "--models", model),
        )
        assert code == 1
        assert message in err
        assert len(err.strip().splitlines()[-1]) > len(message)
        assert "Traceback" not in err


@pytest.mark.parametrize("check", [False, True])
def test_the_results_of_a_model_are_kept_if_a_later_one_fails(run, short, target, tmp_path, check):
    options = ("--target", target / "flat", "--class-names", "cat", "dog") if check else ()
    nowhere = tmp_path / "nowhere"
    code, out, err, _ = run("--models", short, nowhere, "--corruptions", *options)
    folder = tmp_path / "out" / (short.name if check else "")
    found = json.loads((folder / "result.json").read_text())
    assert (code, [*found["models"]]) == (1, [short.name])
    assert str(nowhere) in err and "report.html" in out


def test_an_output_that_is_no_folder_is_said_before_a_model_is_read(run, tmp_path):
    (tmp_path / "out").touch()
    code, _, err, _ = run("--models", tmp_path / "nowhere")
    assert code == 1
    assert f"{tmp_path / 'out'}: File exists" in err


def test_a_reference_needs_no_class_names(run, short, target, tmp_path):
    for number, name in enumerate(("felines", "dog")):
        shutil.copytree(target / "labelled" / name, tmp_path / "numbers" / str(number))
    options = ("--target", target / "flat", "--class-names", "cat", "dog", "--models", short)
    code, *_, found = run(*options, "--data", tmp_path / "numbers")
    assert (code, found["models"]["clip"]["reference"]["images"]) == (0, 40)
    (tmp_path / "arrays").mkdir()
    np.save(
        tmp_path / "arrays" / "clean.npy", data.open_dataset("folder", assets.IMAGES).images[::50]
    )
    np.save(tmp_path / "arrays" / "labels.npy", np.arange(40) % 10)
    code, *_, found = run(*options, "--layout", "arrays", "--data", tmp_path / "arrays")
    assert (code, found["models"]["clip"]["reference"]["images"]) == (0, 40)


def test_features_without_numbers_have_answers():
    rng = np.random.default_rng(0)
    rows, head = rng.normal(size=(12, 60)).astype(np.float32), np.eye(2, 60, dtype=np.float32)
    features = diagnose.FeatureSet(rows, np.full(12, -1), [])
    found, answers = diagnose.check_target(features, features, head, ("a", "b"), scale=1.0)
    np.testing.assert_array_equal(answers.numbers, np.arange(12))
    assert np.mean(answers.labels == 0) == pytest.approx(found.target.predicted[0])
    few = features._replace(rows=rows[:3])
    with pytest.raises(ValueError, match="the reference has 3 images, expected at least four"):
        diagnose.check_target(features, few, head, ("a", "b"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--target {labelled} --class-names cat dogs",
            "class 'dog' is not one of",
        ),
        ("--target {labelled} --class-names a=x b=y", "class 'dog' is not one of"),
        ("--target {flat}", "flat: --class-names needs two or more"),
        ("--target {flat} --class-names cat", "flat: --class-names needs two or more"),
        ("--target {empty} --class-names a b", "empty: class folder without images"),
        ("--target {one}", "expected at least two class folders, has"),
        ("--target {nowhere}", "nowhere: No such file"),
        ("--data {one}", "expected at least two class folders, has"),
        ("--data {nowhere}", "nowhere: No such file"),
        ("--try-adapters zero_shot tint", "unknown adapter 'tint'"),
        ("--fractions 0 1", r"fractions is \[0.0, 1.0\], expected distinct numbers above 0"),
        ("--fractions 1 1", r"fractions is \[1.0, 1.0\], expected distinct numbers above 0"),
        ("--precision 1.5", r"precision is \[1.5\], expected .* above 0, at most 1"),
        ("--references a b", "--references takes some of --models"),
        ("--models a b --references a", "--references needs two models or more"),
        ("--target-labels {few}", "--target-labels a --target"),
        ("--outlier-threshold 99", "^error: threshold is 99.0, expected a positive number"),
        ("--reference-points {points}", "points.csv: an accuracy is 60.0, expected"),
        ("--reference-points {words}", "words.csv: could not convert string to float: 'a'"),
        ("--reference-points {nowhere}", "nowhere: no such file"),
        ("--reference-points published", "published needs --layout imagenet"),
        (
            "--reference-points published --layout imagenet --corruptions",
            "--reference-points published needs .* --shifted of imagenet-v2",
        ),
        ("--shifted r", "--shifted has 'r', expected NAME=LAYOUT=FOLDER"),
        (
            "--data {labelled} --class-names a b --shifted x=folder={pairs}",
            "--shifted x: --class-names must be a .json by folder name",
        ),
        ("--shifted x=arrays={nowhere}", "nowhere: arrays .*class"),
        ("{check} --target-labels {nowhere}", "nowhere: no such file"),
        ("{check} --target-labels {points}", "points.csv: has no columns image and class"),
        ("{check} --target-labels {few}", "line 2: 'b.png' is no image in .*flat"),
        ("{check} --target-labels {wrong}", "flat: class 'cow' is not one of --class-names"),
        (
            "{check} --target-labels {twice}",
            "line 3: 'torn.png' is no image .* or has a label already",
        ),
        ("--target {labelled} --target-labels {few}", "line 2: 'b.png' is no image"),
        ("--corruptions smog", "unknown corruption 'smog'"),
        ("--max-images 1", "on clean: 1 of the images could be read"),
        ("{check} --max-images 3", "the reference has 3 images, expected at least four"),
        ("{check} --class-names cat=a cat=b", "flat: --class-names needs .* all different"),
        ("{check} --class-names cat=a dog=a", "flat: --class-names needs .* all different"),
        ("--seed -1", "expected non-negative integer"),
        ("--shifted x=folder={labelled} x=folder={pairs}", "--shifted has 'x=.*pairs', .*new name"),
        ("--shifted fog-1=folder={labelled}", "--shifted has 'fog-1=.*, .*new name"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, target, options, message):
    places = {name: tmp_path / name for name in ("empty", "one", "nowhere", "pairs")}
    places |= {"labelled": target / "labelled", "flat": target / "flat"}
    for name, text in (
        ("few", "image,class\nb.png,cat"),
        ("wrong", "image,class\ntorn.png,cow"),
        ("twice", "image,class\ntorn.png,cat\ntorn.png,dog"),
        ("points", "base,shifted\n60,20\n90,50"),
        ("words", "base,shifted\na,b"),
    ):
        places[name] = tmp_path / f"{name}.csv"
        places[name].write_text(f"{text}\n")
    for name in ("empty", "one/cat", "pairs/one", "pairs/two"):
        (tmp_path / name).mkdir(parents=True)
        if "/" in name:
            shutil.copyfile(target / "flat" / "0000.png", tmp_path / name / "a.png")
    places["check"] = f"--target {target / 'flat'} --class-names cat dog"
    code, _, err, _ = run(*options.format(**places).split())
    assert code == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(message, line), line


def points_of(*names, layout="imagenet"):
    """Published accuracies on ImageNet and on these shifted sets."""
    shifted = tuple(f"{name}=imagenet=FOLDER" for name in names)
    shifts = command.ShiftOptions((), shifted=shifted, reference_points="published")
    return command.points_of(types.SimpleNamespace(data=DataOptions(layout=layout), shifts=shifts))


def test_published_reference_points():
    base, shifted = np.transpose(points_of("imagenet-v2"))
    assert len(base) > 15 and (shifted < base).all()
    line = diagnose.fit_baseline(base, shifted)
    assert np.abs(diagnose.effective_robustness(base, shifted, line)).max() < 0.02
    # CLIP ViT-B/16's published accuracies on ImageNet and ImageNet-Sketch: far above the line
    line = diagnose.fit_baseline(*np.transpose(points_of("imagenet-sketch")))
    assert diagnose.effective_robustness([0.683], [0.482], line)[0] > 0.2
    # the mean of sets; a model that gets nothing right on the only set has no logit
    both = points_of("imagenet-v2", "imagenet-r")
    several = [points_of(f"imagenet-{name}") for name in ("v2", "r")]
    np.testing.assert_allclose(both, np.mean(several, axis=0))
    assert len(points_of("imagenet-a")) == len(both) - 1
    for names, layout in (
        ((), "imagenet"),
        (("objectnet",), "imagenet"),
        (("imagenet-a",), "tfds"),
    ):
        with pytest.raises(ValueError, match="published needs --layout imagenet, no --corruptions"):
            points_of(*names, layout=layout)


# --- metrics


def set_metrics(accuracy=0.8, unreadable=(), kurtosis=3.5):
    return diagnosis.SetMetrics(40, [*unreadable], accuracy, (0.0, 1.0), kurtosis, [accuracy])


def model_diagnosis(clean=0.8, shifts=(0.5, 0.6), enough: float | None = 0.2, axes=()):
    base = diagnosis.BaseMetrics([*axes], 0, [1.0] * 10, [(3, 0.5)], None, 0, 1, 1, ["a"], [], 0)
    sets = {"clean": set_metrics(clean)}
    for name, accuracy in zip(("fog", "snow"), shifts, strict=False):
        sets[name] = set_metrics(accuracy, [f"{name}.png"])
    shifted = diagnosis.ShiftedMeans(float(np.mean(shifts)), 3.4, []) if shifts else None
    return diagnose.ModelDiagnosis("", base, sets, shifted, enough)


def test_robustness_is_measured_from_reference_models_or_the_reason_is_said():
    def measured(references=("a", "c"), **changed):
        accuracies = {"a": (0.6, 0.2), "b": (0.8, 0.7), "c": (0.9, 0.5)} | changed
        found = {name: model_diagnosis(base, rest) for name, (base, *rest) in accuracies.items()}
        return diagnose.measure_robustness(found, references=references)

    line = diagnose.fit_baseline([0.6, 0.9], [0.2, 0.5])
    expected = diagnose.effective_robustness([0.6, 0.8, 0.9], [0.2, 0.7, 0.5], line)
    values = measured().values
    assert [*values.values()] == pytest.approx(expected.tolist())
    assert (values["a"], values["c"]) == pytest.approx((0, 0))
    for changed, message in (
        ({"b": (1.0, 0.7)}, "an accuracy is 1.0, expected a number between 0 and 1"),
        ({"c": (0.6, 0.5)}, "at least two reference points of different base accuracies"),
        ({"b": (0.8,)}, "there are no shifted sets"),
        ({"references": ()}, "takes models that are not robust"),
    ):
        found = measured(**changed)
        assert message in found.reason and not found.values
        assert message in report.sentences("diagnosis.txt.j2", models={}, robustness=found)[0]


def test_a_sufficient_fraction_is_counted_from_the_whole_head():
    for accuracies, expected in (
        ((0.6, 0.795, 0.8), 0.5),
        ((0.8, 0.7, 0.8), 1.0),  # from there on, not by luck below
        ((0.8, 0.8, 0.78), None),
        ((0.5, 0.6, 0.7), None),
    ):
        assert diagnosis.sufficient_fraction(0.8, (0.1, 0.5, 1.0), accuracies) == expected
    assert diagnosis.sufficient_fraction(0.8, (0.5, 0.1), (0.8, 0.6)) == 0.5
    assert diagnosis.sufficient_fraction(0.8, (0.5, 0.1), (0.75, 0.75)) is None


def test_few_labels_have_exact_bounds_where_all_or_none_are_right():
    scipy = pytest.importorskip("scipy.stats")
    for right in (0, 5):
        exact = scipy.binomtest(right, 5).proportion_ci(method="exact")
        assert bootstrap.accuracy_interval(np.arange(5) < right) == pytest.approx([*exact])
    low, high = bootstrap.accuracy_interval(np.arange(5) < 2)
    assert 0 <= low < 0.4 < high < 1


def test_directions_may_detect_classes():
    rng = np.random.default_rng(0)
    head, labels = rng.normal(size=(3, 60)), np.arange(90) % 3
    rows = 0.01 * rng.normal(size=(90, 60)) + head[labels]
    rows[:, [7, 9]] += 90
    settings = diagnose.Settings(outlier_threshold=4, detect_with="directions")
    features = diagnose.FeatureSet(rows, labels, [])
    found, _ = diagnosis.base_metrics(head, features, "abc", settings)
    assert found.outlier_axes == [7, 9]
    assert found.chance_overlap == 2 / 60
    ranked = diagnose.privileged_directions(head, rows, [7, 9])
    np.testing.assert_allclose(found.overlap, ranked.overlap)
    scores = np.asarray(rows @ ranked.directions.T)
    detectors = diagnose.concept_detectors(scores, labels[:, None] == np.arange(3))
    assert found.detected == [c for c, so in zip("abc", detectors.encoded, strict=True) if so]
    assert found.most_by_one_direction == detectors.per_direction.max()


# --- words


@pytest.mark.parametrize(
    ("shifts", "expected"),
    [
        ((0.5, 0.6), r"m .*80.00 % on clean, 55.00 % .* 2 shifted sets.*50.00 % .*worst.*, fog\.$"),
        ((0.5,), r"m .*80.00 % on clean, 50.00 % .* 1 shifted set.*, fog\.$"),
        ((), r"m .*80.00 % on clean\.$"),
    ],
)
def test_the_words_of_a_diagnosis(shifts, expected):
    found = {"m": model_diagnosis(shifts=shifts)}
    words = {"models": found, "robustness": diagnose.Robustness({"m": 0.1})}
    first, *others = report.sentences("diagnosis.txt.j2", **words)
    assert re.match(expected, first), first
    assert others[-1].startswith("Not measured: ")
    assert "calibration" in others[-1]
    if len(shifts) > 1:
        assert others[:-1] == ["2 images could not be read: fog.png, snow.png."]


def target_check(p_value=0.002, predicted=(0.75, 0.25, 0.0), unreadable=(), labelled=None):
    metrics = (40, [], 3.0, [], 0.5, 0.604, [*predicted], 0.05, 0.004, p_value)
    reference = check.UnlabelledMetrics(*metrics)
    own = dataclasses.replace(reference, unreadable=[*unreadable])
    return diagnose.TargetCheck(("cat", "dog", "cow"), own, reference, [], labelled, "old")


LABELLED = check.LabelledMetrics(1, 0.6, (0.55, 0.7), [0.5, 0.3, 0.2], [None] * 3)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {},
            [
                r"For m .* differ from the reference, old \(p = 0.002; .*12.5 .*\): .*“cat” "
                r"for 75 %.*never “cow”, .*confidence of 60 % \(guessing: 33 %\)\.$"
            ],
        ),
        (
            {
                **{"p_value": 0.051, "predicted": [0.2, 0.3, 0.5], "unreadable": ["a.png"]},
                "labelled": LABELLED,
            },
            [
                r"For m .* do not differ .*the reference, old \(p = 0.051\).*“cow” for 50 %.*"
                r"confidence of 60 % \(guessing: 33 %\)\.$",
                r"1 image could not be read: a.png\.$",
                r"Unadapted .*60.00 \[55.00, 70.00\] % on 1 labelled image; .* has 50.00 %\.$",
            ],
        ),
    ],
)
def test_the_words_of_a_check(changed, expected):
    words = {"name": "m", "check": target_check(**changed), "trial": None}
    *said, last = report.sentences("target.txt.j2", **words)
    assert len(said) == len(expected)
    assert all(map(re.match, expected, said)), said
    assert "never" in said[0] or "predicted" in changed
    assert last.startswith("Not measured: accuracy, and whether an adapter helps")


def test_every_image_is_in_the_histogram():
    entropies = np.full(7, np.log(3) + 1e-6), np.array([-1e-7, 0.5])
    none = np.zeros(0)
    answers = diagnose.Answers(none, none, none, entropies[0], none, entropies[1])
    found = target_check(predicted=[0.2, 0.7, 0.1])
    left, right = report.draw_predictions(found, answers).axes
    assert sum(bar.get_height() for bar in left.patches) == pytest.approx(200)
    assert [bar.get_width() for bar in right.patches] == pytest.approx([70, 20, 10])
    assert [label.get_text() for label in right.get_yticklabels()] == ["dog", "cat", "cow"]
