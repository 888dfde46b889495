"""TDA, LAME, T3A, StatA and TransCLIP: golden numbers, laws, and their place on other adapters."""

import json
from functools import partial

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import NNXClassifier, golden

import jaxtta
from jaxtta import models, parallel
from jaxtta.adapters import Adapter, Prediction, State, batclip, tent, tnt, zero_shot
from jaxtta.adapters.lame import AFFINITIES, lame, lame_affinity, lame_log_probabilities
from jaxtta.adapters.on_features import FeatureMethod, StackedState, on_features, unit
from jaxtta.adapters.stata import stata, stata_fit
from jaxtta.adapters.t3a import t3a, t3a_logits, t3a_supports
from jaxtta.adapters.tda import TDA_PRESETS, tda, tda_logits
from jaxtta.adapters.tda_cache import tda_caches
from jaxtta.adapters.transclip import transclip, transclip_fit

BATCH = 12
METHODS = {
    "tda": partial(tda, scale=100.0, entropy_range=(0.02, 0.6)),
    "lame": lame,
    "t3a": partial(t3a, supports=2),
    "stata": stata,
    "transclip": transclip,
}
JOIN, ENTER = jax.jit(t3a_logits), jax.jit(partial(tda_logits, entropy_range=(0.1, 0.5)))
PRECISIONS = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture(scope="module")
def task():
    return models.task_from_token_ids(golden("stata")["token_ids"])


@pytest.fixture(scope="module")
def images():
    """Three batches."""
    stored = golden("tda")["single/images"][: 3 * BATCH] / np.float32(255)
    return stored.reshape(3, BATCH, 32, 32, 3)


