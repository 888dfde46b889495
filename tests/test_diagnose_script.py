"""diagnose_model.py, run as a user runs it, and the functions of its field check."""

import json
import re
import runpy
import shutil
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_scripts import EXPERIMENTS, run_script  # noqa: F401 (a fixture)

import jaxtta
from jaxtta import assets, data, diagnose, metrics
from jaxtta.sweep import diagnosis

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
    jaxtta.clip.save(folder, model, params)
    return folder


def features_of(model, params, corruption):
    """Features and labels of the pictures that the script draws."""
    source = data.open_source("folder", assets.PICTURES, model.preprocessing)
    (stream,) = data.make_streams(
        "reset_each_shift", (corruption,), (1,), source.labels, seed=1, limit=40
    )
    numbers = stream.items[:, 1]
    images = np.stack([source.read(stream.segments[0], n, 1) for n in numbers.tolist()])
    features = model.encode_image(params, model.normalize(images))
    return np.asarray(jaxtta.clip.unit(features)), source.labels[numbers]


def test_figures_are_those_of_direct_calls(run_script, tmp_path, embedded):  # noqa: F811
    model, params = embedded
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
        *("--shifted", f"own=folder={assets.PICTURES}", "--output", tmp_path / "a"),
    )
    assert code == 0
    found = result_of(tmp_path / "a")
    name = assets.MODEL.name
    mine, other = (found["models"][n] for n in (name, "noisy"))
    clean, labels = features_of(model, params, "clean")
    fog, _ = features_of(model, params, "fog")
    task = jaxtta.clip.zero_shot_task(model, CLASSES)
    head = model.class_embeddings(params, model.prompts(task))

    outliers = diagnose.outlier_features(clean)
    assert mine["outlier_axes"] == outliers.axes.tolist()
    ranked = diagnose.privileged_directions(head, clean, outliers.axes)
    np.testing.assert_allclose(mine["importance"], ranked.importance, rtol=1e-4)
    np.testing.assert_allclose(mine["overlap"], ranked.overlap, atol=1e-5)
    assert mine["spread"] == pytest.approx(float(ranked.spread), rel=1e-4)
    gap = float(diagnose.modality_gap(clean, head))
    assert mine["modality_gap"] == pytest.approx(gap, rel=1e-4)
    present = np.unique(labels)
    detected = diagnose.concept_detectors(clean, labels[:, None] == present, 0.5)
    assert mine["encoded"] == [CLASSES[label] for label in present[detected.encoded]]
    assert mine["most_concepts_per_direction"] == detected.per_direction.max()
    for key, rows in (("clean", clean), ("fog-1", fog), ("own", clean)):
        figures = mine["sets"][key]
        right = metrics.top_k(rows @ head.T, labels)
        kept = diagnose.pruned_accuracy(head, ranked.directions, rows, labels, (0.1, 0.5, 1))
        assert figures["kurtosis"] == pytest.approx(diagnose.activation_kurtosis(rows), rel=1e-4)
        assert figures["accuracy"] == pytest.approx(float(right.mean()))
        np.testing.assert_allclose(figures["pruned"], kept)
        assert figures["interval"][0] <= figures["accuracy"] <= figures["interval"][1]
        assert figures["pictures"] == 40
    shifted = [mine["sets"][key] for key in ("fog-1", "own")]
    assert mine["shifted_accuracy"] == pytest.approx(np.mean([s["accuracy"] for s in shifted]))
    np.testing.assert_allclose(mine["shifted_pruned"], np.mean([s["pruned"] for s in shifted], 0))
    line = diagnose.fit_logit_line([0.6, 0.9], [0.2, 0.5])
    accuracies = [[m["base_accuracy"], m["shifted_accuracy"]] for m in (mine, other)]
    robust = diagnose.effective_robustness(*np.transpose(accuracies), line)
    np.testing.assert_allclose([*found["robustness"]["values"].values()], robust)
    (pair,) = found["pairs"]
    rows, _ = features_of(*jaxtta.clip.load(noisy), "clean")
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
        for file in sorted((assets.PICTURES / name).iterdir())[:20]:
            shutil.copyfile(file, root / folder / file.name)
    (root / "flat" / "torn.jpg").write_bytes(file.read_bytes()[:300])
    return root


