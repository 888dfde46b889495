"""Mint, CLIPArTT and WATT against the published codes' numbers, and the laws they keep."""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import NNXClassifier, golden
from flax.traverse_util import flatten_dict

import jaxtta
from jaxtta import models, tree
from jaxtta.adapters import State
from jaxtta.adapters.clipartt import (
    CLIPARTT_PRESETS,
    CLIPArTTContext,
    clipartt,
    clipartt_adaptation,
    clipartt_loss,
)
from jaxtta.adapters.combined_prompts import (
    ClassWords,
    class_words,
    combined_length,
    combined_prompts,
)
from jaxtta.adapters.mint import MINT_PRESETS, mint, mint_adaptation, mint_inter_variance
from jaxtta.adapters.per_batch import choices
from jaxtta.adapters.stata import stata
from jaxtta.adapters.tent import tent
from jaxtta.adapters.watt import WATT_PRESETS, WATT_TEMPLATES, watt, watt_adaptation
from jaxtta.adapters.zero_shot import zero_shot
from jaxtta.models.resnet import ResNet, ResNetArchitecture

# CLIP's own, in float64: the model's constants are float32.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
WORDS = ClassWords(
    np.array([62, 5, 9, 6, 5]), golden("clipartt")["class_words"], np.array([10]), np.array([63])
)
METHODS = {
    "mint": mint,
    "clipartt": partial(clipartt, words=WORDS, iterations=2),
    "watt": partial(watt, mode="parallel", rounds=2, iterations=1),
}
BATCH = 6


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """The numbers' dtype, which JAX allows in the test then."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture(scope="module")
def task():
    return models.task_from_token_ids(golden("watt")["token_ids"][:, :2])


@pytest.fixture(scope="module")
def images():
    """Three batches."""
    stored = golden("mint")["images"][0, : 3 * BATCH] / np.float32(255)
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


@pytest.fixture(scope="module")
def zero_shot_of(tiny, task):
    """The predictions of a batch without adaptation."""
    adapter, params = zero_shot(tiny[0], task), tiny[1]
    state, step = adapter.init(params), jax.jit(adapter.step)
    return lambda images: step(params, state, images)[1]


def batch_of(images, mask=None):
    mask = np.ones(len(images), bool) if mask is None else mask
    return jaxtta.Batch(images, mask, np.arange(len(images)))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Golden numbers


class Published:
    """A golden file, the model in its precision, and batches whose pixels are those of the file."""

    def __init__(self, tiny, name, dtype, agrees=None):
        self.model, params = tiny
        self.agrees = partial(agrees, name) if agrees else None
        self.dtype, self.reference = dtype, golden(name)
        self.params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
        self.task = models.task_from_token_ids(self.reference["token_ids"])
        prompts = self.model.prompts(self.task)
        self.classes = jax.jit(self.model.class_embeddings)(self.params, prompts)
        self.start, _ = tree.partition(self.params, tree.normalisation_parameters("image"))

    @property
    def batches(self):
        preprocessing = self.model.preprocessing
        mean, std = (np.asarray(x, np.float32) for x in (preprocessing.mean, preprocessing.std))
        pixels = (self.reference["images"] / 255 - MEAN) / STD
        return [batch_of(jnp.asarray(x * std + mean, self.dtype)) for x in pixels]

    def near(self, quantity, ours, theirs):
        assert ours.dtype == self.dtype
        self.agrees(quantity, ours, theirs, self.tolerance(1e-4))

    def tolerance(self, single):
        return 1e-9 if self.dtype == "float64" else single

    def same_norms(self, ours, prefix, *places, start=None):
        """Changes of the parameters, or their gradients, as one vector."""
        start = self.start if start is None else start
        ours, start = (flatten_dict(x) for x in (ours, start))
        names = {path: prefix + ".".join(path).replace("scale", "weight") for path in ours}
        assert {*names.values()} == {x for x in self.reference.files if x.startswith(prefix)}
        moved = np.concatenate([np.ravel(ours[p] - start[p]) for p in ours])
        expected = [np.ravel(self.reference[names[p]][places] - start[p]) for p in ours]
        quantity = "gradients" if prefix == "gradients/" else "update"
        self.agrees(quantity, moved, np.concatenate(expected), norm=self.tolerance(2e-4))


def test_mint_equals_the_published_code(tiny, agrees, dtype):
    run = Published(tiny, "mint", dtype, agrees)
    meta = json.loads(str(run.reference["meta"]))
    optimizer = MINT_PRESETS["cifar10-c"].optimizer()
    adapter = mint(run.model, run.task, scale=meta["scale"], prior=meta["prior"])
    adapt = jax.jit(mint_adaptation(run.model, optimizer))
    state, step = adapter.init(run.params), jax.jit(adapter.step)
    nothing = jax.tree.map(jnp.zeros_like, run.start)
    for number, batch in enumerate(run.batches):
        expected = {key: run.reference[key][number] for key in run.reference.files if key != "meta"}
        before, (state, prediction) = state, step(run.params, state, batch)
        run.near("logits", prediction.logits, expected["logits"])
        run.near("loss", -prediction.metrics["loss"], expected["inter_variance"])
        memory = state.memory
        run.near("class means", memory.source.means, expected["class_means"])
        run.near("mean", memory.source.mean, expected["mean"])
        np.testing.assert_array_equal(memory.source.counts, expected["class_counts"])
        run.same_norms(memory.gradient, "gradients/", number, start=nothing)
        descent, _ = adapt(run.params, run.start, run.classes, before.memory, batch)
        run.same_norms(descent.adapted, "ln/", number)
    assert int(memory.batches) == meta["steps"]
    assert int(state.seen) == meta["steps"] * meta["batch"]
    assert MINT_PRESETS["cifar10-c"].batch_size == meta["batch"]


def test_clipartt_equals_the_published_code(tiny, agrees, dtype):
    run = Published(tiny, "clipartt", dtype, agrees)
    length = combined_length(WORDS, 3)
    adapter = clipartt(run.model, run.task, words=WORDS, scale=100.0)
    optimizer = CLIPARTT_PRESETS["cifar10-c"].optimizer()
    adapt = jax.jit(clipartt_adaptation(run.model, optimizer, length))
    state, step = adapter.init(run.params), jax.jit(adapter.step)
    for number, batch in enumerate(run.batches):
        state, prediction = step(run.params, state, batch)
        run.near("logits", prediction.logits, run.reference["logits"][number])
        context = CLIPArTTContext(run.classes, WORDS)
        descent, _ = adapt(run.params, run.start, context, (), batch)
        run.near("loss", descent.losses, run.reference["losses"][number])
        run.same_norms(descent.adapted, "ln/", number)
        losses = (prediction.metrics["loss"], prediction.metrics["last_loss"])
        run.near("loss", jnp.stack(losses), run.reference["losses"][number, [0, -1]])


def test_clipartts_prompts_are_the_published_ones(tiny):
    """Those of the first iteration; the losses depend on the others."""
    run = Published(tiny, "clipartt", "float32")
    length = combined_length(WORDS, 3)
    for number, logits in enumerate(run.reference["logits_before"]):
        chosen = jax.lax.top_k(jnp.asarray(logits), 3)[1]
        prompts = jax.jit(partial(combined_prompts, length=length))(WORDS, chosen)
        expected = run.reference["combined_ids"][number, 0]
        np.testing.assert_array_equal(prompts, expected[:, :length])
        assert (expected[:, length:] == 63).all()
    # All classes in all orders, against strings of tokens.
    own = [[x for x in row if x >= 0] for row in WORDS.names.tolist()]
    orders = np.array([*itertools.permutations(range(8), 3)])
    prompts = combined_prompts(WORDS, jnp.asarray(orders), length)
    for (a, b, c), prompt in zip(orders, prompts.tolist(), strict=True):
        text = [62, 5, 9, 6, 5, *own[a], 10, *own[b], 10, *own[c], 63]
        assert prompt == text + [63] * (length - len(text))
    assert combined_length(WORDS, 1) == 8


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_watt_equals_the_published_code(tiny, agrees, dtype, mode):
    run = Published(tiny, "watt", dtype, agrees)
    adapter = watt(run.model, run.task, mode=mode, rounds=2, scale=100.0)
    optimizer = WATT_PRESETS["cifar10-c"].optimizer()
    state, step = adapter.init(run.params), jax.jit(adapter.step)
    adapt = jax.jit(watt_adaptation(run.model, optimizer, parallel=mode == "parallel", rounds=2))
    np.testing.assert_allclose(state.context.classes, run.classes, rtol=0, atol=run.tolerance(1e-4))
    for number, batch in enumerate(run.batches):
        state, prediction = step(run.params, state, batch)
        run.near("logits", prediction.logits, run.reference[f"{mode}/logits"][number])
        descent, _ = adapt(run.params, run.start, state.context, (), batch)
        run.near("loss", descent.losses, run.reference[f"{mode}/losses"][number])
        run.same_norms(descent.adapted, f"{mode}/ln/", number, 1)


# The formulas


def test_losses_are_what_loops_give():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        f, t = (x / np.linalg.norm(x, axis=1)[:, None] for x in rng.normal(size=(2, 5, 4)))
        pairs = np.exp((f @ f.T + t @ t.T) / 2 / 0.3)
        targets, scores = pairs / pairs.sum(1)[:, None], np.exp(7 * f @ t.T)
        log_p = np.log(scores / scores.sum(1)[:, None])
        expected = np.mean([-sum(targets[j, i] * log_p[i, j] for j in range(5)) for i in range(5)])
        padded = [np.concatenate([x, rng.normal(size=(3, 4))]) for x in (f, t)]
        ours = clipartt_loss(*map(jnp.asarray, padded), 7.0, np.arange(8) < 5, 0.3)
        np.testing.assert_allclose(ours, expected, rtol=1e-12)
        labels, means, mean = np.array([2, 0, 2, 2, 0]), rng.normal(size=(3, 4)), np.ones(4)
        distance = ((f - mean) ** 2).sum(1) - ((f - means[labels]) ** 2).sum(1)
        expected = (distance[labels == 0].mean() + distance[labels == 2].mean()) / 2
        members = labels[:, None] == np.arange(3)
        ours = mint_inter_variance(*map(jnp.asarray, (f, members, means, mean)))
        np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_mint_predicts_with_the_text_and_the_streams_means(tiny, task, images, zero_shot_of):
    """Where the prior is small and nothing is learnt, classes are the means so far."""
    model, params = tiny
    adapter = mint(model, task, optimizer=optax.sgd(0.0), prior=1e-9)
    source = zero_shot_of(images[0])
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[0])
    features = np.asarray(models.l2_normalize(source.outputs.embeddings))
    labels = np.asarray(source.logits).argmax(1)
    for label in range(8):
        mean = features[labels == label].sum(0)
        direction = mean / max(np.linalg.norm(mean), 1e-12)
        expected = float(model.logit_scale(params)) * features @ direction
        np.testing.assert_allclose(prediction.logits[:, label], expected, atol=1e-3)


# Laws


def test_padding_changes_nothing_for_the_others(tiny, adapter, step, images):
    params, valid = tiny[1], 4
    start = adapter.init(params)
    outcomes = []
    for filling in (0.0, np.nan):
        padded = images[0].copy()
        padded[valid:] = filling
        outcomes.append(step(params, start, batch_of(padded, np.arange(BATCH) < valid)))
    same(*outcomes)
    after, prediction = outcomes[0]
    alone, expected = jax.jit(adapter.step)(params, start, images[0][:valid])
    np.testing.assert_allclose(prediction.logits[:valid], expected.logits, atol=1e-3)
    chex.assert_trees_all_close(after, alone, atol=2e-5)
    assert int(after.seen) == valid
    assert not prediction.metrics["skipped"]


def test_a_fully_masked_batch_leaves_the_state_bit_identical(tiny, adapter, step, images):
    params = tiny[1]
    state, _ = step(params, adapter.init(params), batch_of(images[0]))
    after, prediction = step(params, state, batch_of(images[1], np.zeros(BATCH, bool)))
    same(after, state)
    assert not prediction.metrics["skipped"]
    assert all(np.isfinite(x) for x in prediction.metrics.values())


def test_the_order_of_a_batch_does_not_matter(tiny, adapter, step, images):
    params, order = tiny[1], np.random.default_rng(0).permutation(BATCH)
    after, straight = step(params, adapter.init(params), batch_of(images[0]))
    mixed, permuted = step(params, adapter.init(params), batch_of(images[0][order]))
    np.testing.assert_allclose(permuted.logits, straight.logits[order], atol=1e-3)
    chex.assert_trees_all_close(mixed, after, atol=2e-5)


def test_batches_begin_anew(name, tiny, adapter, step, images):
    """What is remembered of others changes Mint's predictions alone."""
    params = tiny[1]
    _, first = step(params, adapter.init(params), batch_of(images[0]))
    state, _ = step(params, adapter.init(params), batch_of(images[1]))
    after, later = step(params, state, batch_of(images[0]))
    assert np.array_equal(later.logits, first.logits) == (name != "mint")
    assert after.adapted == {}
    assert np.abs(first.metrics["update_norm"]) > 1e-3


