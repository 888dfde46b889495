"""MGTTA against the published code's numbers; source statistics; objective and optimiser apart."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import changes, golden, images_of, save_vit, size_of
from safetensors.numpy import save_file
from transformers import CLIPConfig, ViTConfig

import jaxtta
from jaxtta import models, optim
from jaxtta.adapters import MGTTAContext
from jaxtta.adapters.mgtta import PAPER_LEARNING_RATE, feature_discrepancy


@pytest.fixture(scope="module")
def reference():
    return golden("mgtta")


@pytest.fixture(scope="module")
def task(reference):
    return models.task_from_token_ids(reference["token_ids"])


@pytest.fixture(scope="module")
def phi(reference):
    names = [name for name in reference.files if name.startswith("phi/")]
    return {name[4:]: jnp.asarray(reference[name], jnp.float32) for name in names}


@pytest.fixture(scope="module")
def statistics(tiny, reference):
    model, params = tiny
    images = images_of(model, reference["source_images"]).astype(np.float32)
    return models.feature_statistics(model, params, [images])


def test_equal_to_the_published_run(tiny, reference, task, phi, statistics, agrees):
    model, params = tiny
    adapter = jaxtta.adapters.mgtta(
        model,
        task,
        optimizer=optim.meta_gradient_generator(phi, 1e-3),
        statistics=statistics,
    )
    for name, ours in (("mean", statistics.mean), ("std", statistics.std)):
        theirs = reference[f"source_{name}"]
        agrees("mgtta", "source statistics", ours.ravel(), theirs, norm=1e-5)
    state, step = adapter.init(params), jax.jit(adapter.step)
    for number, pixels in enumerate(reference["images"]):
        images = images_of(model, pixels).astype(np.float32)
        state, prediction = step(params, state, images)
        agrees("mgtta", "logits", prediction.logits, reference["logits"][number], 2e-4)
        for name in ("loss", "entropy", "discrepancy"):
            ours, theirs = prediction.metrics[name], reference[name][number]
            agrees("mgtta", name, ours, theirs, norm=1e-4)
    ours, theirs = changes(params, state.adapted, reference)
    agrees("mgtta", "update", ours, theirs, norm=1e-3)


@hypothesis.given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 2**31 - 1))
def test_statistics_do_not_depend_on_the_division(sizes, seed):
    hypothesis.assume(sum(sizes) > 1)
    features = 3 + np.random.default_rng(seed).normal(size=(sum(sizes), 2, 3)).astype(np.float32)
    parts = np.split(features, np.cumsum(sizes)[:-1])
    merged = models.FeatureStatistics(jnp.zeros(()), jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    for part in parts:
        padded = np.concatenate([part, np.full((2, 2, 3), np.nan, np.float32)])
        mask = np.arange(len(padded)) < len(part)
        merged = models.merge_statistics(merged, models.statistics_of(padded, mask))
    assert merged.count == len(features)
    np.testing.assert_allclose(merged.mean, features.mean(0), atol=1e-5)
    np.testing.assert_allclose(merged.std, features.std(0, ddof=1), atol=1e-5)


def test_statistics_of_a_stream_are_those_of_its_images(tiny, reference, statistics, tmp_path):
    model, params = tiny
    images = images_of(model, reference["source_images"]).astype(np.float32)
    padding = np.full((3, *images.shape[1:]), np.nan, np.float32)
    batches = [
        jaxtta.Batch(images[:25], np.ones(25, bool), np.arange(25)),
        jaxtta.Batch(np.concatenate([images[25:], padding[:]]), np.arange(18) < 15, None),
    ]
    found = models.feature_statistics(model, params, batches)
    assert found.count == len(images)
    np.testing.assert_allclose(found.mean, statistics.mean, atol=1e-5)
    np.testing.assert_allclose(found.std, statistics.std, atol=1e-5)
    models.save_statistics(tmp_path / "source.safetensors", found, {"weights": "abc"})
    loaded, about = models.load_statistics(tmp_path / "source.safetensors")
    assert about == {"weights": "abc"}
    for x, y in zip(loaded, found, strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="source statistics of 1 images, expected at least two"):
        models.feature_statistics(model, params, [images[:1]])
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        models.load_statistics(tmp_path / "nothing")
    (tmp_path / "odd").write_text("odd")
    with pytest.raises(ValueError, match="odd: "):
        models.load_statistics(tmp_path / "odd")
    with pytest.raises(ValueError, match="source statistics that are not finite"):
        models.feature_statistics(model, params, [np.full_like(images[:2], np.nan)])
    array = np.zeros((3, 32), np.float32)
    for arrays, message in (
        ({"query": array}, "odd: holds query"),
        (
            {"count": np.array(1.0, np.float32), "mean": array, "squares": array},
            "odd: source .* of 1 images",
        ),
        (
            {"count": np.array(5.0, np.float32), "mean": array, "squares": array[:2]},
            r"odd: source statistics of shapes \(\), \(3, 32\) and \(2, 32\), expected a number",
        ),
        (
            {"count": np.array(5.0, np.float32), "mean": array, "squares": array + np.nan},
            "odd: .* not finite",
        ),
    ):
        save_file(arrays, tmp_path / "odd")
        with pytest.raises(ValueError, match=message):
            models.load_statistics(tmp_path / "odd")


def test_statistics_gathered_by_eight_devices(tiny, reference, statistics):
    """A batch that is spread over devices, and two sums that are put together in the end."""
    model, params = tiny
    images = images_of(model, reference["source_images"]).astype(np.float32)
    rows = jax.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()), "images"), jax.P("images"))
    assert rows.mesh.size == 8
    assert len(images) >= 40
    parts = [jax.device_put(jnp.asarray(images[i : i + 8]), rows) for i in range(0, 32, 8)]
    one = models.feature_statistics(model, params, parts[:2])
    other = models.feature_statistics(model, params, [*parts[2:], images[32:]])
    for found in (models.merge_statistics(one, other), models.merge_statistics(other, one)):
        assert found.count == len(images)
        np.testing.assert_allclose(found.mean, statistics.mean, atol=1e-5)
        np.testing.assert_allclose(found.std, statistics.std, atol=1e-5)


def test_statistics_of_another_model_are_refused(tiny, task, phi):
    model, params = tiny
    other = models.FeatureStatistics(jnp.array(5.0), jnp.zeros((2, 32)), jnp.ones((2, 32)))
    optimizer = optim.meta_gradient_generator(phi, 1e-3)
    message = r"\(2, 32\).* \(3, 32\)"
    with pytest.raises(ValueError, match=message):
        jaxtta.adapters.mgtta(model, task, optimizer=optimizer, statistics=other)
    context = MGTTAContext(model.prompts(task), other.mean, other.std)
    trainable = jaxtta.tree.normalisation_parameters("image")
    adapter = jaxtta.adapters.online(
        jaxtta.adapters.mgtta_objective(model), lambda _: context, trainable, optimizer
    )
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(adapter.step, params, adapter.init(params), jnp.zeros((2, 32, 32, 3)))


def test_there_is_no_default_generator(tiny, task, statistics):
    with pytest.raises(TypeError, match="optimizer"):
        jaxtta.adapters.mgtta(tiny[0], task, statistics=statistics)
    with pytest.raises(TypeError):
        jaxtta.adapters.mgtta(tiny[0], task, statistics)
    with pytest.raises(ValueError, match="optimizer"):
        jaxtta.adapters.mgtta(tiny[0], task, optimizer=None, statistics=statistics)


def test_the_discrepancy_is_that_of_the_valid_images():
    features = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)
    mean, std = np.full((2, 3), 0.5, np.float32), np.full((2, 3), 2.0, np.float32)
    value = jax.jit(jax.value_and_grad(feature_discrepancy))
    padded = np.concatenate([features, np.full((2, 2, 3), np.nan, np.float32)])
    ours, gradient = value(padded, np.arange(7) < 5, mean, std)
    expected = ((features.std(0, ddof=1) - std) ** 2 + (features.mean(0) - mean) ** 2).sum()
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert np.all(gradient[5:] == 0)
    assert np.all(gradient[:5] != 0)
    for count in (0, 1):  # one image has no standard deviation
        ours, gradient = value(padded, np.arange(7) < count, mean, std)
        assert ours == 0
        assert not np.any(gradient)
    equal = np.ones((4, 2, 3), np.float32)
    assert np.all(np.isfinite(value(equal, np.ones(4, bool), mean, std)[1]))


@pytest.fixture(scope="module")
def images(tiny, reference):
    return images_of(tiny[0], reference["images"]).astype(np.float32)


@pytest.mark.parametrize("tower", ["image", "both"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_same_objective_under_other_optimisers(tiny, task, statistics, images, name, tower):
    model, params = tiny
    optimizer = {"sgd": optax.sgd(1e-3, momentum=0.9), "adam": optax.adam(1e-3)}[name]
    adapter = jaxtta.adapters.mgtta(
        model,
        task,
        optimizer=optimizer,
        trainable=jaxtta.tree.normalisation_parameters(tower),
        statistics=statistics,
    )
    state = adapter.init(params)
    assert ("text_model" in state.adapted) == (tower == "both")
    step, found = jax.jit(adapter.step), []
    for _ in range(4):  # the same images: the loss goes down
        state, prediction = step(params, state, images[0])
        found.append(float(prediction.metrics["loss"]))
    assert found[-1] < found[0]


def test_batclip_driven_by_the_generator(tiny, task, phi, images):
    """Any loss goes with any optimiser, chained with clipping and a schedule."""
    model, params = tiny
    schedule = optax.linear_schedule(1e-3, 0.0, 2)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optim.meta_gradient_generator(phi, schedule)
    )
    adapter = jaxtta.adapters.batclip(model, task, optimizer=optimizer)
    state, step = adapter.init(params), jax.jit(adapter.step)
    before = state.adapted
    for number, rate in enumerate((1e-3, 5e-4, 0.0)):
        before = state.adapted
        state, prediction = step(params, state, images[number])
        moved = optax.tree.norm(optax.tree.sub(state.adapted, before), ord=jnp.inf)
        assert not prediction.metrics["skipped"]
        assert moved <= rate * (1 + 1e-3)  # tanh bounds every update by the learning rate
        assert (moved > 0.1 * rate) or rate == 0


def test_the_generator_is_handed_clipped_gradients(phi):
    """As in the chain written out by hand, below and above the bound."""
    chained = optax.chain(optax.clip_by_global_norm(1.0), optim.meta_gradient_generator(phi, 1e-3))
    alone = optim.meta_gradient_generator(phi, 1e-3)
    state, own, unclipped = chained.init(jnp.zeros(6)), *([alone.init(jnp.zeros(6))] * 2)
    random = np.random.default_rng(0)
    for norm in (0.1, 30.0, 0.5, 3.0):
        gradient = jnp.asarray(random.normal(size=6), jnp.float32)
        gradient *= norm / jnp.linalg.norm(gradient)
        update, state = chained.update(gradient, state)
        expected, own = alone.update(gradient / max(norm, 1.0), own)
        np.testing.assert_allclose(update, expected, atol=1e-7)
        other, unclipped = alone.update(gradient, unclipped)
    assert np.abs(update - other).max() > 1e-5  # what was clipped before is remembered


@pytest.fixture(scope="module")
def classifier():
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    model = models.classifier_from_config(config)
    return config, model, jax.jit(model.init)(jax.random.key(0))


def test_a_supervised_classifier_in_clips_place(classifier, phi, images):
    _, model, params = classifier
    statistics = models.feature_statistics(model, params, [images[3]])
    optimizer = optim.meta_gradient_generator(phi, 1e-3)
    adapter = jaxtta.adapters.mgtta(model, None, optimizer=optimizer, statistics=statistics)
    state, step = adapter.init(params), jax.jit(adapter.step)
    assert size_of(state.adapted) == 2 * 32 * (2 * 3 + 1)  # none before the blocks
    first = state.adapted
    state, prediction = step(params, state, images[0].clip(0, 1))
    assert prediction.logits.shape == (24, 5)
    assert not prediction.metrics["skipped"]
    assert optax.tree.norm(optax.tree.sub(state.adapted, first)) > 0


@pytest.mark.parametrize("version", [4, 5])
def test_a_classifier_is_loaded_under_both_of_transformers_names(
    classifier, images, tmp_path, version
):
    config, model, params = classifier
    save_vit(tmp_path, config, params, version)
    loaded, again = models.load(tmp_path)
    assert loaded == model
    expected = jax.jit(model)(params, (), images[0]).logits
    np.testing.assert_allclose(jax.jit(loaded)(again, (), images[0]).logits, expected, atol=1e-5)
    with pytest.raises(ValueError, match="supervised"):
        models.load_clip(tmp_path)


def test_a_gradient_that_is_nan_leaves_the_memory_unharmed(tiny, task, statistics, phi, images):
    model, params = tiny
    adapter = jaxtta.adapters.mgtta(
        model,
        task,
        optimizer=optim.meta_gradient_generator(phi, 1e-3),
        statistics=statistics,
    )
    state, step = adapter.init(params), jax.jit(adapter.step)
    state, _ = step(params, state, images[0])
    after, prediction = step(params, state, np.full_like(images[0], np.nan))
    assert prediction.metrics["skipped"]
    for x, y in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_finite_loss_with_a_gradient_that_is_not(phi):
    """NaN (of a square root at 0), and one whose square overflows though tanh bounds its update."""

    def objective(params, context, batch):
        under_root, factor = batch.images[0, 0, 0, :2]
        loss = factor * jnp.sqrt(under_root * params["norm"]["scale"][0])
        return loss, (jnp.zeros((len(batch.images), 2)), {})

    adapter = jaxtta.adapters.online(
        objective, lambda _: (), lambda path: True, optim.meta_gradient_generator(phi, 1e-3)
    )
    params = {"norm": {"scale": jnp.ones(3)}}
    step, images = jax.jit(adapter.step), jnp.ones((2, 4, 4, 3))
    state, prediction = step(params, adapter.init(params), images)
    assert not prediction.metrics["skipped"]
    for odd in ((0.0, 1.0, 0.0), (1.0, 1e25, 0.0)):
        after, prediction = step(params, state, images * jnp.array(odd))
        assert np.isfinite(prediction.metrics["loss"])
        assert prediction.metrics["skipped"]
        for x, y in zip(*map(jax.tree.leaves, (state, after)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_the_state_on_a_full_size_model_is_small():
    """ViT-B/16's image tower: 39,936 numbers, below 15 MB."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    config = CLIPConfig(
        vision_config=vision | {"num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    )
    model = models.from_config(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    adapted, _ = jaxtta.tree.partition(params, jaxtta.tree.normalisation_parameters("image"))
    weights = optim.init_meta_gradient_generator(jax.random.key(0))
    state = jax.eval_shape(optim.meta_gradient_generator(weights, 1e-3).init, adapted)
    assert size_of(adapted) == 39936
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) < 15e6


def test_the_bundled_generator_updates_the_bundled_model(embedded):
    model, params = embedded
    task = models.zero_shot_task(model, ["cat", "dog", "ship"])
    statistics, _ = models.load_statistics(jaxtta.assets.STATISTICS)
    phi, _ = optim.load_mgg(jaxtta.assets.PHI)
    optimizer = optim.meta_gradient_generator(phi, PAPER_LEARNING_RATE)
    adapter = jaxtta.adapters.mgtta(model, task, optimizer=optimizer, statistics=statistics)
    state = adapter.init(params)
    images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))
    after, prediction = jax.jit(adapter.step, donate_argnums=1)(params, state, images)
    assert not prediction.metrics["skipped"]
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).max(), after.adapted, adapter.init(params).adapted
    )
    assert 0 < max(jax.tree.leaves(moved)) <= 1.001e-3  # the published learning rate bounds it
