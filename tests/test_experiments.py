"""The experiments that are programs of their own."""

import json

import jax
import numpy as np
import pytest
from conftest import errors_in
from PIL import Image

import jaxtta
from jaxtta import assets, data, evaluate
from jaxtta.optim import project_out


@pytest.mark.parametrize("script", ["pretrain_tiny_clip.py", "protect_batclip.py"])
def test_help_teaches(run_script, script):
    code, out, _ = run_script(script, "--help")
    assert code == 0
    assert f"python experiments/{script}" in out.replace("\n", " ")


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
    _, prediction = adapter.step(params, adapter.init(params), model.preprocess(images))
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