@pytest.fixture(scope="module", params=METHODS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(name, tiny, task):
    return METHODS[name](tiny[0], task)


@pytest.fixture(scope="module")
def step(adapter):
    return jax.jit(adapter.step)


def batch_of(images, mask=None):
    mask = np.ones(len(images), bool) if mask is None else mask
    return jaxtta.Batch(images, mask, np.arange(len(images)))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def all_of(features):
    return jnp.ones(len(features), bool)


def tolerance(dtype, single):
    return 1e-9 if dtype == "float64" else single


# Golden numbers


def pictures_in(cache, features):
    """Which pictures a cache holds, the surest first."""
    order = np.argsort(cache.entropy, axis=1, kind="stable")
    kept = np.take_along_axis(np.asarray(cache.features), order[..., None], axis=1)
    found = (kept[:, :, None] == np.asarray(features)).all(-1)
    there = np.isfinite(np.take_along_axis(np.asarray(cache.entropy), order, axis=1))
    np.testing.assert_array_equal(found.sum(-1), there)
    return np.where(there, found.argmax(-1), -1)


@PRECISIONS
@pytest.mark.parametrize("kind", ["single", "views"])
def test_tda_equals_the_published_code(agrees, kind, dtype):
    reference = golden("tda")
    meta = json.loads(str(reference["meta"]))[kind]
    positive, negative = meta["positive"], meta["negative"]
    limits = negative["entropy_threshold"], negative["mask_threshold"]
    predict = partial(
        tda_logits,
        alpha=positive["alpha"],
        beta=positive["beta"],
        negative_alpha=negative["alpha"],
        negative_beta=negative["beta"],
        entropy_range=(limits[0]["lower"], limits[0]["upper"]),
        probability_range=(limits[1]["lower"], limits[1]["upper"]),
    )
    names = ("features", "clip_logits", "probabilities")
    with jax.enable_x64(dtype == "float64"):
        features, logits, p = (jnp.asarray(reference[f"{kind}/{name}"]) for name in names)
        sizes = positive["shot_capacity"], negative["shot_capacity"]
        caches = tda_caches(logits.shape[1], features.shape[1], *sizes, features.dtype)
        # of one view, probabilities are the logits' own
        own = {"probabilities": p} if kind == "views" else {}
        caches, ours = jax.jit(predict)(caches, features, logits, all_of(features), **own)
        assert ours.dtype == dtype
        agrees("tda", "logits", ours, reference[f"{kind}/logits"], tolerance(dtype, 1e-4))
        for cache, which in zip(caches, ("positive", "negative"), strict=True):
            expected = reference[f"{kind}/{which}_cache"]
            np.testing.assert_array_equal(pictures_in(cache, features), expected)


@PRECISIONS
@pytest.mark.parametrize("affinity", AFFINITIES)
def test_lame_equals_the_published_code(agrees, affinity, dtype):
    reference = golden("lame")
    with jax.enable_x64(dtype == "float64"):
        features, logits = jnp.asarray(reference["features"]), jnp.asarray(reference["logits"])
        mask = all_of(features)
        affinities = lame_affinity(features, mask, affinity, 5)
        ours = jnp.exp(jax.jit(lame_log_probabilities)(logits, affinities, mask))
        assert ours.dtype == dtype
        expected = reference[f"{affinity}/affinity"]
        agrees("lame", "affinities", affinities, expected, tolerance(dtype, 1e-5))
        expected = reference[f"{affinity}/probabilities"]
        agrees("lame", "probabilities", ours, expected, tolerance(dtype, 2e-4))


def test_lame_stops_where_the_published_code_does():
    """From the third iteration on, at the first whose energy stays."""
    reference = golden("lame")
    iterations = json.loads(str(reference["meta"]))["iterations"]
    with jax.enable_x64(True):
        logits, mask = jnp.asarray(reference["logits"]), np.ones(40, bool)
        for affinity, number in iterations.items():
            run = partial(
                lame_log_probabilities, logits, jnp.asarray(reference[f"{affinity}/affinity"]), mask
            )
            np.testing.assert_array_equal(run(number), run())
            assert np.any(np.asarray(run(number - 1)) != run())
        flat = jnp.zeros_like(logits)  # nothing changes from the first on
        np.testing.assert_allclose(lame_log_probabilities(flat, jnp.eye(40), mask), -np.log(8))


@PRECISIONS
def test_t3a_equals_the_published_code(tiny, task, agrees, dtype):
    model, params = tiny
    reference = golden("t3a")
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        rows = model.logit_scale(params) * model.init_context(
            params, models.task_from_token_ids(reference["token_ids"])
        )
        supports, encode = t3a_supports(*rows.shape, 3, dtype), jax.jit(model.encode_image)
        mean, std = (np.asarray(x) for x in (model.preprocessing.mean, model.preprocessing.std))
        for number, batch in enumerate(reference["images"]):
            pixels = jnp.asarray((batch / 255 - mean) / std, dtype)
            features = unit(encode(params, pixels))
            logits = features @ rows.T
            supports, ours, counts = JOIN(supports, features, logits, rows, all_of(batch))
            assert ours.dtype == dtype
            close = tolerance(dtype, 1e-4)
            agrees("t3a", "logits of CLIP", logits, reference["clip_logits"][number], close)
            agrees("t3a", "logits", ours, reference["logits"][number], close)
            np.testing.assert_array_equal(counts, reference["supports"][number])


@PRECISIONS
@pytest.mark.parametrize("soft", [False, True])
def test_stata_equals_the_published_code(agrees, soft, dtype):
    reference, kind = golden("stata"), "soft" if soft else "stata"
    with jax.enable_x64(dtype == "float64"):
        features, texts = jnp.asarray(reference["features"]), jnp.asarray(reference["text_embeds"])
        logits, close = 100 * features @ texts.T, tolerance(dtype, 1e-4)
        for number in (1, 10):
            run = jax.jit(partial(stata_fit, soft_beta=soft, iterations=number))
            fit = run(features, texts, logits, all_of(features))
            assert fit.log_z.dtype == dtype
            z = reference[f"{kind}/z_steps"][number]
            agrees("stata", "probabilities", jnp.exp(fit.log_z), z, close)
            agrees("stata", "weights", fit.weights, reference[f"{kind}/beta"][number - 1], close)
        agrees("stata", "means", fit.means, reference[f"{kind}/mu"], close)
        agrees("stata", "variances", fit.variances, reference[f"{kind}/cov"], close)
        agrees("stata", "probabilities", jnp.exp(fit.log_z), reference[f"{kind}/z"], close)


@PRECISIONS
@pytest.mark.parametrize(
    ("start", "kind"), [("images", "transclip"), ("text", "transclip_text_start")]
)
def test_transclip_equals_the_published_code(agrees, start, kind, dtype):
    reference = golden("stata")
    with jax.enable_x64(dtype == "float64"):
        features, texts = jnp.asarray(reference["features"]), jnp.asarray(reference["text_embeds"])
        logits = 100 * features @ texts.T
        fit = jax.jit(partial(transclip_fit, start=start))(
            features, texts, logits, all_of(features)
        )
        assert fit.log_z.dtype == dtype
        z = reference[f"{kind}/z"]
        agrees("transclip", "probabilities", jnp.exp(fit.log_z), z, tolerance(dtype, 1e-4))


def test_adapters_equal_the_published_code_from_the_pictures_on(tiny, agrees):
    """With the model's own features, the text encoded once."""
    model, params = tiny

    def run(method, reference, batches):
        adapter = method(model, models.task_from_token_ids(reference))
        state, step = adapter.init(params), jax.jit(adapter.step)
        for batch in batches:
            state, prediction = step(params, state, batch)
            yield np.asarray(prediction.logits, np.float64)

    stream = golden("tda")
    batches = stream["single/images"].reshape(4, 15, 32, 32, 3)
    method = partial(tda, scale=100.0, **TDA_PRESETS["imagenet"])
    ours = np.concatenate([*run(method, stream["single/token_ids"], batches)])
    agrees("tda", "logits of the adapter", ours, stream["single/logits"], 2e-4)
    supports = golden("t3a")
    ours = run(partial(t3a, supports=3), supports["token_ids"], supports["images"])
    scale = np.exp(float(params["logit_scale"]))
    for logits, expected in zip(ours, supports["logits"], strict=True):
        agrees("t3a", "logits of the adapter", logits / scale, expected, 1e-4)
    for method, file, key in (
        (partial(lame, affinity="rbf"), "lame", "rbf/probabilities"),
        (partial(stata, scale=100.0), "stata", "stata/z"),
        (partial(transclip, scale=100.0), "stata", "transclip/z"),
    ):
        reference = golden(file)
        (logits,) = run(method, reference["token_ids"], [reference["images"]])
        name = "transclip" if "transclip" in key else file
        agrees(name, "probabilities of the adapter", np.exp(logits), reference[key], 2e-4)


# The formulas, as loops


@hypothesis.given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 3]))
def test_supports_and_caches_are_what_loops_keep(seed, size):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        features = unit(jnp.asarray(rng.normal(size=(24, 6))))
        rows = unit(jnp.asarray(rng.normal(size=(4, 6))))
        logits = 5 * features @ rows.T
        mask = rng.random(24) < 0.8
        p = np.asarray(jax.nn.softmax(logits))
        entropies, labels = -(p * np.log(p)).sum(1), p.argmax(1)
        supports, caches = t3a_supports(4, 6, size, float), tda_caches(4, 6, size, size, float)
        for part in np.split(np.arange(24), 3):  # in batches, where loops go on
            given = features[part], logits[part]
            supports, cosines, _ = JOIN(supports, *given, 5 * rows, mask[part])
            caches, _ = ENTER(caches, *given, mask[part])
        own = np.asarray(jax.nn.softmax(25 * rows @ rows.T))
        for k in range(4):
            kept = sorted((entropies[i], i) for i in range(24) if labels[i] == k and mask[i])
            np.testing.assert_allclose(
                np.sort(supports.entropy[k][: len(kept)]), [h for h, _ in kept[:size]], atol=1e-12
            )
            row = [(-(q * np.log(q)).sum(), 24 + i) for i, q in enumerate(own)]
            row = [pair for pair in row if own[pair[1] - 24].argmax() == k]
            everything = np.concatenate([features, rows])
            used = [everything[i] for _, i in sorted(kept + row)[:size]]
            centroid = np.sum(used, 0) / np.linalg.norm(np.sum(used, 0))
            np.testing.assert_allclose(cosines[:, k], features[part] @ centroid, atol=1e-12)
            for cache, low, high in ((caches[0], -1, 9), (caches[1], 0.1, 0.5)):
                those = [h for h, _ in kept if low < h / 2 < high][:size]  # log₂ 4 is 2
                found = np.sort(cache.entropy[k])
                np.testing.assert_allclose(found[np.isfinite(found)], those, atol=1e-12)


