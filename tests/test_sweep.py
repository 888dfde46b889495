"""Sweeps that are interrupted, shared, repeated and spoilt."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtta import Adapter, Prediction, data, evaluate
from jaxtta.bootstrap import bootstrap, interval
from jaxtta.evaluate.store import lock, result_path
from jaxtta.models import as_batch


@dataclasses.dataclass
class Images:
    """Twenty small images; those of all domains share `reads`, and the `fatal`-th ends the run."""

    domain: data.Domain
    reads: list
    fatal: int = 0
    stored: str | None = "one"
    labels = np.arange(20, dtype=np.int32) % 3
    class_names = ("a", "b", "c")

    def __len__(self):
        return 20

    def __getitem__(self, number):
        self.reads.append(number)
        if len(self.reads) == self.fatal:
            raise KeyboardInterrupt
        if number == 7:
            raise data.UnreadableImageError("broken")
        rng = np.random.default_rng([number, len(self.domain.corruption)])
        return rng.integers(0, 256, (4, 4, 3), np.uint8)

    def name(self, number):
        return f"{self.domain} {number}"

    def content(self):
        return self.stored


def drifting(rate):
    """An adapter whose predictions depend on everything it has seen."""

    def init(params, key=None):
        return {"mean": jnp.zeros(3), "seen": jnp.zeros((), jnp.int32)}

    def step(params, state, batch):
        batch = as_batch(batch, state["seen"])
        colour = batch.images.mean((1, 2)) / 255
        logits = (colour - state["mean"]) * params["scale"]
        weight = batch.mask[:, None]
        mean = (colour * weight).sum(0) / jnp.maximum(weight.sum(), 1)
        state = {"mean": state["mean"] + rate * mean, "seen": state["seen"] + batch.mask.sum()}
        return state, Prediction(logits, {})

    return lambda model, task: Adapter(init, step)


class Model:
    image_size = 4


ADAPTERS = {"zero_shot": drifting(0.0), "drift": drifting(0.3)}
PARAMS = {"scale": jnp.float32(3)}


def spec_of(
    setting="continual",
    seeds=(1, 2),
    corruptions=("fog", "haze"),
    reads=None,
    fatal=0,
    stored="one",
    **how,
):
    reads = [] if reads is None else reads
    domains = [data.Domain(name, 5) for name in corruptions]
    streams = [
        stream
        for seed in seeds
        for stream in data.make_streams(setting, corruptions, (5,), Images.labels, seed=seed)
    ]
    benchmark = {domain: Images(domain, reads, fatal, stored) for domain in domains}
    return evaluate.Spec(benchmark, streams, None, 6, setting=setting, **how)


def sweep(folder, adapters=ADAPTERS, run=None, **how):
    run = {"progress": False, "about": {}} | (run or {})
    return evaluate.sweep(spec_of(**how), adapters, Model(), PARAMS, folder, **run)


def same(found, expected):
    """The same results, but for times and memory."""
    assert [(r.adapter, r.stream, r.seed) for r in found] == [
        (r.adapter, r.stream, r.seed) for r in expected
    ]
    for one, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one.rows, other.rows)
        assert one.steps["skipped"].equals(other.steps["skipped"])
        assert (one.settings, one.unreadable) == (other.settings, other.unreadable)
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted sweep of each setting: its folder and results."""
    folders = {
        name: tmp_path_factory.mktemp(name) for name in ("continual", "reset_each_shift", "mixed")
    }
    return {name: (folder, sweep(folder, setting=name)) for name, folder in folders.items()}


