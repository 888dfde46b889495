"""TNT against the published code's numbers, and the laws that it keeps."""

import dataclasses
import functools
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import golden
from safetensors.numpy import save_file

import jaxtta
from jaxtta.adapters import (
    TNT_PRESETS,
    TNTConfig,
    load_noise,
    optimize_noise,
    save_noise,
    tnt,
    tnt_image,
)
from jaxtta.adapters.tnt.optimize import inter_view_distance, marginal_entropy


@pytest.fixture(scope="module")
def reference():
    return golden("tnt")


@pytest.fixture(scope="module")
def setup(tiny, reference):
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(reference["token_ids"])
    classes = jax.jit(model.class_embeddings)(params, model.prompts(task))

    def embed(params, images):
        return model.encode_image(params, model.normalize(images))

    return embed, params, classes, jnp.exp(params["logit_scale"])


def tuning_of(reference, **changes):
    meta = json.loads(str(reference["meta"]))
    return TNTConfig(
        views=20,
        steps=meta["steps"],
        select_fraction=meta["select_fraction"],
        ensemble_fraction=meta["vote_fraction"],
        entropy_weight=meta["entropy_weight"],
        learning_rate=meta["lr"],
        epsilon=meta["eps"],
        temperature=meta["paper_temperature"],
        **changes,
    )


def test_equal_to_the_published_code(setup, reference, agrees):
    def run(tuning):
        return jax.jit(
            jax.vmap(lambda views, noise: optimize_noise(*setup, views, noise, tuning)),
        )(reference["views"], reference["noise_init"])

    tuned = run(tuning_of(reference))
    wrong = np.abs(tuned.noise_steps - reference["noise_steps"]) > 1e-7
    assert wrong.mean() <= 0.005
    agrees("tnt", "loss", tuned.losses, reference["losses"], 1e-4)
    theirs_of = {"selected": "selected", "ensemble": "voting"}
    for name in theirs_of:
        ours, theirs = np.sort(getattr(tuned, name), -1), np.sort(reference[theirs_of[name]], -1)
        np.testing.assert_array_equal(ours, theirs)
    agrees("tnt", "logits", tuned.logits, reference["adapted_logits"], 5e-3)
    paper = np.exp(tuned.log_probabilities)
    agrees("tnt", "probabilities", paper, reference["paper_probs"], 5e-3)
    code = run(dataclasses.replace(tuning_of(reference), temperature="code"))
    agrees("tnt", "probabilities", np.exp(code.log_probabilities), reference["code_probs"], 5e-3)


