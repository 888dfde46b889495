"""Sweeps over several devices give what one device gives."""

import os
import socket
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax.experimental import multihost_utils
from test_sweep import PARAMS, Images, Model, drifting

import jaxtta
from jaxtta import assets, data, evaluate, models, optim
from jaxtta.evaluate import placement


def noisy(model, task):
    """An adapter that carries a random key and a number in bfloat16."""
    init, step = drifting(0.3)(model, task)

    def noisy_init(params, key):
        return init(params, key) | {"key": key, "half": jnp.ones((), jnp.bfloat16)}

    def noisy_step(params, state, batch):
        key, own = jax.random.split(state["key"])
        after, prediction = step(params, state, batch)
        noise = jax.random.normal(own, prediction.logits.shape) * state["half"]
        after |= {"key": key, "half": state["half"] * 0.9}
        return after, prediction._replace(logits=prediction.logits + noise)

    return jaxtta.Adapter(noisy_init, noisy_step)


ADAPTERS = {"zero_shot": drifting(0.0), "drift": drifting(0.3), "noisy": noisy}
SIZES = (20, 3, 11, 20, 7)  # 4, 1, 2, 4 and 2 batches of 6


def sweep(folder=None, adapters=ADAPTERS, fatal=0, reads=None, stored="one", size=6, **run):
    """A sweep over five streams of different lengths."""
    fog = data.Domain("fog", 5)
    streams = [
        data.stream_of(f"stream-{number}", [fog], np.arange(count), 1)
        for number, count in enumerate(SIZES)
    ]
    benchmark = {fog: Images(fog, [] if reads is None else reads, fatal, stored)}
    spec = evaluate.Spec(benchmark, streams, None, size)
    run = {"progress": False, "about": {}} | run
    return evaluate.sweep(spec, adapters, Model(), PARAMS, folder, **run)


def alike(found, expected):
    """The same figures, but for times and memory."""
    assert [(r.adapter, r.stream) for r in found] == [(r.adapter, r.stream) for r in expected]
    for one, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one.rows, other.rows, rtol=1e-5, atol=1e-6)
        assert one.steps["skipped"].equals(other.steps["skipped"])
        assert (one.settings, one.unreadable) == (other.settings, other.unreadable)
    return True


@pytest.fixture(scope="module")
def one():
    """One device's results, and the images in the order in which it reads them."""
    reads = []
    return sweep(reads=reads), reads


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_streams_of_unequal_length_step_at_once(one, devices):
    expected, order = one
    reads = []
    assert alike(sweep(reads=reads, devices=devices), expected)
    assert sorted(reads) == sorted(order)  # each once for both adapters


@pytest.mark.parametrize("devices", [2, 3, 6])
def test_a_batch_is_split_over_devices(one, devices):
    assert alike(sweep(devices=devices, split="batch"), one[0])


@pytest.mark.parametrize(
    ("before", "after"), [(8, 2), (8, 1), (2, 8), (1, 3), (2, "batch"), ("batch", 2)]
)
def test_a_run_goes_on_with_any_number_of_devices(one, tmp_path, before, after):
    def how(devices):
        split = {"devices": 2, "split": "batch"} if devices == "batch" else {"devices": devices}
        return split | {"checkpoint_every": 1}

    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, fatal=46, reads=[], **how(before))
    reads = []
    assert alike(sweep(tmp_path, reads=reads, **how(after)), one[0])
    assert 16 <= len(reads) < 30  # of 61
    assert not [*tmp_path.glob("checkpoints/*")]


def test_checkpoints_of_different_ages_step_together(one, tmp_path):
    """One device has finished a stream and half of the next; the others start."""
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, fatal=30, reads=[], checkpoint_every=1)
    assert len([*tmp_path.glob("predictions/*")]) == 2 * len(ADAPTERS)
    results = sweep(tmp_path, devices=8, checkpoint_every=1)
    assert alike(results, one[0])
    assert [result.about["devices"] for result in results[:: len(ADAPTERS)]] == [1, 1, 8, 8, 8]


def test_an_adapter_that_is_added_later_has_all_streams(one, tmp_path):
    """Also of streams that the others had not finished."""
    zero = {"zero_shot": ADAPTERS["zero_shot"]}
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path, zero, fatal=30, reads=[])
    assert alike(sweep(tmp_path, devices=3), one[0])


@pytest.mark.parametrize("split", ["streams", "batch"])
def test_one_devices_results_are_found(one, tmp_path, split):
    sweep(tmp_path)
    reads = []
    assert alike(sweep(tmp_path, reads=reads, devices=2, split=split), one[0])
    assert not reads


def test_idle_devices_are_shown(capsys):
    sweep(progress=True, devices=3)
    err = capsys.readouterr().err
    assert "stream-0 seed 1 and 2 more:" in err
    assert "stream-0 seed 1 and 1 more, 1 of 3 devices idle:" in err  # stream-1 is at its end
    assert "stream-3 seed 1, 2 of 3 devices idle:" in err
    sweep(progress=True, devices=2, split="batch")
    assert "idle" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"devices": 9}, "devices is 9, expected 1 to 8, as many as there are"),
        ({"devices": 0}, "devices is 0, expected 1 to 8"),
        ({"devices": 4, "split": "batch"}, "batch_size is 6, expected a multiple of the 4 devices"),
        ({"split": "images"}, "split is 'images', expected streams or batch"),
    ],
)
def test_devices_that_are_not_to_be_had_are_refused(tmp_path, run, said):
    with pytest.raises(ValueError, match=said):
        sweep(tmp_path / "out", **run)
    assert not (tmp_path / "out").exists()


