"""diagnose_model.py, run as a user runs it, and the functions of its field check."""

import csv
import json
import os
import re
import runpy
import shutil
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from conftest import EXPERIMENTS, GOLDEN
from safetensors.numpy import load_file, save_file

import jaxtta
from jaxtta import assets, data, diagnose, metrics, models
from jaxtta.evaluate import figures
from jaxtta.report import diagnosis

SCRIPT = "diagnose_model.py"
QUICK = ("--workers", "0", "--batch-size", "20", "--limit", "40")
CLASSES = data.CIFAR10_CLASSES
SEEDS = st.integers(0, 2**31 - 1)


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def saved(folder, embedded, change):
    """The embedded model with some of its leaves changed, as a checkpoint."""
    model, params = embedded
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.asarray(change(path[0].key, leaf)), params
    )
    jaxtta.models.save(folder, model, params)
    return folder


def features_of(model, params, corruption, folder=assets.IMAGES):
    """Features and labels of the images that the script draws."""
    source = data.open_source("folder", folder, model.preprocessing)
    (stream,) = data.make_streams(
        "reset_each_shift", (corruption,), (1,), source.labels, seed=1, limit=40
    )
    numbers = stream.items[:, 1]
    images = np.stack([source.read(stream.segments[0], n, 1) for n in numbers.tolist()])
    features = jax.jit(model.encode_image)(params, model.normalize(images))
    return np.asarray(jaxtta.models.l2_normalize(features)), source.labels[numbers]


def head_of(model, params, names):
    prompts = model.prompts(jaxtta.zero_shot_task(model, names))
    return jax.jit(model.class_embeddings)(params, prompts)


def test_figures_are_those_of_direct_calls(run_script, tmp_path, embedded):
    model, params = embedded
    own = tmp_path / "own"
    for folder, name in (("hounds", "dog"), ("kittens", "cat"), ("vessels", "ship")):
        (own / folder).mkdir(parents=True)
        for file in sorted((assets.IMAGES / name).iterdir())[:14]:
            shutil.copyfile(file, own / folder / file.name)
    rng = np.random.default_rng(0)
    noisy = saved(
        *(tmp_path / "noisy", embedded),
        lambda name, x: x if "text" in name else x * (1 + 0.1 * rng.normal(size=x.shape)),
    )
    points = tmp_path / "points.json"
    points.write_text(json.dumps([{"base": 0.6, "shifted": 0.2}, {"base": 0.9, "shifted": 0.5}]))
    code, out, _ = run_script(
        *(SCRIPT, *QUICK, "--models", assets.MODEL, noisy, "--corruptions", "fog", "--precision"),
        *("0.5", "--fractions", "0.1", "0.5", "1", "--reference-points", points),
        *("--shifted", f"own=folder={own}", "--output", tmp_path / "a"),
    )
    assert code == 0
    found = result_of(tmp_path / "a")
    name = assets.MODEL.name
    mine, other = (found["models"][n] for n in (name, "noisy"))
    clean, labels = features_of(model, params, "clean")
    fog, _ = features_of(model, params, "fog")
    head = head_of(model, params, CLASSES)

    outliers = diagnose.outlier_features(clean)
    assert mine["outlier_axes"] == outliers.axes.tolist()
    ranked = diagnose.privileged_directions(head, clean, outliers.axes)
    np.testing.assert_allclose(mine["importance"], ranked.importance, rtol=1e-4)
    assert (mine["outlier_axes"], mine["overlap"], mine["chance_overlap"]) == ([], None, 0)
    axes, weights = zip(*mine["top_direction"], strict=True)
    top = np.asarray(ranked.directions[0])
    np.testing.assert_array_equal(axes, np.argsort(-np.abs(top))[:5])
    np.testing.assert_allclose(weights, top[[*axes]] * np.sign(top[axes[0]]), atol=1e-4)
    assert mine["spread"] == pytest.approx(float(ranked.spread), rel=1e-4)
    gap = float(diagnose.modality_gap(clean, head))
    assert mine["modality_gap"] == pytest.approx(gap, rel=1e-4)
    present = np.unique(labels)
    detected = diagnose.concept_detectors(clean, labels[:, None] == present, 0.5)
    assert mine["encoded"] == [CLASSES[label] for label in present[detected.encoded]]
    assert mine["most_concepts_per_direction"] == detected.per_direction.max()
    others, own_labels = features_of(model, params, "clean", own)
    own_head = head_of(model, params, ["hounds", "kittens", "vessels"])  # with its own directions
    own_ranked = diagnose.privileged_directions(own_head, clean)
    for key, rows, truth, weights, by in (
        ("clean", clean, labels, head, ranked),
        ("fog-1", fog, labels, head, ranked),
        ("own", others, own_labels, own_head, own_ranked),
    ):
        figures = mine["sets"][key]
        right = metrics.top_k(rows @ weights.T, truth)
        kept = diagnose.pruned_accuracy(weights, by.directions, rows, truth, (0.1, 0.5, 1))
        assert figures["pruned"][-1] == pytest.approx(figures["accuracy"])
        assert figures["kurtosis"] == pytest.approx(diagnose.activation_kurtosis(rows), rel=1e-4)
        assert figures["accuracy"] == pytest.approx(float(right.mean()))
        np.testing.assert_allclose(figures["pruned"], kept)
        assert figures["interval"][0] <= figures["accuracy"] <= figures["interval"][1]
        assert figures["images"] == 40
    shifted = [mine["sets"][key] for key in ("fog-1", "own")]
    assert mine["shifted_accuracy"] == pytest.approx(np.mean([s["accuracy"] for s in shifted]))
    np.testing.assert_allclose(mine["shifted_pruned"], np.mean([s["pruned"] for s in shifted], 0))
    line = diagnose.fit_baseline([0.6, 0.9], [0.2, 0.5])
    accuracies = [[m["base_accuracy"], m["shifted_accuracy"]] for m in (mine, other)]
    robust = diagnose.effective_robustness(*np.transpose(accuracies), line)
    np.testing.assert_allclose([*found["robustness"]["values"].values()], robust)
    (pair,) = found["pairs"]
    rows, _ = features_of(*jaxtta.load(noisy), "clean")
    assert pair["cka"] == pytest.approx(diagnose.linear_cka(clean, rows), rel=1e-4)
    first, second = (set(m["encoded"]) for m in (mine, other))
    assert set(pair["shared"]) == first & second
    assert [*map(set, pair["unique"])] == [first - second, second - first]

    assert (tmp_path / "a" / "table.txt").read_text().strip() in out
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("data:image/png;base64") == 4
    assert 'src="http' not in page and "<script" not in page
    pngs = {path.stem for path in (tmp_path / "a").glob("*.png")}
    assert pngs == {"kurtosis", "importance", "pruning", "robustness"}