def test_a_class_far_from_all_images_keeps_its_text():
    """Its Σ z is 0 in float32."""
    rng = np.random.default_rng(0)
    texts = unit(jnp.asarray(rng.normal(size=(5, 64)), jnp.float32))
    features = unit(texts[np.arange(16) % 2] + 0.02 * jnp.asarray(rng.normal(size=(16, 64))))
    logits = 1e3 * features @ texts.T
    assert np.exp(jax.nn.log_softmax(logits))[:, 2:].sum() == 0
    fit = jax.jit(stata_fit)(features, texts, logits, all_of(features))
    assert all(np.isfinite(x).all() for x in fit)
    np.testing.assert_allclose(fit.means[2:], texts[2:], atol=1e-6)
    np.testing.assert_array_equal(fit.log_z.argmax(1), np.arange(16) % 2)
    other = jax.jit(transclip_fit)(features, texts, logits, all_of(features))
    assert all(np.isfinite(x).all() for x in other)


def test_images_that_are_all_the_same():
    """No variance, no distances."""
    features = jnp.tile(unit(jnp.arange(1.0, 9.0)), (6, 1))
    texts = unit(jax.random.normal(jax.random.key(0), (3, 8)))
    logits = 20 * features @ texts.T
    label = int(logits[0].argmax())
    for fit in (transclip_fit, stata_fit):
        found = jax.jit(fit)(features, texts, logits, all_of(features))
        assert all(np.isfinite(x).all() for x in found)
    assert (found.log_z.argmax(1) == label).all()
    for affinity in AFFINITIES:
        w = lame_affinity(features, all_of(features), affinity)
        log_z = jax.jit(lame_log_probabilities)(logits, w, all_of(features))
        assert (log_z.argmax(1) == label).all()