@hypothesis.given(
    st.integers(2, 12), st.floats(0.05, 1), st.integers(1, 3), st.integers(0, 2**31 - 1)
)
@hypothesis.settings(max_examples=3)  # every shape compiles anew
def test_selecting_first_changes_nothing(setup, count, fraction, steps, seed):
    view_key, noise_key = jax.random.split(jax.random.key(seed))
    views = jax.random.uniform(view_key, (count, 32, 32, 3))
    noise = jax.random.normal(noise_key, (32, 32, 3)).clip(-1 / 255, 1 / 255)
    tuning = TNTConfig(views=count, steps=steps, select_fraction=fraction)
    few, all_ = (
        jax.jit(lambda s=select: optimize_noise(*setup, views, noise, tuning, s))()
        for select in (True, False)
    )
    # A gradient that is rounding noise has a sign of its own.
    assert np.mean(np.abs(few.noise - all_.noise) > 1e-7) <= 0.005
    np.testing.assert_array_equal(few.selected, all_.selected)
    np.testing.assert_allclose(few.losses, all_.losses, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_change_nothing(setup, reference, chunk):
    views, noise = jnp.asarray(reference["views"][0, :6]), jnp.asarray(reference["noise_init"][0])

    def run(config):
        return jax.jit(lambda: optimize_noise(*setup, views, noise, config))()

    whole, parts = (run(TNTConfig(views=6, views_per_chunk=count)) for count in (99, chunk))
    np.testing.assert_allclose(parts.logits, whole.logits, atol=2e-3)
    np.testing.assert_array_equal(parts.ensemble, whole.ensemble)
    assert np.mean(np.abs(parts.noise - whole.noise) > 1e-7) <= 0.005


def test_images_of_a_batch_know_nothing_of_each_other(tiny):
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("tnt")["token_ids"])
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    index, mask = jnp.arange(4), jnp.ones(4, bool)

    def predict(count, size):
        adapter = tnt(model, task, config=TNTConfig(views=6, images_per_map=count))
        step, state = jax.jit(adapter.step), adapter.init(params)
        chosen = [slice(first, first + size) for first in range(0, 4, size)]
        parts = [step(params, state, jaxtta.Batch(images[c], mask[c], index[c])) for c in chosen]
        return np.concatenate([prediction.logits for _, prediction in parts])

    together = predict(1, 4)
    np.testing.assert_allclose(np.exp(together).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(predict(3, 4), together, atol=2e-3)
    np.testing.assert_allclose(predict(1, 1), together, atol=2e-3)


def test_a_map_is_carried_saved_frozen_and_refreshed(tiny, tmp_path):
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("tnt")["token_ids"])
    images = jax.random.uniform(jax.random.key(1), (3, 32, 32, 3))
    tuning = TNTConfig(views=4, online=True)
    carrying = tnt(model, task, config=tuning)
    state = carrying.init(params)
    first = state.noise
    state, _ = jax.jit(carrying.step)(params, state, images)
    assert np.abs(state.noise - first).max() > 0
    assert np.abs(state.noise).max() <= tuning.epsilon
    # image by image is the same as in one batch
    single = carrying.init(params)
    for number in range(3):
        single, _ = jax.jit(carrying.step)(params, single, images[number : number + 1])
    assert np.mean(np.abs(single.noise - state.noise) > 1e-7) <= 0.005
    # padding leaves the map alone
    masked = jaxtta.Batch(images, np.zeros(3, bool), np.arange(3))
    again, _ = jax.jit(carrying.step)(params, state, masked)
    np.testing.assert_array_equal(again.noise, state.noise)

    save_noise(tmp_path / "camera.safetensors", state.noise, tuning)
    noise, settings = load_noise(tmp_path / "camera.safetensors")
    assert settings == tuning
    frozen = tnt(model, task, config=TNTConfig(views=1, steps=0), noise=noise)
    kept, _ = jax.jit(frozen.step)(params, frozen.init(params), images)
    np.testing.assert_array_equal(kept.noise, noise)
    refreshed, _ = jax.jit(carrying.step)(params, kept, images)
    assert np.abs(refreshed.noise - noise).max() > 0


@pytest.mark.parametrize("temperature", [7e-3, 1.0, "code", "model"])
def test_a_frozen_map_answers_with_the_models_own_confidence(tiny, temperature):
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("tnt")["token_ids"])
    keys = jax.random.split(jax.random.key(1))
    images = jax.random.uniform(keys[0], (3, 32, 32, 3))
    noise = jax.random.uniform(keys[1], (32, 32, 3), minval=-1 / 255, maxval=1 / 255)
    with_map = jnp.clip(images + noise, 0, 1)
    context = model.init_context(params, task)
    config = TNTConfig(views=1, steps=0, temperature=temperature)
    frozen = tnt(model, task, config=config, noise=noise)
    step, plain = jax.jit(frozen.step), jax.jit(model)
    # the bundled model's and CLIP's; bfloat16 holds no 4.605
    for scale in (jnp.log(14.4), jnp.log(100.0), jnp.bfloat16(jnp.log(100.0))):
        own = params | {"logit_scale": scale}
        _, prediction = step(own, frozen.init(own), images)
        logits = plain(own, context, with_map).logits
        expected = jax.nn.log_softmax(logits)
        np.testing.assert_allclose(prediction.logits, expected, atol=1e-4)
        confidences = (np.exp(x).max(-1) for x in (prediction.logits, expected))
        np.testing.assert_allclose(*confidences, rtol=1e-4)