@pytest.fixture(scope="module")
def field(tmp_path_factory):
    """Cats in a folder that is called otherwise, and dogs; cats without labels, one torn."""
    root = tmp_path_factory.mktemp("field")
    for folder, name in (("labelled/felines", "cat"), ("labelled/dogs", "dog"), ("flat", "cat")):
        (root / folder).mkdir(parents=True)
        for file in sorted((assets.IMAGES / name).iterdir())[:20]:
            shutil.copyfile(file, root / folder / file.name)
    (root / "flat" / "torn.jpg").write_bytes(file.read_bytes()[:300])
    return root


def test_field_without_labels(run_script, tmp_path, field, embedded):
    model, params = embedded
    code, out, _ = run_script(
        *(SCRIPT, *QUICK, "--field", field / "flat", "--class-names", "cat", "dog", "ship"),
        *("--output", tmp_path / "a"),
    )
    assert code == 0
    (found,) = result_of(tmp_path / "a")["models"].values()
    assert "accuracy" not in found and "trial" not in found
    assert (found["field"]["images"], found["reference"]["images"]) == (20, 40)
    opened = [jaxtta.data.open_image(f) for f in sorted((field / "flat").iterdir())[:20]]
    images = model.normalize(model.preprocess(opened))
    rows = np.asarray(jaxtta.models.l2_normalize(jax.jit(model.encode_image)(params, images)))
    task = jaxtta.zero_shot_task(model, ["cat", "dog", "ship"])
    forward = jax.jit(model)
    logits = forward(params, model.prompts(task), model.preprocess(opened)).logits
    answers = np.bincount(logits.argmax(-1), minlength=3) / 20
    assert found["field"]["predicted"] == pytest.approx(answers.tolist())
    kurtosis = diagnose.activation_kurtosis(rows)
    assert found["field"]["kurtosis"] == pytest.approx(kurtosis, rel=1e-4)
    entropy = float(jaxtta.losses.entropy(logits).mean())
    assert found["field"]["entropy"] == pytest.approx(entropy, rel=1e-3)
    pairs = diagnose.confused_classes(jax.nn.softmax(logits))
    assert [pair["classes"] for pair in found["confused"]] == [
        [("cat", "dog", "ship")[c] for c in pair] for pair in pairs.classes
    ]
    # cats are nothing new among CIFAR-10's classes, but not all of them; halves are alike
    assert found["field"]["p_value"] < 0.05 < found["reference"]["p_value"]
    assert found["field"]["lost"] == [str(field / "flat" / "torn.jpg")]
    assert f"1 image could not be read: {field / 'flat' / 'torn.jpg'}." in out
    assert "accuracy, and whether an adapter helps (both need labels)" in out
    assert "Not measured" in (tmp_path / "a" / "report.html").read_text()