def test_a_stream_compiles_once_without_scatters(tiny, adapter, images):
    params = tiny[1]
    step = jax.jit(chex.assert_max_traces(adapter.step, n=1), donate_argnums=1)
    state = adapter.init(params)
    made = step.trace(params, state, batch_of(images[0]))
    assert "scatter" not in str(made.jaxpr)
    for batch, valid in zip(images, (BATCH, 4, 0), strict=True):
        state, _ = step(params, state, batch_of(batch, np.arange(BATCH) < valid))
    assert int(state.seen) == BATCH + 4
    chex.clear_trace_counter()


def test_two_streams_are_each_alone(tiny, adapter, step, images):
    params = tiny[1]
    states = [adapter.init(params)]
    states.append(step(params, states[0], batch_of(images[0]))[0])
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(s._replace(context=()) for s in states))
    stacked = stacked._replace(context=states[0].context)
    axes = State(0, 0, None, 0, 0, 0)
    run = jax.jit(jax.vmap(adapter.step, (None, axes, 0), (axes, 0)))
    after, predictions = run(params, stacked, images[1:])
    for number, state in enumerate(states):
        alone, expected = step(params, state, batch_of(images[1 + number]))
        np.testing.assert_allclose(predictions.logits[number], expected.logits, atol=1e-3)
        memory = jax.tree.map(lambda x, number=number: x[number], after.memory)
        chex.assert_trees_all_close(memory, alone.memory, atol=2e-5)