@pytest.mark.parametrize("word, value", [("model", "model"), ("code", "code"), ("0.01", 0.01)])
def test_temperatures_on_the_command_line(word, value):
    assert tyro.cli(TNTConfig, args=["--temperature", word]).temperature == value


@pytest.mark.parametrize("online", [False, True])
def test_the_vote_with_the_models_own_temperature(tiny, online):
    """The scale is read from the parameters of each step, not from those of `init`."""
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("tnt")["token_ids"])
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    settings = {"views": 4, "select_fraction": 0.5, "ensemble_fraction": 0.5, "online": online}

    @functools.cache
    def compiled(temperature):
        adapter = tnt(model, task, config=TNTConfig(**settings, temperature=temperature))
        return jax.jit(adapter.step), adapter.init(params)

    def log_probabilities(temperature, scale):
        step, state = compiled(temperature)
        own = params | {"logit_scale": jnp.log(jnp.float32(scale))}
        return np.asarray(step(own, state, images)[1].logits)

    for scale in (5.0, 20.0):
        np.testing.assert_allclose(
            log_probabilities("model", scale), log_probabilities(1 / scale, scale), atol=1e-4
        )
    assert np.abs(log_probabilities("model", 5.0) - log_probabilities("model", 20.0)).max() > 0.1


def test_on_parameters_that_another_adapter_adapted(tiny):
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("tnt")["token_ids"])
    images = jax.random.uniform(jax.random.key(1), (3, 32, 32, 3))
    first = jaxtta.adapters.batclip(model, task)
    state, _ = jax.jit(first.step)(params, first.init(params), images)
    adapted = jaxtta.tree.merge(params, state.adapted)
    adapter = tnt(model, task, config=TNTConfig(views=4))
    step = jax.jit(adapter.step)
    outputs = [step(p, adapter.init(p), images)[1].logits for p in (params, adapted)]
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_a_batch_is_its_images_tuned_one_by_one(tiny):
    """What examples are drawn from is what the adapter did."""
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("tnt")["token_ids"])
    canvas = jax.random.randint(jax.random.key(1), (2, 50, 50, 3), 0, 256).astype(jnp.uint8)
    sizes = jnp.array([[50, 40], [33, 47]])
    tuning = TNTConfig(views=5, augmix=2.0)
    adapter = tnt(model, task, config=tuning)
    batch = jaxtta.Batch(canvas, jnp.ones(2, bool), jnp.array([7, 8]), sizes)
    state, prediction = jax.jit(adapter.step)(params, adapter.init(params), batch)
    views, tuned = jax.jit(lambda *image: tnt_image(model, params, state.context, *image, tuning))(
        jax.random.fold_in(jax.random.key(0), 8), canvas[1], sizes[1]
    )
    np.testing.assert_allclose(tuned.log_probabilities, prediction.logits[1], atol=2e-3)
    assert views.shape == (5, 32, 32, 3)
    assert np.abs(tuned.noise).max() <= tuning.epsilon


def test_a_map_that_is_not_finite_is_forgotten_and_said(tiny):
    """Where the loss is finite and its gradient is not."""
    model, params = tiny

    class Broken:
        preprocessing = model.preprocessing

        def __getattr__(self, name):
            return getattr(model, name)

        def __call__(self, params, context, batch):
            out = model(params, context, batch)
            # The root of 0 has no derivative.
            root = jnp.sqrt(batch.images.sum((1, 2, 3))[:, None] * 0)
            return out._replace(embeddings=out.embeddings + root)

    task = jaxtta.models.task_from_token_ids(golden("tnt")["token_ids"])
    adapter = tnt(Broken(), task, config=TNTConfig(views=4, online=True))
    state = adapter.init(params)
    images = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))
    after, prediction = jax.jit(adapter.step)(params, state, images)
    assert np.isfinite(prediction.metrics["loss"])
    assert prediction.metrics["skipped"]
    np.testing.assert_array_equal(after.noise, state.noise)