def test_answers_to_every_image_and_those_least_sure(run_script, tmp_path, field, embedded):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\nship\n")
    code, _, err = run_script(
        *(SCRIPT, *QUICK, "--field", field / "flat", "--class-names", names),
        *("--output", tmp_path / "a"),
    )
    assert code == 0
    assert "compiling the image tower of tiny-clip-cifar10 …" in err
    with (tmp_path / "a" / "images.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [*rows[0]] == ["file", "class", "confidence", "entropy", "distance"]
    files = sorted((field / "flat").iterdir())[:20]  # the last is torn
    assert [row["file"] for row in rows] == [file.name for file in files]
    model, params = embedded
    images = model.normalize(model.preprocess([data.open_image(file) for file in files]))
    features = models.l2_normalize(jax.jit(model.encode_image)(params, images))
    head = head_of(model, params, ["cat", "dog", "ship"])
    logits = np.exp(params["logit_scale"]) * np.asarray(features @ head.T)
    probabilities = np.asarray(jax.nn.softmax(logits))
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    assert [*columns["class"]] == [("cat", "dog", "ship")[c] for c in logits.argmax(1)]
    np.testing.assert_allclose(columns["confidence"].astype(float), probabilities.max(1), atol=1e-3)
    entropy = np.asarray(jaxtta.losses.entropy(logits))
    np.testing.assert_allclose(columns["entropy"].astype(float), entropy, atol=1e-3)
    distances = columns["distance"].astype(float)
    assert ((distances > 0) & (distances < 2)).all()
    page = (tmp_path / "a" / "report.html").read_text()
    shown = re.findall(r"<figcaption>(\d+\.jpg): (\w+) (\d+) %", page)
    assert [file for file, *_ in shown] == [files[n].name for n in np.argsort(-entropy)[:12]]
    assert shown[0][1:] == (
        columns["class"][entropy.argmax()],
        f"{100 * probabilities[entropy.argmax()].max():.0f}",
    )


def test_file_names_of_any_bytes_stop_no_report(run_script, short, tmp_path, field):
    root = tmp_path / "odd"
    root.mkdir()
    names = (b"caf\xe9 <b>.jpg", b"two\nlines.jpg", b"plain_name.jpg")
    for name, file in zip(names, sorted((field / "flat").iterdir()), strict=False):
        shutil.copyfile(file, os.fsencode(root) + b"/" + name)
    (root / os.fsdecode(b"torn\xe9.jpg")).write_bytes(b"no image")
    code, out, _ = run_script(
        *(SCRIPT, *QUICK, "--field", root, "--class-names", "cat", "dog", "--models", short),
        *("--output", tmp_path / "a"),
    )
    assert code == 0
    assert "1 image could not be read: " in out
    with (tmp_path / "a" / "images.csv").open(newline="") as lines:
        rows = [row["file"] for row in csv.DictReader(lines)]
    assert rows == [r"caf\xe9 <b>.jpg", "plain_name.jpg", r"two\nlines.jpg"]
    page = (tmp_path / "a" / "report.html").read_text()
    for name in (r"caf\xe9 &lt;b&gt;.jpg", "plain_name.jpg", r"two\nlines.jpg"):
        assert f"<figcaption>{name}: " in page
    assert "1 image could not be read: " in page


def test_field_with_labels(run_script, short, tmp_path, field):
    code, out, _ = run_script(
        *(SCRIPT, *QUICK, "--field", field / "labelled", "--trial", "zero_shot", "batclip"),
        *("--class-names", "dogs=dog", "ships=ship", "felines=cat", "--models", short),
        *("--output", tmp_path / "a"),
    )
    assert code == 0
    (found,) = result_of(tmp_path / "a")["models"].values()
    assert found["classes"] == ["dog", "ship", "cat"]
    assert found["labelled"] == [0.5, 0, 0.5]
    assert found["recall"][1] is None
    assert found["accuracy"] == pytest.approx(np.mean([found["recall"][n] for n in (0, 2)]))
    low, high = found["interval"]
    assert low <= found["accuracy"] <= high
    zero, batclip = found["trial"]
    assert zero["top1"] == pytest.approx(found["accuracy"])
    assert zero["gain"] is None
    gained = batclip["top1"] - zero["top1"]
    assert batclip["gain"]["top1"] == pytest.approx(gained)
    assert batclip["gain"]["interval"][0] <= gained <= batclip["gain"]["interval"][1]
    assert low == pytest.approx(zero["interval"][0])
    assert "% on 40 labelled images" in out and "adapters, 10 steps of 4 images: On field" in out
    assert "Not measured: whether later images" in out


def test_field_with_a_few_labels(run_script, short, tmp_path, field):
    names = sorted(path.name for path in (field / "flat").iterdir() if path.stem != "torn")
    labels = tmp_path / "few.csv"
    rows = [f"{name},{'hound' if n < 2 else 'cat'}" for n, name in enumerate(names[:6])]
    labels.write_text("\n".join(["image,class", *rows]))
    code, out, _ = run_script(
        *(SCRIPT, *QUICK, "--field", field / "flat", "--class-names", "cat", "hound=dog"),
        *("--field-labels", labels, "--trial", "zero_shot", "--models", short),
        *("--output", tmp_path / "a"),
    )
    assert code == 0
    (found,) = result_of(tmp_path / "a")["models"].values()
    assert found["field"]["images"] == 20
    assert (found["labels"], found["steps"]) == (6, 2)
    assert found["labelled"] == pytest.approx([2 / 3, 1 / 3])
    (zero,) = found["trial"]
    assert zero["top1"] == pytest.approx(found["accuracy"])
    assert zero["interval"] == pytest.approx(found["interval"])
    assert "% on 6 labelled images" in out and "2 steps of 4 images" in out


def test_a_labelled_folder_with_odd_names_and_system_folders(run_script, short, tmp_path, field):
    """The trial hashes the names; a flat folder with a system's folder has no classes."""
    root, flat = tmp_path / "odd", tmp_path / "flat"
    for name in (b"felines\xe9", b"dogs", b"@eaDir", b"__MACOSX"):
        shutil.copytree(field / "labelled" / "dogs", root / os.fsdecode(name))
    shutil.copytree(field / "flat", flat)
    shutil.copytree(root / "@eaDir", flat / "@eaDir")
    (root / os.fsdecode(b"felines\xe9")).joinpath(os.fsdecode(b"\xe9.jpg")).write_bytes(b"no image")
    every = (*QUICK[:-1], "41")
    common = ("--models", short, "--trial", "zero_shot", "--output")
    code, _, err = run_script(SCRIPT, *every, "--field", root, *common, tmp_path / "a")
    assert code == 1
    assert r"class folder felines\xe9 has a name that is not text: set the class names" in err
    names = ("--class-names", os.fsdecode(b"felines\xe9=cat"), "dogs=dog")
    code, out, _ = run_script(SCRIPT, *every, "--field", root, *names, *common, tmp_path / "a")
    assert code == 0
    assert "on 40 labelled images" in out
    assert rf"1 image could not be read: {root}/felines\xe9/\xe9.jpg." in out
    names = ("--class-names", "cat", "dog")
    code, out, _ = run_script(SCRIPT, *QUICK, "--field", flat, *names, *common, tmp_path / "b")
    assert (code, result_of(tmp_path / "b")["models"]["clip"]["field"]["images"]) == (0, 20)


def test_a_spreadsheet_of_labels(run_script, short, tmp_path, field):
    names = sorted(path.name for path in (field / "flat").iterdir() if path.stem != "torn")
    labels = tmp_path / "few.csv"
    labels.write_bytes(b"\xef\xbb\xbfimage;class\r\n%s;k\xc3\xa4fer\r\n" % names[0].encode())
    options = (*QUICK, "--field", field / "flat", "--class-names", "käfer=cat", "hound=dog")
    options += ("--field-labels", labels, "--trial", "zero_shot", "--models", short, "--output")
    assert run_script(SCRIPT, *options, tmp_path / "a")[0] == 0
    assert result_of(tmp_path / "a")["models"]["clip"]["labels"] == 1
    labels.write_bytes(b"image,class\n%s,k\xe4fer\n" % names[0].encode())
    code, _, err = run_script(SCRIPT, *options, tmp_path / "b")
    assert (code, err.count("error: ")) == (1, 1)
    assert f"{labels}: is not UTF-8 text" in err


def test_a_trial_of_mgtta_needs_files_of_the_model(run_script, tmp_path, field, embedded):
    other = saved(tmp_path / "other", embedded, lambda name, x: 1.01 * x)
    code, _, err = run_script(
        *(SCRIPT, *QUICK, "--field", field / "labelled", "--trial", "zero_shot", "mgtta"),
        *("--models", other, "--output", tmp_path / "a"),
    )
    assert code == 1
    assert "was made with another model" in err


def arrays(folder, images, labels):
    folder.mkdir()
    np.save(folder / "clean.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)


def test_images_and_models_without_a_diagnosis(run_script, tmp_path, embedded):
    labels = np.arange(20) % 2
    same = arrays(tmp_path / "same", np.repeat(NOISE[:1], 20, 0), labels)
    cats = arrays(tmp_path / "cats", NOISE, 0 * labels)
    good = arrays(tmp_path / "good", NOISE, labels)
    blind = saved(
        *(tmp_path / "blind", embedded),
        lambda name, x: 0 * x if name == "visual_projection" else x,
    )
    headless = saved(tmp_path / "headless", embedded, lambda _, x: x)
    weights = load_file(headless / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, headless / "model.safetensors")
    for options, message in (
        (("--data", same), "on clean: the features are"),
        (("--data", cats), "on clean: all images are of class cat, expected two or more"),
        (
            ("--data", good, "--models", blind),
            "blind on clean: 20 of 20 images have features that are constant or not finite",
        ),
        (
            ("--data", good, "--models", headless),
            f"{headless}/model.safetensors: does not fit its config.json: visual_projection/kernel",
        ),
        (
            ("--data", good, "--models", tmp_path),
            f"{tmp_path}: has no config.json",
        ),
        (
            ("--data", good, "--models", GOLDEN / "openclip-vit"),
            "openclip-vit: --outlier-threshold: threshold is 6.0, expected a positive number below "
            "3.87",
        ),
    ):
        code, _, err = run_script(
            *(SCRIPT, *QUICK, "--layout", "arrays", "--class-names", "cat", "dog"),
            *("--corruptions", *options, "--output", tmp_path / "out"),
        )
        assert code == 1
        assert message in err
        assert len(err.strip().splitlines()[-1]) > len(message)
        assert "Traceback" not in err


FLAT = ("--field", "{flat}", "--class-names", "cat", "dog")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--field", "{labelled}", "--class-names", "cat", "dogs"), "class folder is not one of"),
        (("--field", "{labelled}", "--class-names", "a=x"), "felines: class folder|dogs: "),
        (("--field", "{flat}"), "--class-names has 0 classes, expected at least two"),
        (("--field", "{flat}", "--class-names", "cat"), "has 1 classes, expected at least two"),
        (("--field", "{empty}", "--class-names", "a", "b"), "empty: folder without images"),
        (
            (
                "--field",
                "{one}",
            ),
            "has 1 class folders, expected at least two",
        ),
        (
            (
                "--field",
                "{both}",
            ),
            "both: has images .*a.jpg",
        ),
        (
            (
                "--field",
                "{nowhere}",
            ),
            "nowhere: no such folder",
        ),
        (
            (
                "--data",
                "{one}",
            ),
            "has 1 class folders, expected at least two",
        ),
        (
            (
                "--data",
                "{nowhere}",
            ),
            "nowhere: no such folder",
        ),
        (("--trial", "tent"), "--trial needs zero_shot"),
        (("--trial", "zero_shot", "tint"), "unknown adapter 'tint'"),
        (("--fractions", "0", "1"), r"--fractions is \[0.0, 1.0\], expected above 0"),
        (("--precision", "1.5"), r"--precision is \[1.5\], expected above 0, at most 1"),
        (("--references", "a", "b"), "--references has 'a', .*--models"),
        (("--references", str(assets.MODEL)), "--references needs at least two models"),
        (("--reference-points", "{points}"), "points.csv: an accuracy is 60.0, expected a number"),
        (("--reference-points", "{words}"), "words.json: expected base and shifted of each model"),
        (("--reference-points", "published"), "published .*--layout imagenet"),
        (
            ("--reference-points", "published", "--layout", "imagenet", "--corruptions"),
            "--reference-points published: no shifted sets, expected some of imagenet-v2",
        ),
        (("--shifted", "r"), "--shifted has 'r', expected NAME=LAYOUT=FOLDER"),
        (
            ("--data", "{labelled}", "--class-names", "a", "b", "--shifted", "x=folder={pairs}"),
            "pairs: its class folders are not those of .*, dogs, felines, one, two being in one of",
        ),
        (
            ("--shifted", "x=arrays={nowhere}"),
            "--shifted x: .*nowhere: arrays .*class",
        ),
        (("--field-labels", "{few}"), "--field-labels needs --field"),
        ((*FLAT, "--field-labels", "{nowhere}"), "nowhere: no such file"),
        ((*FLAT, "--field-labels", "{points}"), "points.csv: has no columns image and class"),
        ((*FLAT, "--field-labels", "{few}"), "line 2 names 'b.jpg', .*flat"),
        ((*FLAT, "--field-labels", "{wrong}"), "line 2 has class 'cow', .*--class-"),
        ((*FLAT, "--field-labels", "{twice}"), "line 3 names 'torn.jpg' again"),
        ((*FLAT, "--field-labels", "{none}"), "none.csv: .* no image"),
        (
            ("--field", "{labelled}", "--field-labels", "{few}"),
            "labelled: .*--field-labels",
        ),
        (("--corruptions", "smog"), "unknown corruption 'smog'"),
        (
            ("--layout", "arrays", "--severity", "3"),
            "--layout arrays .*--severity",
        ),
        (("--limit", "1"), "--limit is 1, expected at least 2"),
    ],
)
def test_bad_input_is_one_sentence(run_script, tmp_path, field, options, message):
    places = {name: tmp_path / name for name in ("empty", "one", "both", "nowhere")}
    places |= {"labelled": field / "labelled", "flat": field / "flat"}
    for name, text in (
        ("few", "b.jpg,cat"),
        ("wrong", "torn.jpg,cow"),
        ("twice", "torn.jpg,cat\ntorn.jpg,dog"),
        ("none", ""),
    ):
        places[name] = tmp_path / f"{name}.csv"
        places[name].write_text(f"image,class\n{text}\n")
    places["pairs"] = tmp_path / "pairs"
    for name in ("empty", "one/cat", "both/cat", "both/dog", "pairs/one", "pairs/two"):
        (tmp_path / name).mkdir(parents=True)
        if "/" in name:
            shutil.copyfile(min((field / "flat").iterdir()), tmp_path / name / "a.jpg")
    (tmp_path / "both" / "a.jpg").touch()
    places |= {"points": tmp_path / "points.csv", "words": tmp_path / "words.json"}
    places["points"].write_text("base,shifted\n60,20\n90,50\n")
    places["words"].write_text('["a", "b"]')
    options = [text.format(**places) for text in options]
    code, _, err = run_script(SCRIPT, *QUICK, *options, "--output", tmp_path / "out")
    assert code == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert re.search(message, line), line