def test_an_image_that_is_not_finite_keeps_the_source_weights(
    tiny, adapter, step, images, zero_shot_of
):
    params = tiny[1]
    spoilt = images[1].copy()
    spoilt[3, 0, 0, 0] = np.nan
    start = adapter.init(params)
    after, prediction = step(params, start, batch_of(spoilt))
    same(after, start)
    assert prediction.metrics["skipped"]
    assert prediction.metrics["update_norm"] == 0
    assert np.isnan(prediction.logits[3]).all()
    expected = zero_shot_of(images[1])
    others = np.arange(BATCH) != 3
    np.testing.assert_allclose(prediction.logits[others], expected.logits[others], atol=1e-4)


def test_an_optimizer_that_overflows_is_skipped(tiny, task, images):
    model, params = tiny
    adapter = mint(model, task, optimizer=optax.sgd(jnp.inf))
    start = adapter.init(params)
    after, prediction = jax.jit(adapter.step)(params, start, images[0])
    same(after, start)
    assert prediction.metrics["skipped"]
    assert np.isfinite(prediction.logits).all()


def test_one_image_a_batch(tiny, adapter, images):
    params, step = tiny[1], jax.jit(adapter.step)
    state = adapter.init(params)
    for image in images[0, :3]:
        state, prediction = step(params, state, image[None])
        assert np.isfinite(prediction.logits).all()
        assert not prediction.metrics["skipped"]
    assert int(state.seen) == 3