# The laws


@pytest.mark.parametrize("affinity", AFFINITIES)
@pytest.mark.parametrize("valid", [1, 3, 8])  # fewer than the neighbours, too
def test_padding_has_no_affinity(affinity, valid):
    features = unit(jax.random.normal(jax.random.key(0), (valid, 6)))
    alone = lame_affinity(features, all_of(features), affinity)
    mask = np.arange(9) < valid
    padded = lame_affinity(jnp.pad(features, ((0, 9 - valid), (0, 0))), mask, affinity)
    np.testing.assert_allclose(padded[:valid, :valid], alone, atol=1e-6)
    assert not np.any(padded[valid:]) and not np.any(padded[:, valid:])


def test_padding_changes_nothing(tiny, adapter, step, images):
    """Whatever stands in it, wherever it stands."""
    params = tiny[1]
    state, _ = step(params, adapter.init(params), batch_of(images[0]))
    place = np.sort(np.random.default_rng(1).permutation(BATCH)[:7])
    mask = np.isin(np.arange(BATCH), place)
    padded = np.full(images[1].shape, np.nan, np.float32)
    padded[place] = images[1][:7]
    after, masked = step(params, state, batch_of(padded, mask))
    alone, expected = step(params, state, batch_of(images[1][:7]))
    np.testing.assert_allclose(masked.logits[place], expected.logits, atol=2e-4)
    chex.assert_trees_all_close(after, alone, atol=2e-5)
    assert int(after.seen) == BATCH + 7
    assert not masked.metrics["skipped"]