def test_a_result_has_a_row_for_each_image(whole):
    folder, results = whole["continual"]
    assert [(r.stream, r.seed, r.adapter) for r in results] == [
        ("continual-5", seed, name) for seed in (1, 2) for name in ADAPTERS
    ]
    for result in results:
        assert [domain.corruption for domain in result.domains] == ["fog", "haze"]
        assert result.unreadable == ("fog-5 7", "haze-5 7")
        lost = result.rows[~result.rows["seen"]]
        assert lost["image"].tolist() == [7, 7]
        assert lost["segment"].tolist() == [0, 1]
        np.testing.assert_array_equal(result.rows["label"], Images.labels[result.rows["image"]])
        assert len(result.steps) == 8
        for number in range(2):
            rows = result.segment(number)
            assert rows["image"].tolist() == list(range(20))
            seen = rows[rows["seen"]]
            np.testing.assert_array_equal(seen["top1"], seen["prediction"] == seen["label"])
    assert same(evaluate.load_predictions(folder), results)
    assert same(sweep(None, setting="continual"), results)


def test_scores_of_logits_that_are_not_finite():
    logits = np.array([[1, 2, 0], [np.nan, 0, 1], [np.inf, 0, 1], [0, 0, 0]], np.float32)
    scores = evaluate.score(logits, np.zeros(4, int))
    assert scores["prediction"].tolist() == [1, -1, 0, 0]
    assert np.isfinite(scores["nll"]).tolist() == [True, False, False, True]


# --- interrupted, shared, repeated ---


@given(
    setting=st.sampled_from(["continual", "reset_each_shift", "mixed"]),
    fatal=st.integers(2, 79),
    every=st.integers(1, 3),
)
def test_an_interrupted_sweep_goes_on_and_ends_the_same(
    whole, tmp_path_factory, setting, fatal, every
):
    folder, run = tmp_path_factory.mktemp("cut"), {"checkpoint_every": every}
    with pytest.raises(KeyboardInterrupt):
        sweep(folder, setting=setting, fatal=fatal, reads=[], run=run)
    reads = []
    assert same(sweep(folder, setting=setting, reads=reads, run=run), whole[setting][1])
    # the batches since the checkpoint are lost, the one in hand, and those read ahead
    assert len(reads) < 80 - fatal + 6 * every + 6 * 4
    assert not [*folder.glob("checkpoints/*")]
    reads = []
    assert same(sweep(folder, setting=setting, reads=reads), whole[setting][1])
    assert not reads


def test_an_interrupted_sweep_leaves_no_thread_that_reads():
    """While the error's frames are still held, as where the command waits for its threads."""

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        sweep(None, run={"log": stop})
    assert not [thread for thread in threading.enumerate() if "Pool" in thread.name], caught


@pytest.mark.parametrize(("size", "timed"), [(20, [0]), (10, [1]), (2, [1, 9]), (1, [1, 9, 17])])
def test_one_step_in_eight_is_timed_and_the_first_only_if_alone(size, timed):
    spec = dataclasses.replace(spec_of(setting="reset_each_shift"), batch_size=size)
    for result in evaluate.sweep(spec, ADAPTERS, Model(), PARAMS, progress=False, about={}):
        assert np.flatnonzero(result.steps["seconds"].notna()).tolist() == timed


@given(count=st.integers(1, 5), setting=st.sampled_from(["continual", "reset_each_shift"]))
def test_shards_together_equal_one_run(whole, tmp_path_factory, count, setting):
    folder, reads = tmp_path_factory.mktemp("shards"), []
    for number in range(count):
        part = tmp_path_factory.mktemp("part")
        share = sweep(part, setting=setting, run={"shard": (number, count)})
        assert len(share) == 2 * len(spec_of(setting).streams[number::count])
        shutil.copytree(part, folder, dirs_exist_ok=True)
    assert same(sweep(folder, setting=setting, reads=reads), whole[setting][1])
    assert not reads
    assert same(evaluate.load_predictions(folder), whole[setting][1])


