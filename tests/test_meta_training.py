"""Meta-training differentiates what it says it does; jaxtta pretrain-mgg trains and resumes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import errors_in, save_vit, write_images
from PIL import Image

import jaxtta
from jaxtta import evaluate, io, optim
from jaxtta.cli import pretrain_mgg
from jaxtta.optim import EpochMetrics, begin_epoch, best_epoch, init_meta_training, meta_step

RATE = 0.05
TARGETS = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)), jnp.float32)


def loss_of(adapted, target):
    """A quartic: its gradient depends on where one stands."""
    return ((adapted["a"] - target[:2]) ** 4).sum() + ((adapted["b"] - target[2:]) ** 2).sum()


@pytest.fixture
def phi():
    return optim.init_meta_gradient_generator(jax.random.key(0), 4)


ADAPTED = {"a": jnp.zeros(2), "b": jnp.ones(2)}


def by_hand(phi, adapted, targets, optimizer, truncation):
    """One epoch written out: plain differentiation through the updates."""
    generator = lambda phi: optim.meta_gradient_generator(phi, RATE)  # noqa: E731
    gradients = jax.grad(loss_of)(adapted, targets[0])
    memory, state, found = None, optimizer.init(phi), []
    for first in range(1, len(targets), truncation):
        window = targets[first : first + truncation]

        def total(phi, adapted=adapted, gradients=gradients, memory=memory, window=window):
            memory = generator(phi).init(adapted) if memory is None else memory
            losses = []
            for target in window:
                updates, memory = generator(phi).update(gradients, memory)
                adapted = optax.apply_updates(adapted, updates)
                losses.append(loss_of(adapted, target))
                gradients = jax.grad(loss_of)(jax.lax.stop_gradient(adapted), target)
            return sum(losses), (adapted, gradients, memory, losses)

        meta, (adapted, gradients, memory, losses) = jax.grad(total, has_aux=True)(phi)
        found += losses
        updates, state = optimizer.update(meta, state)
        phi = optax.apply_updates(phi, updates)
    updates, _ = generator(phi).update(gradients, memory)
    return phi, optax.apply_updates(adapted, updates), found


@pytest.mark.parametrize("truncation", [1, 2, 4])
def test_equal_to_plain_differentiation(phi, truncation):
    optimizer = optax.adam(1e-2)
    state = init_meta_training(phi, ADAPTED, optimizer)
    begin = jax.jit(begin_epoch(loss_of, RATE))
    step = jax.jit(meta_step(loss_of, optimizer, RATE))
    state, first = begin(state, TARGETS[0])
    losses = []
    for start in range(1, len(TARGETS), truncation):
        state, found = step(state, TARGETS[start : start + truncation])
        losses += found.tolist()
    expected_phi, adapted, expected = by_hand(phi, ADAPTED, TARGETS, optimizer, truncation)
    np.testing.assert_allclose(first, loss_of(ADAPTED, TARGETS[0]), rtol=1e-5)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for name in phi:
        np.testing.assert_allclose(state.phi[name], expected_phi[name], atol=1e-4)
    # the next epoch begins with the update that was pending, and with memories anew
    state, loss = begin(state, TARGETS[0])
    np.testing.assert_allclose(loss, loss_of(adapted, TARGETS[0]), rtol=1e-3)
    assert state.memory_is_initial


def test_the_generator_is_recomputed_in_the_backward_pass(phi):
    """Each update's inner steps are, so that K of them cost the memory of their states alone."""
    optimizer = optax.adam(1e-2)
    state = init_meta_training(phi, ADAPTED, optimizer)
    program = jax.make_jaxpr(meta_step(loss_of, optimizer, RATE))(state, TARGETS[:4])
    assert "checkpoint" in str(program) or "remat" in str(program)