def test_methods_on_features_go_on_top(tiny, task, images):
    model, params = tiny
    adapter = stata(model, task, on=METHODS["watt"](model, task))
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[0])
    np.testing.assert_allclose(np.exp(prediction.logits).sum(1), 1, rtol=1e-4)
    assert "last_loss" in prediction.metrics


def test_passes_per_image_are_those_that_are_documented(tiny, task, monkeypatch):
    """Counted as the operations of the matrix products."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from jax_steps import count_flops

    model, params = tiny
    images, trainable = jnp.zeros((BATCH, 32, 32, 3)), tree.normalisation_parameters("image")
    start, _ = tree.partition(params, trainable)

    def count(function, *arguments):
        return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    def encode(adapted):
        return model.encode_image(tree.merge(params, adapted), images).sum()

    def passes(method, **settings):
        adapter = method(model, task, **settings)
        return count(adapter.step, params, adapter.init(params), images)

    forward, both = count(encode, start), count(jax.grad(encode), start)
    prompts = jnp.zeros((BATCH, combined_length(WORDS, 3)), jnp.int32)
    text = count(lambda: model.encode_text(params, prompts))
    assert 1.5 * forward < both < 3 * forward
    small = 0.01 * forward  # the products of a batch's embeddings
    clipartt_cost = passes(clipartt, words=WORDS)
    for cost, steps, expected in (
        (passes(mint), 1, both + forward),
        (clipartt_cost, 10, 10 * (both + text) + forward),
        (passes(watt), 20, 20 * both + forward),  # two templates
        (passes(watt, mode="parallel"), 200, 200 * both + forward),
    ):
        assert 0 <= cost - expected <= (steps + 1) * small


# Models, tasks and settings


def test_words_are_put_together_as_the_tokenizer_would(embedded):
    model, _ = embedded
    names = ["cat", "polar bear", "or", "o'clock", "St. Bernard", "zip-line 3"]
    words = class_words(model, names)
    length = combined_length(words, 3)
    orders = np.array([[0, 1, 2], [5, 4, 3], [3, 3, 3], [4, 0, 5]])
    texts = [" or ".join(names[n] for n in order) for order in orders]
    expected = models.zero_shot_task(model, texts, ("a photo of a {}",)).token_ids[:, 0]
    prompts = combined_prompts(words, jnp.asarray(orders), length)
    shared = min(length, expected.shape[1])
    np.testing.assert_array_equal(prompts[:, :shared], expected[:, :shared])
    assert (np.asarray(prompts)[:, shared:] == expected[0, -1]).all()
    with pytest.raises(ValueError, match="the tokens of 'cat' are others in the template"):
        class_words(model, names, "a photo of {}s")
    task = models.zero_shot_task(model, names, ("a photo of a {}.",))
    context = clipartt(model, task).init(embedded[1]).context
    same(context.words, words)


def test_published_templates_make_a_task_for_watt(embedded):
    model, params = embedded
    task = models.zero_shot_task(model, ["cat", "dog"], WATT_TEMPLATES)
    context = watt(model, task).init(params).context
    assert context.templates.shape[:2] == (8, 2)
    np.testing.assert_allclose(context.classes, model.init_context(params, task), atol=1e-5)
    one = models.zero_shot_task(model, ["cat", "dog"], WATT_TEMPLATES[2:3])
    np.testing.assert_allclose(context.templates[2], model.init_context(params, one), atol=1e-5)


def test_batch_norms_use_the_batchs_statistics(tiny):
    arch = ResNetArchitecture((1, 1, 1, 1), 8, 4)
    resnet = dataclasses.replace(tiny[0], vision=ResNet(arch, 32))
    for which in ("running", "batch"):
        model, _, trainable = choices(
            "Mint", resnet.with_batch_norm_statistics(which), None, None, MINT_PRESETS["cifar10-c"]
        )
        assert model == resnet.with_batch_norm_statistics("batch") != resnet
        assert trainable("vision_model/bn1/scale")


def test_siglip(siglip, images):
    model, params = siglip
    ids = golden("siglip")["token_ids"]
    task = models.task_from_token_ids(np.stack([ids, np.roll(ids, 1, axis=0)], 1))
    for method in (mint, partial(watt, rounds=1, iterations=1)):
        adapter = method(model, task)
        _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[0])
        assert np.isfinite(prediction.logits).all()
        assert prediction.metrics["update_norm"] > 0
    with pytest.raises(ValueError, match="this model, as SigLIP, reads each whole"):
        clipartt(model, task, words=WORDS)


def test_what_a_model_or_task_lacks_is_said_in_one_sentence(name, tiny, task):
    model, params = tiny
    method = METHODS[name]
    with pytest.raises(TypeError, match="model is a Task, expected a classifier"):
        method(task, model)
    with pytest.raises(TypeError, match="task is a list, expected a Task"):
        method(model, ["cat", "dog"])
    with pytest.raises(ValueError, match="task is None"):
        method(model, None)
    with pytest.raises(TypeError, match="optimizer is a float, expected an optax transformation"):
        method(model, task, optimizer=1e-3)
    with pytest.raises(TypeError, match="trainable"):
        method(model, task, trainable=["scale"])
    with pytest.raises(ValueError, match="needs a model with cosine logits; this one has no"):
        method(NNXClassifier(), None)
    with pytest.raises(ValueError, match="no parameter is chosen"):
        method(model, task, trainable=lambda path: False).init(params)
    with pytest.raises(ValueError, match="adapts the image tower alone; trainable chooses text_mo"):
        method(model, task, trainable=tree.normalisation_parameters()).init(params)
    adapter = method(model, task)
    with pytest.raises(TypeError, match="params and state are swapped"):
        adapter.step(adapter.init(params), params, np.zeros((2, 32, 32, 3), np.uint8))
    below = tree.below_block(tree.normalisation_parameters("image"), 1)
    others = [zero_shot(model, task), tent(model, task), mint(model, task, trainable=below)]
    others += [METHODS["clipartt" if name != "clipartt" else "watt"](model, task)]
    for other in others:
        with pytest.raises(ValueError, match=r"the state is another adapter's, expected .* from"):
            jax.eval_shape(adapter.step, params, other.init(params), np.zeros((2, 32, 32, 3)))


class Cosines:
    """A user's model with cosine logits, without text or class embeddings."""

    image_size, mixes_batch, feature_shape = 32, False, None

    def init_context(self, params, task):
        return ()

    def logit_scale(self, params):
        return jnp.ones(())

    def __call__(self, params, context, batch):
        features = batch.images.mean((1, 2)) * params["scale"]
        return jaxtta.Outputs(features, features)