@given(order=st.permutations(["zero_shot", "drift", "other"]), first=st.integers(0, 3))
def test_adapters_do_not_depend_on_each_other(whole, tmp_path_factory, order, first):
    """In another order, or added later."""
    adapters = {name: (ADAPTERS | {"other": drifting(0.1)})[name] for name in order}
    folder = tmp_path_factory.mktemp("order")
    if first:
        sweep(folder, {name: adapters[name] for name in order[:first]})
    results = sweep(folder, adapters)
    assert [r.adapter for r in results] == [*order, *order]
    known = sorted(
        (r for r in results if r.adapter in ADAPTERS),
        key=lambda r: (r.seed, list(ADAPTERS).index(r.adapter)),
    )
    assert same(known, whole["continual"][1])


def test_a_checkpoint_that_does_not_fit_is_not_used(whole, tmp_path, caplog):
    expected = sweep(None, seeds=(1,))

    def cut(name, adapters=ADAPTERS, **how):
        folder = tmp_path / name
        with pytest.raises(KeyboardInterrupt):
            sweep(folder, adapters, {"checkpoint_every": 2}, seeds=(1,), fatal=33, reads=[], **how)
        return folder

    def resume(folder, **how):
        reads = []
        caplog.clear()
        found = sweep(folder, run={"checkpoint_every": 2}, seeds=(1,), reads=reads, **how)
        for one, other in zip(found, expected, strict=True):
            pd.testing.assert_frame_equal(one.rows, other.rows)
        return len(reads) < 40, ": ignored" in caplog.text

    assert resume(cut("whole")) == (True, False)
    assert resume(cut("lacking", {"zero_shot": ADAPTERS["zero_shot"]})) == (False, True)
    folder = cut("settings", settings={"order": "stored"})
    (folder / "settings.json").unlink()
    assert resume(folder) == (False, True)
    folder = cut("torn")
    (file,) = folder.glob("checkpoints/*/step-*")
    file.write_bytes(file.read_bytes()[:-99])
    assert resume(folder) == (False, True)
    # one adapter's result was written before the end, the other's goes on
    folder = cut("half")
    finished = result_path(whole["continual"][0], "zero_shot", "continual-5", 1)
    shutil.copy(finished, folder / "predictions")
    assert resume(folder) == (True, False)


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
    run, reads = {"checkpoint_every": 1, "trust_data": trusted}, []
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, run=run, seeds=(1,), stored=earlier, fatal=33, reads=[])
    sweep(tmp_path, run=run, seeds=(1,), stored=now, reads=reads)
    assert (len(reads) < 40) == goes_on


def test_a_dataset_that_cannot_tell_says_so(tmp_path, caplog):
    sweep(tmp_path, stored=None)
    assert not caplog.text
    sweep(tmp_path, stored=None, fatal=1, reads=[])
    assert "the images have no content()" in caplog.text


# --- what a folder refuses ---


def test_other_settings_are_refused_by_name(tmp_path):
    sweep(tmp_path, settings={"order": "stored", "layout": "a"})
    for how, message in (
        ({"settings": {"order": "stored", "layout": "b"}}, r"streams.layout 'a' \(this run: 'b'\)"),
        ({"settings": {"order": "stored"}}, r"streams.layout 'a' \(this run: None\)"),
        ({"settings": {"order": "stored", "layout": "a", "new": 1}}, "no record of streams.new"),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path}: has results with {message}"):
            sweep(tmp_path, **how)
    with pytest.raises(ValueError, match=r"was made with streams.domains .* streams.images '40, "):
        sweep(tmp_path, settings={"order": "stored", "layout": "a"}, corruptions=("fog",))
    # a file that came from elsewhere, under this folder's settings
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"seed1.safetensors: was made with streams.layout 'a'"):
        sweep(tmp_path, settings={"order": "stored", "layout": "b"})
    for text, message in (("[]", "settings.json: has a list"), ("{", "not valid JSON")):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            sweep(tmp_path)