def test_synthetic_features_are_timed(run_script, tmp_path):
    code, out, _ = run_script(SCRIPT, "--synthetic", "2000", "--output", tmp_path)
    assert code == 0
    assert "2000 images, 512 features, 1000 classes: " in out
    found = json.loads((tmp_path / "synthetic.json").read_text())
    assert found["outlier_axes"] == [0]  # as planted
    assert 0.5 < found["accuracy"] < 1
    assert 0.1 < found["cka"] < 0.9  # as much noise as features
    assert min(found["p_values"]) > 0.01


def test_names_hold_for_shifted_folders_and_arrays(field, tmp_path):
    names_for = runpy.run_path(str(EXPERIMENTS / SCRIPT))["names_for"]
    options = types.SimpleNamespace(class_names=("cat", "dog"), layout="arrays", data="base")
    for layout, root in (("arrays", "nowhere"), ("folder", field / "labelled")):
        assert names_for(options, layout, root) == ("cat", "dog")
    file = tmp_path / "names.json"
    file.write_text('{"felines": "cat", "dogs": "dog", "ships": "ship"}')
    options.class_names = (str(file),)
    assert names_for(options, "folder", field / "labelled") == ("dog", "cat")
    options.class_names = ()
    assert names_for(options, "folder", field / "labelled") == ()