def test_training_makes_the_losses_smaller(phi):
    """A target that stays, seen through noise: a steady hand is learnt."""
    noise = np.random.default_rng(1).normal(size=(60, 20, 4)).astype(np.float32)
    optimizer = optax.adam(1e-2)
    state = init_meta_training(phi, ADAPTED, optimizer)
    begin = jax.jit(begin_epoch(loss_of, RATE))
    step = jax.jit(meta_step(loss_of, optimizer, RATE))

    def steady(phi):
        """Loss on new noise after twenty updates from the start."""
        generator, adapted = optim.meta_gradient_generator(phi, RATE), ADAPTED
        memory = generator.init(adapted)
        for target in 1 + np.random.default_rng(2).normal(size=(20, 4)):
            updates, memory = generator.update(jax.grad(loss_of)(adapted, target), memory)
            adapted = optax.apply_updates(adapted, updates)
        return loss_of(adapted, jnp.ones(4))

    for epoch in noise:
        state, _ = begin(state._replace(adapted=ADAPTED, pending=jnp.asarray(False)), 1 + epoch[0])
        for start in range(1, 20):
            state, _ = step(state, 1 + epoch[start : start + 1])
    assert steady(state.phi) < 0.5 * steady(phi)


def test_the_best_epoch_is_the_first_of_equal_ones():
    history = [
        EpochMetrics(3.0, 1.0, 0.5),
        EpochMetrics(1.0, 2.0, 0.7),
        EpochMetrics(1.0, 1.0, 0.7),
    ]
    assert best_epoch(history, "accuracy") == 1
    assert best_epoch(history, "loss") == 0
    assert best_epoch([epoch._replace(val_loss=None) for epoch in history], "loss") == 1


SMALL = [
    *("--workers", "0", "--images", "8", "--val-images", "6", "--test-batch", "3"),
    *("--source-images", "6", "--severity", "1", "--hidden", "2"),
]


