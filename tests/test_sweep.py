"""Sweeps that are interrupted, shared, repeated and spoilt."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtta import Adapter, Prediction, data, evaluate
from jaxtta.evaluate.bootstrap import bootstrap, interval
from jaxtta.models import as_batch
from jaxtta.models.preprocess import Preprocessing

SCRIPT = Path(__file__).parents[1] / "experiments" / "corruption_sweep.py"


class Source:
    """Twenty small images; reading the `fatal`-th time ends the run."""

    labels = np.arange(20, dtype=np.int32) % 3
    class_names = ("a", "b", "c")
    preprocess = Preprocessing(4)

    def __init__(self, fatal=None):
        self.fatal, self.reads = fatal, 0

    def check(self, domain):
        pass

    def name(self, domain, number):
        return f"{domain} {number}"

    def read(self, domain, number, seed):
        self.reads += 1
        if self.reads == self.fatal:
            raise KeyboardInterrupt
        if number == 7:
            raise data.UnreadableImageError("broken")
        rng = np.random.default_rng([number, domain.severity, len(domain.corruption), seed])
        return rng.integers(0, 256, (4, 4, 3), np.uint8)

    def read_both(self, domain, number, seed):
        original = np.full((6, 5, 3), 10 * number, np.uint8)
        return self.read(domain, number, seed), original


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

    return Adapter(init, step)


ADAPTERS = {"zero_shot": drifting(0.0), "drift": drifting(0.3)}
PARAMS = {"scale": jnp.float32(3)}


def go(folder, source=None, adapters=ADAPTERS, setting="continual", seeds=(1, 2), **options):
    source = source or Source()
    streams = [
        stream
        for seed in seeds
        for stream in data.make_streams(setting, ("fog", "haze"), (5,), source.labels, seed=seed)
    ]
    return evaluate.run(
        adapters,
        PARAMS,
        data.Batches(source, tuple(streams), 6),
        evaluate.Results(folder, options.pop("settings", {"setting": setting})),
        setting=setting,
        workers=0,
        progress=False,
        **options,
    )


def figures(cells):
    """The cells without what no two runs share."""
    timing = ("images_per_second", "peak_memory_gb")
    return [{k: v for k, v in cell.items() if k not in timing} for cell in cells]


def test_a_cell_says_everything(tmp_path):
    cells = go(tmp_path)
    assert [(c["stream"], c["seed"], c["adapter"]) for c in cells] == [
        ("continual-5", seed, name) for seed in (1, 2) for name in ADAPTERS
    ]
    for cell in cells:
        assert [s["corruption"] for s in cell["segments"]] == ["fog", "haze"]
        assert cell["images"] == 38
        for segment in cell["segments"]:
            assert segment["images"] == 19
            assert segment["unreadable"] == [f"{segment['corruption']}-5 7"]
            low, high = segment["intervals"]["top1"]
            assert low <= segment["top1"] <= high
            seen, right = evaluate.outcomes(segment)
            assert np.flatnonzero(~seen).tolist() == [7]
            assert right.sum() / seen.sum() == pytest.approx(segment["top1"])
            assert np.sum(segment["reliability"]["count"]) == 19
            if cell["adapter"] == "zero_shot":
                assert segment["gain"] is None
        count, top1 = cell["running"][-1]
        assert count == 38
        assert top1 == pytest.approx(np.mean([s["top1"] for s in cell["segments"]]))
    zero, drift = cells[:2]
    for a, b in zip(drift["segments"], zero["segments"], strict=True):
        assert a["gain"]["top1"] == pytest.approx(a["top1"] - b["top1"])
        low, high = a["gain"]["interval"]
        assert low <= a["gain"]["top1"] <= high


def test_a_checkpoint_that_does_not_fit_is_not_used(tmp_path, caplog):
    def cut(folder, **options):
        with pytest.raises(KeyboardInterrupt):
            go(folder, Source(33), seeds=(1,), checkpoint_every=2, **options)

    expected = go(tmp_path / "whole", seeds=(1,))
    # without one of the adapters
    cut(tmp_path / "a", adapters={"zero_shot": ADAPTERS["zero_shot"]})
    assert figures(go(tmp_path / "a", seeds=(1,), checkpoint_every=2)) == figures(expected)
    assert ": ignored" in caplog.text
    # of other settings, whose record somebody removed
    cut(tmp_path / "b", settings={"batch_size": 7})
    (tmp_path / "b" / "settings.json").unlink()
    assert figures(go(tmp_path / "b", seeds=(1,), checkpoint_every=2)) == figures(expected)
    # torn
    cut(tmp_path / "c")
    for file in (tmp_path / "c" / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    caplog.clear()
    assert figures(go(tmp_path / "c", seeds=(1,), checkpoint_every=2)) == figures(expected)
    assert ": ignored" in caplog.text
    # one adapter's cell was written before the end, the other's goes on
    cut(tmp_path / "d")
    drift = sorted((tmp_path / "whole" / "cells").glob("zero_shot*"))[0]
    shutil.copyfile(drift, tmp_path / "d" / "cells" / drift.name)
    source = Source()
    resumed = go(tmp_path / "d", source, seeds=(1,), checkpoint_every=2)
    assert figures(resumed) == figures(expected)
    assert source.reads < 40


@pytest.mark.parametrize("setting", ["continual", "reset_each_shift", "mixed"])
@pytest.mark.parametrize("fatal", [14, 33, 61])
def test_an_interrupted_sweep_goes_on_and_ends_the_same(tmp_path, setting, fatal):
    expected = go(tmp_path / "whole", setting=setting)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", Source(fatal), setting=setting, checkpoint_every=2)
    source = Source()
    resumed = go(tmp_path / "cut", source, setting=setting, checkpoint_every=2)
    assert figures(resumed) == figures(expected)
    assert source.reads < 80 - fatal + 2 * 6 + 6  # two batches are lost, and the one in hand
    assert not list((tmp_path / "cut" / "checkpoints").glob("*"))
    untouched = Source(fatal=1)
    assert figures(go(tmp_path / "cut", untouched, setting=setting)) == figures(expected)


def test_two_workers_together_equal_one(tmp_path):
    expected = go(tmp_path / "one", setting="reset_each_shift")
    for number in range(2):
        share = go(tmp_path / "two", setting="reset_each_shift", worker=(number, 2))
        assert len(share) == 4
    together = go(tmp_path / "two", Source(fatal=1), setting="reset_each_shift")
    assert figures(together) == figures(expected)


def test_an_adapter_that_cuts_its_own_views_is_given_the_originals(tmp_path):
    def step(params, state, batch):
        # the image's number, read off its original; the plain image knows nothing of it
        valid = jnp.arange(8) < batch.sizes[:, :1]
        number = (batch.images[..., 2, 0] * valid).sum(1) // (10 * batch.sizes[:, 0])
        return state, Prediction(jax.nn.one_hot(number % 3, 3), {})

    source = Source()
    streams = data.make_streams("mixed", ("fog",), (5,), source.labels)
    batches = data.Batches(source, tuple(streams), 6, canvas=8)
    adapters = ADAPTERS | {"reader": Adapter(lambda params, key: {"seen": jnp.zeros(())}, step)}
    cells = evaluate.run(
        *(adapters, PARAMS, batches, evaluate.Results(tmp_path, {})),
        from_originals=("reader",),
        workers=0,
        progress=False,
    )
    assert [cell["segments"][0]["images"] for cell in cells] == [19] * 3
    assert cells[2]["segments"][0]["top1"] == 1
    assert cells[0]["segments"][0]["top1"] < 1
    with pytest.raises(ValueError, match=r"reader .*canvas"):
        evaluate.run(
            *(adapters, PARAMS, data.Batches(source, tuple(streams), 6)),
            evaluate.Results(tmp_path / "b", {}),
            from_originals=("reader",),
        )


def test_an_adapter_can_be_added_later(tmp_path):
    expected = go(tmp_path / "at once")
    go(tmp_path / "later", adapters={"zero_shot": ADAPTERS["zero_shot"]})
    assert figures(go(tmp_path / "later")) == figures(expected)


def test_a_folder_of_other_settings_is_refused(tmp_path):
    go(tmp_path, settings={"batch_size": 6, "model": "a"})
    with pytest.raises(ValueError, match=r"results with model 'a' \(this run: 'b'\)"):
        go(tmp_path, settings={"batch_size": 6, "model": "b"})
    # a cell that came from elsewhere, under this folder's settings
    (tmp_path / "settings.json").write_text('{"batch_size": 6, "model": "b"}')
    with pytest.raises(ValueError, match=r"was made with model 'a' \(this run: 'b'\)"):
        go(tmp_path, settings={"batch_size": 6, "model": "b"})
    for text, message in (("[]", "no settings"), ("{", "JSON")):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            go(tmp_path, settings={"batch_size": 6, "model": "b"})


def test_what_one_adapter_is_set_to_concerns_its_own_cells_only(tmp_path):
    def run(rate, adapters=ADAPTERS):
        source = Source()
        streams = data.make_streams("mixed", ("fog",), (5,), source.labels)
        batches = data.Batches(source, tuple(streams), 6)
        own = {"drift": {"learning_rate": rate}}
        results = evaluate.Results(tmp_path, {"batch_size": 6}, {}, own)
        return evaluate.run(adapters, PARAMS, batches, results, workers=0, progress=False)

    run(0.1)
    run(0.2, {"zero_shot": ADAPTERS["zero_shot"]})
    with pytest.raises(ValueError, match=r"learning_rate 0\.1 \(this run: 0\.2\)"):
        run(0.2)


def test_a_torn_file_is_computed_again_and_an_edited_one_refused(tmp_path, caplog):
    expected = go(tmp_path)
    path = sorted((tmp_path / "cells").iterdir())[0]
    content = path.read_text()
    path.write_text(content[:500])
    assert figures(go(tmp_path)) == figures(expected)
    assert f"{path}: is corrupt" in caplog.text
    path.write_text("[]")
    assert figures(go(tmp_path)) == figures(expected)
    cell = json.loads(content)
    copied = path.with_name(path.name.replace("seed1", "seed2"))
    copied.write_text(content)
    with pytest.raises(ValueError, match="is the cell of another stream"):
        go(tmp_path)
    copied.unlink()
    go(tmp_path)
    cell["segments"][0]["top1"] = 0.99
    path.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match="was changed after it was written"):
        go(tmp_path)


def test_two_runs_on_one_folder_are_refused(tmp_path):
    results = evaluate.Results(tmp_path, {"setting": "continual"})
    with results.claim(), pytest.raises(ValueError, match="another run is writing"):
        go(tmp_path)
    with results.claim((0, 2)), pytest.raises(ValueError, match="another run is writing"):
        go(tmp_path, worker=(0, 2))
    with results.claim((0, 2)), pytest.raises(ValueError, match="another run is writing"):
        go(tmp_path, worker=(0, 3))
    with results.claim((0, 2)):
        go(tmp_path, worker=(1, 2))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        go(tmp_path / "file" / "out")


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path):
    expected = go(tmp_path / "whole", setting="reset_each_shift")
    go(tmp_path / "full", setting="reset_each_shift", seeds=(1,))
    before = sorted(p.name for p in (tmp_path / "full" / "cells").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            go(tmp_path / "full", setting="reset_each_shift")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in (tmp_path / "full" / "cells").iterdir()) == before
    assert figures(go(tmp_path / "full", setting="reset_each_shift")) == figures(expected)


def test_predictions_are_saved_image_by_image(tmp_path):
    cells = go(tmp_path, save_predictions=True, seeds=(1,))
    saved = np.load(tmp_path / "predictions" / "drift--continual-5--seed1.npz")
    for number, segment in enumerate(cells[1]["segments"]):
        chosen = (saved["segment"] == number) & saved["seen"]
        assert saved["top1"][chosen].mean() == pytest.approx(segment["top1"])
        right = saved["prediction"][chosen] == Source.labels[saved["image"][chosen]]
        np.testing.assert_array_equal(right, saved["top1"][chosen])


def test_a_learning_rate_is_chosen_on_validation_corruptions_only(tmp_path):
    source = Source()

    def batches(corruptions):
        streams = data.make_streams("reset_each_shift", corruptions, (1,), source.labels)
        return data.Batches(source, tuple(streams), 6)

    rates = (0.1, 0.5, 2.0)
    choice = evaluate.choose_learning_rate(
        *("drift", drifting, rates, PARAMS, batches(data.VALIDATION)),
        *(evaluate.Results(tmp_path, {}),),
        workers=0,
        progress=False,
    )
    assert set(choice.accuracies) == set(rates)
    assert choice.accuracies[choice.rate] == max(choice.accuracies.values())
    assert "speckle_noise" in choice.chosen_on
    with pytest.raises(ValueError, match=r"speckle_noise.*not on fog"):
        evaluate.choose_learning_rate(
            *("drift", drifting, rates, PARAMS, batches(("fog",))),
            *(evaluate.Results(tmp_path / "b", {}),),
        )


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
    means = bootstrap(right, seen)
    assert means.mean() == pytest.approx(0.5, abs=0.02)  # 0.25 if they counted as wrong
    assert np.isnan(bootstrap(right * 0, seen * 0)).all()
    assert interval(bootstrap(right * 0, seen * 0)[:, 0]) is None


def children(pid):
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in lists for child in path.read_text().split()]


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_a_killed_script_goes_on_where_it_was(short, tmp_path):
    """The real thing: kill -9 in the middle of a stream, then the same command."""
    command = [sys.executable, str(SCRIPT), "--adapters", "zero_shot", "batclip", "--limit", "60"]
    command += ["--corruptions", "fog", "brightness", "--batch-size", "5", "--setting", "continual"]
    command += ["--model", str(short)]
    environment = os.environ | {"TQDM_DISABLE": "1"}

    def call(folder, every="4", **options):
        return subprocess.Popen(
            [*command, "--checkpoint-every", every, "--output", str(tmp_path / folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            **options,
        )

    killed = call("cut")
    deadline = time.time() + 240
    while not list((tmp_path / "cut").glob("checkpoints/*/[0-9]*")):
        assert killed.poll() is None, "it ended before its first checkpoint"
        assert time.time() < deadline
        time.sleep(0.02)
    readers = children(killed.pid)
    assert readers
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    deadline = time.time() + 20
    while any(alive(pid) for pid in readers):  # its reading processes do not outlive it
        assert time.time() < deadline
        time.sleep(0.1)
    assert not list((tmp_path / "cut" / "cells").iterdir())
    stopped = call("cut", stderr=subprocess.PIPE)
    for line in stopped.stderr:
        if "/24" in line:  # the bar stands before the first step
            break
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate()
    assert stopped.returncode == 130
    assert "interrupted" in err
    tables = []
    for folder in ("cut", "whole"):
        process = call(folder)
        out, _ = process.communicate()
        assert process.returncode == 0
        tables.append((tmp_path / folder / "table.txt").read_text())
        assert tables[-1].strip() in out
    assert tables[0] == tables[1]
    for path in (tmp_path / "whole" / "cells").iterdir():
        a, b = (
            json.loads((tmp_path / folder / "cells" / path.name).read_text())["segments"]
            for folder in ("cut", "whole")
        )
        for one, other in zip(a, b, strict=True):
            assert one["correct"] == other["correct"]
            for name in ("top1", "top5", "nll", "brier", "ece"):
                assert one[name] == pytest.approx(other[name], abs=1e-6)


def test_states_of_any_shape_survive(tmp_path):
    """Typed optimiser states with empty nodes come back as they were."""
    from jaxtta.evaluate.checkpoint import Checkpoints

    stream = data.make_streams("mixed", ("fog",), (1,), np.zeros(4, int))[0]
    import optax

    state = optax.adamw(1e-3).init({"w": jnp.arange(3.0)})
    moved = jax.tree.map(lambda x: x + 1, state)
    records = {"a": evaluate.Record.empty(stream, 2)}
    records["a"].seen[:2] = True
    checkpoints = Checkpoints(tmp_path / "c", 1, "this")
    checkpoints.save(1, {"a": moved}, records)
    states, empty = {"a": state}, {"a": evaluate.Record.empty(stream, 2)}
    assert checkpoints.restore(states, empty) == 1
    jax.tree.map(np.testing.assert_array_equal, states["a"], moved)
    assert jax.tree.structure(states["a"]) == jax.tree.structure(moved)
    np.testing.assert_array_equal(empty["a"].seen, [True, True, False, False])
    assert checkpoints.restore({"b": state}, {"b": empty["a"]}) == 0
    assert not (tmp_path / "c").exists()


def test_a_saved_step_knows_no_devices_and_a_damaged_one_is_named(tmp_path):
    """So that what one machine saved another one reads."""
    folder = tmp_path / "steps"
    assert evaluate.restore_step(folder) is None
    array = jax.device_put(jnp.arange(3.0), jax.devices()[3])
    evaluate.save_step(folder, 2, {"deep": {"a": array}}, ["note"])
    step, arrays, note = evaluate.restore_step(folder)
    assert (step, note) == (2, ["note"])
    np.testing.assert_array_equal(arrays["deep"]["a"], [0, 1, 2])
    assert not [*folder.rglob("_sharding")]
    for path in (folder / "2" / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(ValueError, match="steps: cannot be read, remove it"):
        evaluate.restore_step(folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_a_callback_drops_comes_again(monkeypatch, capsys):
    """Python swallows what is raised in a weak reference's callback; Ctrl-C must still stop."""
    import weakref

    from jaxtta.cli import script

    @dataclasses.dataclass
    class Options:
        debug: bool = False

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
    monkeypatch.setattr(script, "_INSIST", 0.1)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    with pytest.raises(SystemExit) as stopped:
        script.run_script(Options, main, None)
    assert swallowed == [True]
    assert stopped.value.code == 130
    assert "interrupted" in capsys.readouterr().err
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