def test_published_points_are_those_of_the_shifted_sets():
    points_of = runpy.run_path(str(EXPERIMENTS / SCRIPT))["points_of"]
    options = types.SimpleNamespace(reference_points="published", layout="imagenet")
    options.corruptions, options.shifted = (), ("imagenet-r=imagenet=R", "imagenet-a=imagenet=A")
    assert points_of(options) == data.reference_points(["imagenet-r", "imagenet-a"])
    options.shifted = ("r=imagenet=R",)
    with pytest.raises(ValueError, match="published: 'r' has no published reference points, exp"):
        points_of(options)


def test_robustness_is_measured_from_reference_models_or_the_reason_is_said():
    references = ("a", "c")
    accuracies = {"a": (0.6, 0.2), "b": (0.8, 0.7), "c": (0.9, 0.5)}

    def results(**changed):
        return {
            name: dict(zip(("base_accuracy", "shifted_accuracy"), pair, strict=True))
            for name, pair in (accuracies | changed).items()
        }

    found = figures.robustness_of(results(), references=references)
    line = diagnose.fit_baseline([0.6, 0.9], [0.2, 0.5])
    expected = diagnose.effective_robustness([0.6, 0.8, 0.9], [0.2, 0.7, 0.5], line)
    assert [*found["values"].values()] == pytest.approx(expected.tolist())
    assert (found["values"]["a"], found["values"]["c"]) == pytest.approx((0, 0))
    for changed, message in (
        ({"b": (1.0, 0.7)}, "an accuracy is 1.0, expected a number between 0 and 1"),
        ({"c": (0.6, 0.5)}, "at least two reference points of different base accuracies"),
        (dict.fromkeys("abc", (0.6, None)), "there are no shifted sets"),
    ):
        assert message in figures.robustness_of(results(**changed), references=references)["reason"]
    assert "takes models that are not robust" in figures.robustness_of(results())["reason"]