def test_a_generator_is_trained_and_a_killed_run_goes_on(run_jaxtta, short, tmp_path, monkeypatch):
    options = ["pretrain-mgg", *SMALL, "--model", short, "--epochs", "2"]
    options += ["--corruptions", "speckle_noise", "saturate", "--output"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, _ = run_jaxtta(*options, whole)
    assert code == 0
    record = json.loads((whole / "training.json").read_text())
    accuracies = [epoch["accuracy"] for epoch in record["epochs"]]
    best = record["selected_epoch"]
    assert len(accuracies) == 2
    assert accuracies[best - 1] == max(accuracies)
    assert f"the weights of epoch {best}, selected by accuracy" in out
    phi, about = optim.load_mgg(whole / "phi.safetensors")
    assert (optim.check_mgg_params(phi), about["epoch"]) == (2, best)
    assert jaxtta.models.load_statistics(whole / "statistics.safetensors")[0].count == 6

    # killed in the second epoch, between weights and checkpoint; then the same command again
    def stop(folder, step, *arguments):
        if step == 2:
            raise KeyboardInterrupt
        return io.save_checkpoint(folder, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "save_checkpoint", stop)
        assert run_jaxtta(*options, parts)[0] == 130
    assert run_jaxtta(*options, parts)[0] == 0
    for file in ("phi.safetensors", "statistics.safetensors"):
        assert (parts / file).read_bytes() == (whole / file).read_bytes()
    again = json.loads((parts / "training.json").read_text())
    assert (again["epochs"], again["before"]) == (record["epochs"], record["before"])
    code, _, err = run_jaxtta(*options, parts, "--seed", "1")
    assert code == 1
    assert "parts: has results with training.seed 0 (this run: 1)" in err


def test_the_papers_table_of_mgtta_on_a_supervised_vit(run_jaxtta, tmp_path):
    """The README's two commands: a generator and statistics, then no adaptation, TENT, MGTTA."""
    from transformers import ViTConfig

    names = ["cat", "dog", "ship"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = ViTConfig(
        **sizes,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = jaxtta.models.classifier_from_config(config)
    save_vit(tmp_path / "vit", config, jax.jit(model.init)(jax.random.key(0)))
    common = ["--model", tmp_path / "vit", "--data", write_images(tmp_path / "images", 6, names)]
    trained, run = tmp_path / "mgg", tmp_path / "run"
    options = [*common, *SMALL, "--corruptions", "saturate", "--epochs", "1", "--output", trained]
    code, _, err = run_jaxtta("pretrain-mgg", *options)
    assert code == 0, err
    options = [
        *("sweep", *common, "--workers", "0", "--adapters", "zero_shot", "tent", "mgtta"),
        *("--corruptions", "fog", "contrast", "--severities", "1", "--batch-size", "6"),
        *("--mgtta.phi", trained / "phi.safetensors"),
        *("--mgtta.statistics", trained / "statistics.safetensors"),
    ]
    code, _, err = run_jaxtta(*options, "--output", run)
    assert code == 0, err
    assert len(evaluate.load_predictions(run)) == 6
    # the same classes in another order would give wrong figures: refused
    for given in (("ship", "cat", "dog"), ("a", "b")):
        code, _, err = run_jaxtta(*options, "--output", tmp_path / "odd", "--class-names", *given)
        assert code == 1
        assert given[0] in err or "2 class names" in err


def test_a_generator_for_both_towers_through_several_updates(run_jaxtta, short, tmp_path):
    common = ["--workers", "0", "--model", short, "--output"]
    options = [
        *("--images", "12", "--val-images", "0", "--select-by", "loss", "--source-images", "6"),
        *("--corruptions", "saturate", "--hidden", "2", "--epochs", "1", "--batch", "2"),
        *("--truncation", "3", "--tower", "both"),  # five batches after the first: 3 and 2
    ]
    assert run_jaxtta("pretrain-mgg", *common, tmp_path / "a", *options)[0] == 0
    adapters = ["zero_shot", "mgtta", "mgtta:lr=1e-2", "mgtta:optimizer=sgd"]
    options = ["--max-images", "20", "--batch-size", "10", "--corruptions", "fog", "--adapters"]
    options += [*adapters, "mgtta:optimizer=adam,lr=1e-2", "--mgtta.tower", "both"]
    for name in ("phi", "statistics"):
        options += [f"--mgtta.{name}", tmp_path / "a" / f"{name}.safetensors"]
    code, _, err = run_jaxtta("sweep", *common, tmp_path / "b", *options)
    assert code == 0, err
    found = {each.adapter: each for each in evaluate.load_predictions(tmp_path / "b")}
    assert found["mgtta"].settings["adapter"]["tower"] == "both"
    assert "0.01" in found["mgtta:lr=1e-2"].settings["adapter"]["optimizer"]
    assert "phi" not in found["mgtta:optimizer=sgd"].settings["adapter"]
    nll = {each.rows["nll"].mean() for each in found.values()}
    assert len(nll) == len(found) == 5  # every one did something else


def test_clean_images_of_imagenet_c_are_those_of_imagenet(run_jaxtta, tmp_path, monkeypatch):
    """IMAGENET/val, as in docs/papers/mgtta.md, or a folder of the layout with clean images."""
    for number, wnid in enumerate(("n01440764", "n01443537")):
        for place in (tmp_path / "val" / wnid, tmp_path / "c" / "clean" / wnid):
            place.mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(place / f"{number}.JPEG")
    found = []

    def read_images(*arguments):
        found.append(arguments[-1])
        raise ValueError("enough")

    monkeypatch.setattr(pretrain_mgg, "read_images", read_images)
    given = ["pretrain-mgg", "--layout", "imagenet-c", "--data", tmp_path / "c"]
    for source in ("val", "c"):
        run_jaxtta(*given, "--source", tmp_path / source, "--output", tmp_path / "out")
    assert [len(clean[jaxtta.data.Domain("clean")]) for clean in found] == [2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--val-images 0", "--val-images is 0, expected at least 1"),
        ("--images 2", "--images is 2, expected at least 4"),
        ("--learning-rate -1", "--learning-rate is -1.0, expected at least 0"),
        ("--data {torn} --images 8 --val-images 1", "fewer than two batches"),
        ("--images 3000", "2000 images are fewer than --images and --val-images, 3256"),
        ("--max-images 9", "9 images are fewer"),
        ("--corruptions rain", "unknown corruption 'rain'"),
        ("--source {folder}", "No such file or directory"),
    ],
)
def test_bad_options_of_meta_training(run_jaxtta, tmp_path, options, message):
    images = jaxtta.data.open_dataset("folder", jaxtta.assets.IMAGES)
    for number in range(10):  # of which two can be read
        path = tmp_path / "torn" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if number < 2:
            Image.fromarray(images[number]).save(path)
    options = options.format(folder=tmp_path / "nowhere", torn=tmp_path / "torn").split()
    code, _, err = run_jaxtta("pretrain-mgg", "--output", tmp_path / "a", *options)
    assert code == 1
    assert message in err
    assert errors_in(err) == 1
    assert not (tmp_path / "a").exists()
