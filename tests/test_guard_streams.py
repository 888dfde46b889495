"""The streams of the guard's experiment."""

import dataclasses
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import EXPERIMENTS

from jaxtta import data, io
from jaxtta.adapters.guard import Policy

sys.path.insert(0, str(EXPERIMENTS))
import guard_streams

IMAGES = 30
NAMES = ("clean", "fog", "snow", "frost", "contrast", "pixelate", "brightness")


@pytest.fixture(scope="module")
def benchmark():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(200) % 5).astype(np.int32)
    known = labels, ("a", "b", "c", "d", "e")
    images = {name: rng.integers(0, 256, (200, 4, 4, 3), np.uint8) for name in NAMES}
    stored = {data.Domain(name): data.ArrayDataset(x, *known) for name, x in images.items()}
    return guard_streams.with_frames(stored)


def wrong_for_odd(domain, images):
    return images % 2 == 0


@pytest.fixture(scope="module")
def streams(benchmark):
    return guard_streams.make_streams(benchmark, IMAGES, 1, wrong_for_odd)


def test_every_kind_has_distinct_images_of_known_domains(benchmark, streams):
    assert tuple(streams) == guard_streams.KINDS
    for made in streams.values():
        assert len({stream.name for stream in made}) == len(made)
        data.Batches(benchmark, tuple(made), 8, lambda image: np.asarray(image))
        for stream in made:
            assert len(np.unique(stream.items, axis=0)) == len(stream.items)
            assert stream.items[:, 0].max() < len(stream.segments)
    shifts = len(NAMES) - 1
    assert [len(x.items) for x in streams["friendly"]] == [IMAGES] * shifts
    lengths = {kind: sum(len(x.items) for x in made) for kind, made in streams.items()}
    assert lengths["continual"] == shifts * IMAGES
    for kind in ("clean", "alternating", "mixed", "sorted", "label_shift", "wrong_first"):
        assert lengths[kind] == 5 * IMAGES
    assert lengths["half_noise"] == lengths["half_blank"] == 10 * IMAGES


def test_kinds_are_what_their_names_say(benchmark, streams):
    labels = data.labels_of(benchmark)

    def shown(kind):
        return [labels[stream.items[:, 1]] for stream in streams[kind]]

    assert {len(set(x)) for x in shown("one_class")} == {1}
    assert {len(set(x)) for x in shown("three_classes")} == {3}
    assert all((np.diff(x) != 0).sum() == 4 for x in shown("sorted"))
    assert all(
        np.bincount(x).max() > 2 * np.bincount(x, minlength=5).min() for x in shown("long_tail")
    )
    for stream in streams["wrong_first"]:
        assert (np.diff(wrong_for_odd(None, stream.items[:, 1]).astype(int)) >= 0).all()
    for stream in streams["noise_first"]:
        first = stream.items[:, 0] == 1
        assert first[: guard_streams.BURST].all()
        assert first.sum() == guard_streams.BURST
    (turns,) = streams["alternating"]
    assert set(np.flatnonzero(np.diff(turns.items[:, 0])) + 1) == {64, 128}
    blank = benchmark[guard_streams.BLANK][3]
    assert blank.min() == blank.max()
    assert benchmark[guard_streams.NOISE][3].std() > 50


def test_seeds_are_reproducible_and_differ(benchmark, streams):
    again = guard_streams.make_streams(benchmark, IMAGES, 1, wrong_for_odd)
    other = guard_streams.make_streams(benchmark, IMAGES, 2, wrong_for_odd)
    for kind, made in streams.items():
        for one, same in zip(made, again[kind], strict=True):
            assert np.array_equal(one.items, same.items)
        assert not np.array_equal(made[0].items, other[kind][0].items)
    assert streams["sorted"][0].segments != other["sorted"][0].segments
    with pytest.raises(ValueError, match="unknown stream 'odd'"):
        guard_streams.make_streams(benchmark, IMAGES, 1, wrong_for_odd, ["odd"])


@pytest.mark.parametrize("script", ["guard.py", "guard_canary.py"])
def test_help_teaches(run_script, script):
    code, out, _ = run_script(script, "--help")
    assert code == 0
    assert f"python experiments/{script}" in out.replace("\n", " ")