def test_enough_is_counted_from_the_whole_head():
    for accuracies, expected in (
        ((0.6, 0.795, 0.8), 0.5),
        ((0.8, 0.7, 0.8), 1.0),  # from there on, not by luck below
        ((0.8, 0.8, 0.78), None),
        ((0.5, 0.6, 0.7), None),
    ):
        assert figures.smallest_sufficient_fraction(0.8, (0.1, 0.5, 1.0), accuracies) == expected
    assert figures.smallest_sufficient_fraction(0.8, (0.5, 0.1), (0.8, 0.6)) == 0.5
    assert figures.smallest_sufficient_fraction(0.8, (0.5, 0.1), (0.75, 0.75)) is None


def test_few_labels_have_exact_bounds_where_all_or_none_are_right():
    scipy = pytest.importorskip("scipy.stats")
    for right in (0, 5):
        exact = scipy.binomtest(right, 5).proportion_ci(method="exact")
        assert figures.interval_of(np.arange(5) < right) == pytest.approx([*exact])
    low, high = figures.interval_of(np.arange(5) < 2)
    assert 0 <= low < 0.4 < high < 1


def test_directions_may_detect_classes():
    rng = np.random.default_rng(0)
    head, labels = rng.normal(size=(3, 60)), np.arange(90) % 3
    rows = 0.01 * rng.normal(size=(90, 60)) + head[labels]
    rows[:, [7, 9]] += 90
    found, _ = figures.base_figures(
        head, figures.Features(rows, labels, []), "abc", threshold=4, detectors="directions"
    )
    assert found["outlier_axes"] == [7, 9]
    assert found["chance_overlap"] == 2 / 60
    ranked = diagnose.privileged_directions(head, rows, [7, 9])
    np.testing.assert_allclose(found["overlap"], ranked.overlap)
    scores = np.asarray(rows @ ranked.directions.T)
    detected = diagnose.concept_detectors(scores, labels[:, None] == np.arange(3))
    assert found["encoded"] == [
        name for name, is_so in zip("abc", detected.encoded, strict=True) if is_so
    ]
    assert found["most_concepts_per_direction"] == detected.per_direction.max()


# --- words


def model_figures(**changed):
    sets = {
        "clean": {"accuracy": 0.8, "kurtosis": 3.5, "lost": []},
        "fog": {"accuracy": 0.5, "kurtosis": 3.4, "lost": ["a.jpg"]},
        "snow": {"accuracy": 0.6, "kurtosis": 3.4, "lost": ["b.jpg"]},
    }
    return {
        "sets": sets,
        "shifted_accuracy": 0.55,
        "outlier_axes": [],
        "importance": [1.0] * 10,
        "enough": 0.2,
    } | changed


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {},
            r"m .*80.00 % .*clean, 55.00 % .* 2 shifted sets .*50.00 % .*fog\. .*kurtosis .*3.50 "
            r"\(Gaussian: 3\); no outlier .*10 directions, 20 % .* on clean within 1 point\.$",
        ),
        ({"enough": 1.0}, "directions, only all .* on clean within 1 point"),
        ({"enough": None}, "directions, none .* on clean within 1 point"),
        ({"outlier_axes": [3, 7]}, "; .*outlier dimensions .*3, 7"),
        (
            {"sets": {"clean": {"accuracy": 0.8, "kurtosis": 3.5, "lost": []}}},
            r"m .*80.00 % on clean\. .*kurtosis",
        ),
        (
            {"sets": dict([*model_figures()["sets"].items()][:2])},
            r"m .*80.00 % on clean and 50.00 % .*fog\. .*kurtosis",
        ),
    ],
)
def test_the_words_of_a_diagnosis(changed, expected):
    first, *others = diagnosis.summary({"m": model_figures(**changed)}, {"values": {}})
    assert re.match(expected if expected.startswith("m ") else f".*{expected}", first)
    assert others[-1].startswith("Not measured: ")
    assert "calibration" in others[-1]
    if not changed:
        assert others[:-1] == ["2 images could not be read: a.jpg, b.jpg."]


def test_why_robustness_was_not_computed():
    said = diagnosis.summary({}, {"reason": "there are no shifted sets"})
    assert said[0] == "Effective robustness was not computed: there are no shifted sets."