def test_other_images_are_refused(tmp_path):
    sweep(tmp_path)
    with pytest.raises(ValueError, match="was made from other images"):
        sweep(tmp_path, stored="two")
    sweep(tmp_path, stored="two", run={"trust_data": True}, fatal=1, reads=[])
    sweep(tmp_path, run={"trust_data": True}, seeds=(3,))
    with pytest.raises(ValueError, match=r"was made from other images .* or does not say"):
        sweep(tmp_path, seeds=(3,))


def test_what_one_adapter_is_set_to_concerns_its_own_results_only(tmp_path):
    def run(rate, *names):
        made = {name: evaluate.AdapterSpec(name, name, {}, ADAPTERS[name]) for name in names}
        if "drift" in made:
            function = lambda model, task, rate: drifting(rate)(model, task)  # noqa: E731
            made["drift"] = evaluate.AdapterSpec("drift", "drift", {"rate": rate}, function)
        return sweep(tmp_path, [*made.values()])

    run(0.1, "zero_shot", "drift")
    run(0.2, "zero_shot")
    with pytest.raises(ValueError, match=r"adapter.settings.rate 0\.1 \(this run: 0\.2\)"):
        run(0.2, "zero_shot", "drift")


class Plain:
    """Images without names and content; a classifier without preprocessing runs on them."""

    labels, class_names = Images.labels, Images.class_names

    def __len__(self):
        return 20

    def __getitem__(self, number):
        return np.full((4, 4, 3), 10 * number, np.uint8)


@pytest.mark.parametrize("wrapped", [False, True])
def test_functions_of_one_name_are_told_apart(tmp_path, caplog, wrapped):
    """By what they enclose, or are given; adapters of similar names do not share a file."""
    fog = data.Domain("fog", 5)
    benchmark = data.subset({fog: Plain()}, np.arange(20)) if wrapped else {fog: Plain()}
    streams = data.make_streams("mixed", ("fog",), (5,), Images.labels)
    spec = evaluate.Spec(benchmark, streams, None, 6, settings={"of": Path("x")})

    def run(first, second):
        adapters = {"a b": drifting(first), "a_b": partial(make_drifting, lr=second)}
        options = {"about": {"data": tmp_path}, "progress": False}
        return evaluate.sweep(spec, adapters, Model(), PARAMS, tmp_path, **options)

    results = run(0.1, 0.2)
    assert same(evaluate.load_predictions(tmp_path), results)
    assert same(run(0.1, 0.2), results)
    assert "the images have no content()" in caplog.text
    with pytest.raises(ValueError, match=r"adapter.function.step.rate 0\.1 \(this run: 0\.3\)"):
        run(0.3, 0.2)
    with pytest.raises(ValueError, match=r"adapter.function.lr 0\.2 \(this run: 0\.3\)"):
        run(0.1, 0.3)
    assert "preprocessing" not in evaluate.about(Model())


@pytest.mark.parametrize(
    ("changes", "adapters", "message"),
    [
        ({}, {}, "one or more adapters of distinct names, not \\[\\]"),
        ({"streams": ()}, ADAPTERS, "one or more streams"),
        ({"streams": 2}, ADAPTERS, "streams of distinct names.*continual-5 of seed 1"),
        ({"batch_size": 0}, ADAPTERS, "batch_size is 0"),
    ],
)
def test_sweeps_of_nothing_are_refused(changes, adapters, message):
    spec = spec_of()
    if changes.get("streams") == 2:
        changes = {"streams": [*spec.streams, *spec.streams]}
    with pytest.raises(ValueError, match=message):
        evaluate.sweep(dataclasses.replace(spec, **changes), adapters, Model(), PARAMS)