def test_field_without_labels(run_script, tmp_path, field, embedded):  # noqa: F811
    model, params = embedded
    code, out, _ = run_script(
        *(SCRIPT, *QUICK, "--field", field / "flat", "--class-names", "cat", "dog", "ship"),
        *("--output", tmp_path / "a"),
    )
    assert code == 0
    (found,) = result_of(tmp_path / "a")["models"].values()
    assert "accuracy" not in found and "trial" not in found
    assert (found["field"]["pictures"], found["reference"]["pictures"]) == (20, 40)
    pictures = [jaxtta.data.open_picture(f) for f in sorted((field / "flat").iterdir())[:20]]
    images = model.normalize(model.preprocess(pictures))
    rows = np.asarray(jaxtta.clip.unit(model.encode_image(params, images)))
    task = jaxtta.clip.zero_shot_task(model, ["cat", "dog", "ship"])
    logits = model.forward(params, model.prompts(task), model.preprocess(pictures)).logits
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
    assert f"1 pictures could not be read: {field / 'flat' / 'torn.jpg'}." in out
    assert "accuracy, and whether an adapter helps (both need labels)" in out
    assert "Not measured" in (tmp_path / "a" / "report.html").read_text()


def test_field_with_labels(run_script, tmp_path, field):  # noqa: F811
    code, out, _ = run_script(
        *(SCRIPT, *QUICK, "--field", field / "labelled", "--trial", "zero_shot", "batclip"),
        *("--class-names", "dogs=dog", "ships=ship", "felines=cat", "--output", tmp_path / "a"),
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
    assert "Unadapted it gets" in out and "adapters, 10 steps of 4 pictures: On field" in out
    assert "Not measured: whether later pictures" in out


def arrays(folder, images, labels):
    folder.mkdir()
    np.save(folder / "clean.npy", images)
    np.save(folder / "labels.npy", labels)
    return folder


NOISE = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)


def test_pictures_and_models_without_a_diagnosis(run_script, tmp_path, embedded):  # noqa: F811
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
        (("--data", same), "on clean: the features are the same for all pictures"),
        (("--data", cats), "on clean: all pictures are of class cat, expected two or more"),
        (
            ("--data", good, "--models", blind),
            "blind on clean: 20 of 20 pictures have features that are constant or not finite",
        ),
        (
            ("--data", good, "--models", headless),
            f"{headless}/model.safetensors: does not fit its config.json: visual_projection/kernel",
        ),
        (
            ("--data", good, "--models", tmp_path),
            f"{tmp_path}: has no config.json",
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--field", "{labelled}", "--class-names", "cat", "dogs"), "class folder is none of"),
        (("--field", "{labelled}", "--class-names", "a=x"), "felines: class folder is none|dogs: "),
        (("--field", "{flat}"), "--class-names has 0 classes, expected at least two"),
        (("--field", "{flat}", "--class-names", "cat"), "has 1 classes, expected at least two"),
        (("--field", "{empty}", "--class-names", "a", "b"), "empty: folder without pictures"),
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
            "has pictures beside its class folders, a.jpg for one",
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
        (("--references", "a", "b"), "--references has 'a', which is none of --models"),
        (("--references", str(assets.MODEL)), "--references needs at least two models"),
        (("--reference-points", "{points}"), "points.csv: an accuracy is 60.0, expected a number"),
        (("--reference-points", "{words}"), "words.json: expected base and shifted of each model"),
        (("--shifted", "r"), "--shifted has 'r', expected NAME=LAYOUT=FOLDER"),
        (("--corruptions", "smog"), "unknown corruption 'smog'"),
        (
            ("--layout", "arrays", "--severity", "3"),
            "arrays has severities of its own, leave --sev",
        ),
        (("--limit", "1"), "--limit is 1, expected at least 2"),
    ],
)
def test_bad_input_is_one_sentence(run_script, tmp_path, field, options, message):  # noqa: F811
    places = {name: tmp_path / name for name in ("empty", "one", "both", "nowhere")}
    places |= {"labelled": field / "labelled", "flat": field / "flat"}
    for name in ("empty", "one/cat", "both/cat", "both/dog"):
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


def test_synthetic_features_are_timed(run_script, tmp_path):  # noqa: F811
    code, out, _ = run_script(SCRIPT, "--synthetic", "2000", "--output", tmp_path)
    assert code == 0
    assert "2000 pictures, 512 features, 1000 classes: " in out
    found = json.loads((tmp_path / "synthetic.json").read_text())
    assert found["outlier_axes"] == [0]  # as planted
    assert found["seconds"] > 0
    assert 0.5 < found["accuracy"] < 1