def test_a_state_without_arrays_is_stepped_too():
    def make(model, task):
        init, step = drifting(0.0)(model, task)
        blank = init(PARAMS)
        return jaxtta.Adapter(
            lambda params, key: (), lambda params, _, batch: ((), step(params, blank, batch)[1])
        )

    run = {"checkpoint_every": 1, "devices": 3}
    assert alike(sweep(adapters={"a": make}, **run), sweep(adapters={"a": make}))


def test_a_state_that_cannot_be_stacked_is_refused():
    def make(model, task):
        init, step = drifting(0.3)(model, task)
        return jaxtta.Adapter(lambda params, key: init(params) | {"name": "x"}, step)

    with pytest.raises(TypeError, match="name of the adapter's state is a str, expected an array"):
        sweep(adapters={"a": make}, devices=2)


def test_weights_are_copied_to_the_devices_once(monkeypatch):
    placed = []
    original = placement.parallel.replicate
    monkeypatch.setattr(
        placement.parallel, "replicate", lambda *given: placed.append(1) or original(*given)
    )
    sweep(devices=3)
    assert len(placed) == 1


# --- the named adapters ---

NAMED = ("zero_shot", "tent", "batclip", "tnt")


@pytest.fixture(scope="module")
def named(short):
    """Sweep four corruptions of bundled images."""
    model, params = jaxtta.load(short)
    clean = data.open_dataset("folder", assets.IMAGES)
    shown = ("fog", "snow", "brightness", "contrast")
    benchmark = data.open_benchmark("folder", assets.IMAGES, model.preprocessing, ())
    streams = data.make_streams("reset_each_shift", shown, (1,), clean.labels, limit=20)
    task = evaluate.task_for(model, clean.class_names, ("a photo of a {}.",))
    spec = evaluate.Spec(benchmark, streams, task, 8)
    phi, _ = optim.load_mgg(assets.PHI)
    images = [np.stack([clean[number] for number in range(0, 200, 20)])]
    given = {
        "optimizer": optim.meta_gradient_generator(phi, 1e-3),
        "statistics": models.feature_statistics(model, params, images),
    }
    mgtta = evaluate.AdapterSpec("mgtta", "", {}, partial(jaxtta.adapters.mgtta, **given))
    adapters = [*map(evaluate.parse_adapter, NAMED), mgtta]

    def run(devices, split="streams"):
        how = {"devices": devices, "split": split, "progress": False, "about": {}}
        config = evaluate.AdapterConfig(tnt=jaxtta.adapters.TNTConfig(views=8, steps=1))
        return evaluate.sweep(spec, adapters, model, params, config=config, **how)

    return run, run(1)


@pytest.mark.parametrize(
    ("devices", "split"),
    [
        (8, "streams"),
        pytest.param(3, "streams", marks=pytest.mark.slow),
        (2, "batch"),
        pytest.param(8, "batch", marks=pytest.mark.slow),
    ],
)
def test_a_table_does_not_depend_on_devices(named, devices, split):
    run, expected = named
    results = run(devices, split)
    same = []
    for found, one in zip(results, expected, strict=True):
        if found.adapter == "zero_shot" and split == "streams":
            pd.testing.assert_frame_equal(found.rows, one.rows, check_exact=True)
        if found.adapter == "tnt" and split == "streams":  # exact too but for these tests' flags
            pd.testing.assert_frame_equal(found.rows, one.rows, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.rows["nll"], one.rows["nll"], rtol=1e-3)
        assert abs(found.top1.mean() - one.top1.mean()) <= 0.001
        same.append(found.rows["prediction"] == one.rows["prediction"])
        assert found.steps["skipped"].equals(one.steps["skipped"])
    assert np.mean(same) >= 0.999
    adapted = [one.rows["nll"] for one in expected if one.stream == "fog-1"]
    assert not np.allclose(adapted[0], adapted[1]) and not np.allclose(adapted[0], adapted[2])


# --- several hosts ---


def test_hosts_that_cannot_work_together_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for run in ({"devices": 8}, {"devices": 2, "split": "batch"}):
        with pytest.raises(ValueError, match=r"2 hosts with split .* expected split batch and all"):
            sweep(tmp_path, **run)
    found = np.array([[0, 13], [2, 12]])  # results, and batches that are left
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: found)
    with pytest.raises(ValueError, match=f"{tmp_path}: hosts do not find the same, expected a sha"):
        sweep(tmp_path, size=8, devices=8, split="batch")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_hosts_share_each_batch(run_jaxtta, short, tmp_path, devices):
    command = ["sweep", "--corruptions", "fog", "snow", "--max-images", "20", "--batch-size", "8"]
    command += ["--model", str(short), "--adapters", "batclip", "tnt:steps=1,views=8", "--output"]
    assert run_jaxtta(*command, tmp_path / "one", "--devices", 1)[0] == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}")
    hosts = []
    for number in range(2):
        own = {"JAX_PROCESS_ID": str(number), "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": flags}
        own |= {"JAX_COORDINATOR_ADDRESS": address, "TQDM_DISABLE": "1"}
        arguments = [sys.executable, "-m", "jaxtta", *command, str(tmp_path / "two")]
        arguments += ["--split", "batch", "--checkpoint-every", "1"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        hosts.append(subprocess.Popen(arguments, env=os.environ | own, **pipe))
    said = [host.communicate(timeout=300)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], said
    assert ["report.html" in text for text in said] == [True, False]  # one writes
    found, expected = (evaluate.load_predictions(tmp_path / name) for name in ("two", "one"))
    assert [result.about["devices"] for result in found] == [2 * devices] * 4
    for result, one in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(result.rows, one.rows, rtol=1e-3, atol=1e-5)