def test_a_model_without_text_is_refused():
    params = {"scale": jnp.ones(3)}
    with pytest.raises(ValueError, match="Mint needs class embeddings, which this model's outputs"):
        mint(Cosines(), None).init(params)
    for method, message in ((clipartt, "for prompts of its own"), (watt, "for its templates")):
        with pytest.raises(ValueError, match=f"needs a text tower, {message}; this model has none"):
            method(Cosines(), None)


LONG = WORDS._replace(names=np.tile(WORDS.names[:, :1], (1, 4)))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (mint, {"prior": 0.0}, "prior is 0.0, expected a positive number of images"),
        (clipartt, {"iterations": 0}, "iterations is 0, expected at least 1"),
        (clipartt, {"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        (clipartt, {}, "CLIPArTT writes class names into prompts and the task has none"),
        (clipartt, {"words": WORDS, "labels": 9}, "a prompt names 9 labels, the task has 8"),
        (clipartt, {"words": LONG}, "a prompt of 3 classes may have 20 tokens, .* at most 16"),
        (clipartt, {"words": WORDS._replace(names=WORDS.names[:3])}, "words of 3 classes, the ta"),
        (watt, {"mode": "serial"}, "mode is 'serial', expected sequential or parallel"),
        (watt, {"rounds": 0}, "rounds is 0, expected at least 1"),
        (watt, {"temperature": -1.0}, "temperature is -1.0, expected a positive number"),
    ],
)
def test_settings_that_make_no_sense(tiny, task, method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(tiny[0], task, **settings)


def test_tasks_that_do_not_do(tiny, task):
    single = models.task_from_token_ids(task.token_ids[:, :1])
    with pytest.raises(ValueError, match="WATT averages over templates and the task has one"):
        watt(tiny[0], single)
    with pytest.raises(TypeError, match="words is a list, expected ClassWords"):
        clipartt(tiny[0], task, words=[1])
    named = task._replace(class_names=tuple("abcdefgh"))
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        clipartt(tiny[0], named)