def test_a_fully_masked_batch_leaves_the_state_bit_identical(tiny, adapter, step, images):
    params = tiny[1]
    nothing = batch_of(images[1], np.zeros(BATCH, bool))
    for state in (adapter.init(params), step(params, adapter.init(params), batch_of(images[0]))[0]):
        after, prediction = step(params, state, nothing)
        same(after, state)
        assert not prediction.metrics["skipped"]


def test_the_order_of_a_batch(name, tiny, adapter, step, images):
    """Matters to TDA alone."""
    params = tiny[1]
    order = np.random.default_rng(0).permutation(BATCH)
    after, straight = step(params, adapter.init(params), batch_of(images[0]))
    after2, permuted = step(params, adapter.init(params), batch_of(images[0][order]))
    same_logits = np.allclose(permuted.logits, straight.logits[order], atol=2e-4)
    assert same_logits == (name != "tda")
    if same_logits:
        chex.assert_trees_all_close(after2, after, atol=2e-5)


def test_a_stream_compiles_once(tiny, adapter, images):
    params = tiny[1]
    step = jax.jit(chex.assert_max_traces(adapter.step, n=1), donate_argnums=1)
    state = adapter.init(params)
    for batch, valid in zip(images, (BATCH, 7, 0), strict=True):
        state, _ = step(params, state, batch_of(batch, np.arange(BATCH) < valid))
    assert int(state.seen) == BATCH + 7
    chex.clear_trace_counter()


def test_no_step_adds_up_by_index(tiny, adapter, step, images):
    params = tiny[1]
    made = step.trace(params, adapter.init(params), batch_of(images[0]))
    assert "scatter" not in str(made.jaxpr)


def test_streams_map_over_states(tiny, adapter, step, images):
    params = tiny[1]
    start = adapter.init(params)
    state, _ = step(params, start, batch_of(images[0]))
    states = jax.tree.map(lambda *x: jnp.stack(x), start, state)
    states = states._replace(below=states.below._replace(context=start.below.context))
    axes = StackedState(State(0, 0, None, 0, 0), 0)
    run = jax.jit(jax.vmap(adapter.step, (None, axes, 0), (axes, 0)))
    after, predictions = run(params, states, images[1:])
    for number, before in enumerate((start, state)):
        alone, expected = step(params, before, batch_of(images[1 + number]))
        np.testing.assert_allclose(predictions.logits[number], expected.logits, atol=2e-4)
        memory = jax.tree.map(lambda x, number=number: x[number], after.memory)
        chex.assert_trees_all_close(memory, alone.memory, atol=2e-5)


def test_an_image_that_is_not_finite_is_left_out(tiny, adapter, step, images):
    params = tiny[1]
    state, _ = step(params, adapter.init(params), batch_of(images[0]))
    spoilt = images[1].copy()
    spoilt[3, 0, 0, 0] = np.nan
    after, prediction = step(params, state, batch_of(spoilt))
    masked, expected = step(params, state, batch_of(spoilt, np.arange(BATCH) != 3))
    same(after.memory, masked.memory)
    others = np.arange(BATCH) != 3
    np.testing.assert_allclose(prediction.logits[others], expected.logits[others], atol=1e-5)
    assert np.isnan(prediction.logits[3]).all()
    assert prediction.metrics["skipped"]
    assert not expected.metrics["skipped"]