def field_figures(**changed):
    field = {"p_value": 0.002, "discrepancy": 0.05, "chance": 0.004, "lost": []}
    field |= {"predicted": [0.75, 0.25, 0.0], "confidence": 0.604}
    return {
        "field": field | changed.pop("field", {}),
        "reference": {"name": "old", "lost": []},
        "classes": ["cat", "dog", "cow"],
    } | changed


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {},
            [
                r"For m .* differ from the reference, old \(p = 0.002; .*12.5 .*\): .*“cat” "
                r"for 75 %.*never “cow”.*confidence of 60 % \(guessing: 33 %\)\.$"
            ],
        ),
        (
            {
                "field": {"p_value": 0.051, "predicted": [0.2, 0.3, 0.5], "lost": ["a.jpg"]},
                "accuracy": 0.6,
                "interval": (0.55, 0.7),
                "labels": 40,
                "labelled": [0.5, 0.3, 0.2],
            },
            [
                r"For m .* do not differ .*the reference, old \(p = 0.051\).*“cow” for 50 %.*"
                r"confidence of 60 % \(guessing: 33 %\)\.$",
                r"1 image could not be read: a.jpg\.$",
                r"Unadapted .*60.00 \[55.00, 70.00\] % .*40 labelled .*, better .*\(50.00 %\)\.$",
            ],
        ),
    ],
)
def test_the_words_of_a_field_check(changed, expected):
    said = diagnosis.expectations("m", field_figures(**changed))
    assert len(said) == len(expected)
    assert all(map(re.match, expected, said))
    assert "never" in said[0] or changed


@pytest.mark.parametrize(
    ("bounds", "than"), [((0.4, 0.49), "worse"), ((0.4, 0.5), "not clearly better")]
)
def test_how_labels_compare_with_the_commonest_class(bounds, than):
    labelled = {"accuracy": 0.45, "interval": bounds, "labels": 1, "labelled": [0.5, 0.3, 0.2]}
    said = diagnosis.expectations("m", field_figures(**labelled))[-1]
    assert f"% on 1 labelled image, {than} than the majority-class" in said


def test_what_a_field_check_leaves_open():
    none = diagnosis.unmeasured(()).split("; ")
    assert none[0].startswith("Not measured: accuracy")
    assert len(none) == 3 and "prompts" in none[-1]
    some = diagnosis.unmeasured(("zero_shot", "tent@1e-4", "batclip")).split("; ")
    assert len(some) == 4 and "learning rates" in some[2]
    assert some[3] == "the adapters tnt, mgtta, mgtta-sgd, mgtta-adam."
    every = diagnosis.unmeasured(diagnosis.ADAPTERS).split("; ")
    assert len(every) == 3 and "learning rates" in every[-1]


def test_every_image_is_in_the_histogram():
    found = {"classes": ["a", "b", "c"], "field": {"predicted": [0.2, 0.7, 0.1]}}
    entropies = {"field": np.full(7, np.log(3) + 1e-6), "reference": np.array([-1e-7, 0.5])}
    left, right = diagnosis.draw_predictions(found, entropies).axes
    assert sum(bar.get_height() for bar in left.patches) == pytest.approx(200)
    assert [bar.get_width() for bar in right.patches] == pytest.approx([70, 20, 10])
    assert [label.get_text() for label in right.get_yticklabels()] == ["b", "a", "c"]


# --- the field check's functions


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def plain_discrepancy(x, y, bandwidth):
    """The definition, sum by sum."""

    def k(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * bandwidth**2))

    n, m = len(x), len(y)
    within = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    others = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + others - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@hypothesis.given(SEEDS)
def test_the_discrepancy_is_its_definition(seed):
    x, y = normal(seed, 9, 4), normal(seed + 1, 6, 4) + 0.5
    both = np.concatenate([x, y])
    distance = pytest.importorskip("scipy.spatial.distance")
    found = diagnose.mmd(x, y, permutations=50)
    assert found.bandwidth == pytest.approx(np.median(distance.pdist(both)), rel=1e-9)
    assert found.squared == pytest.approx(plain_discrepancy(x, y, found.bandwidth), abs=1e-12)
    # the permutations are the estimate for other deals
    rng = np.random.default_rng(0)
    for value in found.permuted[:3]:
        order = rng.permutation(15)
        dealt = np.isin(np.arange(15), order[:9])
        again = diagnose.mmd(both[dealt], both[~dealt], bandwidth=found.bandwidth, permutations=1)
        assert value == pytest.approx(again.squared, abs=1e-12)
    # either set may come first; place and, with the bandwidth, scale are nothing to it
    for a, b in ((y, x), (10 + 3 * x, 10 + 3 * y)):
        other = diagnose.mmd(a, b, permutations=1)
        assert other.squared == pytest.approx(found.squared, abs=1e-9)


def test_the_p_value_finds_what_is_there_and_nothing_else():
    p = [diagnose.mmd(*normal(s, 2, 30, 5), permutations=99).p_value for s in range(99)]
    assert 0 <= np.mean(np.array(p) <= 0.1) <= 0.2  # uniform if nothing is there
    assert 0.4 <= np.mean(p) <= 0.6
    wider = diagnose.mmd(normal(0, 60, 5), 2 * normal(1, 60, 5))
    moved = diagnose.mmd(normal(0, 60, 5), normal(1, 60, 5) + 1)
    assert wider.p_value == moved.p_value == 1 / 501
    assert wider.squared > wider.null_quantile