def test_terms_where_views_agree():
    one = jnp.ones((1, 4)) / 2
    assert float(inter_view_distance(one)) == 0
    same = jnp.concatenate([one, one])
    assert float(inter_view_distance(same)) == 0
    assert np.all(np.isfinite(jax.grad(inter_view_distance)(same)))
    views = jax.random.normal(jax.random.key(0), (5, 4))
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(np.asarray(views), 2)]
    assert float(inter_view_distance(views)) == pytest.approx(np.mean(distances), rel=1e-5)
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(inter_view_distance))(jnp.eye(4)))
    assert float(marginal_entropy(jnp.zeros((3, 8)))) == pytest.approx(np.log(8), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views is 0, expected at least 1"),
        ({"select_fraction": 0.0}, "select_fraction is 0.0, expected above 0 and at most 1"),
        ({"ensemble_fraction": 1.5}, "ensemble_fraction is 1.5"),
        ({"epsilon": -1 / 255}, "epsilon is -0.0039.*, expected a positive number"),
        (
            {"scale": (0.5, 0.2)},
            "scale is 0.5 to 0.2, expected positive numbers in order at most 1",
        ),
        ({"ratio": (0.0, 1.0)}, "ratio is 0.0 to 1.0, expected positive numbers in order"),
        ({"augmix": 11.0}, "augmix is 11.0, expected 0 to 10"),
        ({"learning_rate": float("inf")}, "learning_rate is inf, expected a positive number"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        (
            {"temperature": "paper"},
            "temperature is paper, .* number, code or model",
        ),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        TNTConfig(**options)


def test_bad_maps_are_refused(tiny, tmp_path):
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("tnt")["token_ids"])
    with pytest.raises(ValueError, match=r"shape \(16, 16, 3\), expected \(32, 32, 3\)"):
        tnt(model, task, config=TNT_PRESETS["code"], noise=np.zeros((16, 16, 3)))
    for odd in (np.nan, 4.0):  # 4 of 255 grey levels is 0.016
        noise = np.full((32, 32, 3), odd)
        with pytest.raises(ValueError, match="a noise map with values that are NaN or beyond 1"):
            tnt(model, task, noise=noise)
        with pytest.raises(ValueError, match="a noise map with values that are NaN or beyond 1"):
            save_noise(tmp_path / "never", noise, TNTConfig())
        save_file({"noise": noise}, tmp_path / "odd", {"about": '{"views": 1}'})
        with pytest.raises(ValueError, match=r"odd: .*NaN or beyond 1"):
            load_noise(tmp_path / "odd")
    (tmp_path / "odd").unlink()
    adapter = tnt(model, task)
    state = adapter.init(params)
    with pytest.raises(ValueError, match="an image of 40×40 pixels, expected 32×32, or"):
        jax.eval_shape(adapter.step, params, state, jnp.zeros((1, 40, 40, 3)))
    with pytest.raises(ValueError, match=r"a noise map of shape \(16, 16, 3\) for views of"):
        optimize_noise(
            None, None, None, None, jnp.zeros((2, 32, 32, 3)), jnp.zeros((16, 16, 3)), TNTConfig()
        )
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        load_noise(tmp_path / "nothing")
    save_noise(tmp_path / "new", np.zeros((32, 32, 3)), TNTConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    for tuning in ('{"epsilon": -1}', '{"colour": 1}', "[1]", "{}"):
        save_file({"noise": np.zeros((32, 32, 3))}, tmp_path / "new", {"about": tuning})
        with pytest.raises(ValueError, match="new: "):
            load_noise(tmp_path / "new")
    (tmp_path / "odd").write_text("no noise")
    with pytest.raises(ValueError, match="odd: "):
        load_noise(tmp_path / "odd")