def test_one_image_a_batch(name, tiny, task, adapter, step, images):
    params = tiny[1]
    state, both = adapter.init(params), []
    for image in images[0]:
        state, prediction = step(params, state, image[None])
        assert np.isfinite(prediction.logits).all()
        both.append(prediction.logits[0])
    assert int(state.seen) == BATCH
    if name == "tda":  # it goes through a batch one by one
        after, prediction = step(params, adapter.init(params), batch_of(images[0]))
        np.testing.assert_allclose(np.stack(both), prediction.logits, atol=2e-4)
        chex.assert_trees_all_close(after, state, atol=2e-5)
    if name == "lame":  # no neighbours
        plain = zero_shot(tiny[0], task)
        _, prediction = jax.jit(plain.step)(params, plain.init(params), images[0])
        expected = jax.nn.log_softmax(prediction.logits)
        np.testing.assert_allclose(np.stack(both), expected, atol=2e-4)


@pytest.mark.parametrize("kind", ["automatic", "explicit"])
def test_one_device_or_eight_give_the_same(tiny, adapter, step, images, kind):
    """Also on the axes of `jax.make_mesh`, which are explicit."""
    params, images = tiny[1], images[:2].reshape(-1, 32, 32, 3)
    mesh = jax.make_mesh((8,), ("batch",)) if kind == "explicit" else parallel.mesh(1, 8)
    state = adapter.init(params)
    after, expected = step(params, state, batch_of(images))
    spread = jax.device_put(batch_of(images), parallel.batch_sharding(mesh))
    after8, prediction = step(*parallel.replicate((params, state), mesh), spread)
    np.testing.assert_allclose(prediction.logits, expected.logits, atol=2e-4)
    chex.assert_trees_all_close(after8, after, atol=2e-5)


def test_a_saved_state_goes_on(tiny, adapter, step, images, tmp_path):
    params = tiny[1]
    state, _ = step(params, adapter.init(params), batch_of(images[0]))
    jaxtta.save_state(tmp_path / "state.safetensors", state)
    loaded = jaxtta.load_state(tmp_path / "state.safetensors", like=adapter.init(params))
    same(step(params, loaded, batch_of(images[1])), step(params, state, batch_of(images[1])))
    other = params | {"logit_scale": params["logit_scale"] + 1}
    with pytest.raises(ValueError, match="another model"):
        jaxtta.load_state(tmp_path / "state.safetensors", like=adapter.init(other))


@pytest.mark.parametrize("tower", ["siglip", "nnx"])
def test_any_classifier(name, siglip, images, tower):
    if tower == "siglip":
        own = models.task_from_token_ids(golden("siglip")["token_ids"])
        model, params = siglip
    else:
        model, own = NNXClassifier(), None
        params = model.params
    if name == "t3a" and tower == "nnx":
        with pytest.raises(ValueError, match="T3A needs a model with cosine logits; this one has"):
            METHODS[name](model, own)
        return
    method = tda if name == "tda" else METHODS[name]  # at the model's own scale
    adapter = method(model, own)
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[0])
    assert np.isfinite(prediction.logits).all()
    assert prediction.logits.dtype == jnp.float32


# On top of other adapters


def test_tda_on_batclip_is_tda_of_its_adapted_features(tiny, task, images):
    model, params = tiny
    below = batclip(model, task, optimizer=optax.adamw(1e-2))
    adapter = tda(model, task, on=below)
    state, step = adapter.init(params), jax.jit(adapter.step)
    alone, caches, images = below.init(params), tda_caches(8, 16), images[:2]
    plain_step, enter = jax.jit(below.step), jax.jit(tda_logits)
    for batch in images:
        state, prediction = step(params, state, batch)
        alone, plain = plain_step(params, alone, batch)
        features = unit(plain.outputs.embeddings)
        caches, expected = enter(caches, features, plain.logits, all_of(batch))
        np.testing.assert_allclose(prediction.logits, expected, atol=1e-4)
        for metric, value in plain.metrics.items():
            np.testing.assert_allclose(prediction.metrics[metric], value, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state.below, alone, atol=1e-5)
    chex.assert_trees_all_close(state.memory, caches, atol=1e-5)
    source = zero_shot(model, task)  # whose features are others
    _, other = jax.jit(source.step)(params, source.init(params), images[-1])
    assert np.abs(unit(other.outputs.embeddings) - features).max() > 1e-3