@pytest.mark.parametrize(("images", "most", "drawn"), [(30, 1000, 30), (90, 1000, 40), (90, 7, 7)])
def test_a_half_of_the_reference_is_the_yardstick(images, most, drawn, monkeypatch):
    sizes = []
    whole = diagnose.target.mmd

    def spy(x, y, **options):
        sizes.append((len(x), len(y)))
        assert not {tuple(row) for row in x} & {tuple(row) for row in y}
        return whole(x, y, **options)

    monkeypatch.setattr(diagnose.target, "mmd", spy)
    field, half = diagnose.mmd_to_reference(normal(0, images, 6) + 1, normal(1, 80, 6), most=most)
    assert sizes == [(drawn, drawn)] * 2
    assert field.bandwidth == half.bandwidth
    assert field.squared > half.squared
    assert field.p_value < half.p_value


@hypothesis.given(SEEDS)
def test_confused_classes_are_counted(seed):
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(5), 40)
    found = diagnose.confused_classes(probabilities)
    counts: dict[tuple[int, int], list[float]] = {}
    for row in probabilities:
        second, first = np.argsort(row)[-2:]
        counts.setdefault((min(first, second), max(first, second)), []).append(
            row[first] - row[second]
        )
    assert len(found.classes) == len(counts)
    doubts = found.shares * (1 - found.margins)
    assert (np.diff(doubts) <= 1e-12).all()
    for pair, share, margin in zip(*found, strict=True):
        margins = counts[tuple(pair)]
        assert share == pytest.approx(len(margins) / 40)
        assert margin == pytest.approx(np.mean(margins))


@hypothesis.given(SEEDS)
def test_the_distance_of_an_image_is_that_of_a_near_one(seed):
    distance = pytest.importorskip("scipy.spatial.distance")
    target, reference = normal(seed, 9, 4), normal(seed + 1, 6, 4)
    every = np.sort(distance.cdist(target, reference), 1)
    for k in (1, 3, 6):
        found = diagnose.neighbour_distances(target, reference, neighbour=k)
        np.testing.assert_allclose(found, every[:, k - 1], rtol=1e-4, atol=1e-3)
    many = np.tile(target, (300, 1))  # in parts
    again = diagnose.neighbour_distances(many, reference, neighbour=6)
    np.testing.assert_allclose(again, np.tile(every[:, -1], 300), rtol=1e-4, atol=1e-3)


def test_the_answers_have_the_order_of_the_source():
    rows, reference = normal(0, 5, 4), normal(1, 20, 4)
    logits = normal(2, 5, 3)
    numbers = np.array([7, 2, 9, 0, 4])
    features = figures.Features(rows, np.zeros(5, int), [], numbers)
    found = figures.image_answers(features, logits, reference)
    order = [3, 1, 4, 0, 2]
    assert found.numbers.tolist() == [0, 2, 4, 7, 9]
    np.testing.assert_array_equal(found.labels, logits.argmax(1)[order])
    entropies = np.asarray(jaxtta.losses.entropy(logits))[order]
    np.testing.assert_allclose(found.entropies, entropies)
    distances = diagnose.neighbour_distances(rows, reference, neighbour=10)
    np.testing.assert_allclose(found.distances, distances[order])
    assert found.least_sure(2).tolist() == np.argsort(-entropies)[:2].tolist()
    few = figures.image_answers(features, logits, reference[:3])  # of which the third is taken
    nearest = diagnose.neighbour_distances(rows, reference[:3], neighbour=3)
    np.testing.assert_allclose(few.distances, nearest[order])


GOOD = normal(0, 6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnose.mmd(GOOD, GOOD[:1]), r"\(6, 4\) and \(1, 4\), expected two"),
        (
            lambda: diagnose.mmd(GOOD, GOOD[:, 1:]),
            r"\(6, 4\) and \(6, 3\), expected t",
        ),
        (lambda: diagnose.mmd(GOOD, GOOD[0]), r"\(6, 4\) and \(4,\), expected two"),
        (lambda: diagnose.mmd(GOOD, np.nan * GOOD), "entries that are not finite"),
        (lambda: diagnose.mmd(0 * GOOD, 0 * GOOD), "the same for most images"),
        (lambda: diagnose.mmd(GOOD, GOOD, bandwidth=0), "bandwidth is 0, expected a"),
        (lambda: diagnose.mmd(GOOD, GOOD, permutations=0), "permutations is 0, exp"),
        (lambda: diagnose.mmd_to_reference(GOOD, GOOD[:3]), r"\(1, 4\) and \(1, 4\), expected"),
        (lambda: diagnose.neighbour_distances(GOOD, GOOD[:, 1:]), r"\(6, 4\) and \(6, 3\), exp"),
        (lambda: diagnose.neighbour_distances(GOOD, GOOD), "neighbour is 10, expected 1 to 6"),
        (lambda: diagnose.neighbour_distances(np.nan * GOOD, GOOD, neighbour=1), "not finite"),
        (lambda: diagnose.confused_classes(GOOD[:, :1]), r"shape \(6, 1\), expected \(images, c"),
        (lambda: diagnose.confused_classes(GOOD[:0]), r"shape \(0, 4\), expected \(images, cl"),
        (lambda: diagnose.confused_classes(np.nan * GOOD), "probabilities are not all in"),
        (lambda: diagnose.confused_classes(np.array([[3.0, 1.0]])), r"not all in \[0, 1\]: jax.nn"),
    ],
)
def test_bad_arrays_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