def test_robustness_is_measured_from_reference_models_or_the_reason_is_said():
    robustness_of = runpy.run_path(str(EXPERIMENTS / SCRIPT))["robustness_of"]
    options = types.SimpleNamespace(models=("x/a", "x/b", "x/c"), references=("x/a", "x/c"))
    accuracies = {"a": (0.6, 0.2), "b": (0.8, 0.7), "c": (0.9, 0.5)}

    def results(**changed):
        return {
            name: dict(zip(("base_accuracy", "shifted_accuracy"), pair, strict=True))
            for name, pair in (accuracies | changed).items()
        }

    found = robustness_of(options, results(), [])
    line = diagnose.fit_logit_line([0.6, 0.9], [0.2, 0.5])
    expected = diagnose.effective_robustness([0.6, 0.8, 0.9], [0.2, 0.7, 0.5], line)
    assert [*found["values"].values()] == pytest.approx(expected.tolist())
    assert (found["values"]["a"], found["values"]["c"]) == pytest.approx((0, 0))
    for changed, message in (
        ({"b": (1.0, 0.7)}, "an accuracy is 1.0, expected a number between 0 and 1"),
        ({"c": (0.6, 0.5)}, "at least two reference points of different base accuracies"),
        (dict.fromkeys("abc", (0.6, None)), "there are no shifted sets"),
    ):
        assert message in robustness_of(options, results(**changed), [])["reason"]
    options.references = ()
    assert "takes models that are not robust" in robustness_of(options, results(), [])["reason"]


def test_every_picture_is_in_the_histogram():
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
    found = diagnose.mean_discrepancy(x, y, permutations=50)
    assert found.bandwidth == pytest.approx(np.median(distance.pdist(both)), rel=1e-9)
    assert found.squared == pytest.approx(plain_discrepancy(x, y, found.bandwidth), abs=1e-12)
    # the permutations are the estimate for other deals
    rng = np.random.default_rng(0)
    for value in found.permuted[:3]:
        order = rng.permutation(15)
        dealt = np.isin(np.arange(15), order[:9])
        again = diagnose.mean_discrepancy(
            both[dealt], both[~dealt], bandwidth=found.bandwidth, permutations=1
        )
        assert value == pytest.approx(again.squared, abs=1e-12)
    # either set may come first; place and, with the bandwidth, scale are nothing to it
    for a, b in ((y, x), (10 + 3 * x, 10 + 3 * y)):
        other = diagnose.mean_discrepancy(a, b, permutations=1)
        assert other.squared == pytest.approx(found.squared, abs=1e-9)


def test_the_p_value_finds_what_is_there_and_nothing_else():
    p = [
        diagnose.mean_discrepancy(*normal(s, 2, 30, 5), permutations=99).p_value for s in range(99)
    ]
    assert 0 <= np.mean(np.array(p) <= 0.1) <= 0.2  # uniform if nothing is there
    assert 0.4 <= np.mean(p) <= 0.6
    wider = diagnose.mean_discrepancy(normal(0, 60, 5), 2 * normal(1, 60, 5))
    moved = diagnose.mean_discrepancy(normal(0, 60, 5), normal(1, 60, 5) + 1)
    assert wider.p_value == moved.p_value == 1 / 501
    assert wider.squared > wider.by_chance


@pytest.mark.parametrize(
    ("pictures", "most", "drawn"), [(30, 1000, 30), (90, 1000, 40), (90, 7, 7)]
)
def test_a_half_of_the_reference_is_the_yardstick(pictures, most, drawn, monkeypatch):
    sizes = []
    whole = diagnose.field.mean_discrepancy

    def spy(x, y, **options):
        sizes.append((len(x), len(y)))
        assert not {tuple(row) for row in x} & {tuple(row) for row in y}
        return whole(x, y, **options)

    monkeypatch.setattr(diagnose.field, "mean_discrepancy", spy)
    field, half = diagnose.field_discrepancy(
        normal(0, pictures, 6) + 1, normal(1, 80, 6), most=most
    )
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


GOOD = normal(0, 6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagnose.mean_discrepancy(GOOD, GOOD[:1]), r"\(6, 4\) and \(1, 4\), expected two"),
        (
            lambda: diagnose.mean_discrepancy(GOOD, GOOD[:, 1:]),
            r"\(6, 4\) and \(6, 3\), expected t",
        ),
        (lambda: diagnose.mean_discrepancy(GOOD, GOOD[0]), r"\(6, 4\) and \(4,\), expected two"),
        (lambda: diagnose.mean_discrepancy(GOOD, np.nan * GOOD), "entries that are not finite"),
        (lambda: diagnose.mean_discrepancy(0 * GOOD, 0 * GOOD), "the same for most pictures"),
        (lambda: diagnose.mean_discrepancy(GOOD, GOOD, bandwidth=0), "bandwidth is 0, expected a"),
        (lambda: diagnose.mean_discrepancy(GOOD, GOOD, permutations=0), "permutations is 0, exp"),
        (lambda: diagnose.field_discrepancy(GOOD, GOOD[:3]), r"\(1, 4\) and \(1, 4\), expected"),
        (lambda: diagnose.confused_classes(GOOD[:, :1]), r"shape \(6, 1\), expected \(pictures, c"),
        (lambda: diagnose.confused_classes(GOOD[:0]), r"shape \(0, 4\), expected \(pictures, cl"),
        (lambda: diagnose.confused_classes(np.nan * GOOD), "probabilities are not all finite"),
    ],
)
def test_bad_arrays_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
