"""The experiments that are programs of their own."""

import json

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import EXPERIMENTS, errors_in
from PIL import Image

import jaxtta
from jaxtta import assets, data, evaluate
from jaxtta.evaluate.predictions import BATCH, IMAGE
from jaxtta.optim import project_out


@pytest.mark.parametrize(
    "script", ["pretrain_tiny_clip.py", "protect_batclip.py", "leaderboard.py"]
)
def test_help_teaches(run_script, script):
    code, out, _ = run_script(script, "--help")
    assert code == 0
    assert f"python experiments/{script}" in out.replace("\n", " ")


@pytest.mark.slow
def test_a_small_clip_is_trained_and_loads(run_script, tmp_path):
    options = [
        *("pretrain_tiny_clip.py", "--train", assets.IMAGES, "--test", assets.IMAGES),
        *("--max-images", "40", "--epochs", "2", "--batch", "20", "--output", tmp_path / "model"),
        *("--layers", "1", "1"),
    ]
    code, out, _ = run_script(*options)
    assert code == 0
    assert "test_accuracy" in out
    model, params = jaxtta.load(tmp_path / "model")
    adapter = jaxtta.adapters.zero_shot(model, jaxtta.zero_shot_task(model, ["cat", "dog"]))
    images = [Image.fromarray(data.open_dataset("folder", assets.IMAGES)[n]) for n in (0, 1)]
    state, shown = adapter.init(params), model.preprocess(images)
    _, prediction = jax.jit(adapter.step)(params, state, shown)
    assert prediction.logits.shape == (2, 2)
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert len(record["loss"]) == len(record["test_accuracy"]) == 2
    assert run_script(*options)[0] == 1  # an earlier result is not replaced
    code, out, _ = run_script(*options[:-4], tmp_path / "odd", "--learning-rate", "1e30")
    assert code == 1
    assert len(out.splitlines()) <= 2  # the table's head and the first epoch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nowhere"),
        (["--train", assets.IMAGES, "--batch", "0"], "--batch is 0, expected at least 1"),
        (["--train", assets.IMAGES, "--max-images", "20"], "positive decay_steps"),
    ],
)
def test_bad_options_of_training(run_script, tmp_path, options, message):
    given = ("--train", "nowhere", "--test", assets.IMAGES, "--output", tmp_path / "model")
    code, _, err = run_script("pretrain_tiny_clip.py", *given, *options)
    assert (code, errors_in(err)) == (1, 1)
    assert message in err


def test_what_protection_costs_and_keeps(run_script, short, tmp_path, monkeypatch):
    options = ["--max-images", "20", "--batch-size", "10", "--protect-images", "6"]
    options += ["--corruptions", "fog", "--ranks", "2", "6", "--model", short]
    options += ["--learning-rate", "1e-2", "--workers", "0", "--output", tmp_path / "a"]
    protected, bases = set(), []
    real = data.stream_of

    def remember(name, domains, images, seed):
        protected.update(images.tolist())
        return real(name, domains, images, seed)

    with monkeypatch.context() as patch:
        patch.setattr(data, "stream_of", remember)
        patch.setattr(jaxtta.optim, "project_out", lambda b: bases.append(b) or project_out(b))
        code, out, _ = run_script("protect_batclip.py", *options)
    assert code == 0
    assert [len(jax.tree.leaves(basis)[0]) for basis in bases] == [0, 2, 6]
    results = evaluate.load_predictions(tmp_path / "a")
    assert [found.adapter for found in results] == [
        "zero_shot",
        *(f"batclip, {rank} directions" for rank in (0, 2, 6)),
    ]
    first, adapted = results[0].rows, results[1].rows
    shown = set(first.image)  # adapted to, then tested; all are different
    assert len(shown) == 40
    assert len(protected) == 6
    assert not shown & protected
    assert first.nll[:10].tolist() == pytest.approx(adapted.nll[:10].tolist(), rel=1e-4)
    assert not np.allclose(first.nll[20:], adapted.nll[20:], rtol=1e-3)  # still adapted when clean
    assert (tmp_path / "a" / "table.txt").read_text().strip() in out
    assert run_script("protect_batclip.py", *options)[:2] == (0, out)  # from what is saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "257"], "rank is 257, expected 1 to 256, the number of images"),
        (["--corruptions", "rain"], "unknown corruption 'rain'"),
    ],
)
def test_bad_options_of_protection(run_script, tmp_path, options, message):
    code, _, err = run_script("protect_batclip.py", "--output", tmp_path / "a", *options)
    assert (code, errors_in(err)) == (1, 1)
    assert message in err


def test_streams_of_few_classes_have_the_same_images_in_another_order(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    from leaderboard import CLASSES_A_BATCH, few_classes

    labels = np.random.default_rng(0).integers(0, 10, 200)
    stream = data.stream_of("fog", [data.Domain("fog")], np.arange(0, 200, 2), seed=1)
    few = few_classes(stream, labels, 8)
    assert sorted(few.items.tolist()) == sorted(stream.items.tolist())
    batches = [labels[few.items[start : start + 8, 1]] for start in range(0, 72, 8)]
    assert max(len(np.unique(batch)) for batch in batches) <= CLASSES_A_BATCH
    assert len(np.unique(labels[stream.items[:8, 1]])) > CLASSES_A_BATCH


def test_the_leaderboard_makes_its_tables(run_script, tmp_path, monkeypatch):
    """From stored predictions of two methods on one kind of stream."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import leaderboard

    rng, results = np.random.default_rng(0), []
    for name, seed in ((n, s) for n in ("zero_shot", "tent", "tent:lr=0.03") for s in (1, 2)):
        labels = np.arange(40) % 4
        rows = {"segment": np.arange(40) // 20, "image": np.arange(40) % 20, "label": labels}
        rows |= {key: np.ones(40, kind) for key, kind in IMAGE.items()}
        rows["prediction"] = np.where(rng.random(40) < 0.5, labels, 0).astype(np.int32)
        domains = data.Domain("fog", 0), data.Domain("snow", 0)
        steps = pd.DataFrame({key: np.zeros(2, kind) for key, kind in BATCH.items()})
        about = ("reset, all", seed, "", domains, ("a", "b", "c", "d"), pd.DataFrame(rows))
        results.append(evaluate.Predictions(name, *about, steps, (), {}, {}, 0.0))
    table = pd.DataFrame(leaderboard.lines_of(results))
    top1 = {
        n: np.mean([r.top1.mean() for r in results if r.adapter == n]) for n in table["adapter"]
    }
    gains = table.set_index("adapter")["gain"]
    np.testing.assert_allclose(gains["tent"], top1["tent"] - top1["zero_shot"])
    cost = pd.Series({"tent": 2.0, "zero_shot": 1.0})
    leaderboard.plot(table, cost, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 100