@pytest.fixture
def folder(tmp_path):
    """A few stored images of three classes, under four corruptions."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "labels.npy", np.arange(24) % 3)
    for name in NAMES[:5]:
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (24, 32, 32, 3), np.uint8))
    return tmp_path


@pytest.mark.slow
def test_the_experiment_goes_on_and_its_labels_are_simulated(run_script, short, folder, tmp_path):
    run = ("--data", folder, "--output", tmp_path / "run", "--class-names", "cat", "dog", "ship")
    few = ("--images", "8", "--batch-size", "4", "--model", short)
    kinds = ("--streams", "noise_first", "clean", "wrong_first")
    options = (*run, *few, *kinds, "--adapters", "tent:lr=0.1", "guarded:tent:lr=0.1")
    assert run_script("guard.py", *options)[0] == 0
    rows = pd.read_csv(tmp_path / "run" / "results.csv")
    assert rows.groupby("stream")["adapter"].count().to_dict() == dict.fromkeys(kinds[1:], 3)
    burst = rows[rows["stream"] == "noise_first"]
    assert set(burst["images"]) == {4 * 8}  # frames do not count
    assert (burst["low"] <= burst["gain"]).all()
    assert (burst["gain"] <= burst["high"]).all()
    zero_shot = rows[rows["adapter"] == "zero_shot"]
    assert (zero_shot["gain"] == 0).all()
    assert (zero_shot["ece"] == zero_shot["ece_zero_shot"]).all()
    files = {x: x.stat().st_mtime_ns for x in (tmp_path / "run" / "predictions").iterdir()}
    assert run_script("guard.py", *options)[0] == 0
    again = {x: x.stat().st_mtime_ns for x in (tmp_path / "run" / "predictions").iterdir()}
    assert files == again  # nothing is computed twice
    pd.testing.assert_frame_equal(rows, pd.read_csv(tmp_path / "run" / "results.csv"))
    code, _, err = run_script("guard.py", *options, "--images", "6")
    assert code == 1
    assert "choose another --output" in err
    path = next(x for x in files if "guarded" in x.name)
    assert io.load_arrays(path)[1]["policy"] == dataclasses.asdict(Policy())


def test_what_is_stored_is_not_taken_for_something_else(tmp_path):
    import guard

    path, identity = tmp_path / "stored.safetensors", {"adapter": "tent", "policy": {"share": 0.5}}
    assert guard.stored(path, identity) is None
    io.save_arrays(path, {"logits": np.ones(2)}, identity)
    assert guard.stored(path, identity)["logits"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="is of another model, policy or other images"):
        guard.stored(path, identity | {"policy": {"share": 0.4}})


def test_a_label_that_decides_is_found():
    import guard_canary

    bets, sign = guard_canary.stop_tables(0.05)
    assert not bets[0, 4]
    assert bets[0, 10]
    assert sign[0, 5] == pytest.approx(0.5**5 / 0.05)
    rng, label = np.random.default_rng(0), np.zeros(320, int)
    classes = {"good": np.eye(3)[label], "bad": np.eye(3)[label + 1]}
    known = {"label": label, "counted": np.ones(320, bool)}
    good, bad = ({"logits": classes[x], **known} for x in ("good", "bad"))
    assert guard_canary.review(bad, good, bets, rng) < 100
    assert guard_canary.review(good, bad, bets, rng) == np.inf
    assert guard_canary.review(good, good, bets, rng) == np.inf
    lost = np.ones((3, 128), bool)
    assert guard_canary.drawn(~lost, lost, sign, rng) == guard_canary.EVERY
    assert guard_canary.drawn(~lost, ~lost, sign, rng) == np.inf
    gains, about = guard_canary.facts(bad, good, 0.05)
    assert about["gain"] == pytest.approx(-1)
    found = guard_canary.summary([64, np.inf], gains, good["counted"])
    assert (found["begins"], found["soon"], found["ever"], found["median"]) == (0, 0.5, 0.5, 64)
    assert found["gain_stopped"] == pytest.approx(-(64 + 320) / 640)
    assert guard_canary.needed(0.0, 1.0, 0.05) == 5
    assert guard_canary.needed(0.04, 0.06, 0.05) > 1000