def test_stata_on_any_adapter(tiny, task, images):
    model, params = tiny
    on_tent = stata(model, task, on=tent(model, task, optimizer=optax.sgd(1e-1)))
    step, state = jax.jit(on_tent.step), on_tent.init(params)
    alone, own = stata(model, task), stata(model, task).init(params)
    on_plain = stata(model, task, on=zero_shot(model, task))
    for number, batch in enumerate(images):
        state, prediction = step(params, state, batch)
        own, expected = jax.jit(alone.step)(params, own, batch)
        _, same_again = jax.jit(on_plain.step)(params, on_plain.init(params), batch)
        np.testing.assert_array_equal(same_again.logits, expected.logits)
        # TENT predicts before it steps, so that the first batch has the source's features
        gap = np.abs(prediction.logits - expected.logits).max()
        assert gap < 1e-3 if number == 0 else gap > 1e-2


@pytest.mark.parametrize("below", [zero_shot, tent, batclip])
def test_there_is_no_second_pass(tiny, task, images, below):
    class Counting:
        image_size, mixes_batch, feature_shape = 32, False, None
        init_context = tiny[0].init_context
        calls = 0

        def __call__(self, *arguments):
            self.calls += 1
            return tiny[0](*arguments)

    model, params = Counting(), tiny[1]
    adapter = stata(model, task, on=below(model, task))
    state = adapter.init(params)
    model.calls = 0
    jax.eval_shape(adapter.step, params, state, images[0])
    assert model.calls == 1


def test_methods_pile_up(tiny, task, images):
    """LAME on TDA's logits."""
    model, params = tiny
    below = tda(model, task)
    adapter = lame(model, task, on=below)
    _, first = jax.jit(below.step)(params, below.init(params), images[0])
    _, second = jax.jit(adapter.step)(params, adapter.init(params), images[0])
    features, mask = unit(first.outputs.embeddings), all_of(images[0])
    expected = lame_log_probabilities(first.logits, lame_affinity(features, mask), mask)
    np.testing.assert_allclose(second.logits, expected, atol=1e-5)


def test_a_step_skipped_below_is_said_above(tiny, task, images):
    model, params = tiny
    adapter = stata(model, task, on=tent(model, task, optimizer=optax.sgd(jnp.inf)))
    state = adapter.init(params)
    after, prediction = jax.jit(adapter.step)(params, state, images[0])
    same(after, state)
    assert prediction.metrics["skipped"]
    assert np.isfinite(prediction.logits).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_precision_is_that_of_the_widest(name, tiny, task, images, dtype):
    model, params = tiny
    plain = zero_shot(model, task)

    def step(params, state, batch):
        state, prediction = plain.step(params, state, batch)
        narrow = jax.tree.map(lambda x: x.astype(dtype), prediction.outputs)
        return state, prediction._replace(outputs=narrow)

    adapter = METHODS[name](model, task, on=Adapter(plain.init, step))
    state = adapter.init(params)
    after, prediction = jax.eval_shape(adapter.step, params, state, images[0])
    assert {x.dtype.name for x in jax.tree.leaves(after.memory)} <= {"float32"}
    assert prediction.logits.dtype == "float32"