def test_a_damaged_file_is_computed_again(whole, tmp_path, caplog):
    shutil.copytree(whole["continual"][0], tmp_path, dirs_exist_ok=True)
    paths = sorted((tmp_path / "predictions").iterdir())
    content = paths[0].read_bytes()
    flipped = bytearray(content)
    flipped[-9] ^= 1
    other = Path(shutil.copy(whole["mixed"][0] / "settings.json", tmp_path / "other")).read_bytes()
    for damaged, message in (
        (content[:-99], "is damaged"),
        (bytes(flipped), "was changed after it was written"),
        (other, "is damaged"),
        (b"", "is damaged"),
    ):
        paths[0].write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            evaluate.load_predictions(tmp_path)
        caplog.clear()
        assert same(sweep(tmp_path), whole["continual"][1])
        assert message in caplog.text and "recomputing" in caplog.text
    shutil.copy(paths[0], paths[1])
    with pytest.raises(ValueError, match=r"was made with streams.images .*choose another folder"):
        sweep(tmp_path)


def test_folders_that_hold_no_predictions(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: has no predictions"):
        evaluate.load_predictions(tmp_path)
    (tmp_path / "cells").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: has results of an earlier version"):
        sweep(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        sweep(tmp_path / "file" / "out")


def test_two_runs_on_one_folder_are_refused(tmp_path):
    sweep(tmp_path)
    held = partial(lock, tmp_path, json.loads((tmp_path / "settings.json").read_text()))
    message = rf"another run is writing to this folder \(process {os.getpid()} on \w+\)"
    with held((0, 1)), pytest.raises(ValueError, match=message):
        sweep(tmp_path)
    sweep(tmp_path)
    with held((0, 2)), pytest.raises(ValueError, match=message), held((0, 2)):
        pass
    with held((0, 2)), held((1, 2)):
        pass
    with held((1, 2)), pytest.raises(ValueError, match=message):  # of one stream, two would write
        sweep(tmp_path)
    sweep(tmp_path)


def test_a_full_disk_loses_nothing_that_was_finished(whole, tmp_path):
    setting = "reset_each_shift"
    sweep(tmp_path, setting=setting, seeds=(1,))
    before = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            sweep(tmp_path, setting=setting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in (tmp_path / "predictions").iterdir()) == before
    assert same(sweep(tmp_path, setting=setting), whole[setting][1])


def test_a_stream_without_a_readable_image_is_an_error(tmp_path):
    spec = spec_of()
    stream = data.stream_of("lost", [data.Domain("fog", 5)], np.array([7]), 1)
    spec = dataclasses.replace(spec, streams=[stream])
    with pytest.raises(ValueError, match="none of the images could be read, such as fog-5 7"):
        evaluate.sweep(spec, ADAPTERS, Model(), PARAMS, tmp_path, progress=False, about={})


def test_an_adapter_that_cuts_its_own_views_is_given_the_originals(tmp_path):
    class Originals(Images):
        def __getitem__(self, number):
            return np.full((6, 5, 3), 10 * number, np.uint8)

    def reader(model, task):
        def step(params, state, batch):
            # the image's number, read off its original on the canvas
            valid = jnp.arange(6) < batch.sizes[:, :1]
            number = (batch.images[..., 2, 0] * valid).sum(1) // (10 * batch.sizes[:, 0])
            return state, Prediction(jax.nn.one_hot(number % 3, 3), {})

        return Adapter(lambda params, key: {"seen": jnp.zeros(())}, step)

    reader.needs_originals = True
    fog = data.Domain("fog", 5)
    streams = data.make_streams("mixed", ("fog",), (5,), Images.labels)
    spec = evaluate.Spec({fog: Originals(fog, [])}, streams, None, 6)
    run = {"progress": False, "about": {}}
    # a function that is called like an adapter is none of it
    for name, make in (("reader", partial(reader)), ("tnt", reader)):
        adapters = {"zero_shot": drifting(0.0), name: make}
        zero, read = evaluate.sweep(spec, adapters, Model(), PARAMS, **run)
        assert read.top1.all() and not zero.top1.all()
        assert read.settings["adapter"]["canvas"] == 6  # the longest side
        assert "canvas" not in zero.settings["adapter"]


# --- gains and intervals ---


def outcomes(setting, who):
    """Random predictions of one of two adapters, of which some are not seen or not finite."""
    labels = np.arange(60) % 5
    (stream,) = data.make_streams(setting, ("fog", "haze"), (5,), labels)
    rng, (segment, image) = np.random.default_rng(who), stream.items.T
    logits = rng.normal(size=(120, 5)).astype(np.float32)
    logits[np.arange(120), labels[image]] += 1 + who * 0.4
    logits[7] = np.nan
    if who:
        logits[9, 2] = np.inf
    seen = rng.random(120) > 0.1
    scores = evaluate.score(logits, labels[image])
    rows = {"segment": segment, "image": image, "label": labels[image], "seen": seen}
    rows |= {name: np.where(seen, values, 0) for name, values in scores.items()}
    rows = pd.DataFrame(rows)
    return evaluate.Predictions(
        *(str(who), stream.name, 1, setting, stream.segments, tuple("abcde"), rows),
        *(pd.DataFrame({"seconds": [1.0], "skipped": [False]}), (), {}, {}, 0.0),
    )


@pytest.mark.parametrize(
    ("setting", "together", "apart"),
    [
        (
            "continual",
            (0.15686274509803927, 0.05048004800480049, 0.26668316831683164),
            (0.1530769230769231, 0.02652884615384619, 0.28041346153846153),
        ),
        (
            "mixed",
            (0.06862745098039214, -0.04901960784313725, 0.18627450980392152),
            (0.06518375241779492, -0.0760154738878143, 0.20019342359767897),
        ),
    ],
)
def test_gains_are_those_of_version_0_1(setting, together, apart):
    """Its figures for the same outcomes."""
    zero, other = outcomes(setting, 0), outcomes(setting, 1)
    parts = [[result.segment(number) for number in range(2)] for result in (other, zero)]
    for datasets, expected in (((), together), (["fog", "haze"], apart)):
        gain = evaluate.paired_gain(*parts, datasets)
        np.testing.assert_allclose([gain.top1, *gain.interval], expected, rtol=1e-12)
    unseen = parts[1][0].assign(seen=False)
    assert evaluate.paired_gain(parts[0][:1], [unseen]) is None


def test_intervals_of_means_are_those_of_version_0_1():
    intervals = evaluate.mean_intervals(outcomes("continual", 1).segment(0))
    expected = {
        "top1": (0.40307017543859686, 0.6495614035087716),
        "top5": (1, 1),
        "nll": (1.0049695430123913, 1.4136288794954972),
        "brier": (0.5029920203395054, 0.690676389237134),
    }
    assert intervals.keys() == expected.keys()
    for name, bounds in expected.items():
        np.testing.assert_allclose(intervals[name], bounds, rtol=1e-6)
    nothing = outcomes("continual", 1).segment(0).assign(seen=False)
    assert set(evaluate.mean_intervals(nothing).values()) == {None}


def test_the_bootstrap_agrees_with_the_textbook():
    rng = np.random.default_rng(0)
    flags = rng.random((1000, 2)) < (0.7, 0.6)  # few kinds of images
    values = rng.normal(size=(1000, 2))  # every image its own
    for columns in (flags.astype(float), values):
        means = bootstrap(columns, np.ones_like(columns), 4000)
        error = columns.std(0) / np.sqrt(len(columns))
        np.testing.assert_allclose(means.mean(0), columns.mean(0), atol=4 * error.max() / 63)
        np.testing.assert_allclose(means.std(0), error, rtol=0.05)
        paired = (columns[:, 0] - columns[:, 1]).std() / np.sqrt(len(columns))
        np.testing.assert_allclose((means[:, 0] - means[:, 1]).std(), paired, rtol=0.05)
        low, high = interval(means[:, 0])
        np.testing.assert_allclose((high - low) / 2, 1.96 * error[0], rtol=0.06)


def test_images_that_were_not_seen_do_not_count():
    seen = np.repeat([1.0, 0.0], 100)[:, None]
    right = seen * (np.arange(200) < 50)[:, None]
    assert bootstrap(right, seen).mean() == pytest.approx(0.5, abs=0.02)  # 0.25 if they counted
    assert interval(bootstrap(right * 0, seen * 0)[:, 0]) is None


# --- tuning, tracking, checkpoints ---


def make_drifting(model, task, lr=0.1):
    return drifting(lr)(model, task)


def test_a_learning_rate_is_chosen_on_the_extra_corruptions_only(tmp_path):
    name, rates = f"{__name__}:make_drifting", np.array([0.5, 2.0, 0.1])
    given = (name, rates, spec_of("reset_each_shift", corruptions=data.IMAGENET_C_EXTRA))
    run = {"progress": False, "about": {}}
    choice = evaluate.tune_learning_rate(*given, Model(), PARAMS, tmp_path, **run)
    assert [*choice.accuracies] == sorted(rates)
    assert choice.accuracies[choice.rate] == max(choice.accuracies.values())
    assert "speckle_noise" in choice.chosen_on and "20 images each" in choice.chosen_on
    assert evaluate.has_rate("mgtta:optimizer=sgd")
    assert not any(map(evaluate.has_rate, ("tent:lr=1", "tnt", "zero_shot", name)))
    assert evaluate.with_rate("tent", 1e-4) == "tent:lr=0.0001"
    assert evaluate.with_rate("mgtta:optimizer=sgd", 0.1) == "mgtta:optimizer=sgd,lr=0.1"
    # validation runs are no part of a folder's results
    sweep(tmp_path / "out")
    shutil.copytree(tmp_path / "predictions", tmp_path / "out" / "validation" / "predictions")
    assert {r.adapter for r in evaluate.load_predictions(tmp_path / "out")} == set(ADAPTERS)


@pytest.mark.filterwarnings("ignore")
def test_results_are_logged_to_tensorboard_and_wandb(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # the session that another test has started ignores these
    lines = []
    log = evaluate.loggers(["tensorboard", "wandb"], tmp_path, {"output": tmp_path})
    monkeypatch.setattr(wandb.run, "log", lines.append)
    results = sweep(tmp_path, run={"log": log})
    assert len(lines) == 8  # two adapters, two domains, two seeds
    rows = results[3].segment(1)
    line = {"adapter": "drift", "stream": "continual-5", "seed": 2, "domain": "haze-5"}
    assert lines[-1].items() >= line.items()
    assert lines[-1]["top1"] == pytest.approx(rows["top1"][rows["seen"]].mean())
    wandb.finish()
    assert [*tmp_path.glob("wandb/offline-run-*/*.wandb")]
    for name in ADAPTERS:
        (file,) = tmp_path.glob(f"tensorboard/{name}/events*")
        assert b"haze-5/top1" in file.read_bytes()
    sweep(tmp_path, run={"log": log})
    assert len(lines) == 8
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb"):
        evaluate.loggers(["wandb"], tmp_path, {})


def test_trees_of_any_shape_survive_a_checkpoint(tmp_path):
    """On another device too, with empty nodes, keys, and more in the file than is wanted."""
    assert evaluate.restore_checkpoint(tmp_path) is None
    state = optax.adamw(1e-3).init({"w": jnp.arange(3.0), "half": jnp.ones(2, jnp.bfloat16)})
    tree = {"state": state, "key": jax.random.key(1), "more": {"a": np.arange(2)}}
    tree["array"] = jax.device_put(jnp.arange(3.0), jax.devices()[3])
    evaluate.save_checkpoint(tmp_path, 9, state)
    evaluate.save_checkpoint(tmp_path, 10, tree, note=["note"])
    assert len([*tmp_path.iterdir()]) == 1
    blank = {"state": jax.tree.map(jnp.zeros_like, state), "key": jax.random.key(0)}
    like = blank | {"array": jnp.zeros(3)}
    step, found, note = evaluate.restore_checkpoint(tmp_path, like)
    assert (step, note) == (10, ["note"])
    assert jax.tree.structure(found) == jax.tree.structure(like)
    assert (found["key"] == tree["key"]).all()
    for name in ("state", "array"):
        jax.tree.map(np.testing.assert_array_equal, found[name], tree[name])
    _, arrays, _ = evaluate.restore_checkpoint(tmp_path)
    np.testing.assert_array_equal(arrays["more"]["a"], [0, 1])
    with pytest.raises(ValueError, match=r"array is \[\[3\], 'float32'\], expected \[\[4\], "):
        evaluate.restore_checkpoint(tmp_path, like | {"array": jnp.zeros(4)})
    with pytest.raises(ValueError, match="it lacks other"):
        evaluate.restore_checkpoint(tmp_path, like | {"other": jnp.zeros(4)})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"remove it to start .*step-10.safetensors: is damaged"):
        evaluate.restore_checkpoint(tmp_path)


# --- processes ---


def children(pid):
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_command_goes_on_where_it_was(short, tmp_path):
    """kill -9 in the middle of a stream, Ctrl-C while it compiles, then the same command."""
    command = [sys.executable, "-m", "jaxtta", "sweep", "--adapters", "zero_shot", "batclip"]
    command += ["--corruptions", "fog", "brightness", "--batch-size", "5", "--max-images", "60"]
    command += ["--setting", "continual", "--checkpoint-every", "4", "--model", str(short)]

    def call(folder, **environment):
        arguments = [*command, "--output", str(tmp_path / folder)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(arguments, env=os.environ | environment, **pipes)

    def wait(done, seconds=240):
        deadline = time.time() + seconds
        while not done():
            assert time.time() < deadline
            time.sleep(0.02)

    killed = call("cut", TQDM_DISABLE="1")
    wait(lambda: [*tmp_path.glob("cut/checkpoints/*/step-*")] or killed.poll() is not None)
    readers = children(killed.pid)
    assert readers
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait(lambda: not any(map(alive, readers)), 20)  # its reading processes do not outlive it
    assert not [*tmp_path.glob("cut/predictions/*")]
    (checkpoint,) = tmp_path.glob("cut/checkpoints/*/step-*")
    # nothing compiled is kept, and the bar says what is compiled
    stopped = call("cut", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"))
    said = b""
    while b"compiling batclip" not in said:
        said += os.read(stopped.stderr.fileno(), 4096) or pytest.fail(said.decode())
    stopped.send_signal(signal.SIGINT)
    said += stopped.communicate()[1]
    assert stopped.returncode == 130
    assert b"compiling batclip" in said.split(b"\r")[-1]  # the bar when it was closed
    assert b"interrupted" in said
    assert checkpoint.exists()
    for folder in ("cut", "whole"):
        process = call(folder, TQDM_DISABLE="1")
        out, _ = process.communicate()
        assert process.returncode == 0
        assert (tmp_path / folder / "table.txt").read_text().strip() in out.decode()
    cut, whole = (evaluate.load_predictions(tmp_path / folder) for folder in ("cut", "whole"))
    for one, other in zip(cut, whole, strict=True):
        pd.testing.assert_frame_equal(one.rows, other.rows, atol=1e-6)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_callback_drops_comes_again(monkeypatch, capsys, own_threads):
    """Python swallows what is raised in a weak reference's callback; Ctrl-C must still stop."""
    import weakref

    from jaxtta import cli

    @dataclasses.dataclass
    class Options:
        pass

    class Referent:
        pass

    swallowed = []

    def main(options):
        referent = Referent()
        dropped = weakref.ref(referent, lambda _: signal.raise_signal(signal.SIGINT))
        del referent
        swallowed.append(dropped() is None)
        time.sleep(60)

    monkeypatch.setattr(sys, "argv", ["script"])
    monkeypatch.setattr(cli, "_INSIST", 0.1)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(Options, main, None)
    assert swallowed == [True]
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