# Bad input


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (tda, {"size": 0}, "size is 0, expected at least 1"),
        (tda, {"negative_size": 0}, "negative_size is 0, expected at least 1"),
        (tda, {"negative_beta": -1}, "negative_beta is -1, expected at least 0"),
        (tda, {"scale": "big"}, "scale is 'big', expected a positive number or None"),
        (
            tda,
            {"entropy_range": (0.5, 0.2)},
            r"entropy_range is \(0.5, 0.2\), expected two",
        ),
        (
            tda,
            {"probability_range": (0.1,)},
            r"probability_range is \(0.1,\), expected two",
        ),
        (stata, {"scale": 0}, "scale is 0, expected a positive number or None"),
        (lame, {"affinity": "cosine"}, "affinity is 'cosine', expected one of knn_symmetric, knn"),
        (lame, {"neighbours": 0}, "neighbours is 0, expected at least 1"),
        (lame, {"iterations": 0}, "iterations is 0, expected at least 1"),
        (t3a, {"supports": -1}, "supports is -1, expected at least 1"),
        (stata, {"alpha": 0}, "alpha is 0, expected a positive number"),
        (stata, {"laplacian": float("nan")}, "laplacian is nan, expected at least 0"),
        (transclip, {"inner_iterations": 0}, "inner_iterations is 0, expected at least 1"),
        (transclip, {"start": "texts"}, "start is 'texts', expected images or text"),
    ],
)
def test_settings_that_make_no_sense(tiny, task, method, options, message):
    with pytest.raises(ValueError, match=message):
        method(tiny[0], task, **options)


def test_what_is_no_model_task_or_adapter_is_refused(name, tiny, task):
    model, method = tiny[0], METHODS[name]
    with pytest.raises(TypeError, match="model is a Task, expected a classifier"):
        method(task, model)
    with pytest.raises(TypeError, match="task is a list, expected a Task"):
        method(model, ["cat", "dog"])
    with pytest.raises(ValueError, match="task is None"):
        method(model, None)
    with pytest.raises(TypeError, match="on is a function, expected an adapter"):
        method(model, task, on=batclip)


def test_states_and_predictions_of_another_adapter_are_refused(tiny, task, images):
    model, params = tiny
    with pytest.raises(ValueError, match="the adapter below have no outputs, which a method on"):
        lame(model, task, on=tnt(model, task)).init(params)
    adapter = lame(model, task)
    with pytest.raises(TypeError, match="params and state are swapped"):
        adapter.step(adapter.init(params), params, images[0])
    with pytest.raises(TypeError, match="state is a State, expected this adapter's StackedState"):
        adapter.step(params, zero_shot(model, task).init(params), images[0])


def test_a_model_without_class_embeddings_is_refused(name):
    class Plain:
        image_size, mixes_batch, feature_shape = 32, False, None

        def init_context(self, params, task):
            return ()

        def logit_scale(self, params):
            return jnp.ones(())

        def __call__(self, params, context, batch):
            features = batch.images.mean((1, 2)) * params["scale"]
            return jaxtta.Outputs(features, features)

    params, images = {"scale": jnp.ones(3)}, jax.random.uniform(jax.random.key(0), (8, 32, 32, 3))
    if name == "lame":
        adapter = METHODS[name](Plain(), None)
        _, prediction = adapter.step(params, adapter.init(params), images)
        np.testing.assert_allclose(np.exp(prediction.logits).sum(1), 1, rtol=1e-5)
        return
    with pytest.raises(ValueError, match="needs class embeddings, which this model's outputs lack"):
        METHODS[name](Plain(), None).init(params)


def test_a_method_of_ones_own(tiny, task, images):
    """Centred features, with the mean of all so far."""
    model, params = tiny

    def init(outputs):
        return jnp.zeros(outputs.embeddings.shape[1]), jnp.zeros(())

    def apply(params, memory, outputs, mask):
        total, count = memory[0] + outputs.embeddings.sum(0), memory[1] + mask.sum()
        centred = outputs.embeddings - total / count
        return (total, count), 20 * centred @ outputs.class_embeddings.T

    adapter = on_features(model, task, FeatureMethod(init, apply))
    state, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[0])
    assert isinstance(prediction, Prediction)
    assert int(state.memory[1]) == BATCH
    np.testing.assert_allclose(prediction.logits.sum(0), 0, atol=1e-3)
