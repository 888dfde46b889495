"""SAR, EATA, ETA, DeYO, ROID and RoTTA: golden numbers, laws, and their compositions."""

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
from conftest import NNXClassifier, golden, images_of
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxtta
from jaxtta import evaluate, models, strong_views, tree
from jaxtta.adapters import State, batclip, batclip_objective, tent
from jaxtta.adapters.deyo import deyo, shuffle_patches
from jaxtta.adapters.eata import eata, eta
from jaxtta.adapters.filters import prior_corrected, reliable
from jaxtta.adapters.fisher import eata_fisher
from jaxtta.adapters.named import default_settings
from jaxtta.adapters.online import Sharpness, online
from jaxtta.adapters.roid import roid, roid_weights
from jaxtta.adapters.rotta import rotta
from jaxtta.adapters.rotta_memory import Bank, empty_bank, fill_bank
from jaxtta.adapters.sar import sar
from jaxtta.adapters.stata import stata
from jaxtta.evaluate import provenance
from jaxtta.models import context_of
from jaxtta.optim import init_meta_gradient_generator, meta_gradient_generator
from jaxtta.tree import normalisation_parameters

PRECISIONS = pytest.mark.parametrize("dtype", ["float32", "float64"])


def close(dtype, single):
    return 1e-9 if dtype == "float64" else single


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


NAMES = {  # of the files, as the table of agreement has them
    "corrected_logits": "logits",
    "loss_perturbed": "loss of the second step",
    "ema": "average loss",
    "model_probs": "average probabilities",
    "class_probs": "average probabilities",
    "entropy_term": "entropy",
    "fisher_term": "Fisher term",
}


class Golden:
    """A golden file, or a part of one, with the model in a precision."""

    def __init__(self, name, tiny, dtype, agrees, part=""):
        self.file, self.part, self.dtype = golden(name), part, dtype
        self.agrees = partial(agrees, part.strip("/") if part == "eta/" else name)
        self.meta = json.loads(str(self.file["meta"]))
        self.model = tiny[0]
        self.params = jax.tree.map(lambda x: jnp.asarray(x, dtype), tiny[1])
        self.task = models.task_from_token_ids(self.file["token_ids"])

    def __getitem__(self, name):
        return self.file[self.part + name]

    def images(self, name="images", part=None):
        """Such that the model's pixels are the file's, in double precision too."""
        settings = self.model.preprocessing
        mean, std = np.asarray(settings.mean), np.asarray(settings.std)
        raw = self.file[(self.part if part is None else part) + name]
        return np.asarray(images_of(self.model, (raw / 255 - mean) / std), self.dtype)

    def change(self, params, source=None, step=None, name="ln"):
        """The adapted parameters' change from the source as one vector, and the file's."""
        start, end = (flatten_dict(tree) for tree in (source or self.params, params))
        names = {p: f"{name}/{'.'.join(p).replace('scale', 'weight')}" for p in end}
        ours = np.concatenate([np.ravel(np.asarray(end[p], np.float64) - start[p]) for p in end])
        rows = [np.ravel(self[names[p]][step] - np.asarray(start[p], np.float64)) for p in end]
        return ours, np.concatenate(rows)

    def run(self, adapter, batches, params=None):
        """State and prediction of each batch."""
        params = self.params if params is None else params
        state, step = adapter.init(params), jax.jit(adapter.step)
        for number, batch in enumerate(batches):
            state, prediction = step(params, state, batch)
            assert prediction.logits.dtype == self.dtype
            assert not prediction.metrics["skipped"]
            yield number, state, prediction

    def near(self, ours, name, step, single=1e-4):
        self.agrees(NAMES.get(name, name), ours, self[name][step], close(self.dtype, single))

    def near_update(self, adapted, step, name="ln"):
        ours, theirs = self.change(adapted, step=step, name=name)
        self.agrees("update", ours, theirs, norm=close(self.dtype, 2e-4))


# Golden numbers


@PRECISIONS
def test_sar_equals_the_published_code(tiny, agrees, dtype):
    with jax.enable_x64(dtype == "float64"):
        plain, recovery = (Golden("sar", tiny, dtype, agrees, part) for part in ("", "recovery/"))
        meta = plain.meta
        adapter = sar(
            plain.model,
            plain.task,
            optimizer=optax.sgd(meta["lr"], momentum=meta["momentum"]),
            margin=meta["margin_fraction"],
            radius=meta["rho"],
            recovery=meta["recovery_threshold"],
            reference_quirks=True,
        )
        scale = jnp.log(jnp.asarray(meta["recovery_logit_scale"], dtype))
        sharp = {**plain.params, "logit_scale": scale}
        for reference, params, single in ((plain, plain.params, 1e-4), (recovery, sharp, 2e-3)):
            for number, state, prediction in reference.run(adapter, reference.images(), params):
                metrics = prediction.metrics
                reference.near(prediction.logits, "logits", number)
                reference.near(metrics["loss"], "loss", number)
                reference.near(metrics["loss_perturbed"], "loss_perturbed", number, 2e-3)
                reference.near(state.memory, "ema", number, single)
                assert metrics["selected"] == reference["selected"][number].sum()
                assert metrics["reset"] == reference["reset"][number]
                reference.near_update(state.adapted, number)


@PRECISIONS
@pytest.mark.parametrize("part", ["", "eta/"])
def test_eata_equals_the_published_code(tiny, agrees, part, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("eata", tiny, dtype, agrees, part)
        meta, model, task = reference.meta, reference.model, reference.task
        settings = {
            "optimizer": optax.sgd(meta["lr"], momentum=meta["momentum"]),
            "margin": meta["margin_fraction"],
            "similarity": meta["d_margin"],
        }
        if part:
            adapter = eta(model, task, **settings)
        else:
            clean = reference.images("source_images")
            fisher = eata_fisher(model, task, reference.params, clean)
            zero = jax.tree.map(jnp.zeros_like, fisher)
            ours, theirs = reference.change(fisher, zero, ..., "fisher")
            agrees("eata", "Fisher information", ours, theirs, norm=close(dtype, 2e-4))
            weight = meta["fisher_alpha"]
            adapter = eata(model, task, fisher=fisher, fisher_weight=weight, **settings)
        before = 0
        for number, state, prediction in reference.run(adapter, reference.images(part="")):
            metrics = prediction.metrics
            reference.near(prediction.logits, "logits", number)
            reference.near(metrics["loss"], "loss", number)
            reference.near(state.memory, "model_probs", number)
            assert metrics["selected"] == reference["selected"][number].sum()
            if not part:
                reference.near(metrics["entropy"], "entropy_term", number)
                reference.near(metrics["fisher"], "fisher_term", number)
                assert metrics["reliable"] == reference["reliable"][number].sum()
            reference.near_update(state.adapted, number)
            if not metrics["selected"]:
                same(state._replace(seen=before.seen), before)
            before = state
        assert not metrics["selected"]  # the last batch


@PRECISIONS
def test_deyo_equals_the_published_code(tiny, agrees, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("deyo", tiny, dtype, agrees)
        meta = reference.meta
        table = jnp.asarray(np.concatenate(reference["permutation"]))
        adapter = deyo(
            reference.model,
            reference.task,
            optimizer=optax.sgd(meta["lr"], momentum=meta["momentum"]),
            margin=meta["entropy_margin_fraction"],
            weight_margin=meta["weight_margin_fraction"],
            threshold=meta["plpd_threshold"],
            patches=meta["patches_per_side"],
            permute=lambda key, index: table[index],
        )
        for number, state, prediction in reference.run(adapter, reference.images()):
            metrics = prediction.metrics
            reference.near(prediction.logits, "logits", number)
            reference.near(metrics["loss"], "loss", number)
            for name in ("reliable", "selected"):
                assert metrics[name] == reference[name][number].sum()
            reference.near_update(state.adapted, number)


@PRECISIONS
def test_roid_equals_the_published_code(tiny, agrees, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("roid", tiny, dtype, agrees)
        meta = reference.meta
        views = jnp.asarray(np.concatenate(reference.images("views")))

        def fed(key, index, image):
            return views[index]

        adapter = roid(
            reference.model,
            reference.task,
            optimizer=optax.sgd(meta["lr"], momentum=meta["momentum"], nesterov=True),
            temperature=meta["temperature"],
            source_share=1 - meta["source_momentum"],
            reference_quirks=True,
            augment=fed,
        )
        for number, state, prediction in reference.run(adapter, reference.images()):
            metrics = prediction.metrics
            reference.near(prediction.logits, "corrected_logits", number)
            reference.near(metrics["loss"], "loss", number)
            reference.near(state.memory.average, "class_probs", number)
            assert metrics["selected"] == reference["kept"][number].sum()
            reference.near_update(state.adapted, number)


@PRECISIONS
def test_rotta_equals_the_published_code(tiny, agrees, dtype):
    with jax.enable_x64(dtype == "float64"):
        reference = Golden("rotta", tiny, dtype, agrees)
        meta = reference.meta
        views = jnp.asarray(np.concatenate(reference.images("views")))
        adapter = rotta(
            reference.model,
            reference.task,
            optimizer=optax.adam(meta["lr"]),
            places=meta["capacity"],
            every=meta["update_frequency"],
            teacher_share=meta["nu"],
            augment=lambda key, index, image: views[index],
        )
        updates = 0
        for number, state, prediction in reference.run(adapter, reference.images()):
            reference.near(prediction.logits, "logits", number)
            bank = state.memory.bank
            order = np.lexsort((bank.arrival, bank.label, bank.label < 0))
            there = np.asarray(bank.label)[order] >= 0
            for ours, theirs in (("index", "memory"), ("age", "ages"), ("label", "memory_classes")):
                found, expected = np.asarray(getattr(bank, ours))[order], reference[theirs][number]
                np.testing.assert_array_equal(found[there], expected[there])
            np.testing.assert_array_equal(there, reference["memory"][number] >= 0)
            reference.near_update(state.adapted, number)
            ours, theirs = reference.change(state.memory.teacher, step=number, name="teacher")
            agrees("rotta", "teacher", ours, theirs, close(dtype, 2e-7))
            updates += int(prediction.metrics["updates"])
        assert updates == meta["updates"]


@PRECISIONS
def test_the_published_selections_and_weights(dtype):
    """Of the published logits."""
    with jax.enable_x64(dtype == "float64"):
        for name, margin, mask in (
            ("sar", "margin_fraction", "selected"),
            ("eata", "margin_fraction", "reliable"),
            ("deyo", "entropy_margin_fraction", "reliable"),
        ):
            file = golden(name)
            logits = jnp.asarray(file["logits"], dtype)
            every = np.ones(logits.shape[1], bool)
            meta = json.loads(str(file["meta"]))
            for ours, theirs in zip(logits, file[mask], strict=True):
                np.testing.assert_array_equal(reliable(ours, every, meta[margin]), theirs)
        file = golden("roid")
        average = jnp.full(8, 1 / 8, dtype)
        for number, logits in enumerate(file["logits"]):
            weights = roid_weights(jnp.asarray(logits, dtype), jnp.ones(20, bool), average)
            kept = file["kept"][number]
            np.testing.assert_array_equal(weights > 0, kept)
            gap = np.abs(weights - np.where(kept, file["weights"][number], 0)).max()
            assert gap < close(dtype, 1e-4)
            average = jnp.asarray(file["class_probs"][number], dtype)


# The laws


BATCH = 12
FISHER = {"layers": {"1": {"scale": {"value": np.ones(16, np.float32)}}}}
SGD = {"optimizer": optax.sgd(0.05, momentum=0.9)}
METHODS = {
    "sar": partial(sar, margin=0.85, recovery=1.1, **SGD),
    "sar-batclip": partial(sar, margin=0.85, objective=batclip_objective, **SGD),
    "eata": partial(eata, margin=0.85, similarity=0.9, fisher=FISHER, **SGD),
    "eta": partial(eta, margin=0.85, similarity=0.9, **SGD),
    "deyo": partial(deyo, margin=0.9, threshold=0.0, **SGD),
    "deyo-batclip": partial(deyo, margin=0.9, threshold=0.0, objective=batclip_objective, **SGD),
    "roid": partial(roid, **SGD),
    "rotta": partial(rotta, places=6, every=8, teacher_share=0.5),
}
LAWS = ["sar", "sar-batclip", "eata", "deyo", "roid", "rotta"]
FILTERED = [name for name in METHODS if name not in ("rotta", "roid")]


@pytest.fixture(scope="module")
def nnx():
    return NNXClassifier()


@pytest.fixture(scope="module")
def images():
    """Four batches."""
    stored = golden("sar")["images"].reshape(-1, 32, 32, 3)[: 4 * BATCH] / np.float32(255)
    return stored.reshape(4, BATCH, 32, 32, 3)


@pytest.fixture(scope="module", params=LAWS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(name, nnx):
    return METHODS[name](nnx, None)


@pytest.fixture(scope="module")
def step(adapter):
    return jax.jit(adapter.step)


@pytest.fixture(scope="module")
def middle(nnx, adapter, step, images):
    """A state in the middle of a stream."""
    state = adapter.init(nnx.params, jax.random.key(3))
    for number, batch in enumerate(images[:2]):
        state, prediction = step(nnx.params, state, batch_of(batch, start=number * BATCH))
        assert not prediction.metrics["skipped"]
    (scale,) = jax.tree.leaves(state.adapted)
    assert np.any(scale != 1)
    return state


def batch_of(images, mask=None, start=2 * BATCH):
    mask = np.ones(len(images), bool) if mask is None else mask
    return jaxtta.Batch(images, mask, start + np.arange(len(images)))


def test_padding_changes_nothing(nnx, name, step, middle, images):
    place = np.sort(np.random.default_rng(1).permutation(BATCH)[:7])
    mask = np.isin(np.arange(BATCH), place)
    padded = np.full(images[2].shape, np.nan, np.float32)
    padded[place] = images[2][:7]
    batch = batch_of(padded, mask)
    batch.index[place] = 2 * BATCH + np.arange(7)
    after, masked = step(nnx.params, middle, batch)
    alone, expected = step(nnx.params, middle, batch_of(padded[place]))
    np.testing.assert_allclose(masked.logits[place], expected.logits, atol=1e-5)
    chex.assert_trees_all_close(after, alone, atol=1e-5)
    assert int(after.seen) == 2 * BATCH + 7
    assert not masked.metrics["skipped"]


def test_a_fully_masked_batch_leaves_the_state_bit_identical(nnx, step, middle, images):
    after, prediction = step(nnx.params, middle, batch_of(images[2], np.zeros(BATCH, bool)))
    same(after, middle)
    assert not prediction.metrics["skipped"]


def test_an_image_that_is_not_finite_leaves_the_state_bit_identical(nnx, step, middle, images):
    spoilt = images[2].copy()
    spoilt[3, 0, 0, 0] = np.nan
    after, prediction = step(nnx.params, middle, batch_of(spoilt))
    same(after, middle)
    assert prediction.metrics["skipped"]
    np.testing.assert_array_equal(
        np.isnan(prediction.logits).any(1), np.arange(BATCH) == 3, "the others are predicted"
    )
    after, prediction = step(nnx.params, middle, batch_of(images[2]))
    assert not prediction.metrics["skipped"]


def test_the_order_of_a_batch(nnx, name, step, middle, images):
    """Matters to RoTTA's memory alone."""
    order = np.random.default_rng(0).permutation(BATCH)
    after, straight = step(nnx.params, middle, batch_of(images[2]))
    batch = batch_of(images[2][order])._replace(index=2 * BATCH + order)
    permuted_after, permuted = step(nnx.params, middle, batch)
    np.testing.assert_allclose(permuted.logits, straight.logits[order], atol=1e-5)
    if name != "rotta":
        chex.assert_trees_all_close(permuted_after, after, atol=1e-5)


def test_a_stream_compiles_once(nnx, adapter, images):
    step = jax.jit(chex.assert_max_traces(adapter.step, n=1), donate_argnums=1)
    state = adapter.init(nnx.params)
    for batch, valid in zip(images, (BATCH, 7, 0, BATCH), strict=True):
        state, _ = step(nnx.params, state, batch_of(batch, np.arange(BATCH) < valid))
    assert int(state.seen) == 2 * BATCH + 7
    chex.clear_trace_counter()


def test_streams_map_over_states(nnx, adapter, step, middle, images):
    start = adapter.init(nnx.params)
    states = jax.tree.map(lambda *x: jnp.stack(x), start, middle)
    states = states._replace(context=start.context, fingerprint=start.fingerprint)
    axes = State(0, 0, None, 0, None, 0)
    run = jax.jit(jax.vmap(adapter.step, (None, axes, 0), (axes, 0)))
    after, predictions = run(nnx.params, states, images[2:])
    for number, before in enumerate((start, middle)):
        batch = batch_of(images[2 + number], start=before.seen)
        alone, expected = step(nnx.params, before, batch)
        np.testing.assert_allclose(predictions.logits[number], expected.logits, atol=1e-5)
        for kept in ("adapted", "optimizer", "memory"):
            own = jax.tree.map(lambda x, number=number: x[number], getattr(after, kept))
            chex.assert_trees_all_close(own, getattr(alone, kept), atol=1e-5)


def test_one_image_a_batch(nnx, adapter, images):
    state, step = adapter.init(nnx.params), jax.jit(adapter.step)
    for image in images[0][:3]:
        state, prediction = step(nnx.params, state, image[None])
        assert np.isfinite(prediction.logits).all()
        assert not prediction.metrics["skipped"]
    assert int(state.seen) == 3


def test_a_saved_state_goes_on(nnx, adapter, step, middle, images, tmp_path):
    jaxtta.save_state(tmp_path / "state.safetensors", middle)
    loaded = jaxtta.load_state(tmp_path / "state.safetensors", like=adapter.init(nnx.params))
    batch = batch_of(images[2])
    same(step(nnx.params, loaded, batch), step(nnx.params, middle, batch))


@pytest.mark.parametrize(
    ("name", "tower"),
    [("deyo", "resnet"), ("rotta", "resnet"), ("eata", "supervised"), ("roid", "supervised")],
)
def test_any_classifier(towers, name, images, tower):
    """Traced alone; SAR takes its steps as EATA does."""
    model, params, task = towers[tower]
    fisher = {}
    if name == "eata":
        chosen, _ = tree.partition(params, normalisation_parameters("image"))
        fisher = {"fisher": chosen}
    adapter = METHODS[name](model, task, **fisher)
    state = adapter.init(params)
    after, prediction = jax.eval_shape(adapter.step, params, state, images[0])
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert prediction.logits.dtype == jnp.float32
    assert prediction.outputs.embeddings.shape[0] == BATCH


def test_no_step_adds_up_by_index(nnx, adapter, step, images):
    made = step.trace(nnx.params, adapter.init(nnx.params), batch_of(images[0]))
    assert "scatter" not in str(made.jaxpr)


@pytest.mark.parametrize("name", ["sar", "rotta"])
def test_one_device_or_eight_give_the_same(nnx, images, name):
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["batch"], []))
    adapter = METHODS[name](nnx, None)
    state, step = adapter.init(nnx.params), jax.jit(adapter.step)
    batch = batch_of(images[:2].reshape(-1, 32, 32, 3), start=0)
    after, expected = step(nnx.params, state, batch)
    everywhere = jax.device_put((nnx.params, state), whole)
    after8, prediction = step(*everywhere, jax.device_put(batch, split))
    np.testing.assert_allclose(prediction.logits, expected.logits, atol=1e-5)
    chex.assert_trees_all_close(after8, after, atol=1e-5)


def test_a_method_on_features_goes_on_top(nnx, adapter, images):
    top = stata(nnx, None, on=adapter)
    made = jax.eval_shape(top.step, nnx.params, top.init(nnx.params), images[0])
    assert made[1].logits.shape == (BATCH, 5)


@pytest.mark.parametrize("name", FILTERED)
def test_no_step_where_nothing_is_selected(nnx, name, images):
    adapter = METHODS[name](nnx, None)
    state, step = adapter.init(nnx.params), jax.jit(adapter.step)
    state, _ = step(nnx.params, state, images[0])
    strict = METHODS[name](nnx, None, margin=0.0)
    after, prediction = jax.jit(strict.step)(nnx.params, state, images[1])
    same(after._replace(seen=state.seen), state)
    assert int(after.seen) == 2 * BATCH
    assert prediction.metrics["selected"] == 0
    assert not prediction.metrics["skipped"]
    assert prediction.metrics["loss"] == prediction.metrics["update_norm"] == 0


# What they do


def changed(adapter, params, batches, key=None):
    """Adapted parameters after some batches, with the last prediction."""
    state, step = adapter.init(params, key), jax.jit(adapter.step)
    for batch in batches:
        state, prediction = step(params, state, batch)
    assert not prediction.metrics["skipped"]
    return state, prediction


@pytest.mark.parametrize("quirks", [False, True])
def test_sar_recovers(nnx, images, quirks):
    """As new; the reference implementation keeps the average and the momentum."""
    adapter = sar(nnx, None, margin=1.0, recovery=9.0, reference_quirks=quirks, **SGD)
    start = adapter.init(nnx.params)
    state, prediction = changed(adapter, nnx.params, images[:1])
    assert prediction.metrics["reset"]
    same(state.adapted, start.adapted)
    (momentum,) = jax.tree.leaves(state.optimizer)
    assert np.any(momentum != 0) == quirks
    assert np.isfinite(state.memory) == quirks


def test_the_momentum_moves_on_where_sar_selects_nothing_only_in_the_reference(nnx, images):
    lenient, strict = (
        sar(nnx, None, margin=margin, reference_quirks=True, **SGD) for margin in (1.0, 0.0)
    )
    state, _ = changed(lenient, nnx.params, images[:1])
    after, prediction = jax.jit(strict.step)(nnx.params, state, images[1])
    (before, momentum), (now, decayed) = (
        [jax.tree.leaves(x)[0] for x in (s.adapted, s.optimizer)] for s in (state, after)
    )
    np.testing.assert_allclose(decayed, 0.9 * momentum, rtol=1e-6)
    np.testing.assert_allclose(now, before - 0.05 * decayed, rtol=1e-6)
    same(after.memory, state.memory)
    assert prediction.metrics["selected"] == 0


@pytest.mark.parametrize(
    "all_images",
    [
        partial(sar, margin=10.0, radius=0.0, recovery=0.0),
        partial(deyo, margin=10.0, threshold=-1.0),
        partial(eta, margin=10.0, similarity=2.0),
    ],
)
def test_a_filter_that_lets_all_through_leaves_an_objective_as_it_is(nnx, images, all_images):
    optimizer = optax.sgd(0.05, momentum=0.9)
    filtered = all_images(nnx, None, objective=batclip_objective, optimizer=optimizer)
    plain = batclip(nnx, None, optimizer=optimizer, trainable=normalisation_parameters("image"))
    ours, prediction = changed(filtered, nnx.params, images[:2])
    expected, _ = changed(plain, nnx.params, images[:2])
    chex.assert_trees_all_close(ours.adapted, expected.adapted, rtol=1e-5)
    assert prediction.metrics["selected"] == BATCH


def test_the_second_gradient_on_batclip(tiny, images):
    """Both towers, by hand."""
    model, params = tiny
    task = models.task_from_token_ids(golden("sar")["token_ids"])
    trainable, objective = normalisation_parameters("both"), batclip_objective(model)
    context = context_of(model, task, trainable)
    adapter = online(objective, context, trainable, optax.sgd(0.1), sharpness=Sharpness(0.2))
    state, prediction = changed(adapter, params, images[:1])

    @jax.jit
    def by_hand(chosen):
        def loss_of(adapted):
            batch = models.as_batch(images[0])
            return objective(tree.merge(params, adapted), context(params), batch)

        g = jax.grad(loss_of, has_aux=True)(chosen)[0]
        norm = optax.tree.norm(g)
        nearby = jax.tree.map(lambda x, g: x + 0.2 * g / norm, chosen, g)
        (loss, _), g = jax.value_and_grad(loss_of, has_aux=True)(nearby)
        return jax.tree.map(lambda x, g: x - 0.1 * g, chosen, g), loss

    start = adapter.init(params).adapted
    expected, loss = by_hand(start)
    np.testing.assert_allclose(prediction.metrics["loss_perturbed"], loss, rtol=1e-4)
    assert loss > prediction.metrics["loss"]
    difference = [jax.tree.map(jnp.subtract, x, start) for x in (state.adapted, expected)]
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, *difference))
    assert gap < 2e-3 * optax.tree.norm(difference[1])


@pytest.mark.parametrize("name", ["sar", "deyo-batclip", "roid", "rotta"])
def test_the_meta_gradient_generator_drives_them(nnx, images, name):
    phi = init_meta_gradient_generator(jax.random.key(0))
    optimizer = meta_gradient_generator(phi, 1e-2)
    adapter = METHODS[name](nnx, None, optimizer=optimizer)
    state, _ = changed(adapter, nnx.params, images[:2])
    (scale,) = jax.tree.leaves(state.adapted)
    assert 0 < np.abs(scale - 1).max() < 0.021


def test_an_image_keeps_its_randomness_wherever_it_stands(nnx, images):
    key, other = jax.random.key(1), jax.random.key(2)
    for name in ("deyo", "roid"):
        adapter = METHODS[name](nnx, None)
        states = [changed(adapter, nnx.params, images[:1], k)[0] for k in (key, key, other)]
        same(states[0], states[1])
        (first,), (last,) = (jax.tree.leaves(s.adapted) for s in (states[0], states[2]))
        assert np.any(first != last)


def test_roid_takes_images_that_are_all_alike(nnx, images):
    alike = np.broadcast_to(images[0][:1], images[0].shape)
    _, prediction = changed(METHODS["roid"](nnx, None), nnx.params, [alike])
    assert prediction.metrics["selected"] == BATCH


def test_the_prior_multiplies_probabilities_or_in_the_reference_logits():
    logits, mask = jnp.log(jnp.asarray([[0.8, 0.2], [0.6, 0.4]])), jnp.ones(2, bool)
    # mean p (0.7, 0.3), smoothing 1/2/0.7
    prior = (np.array([0.7, 0.3]) + 0.5 / 0.7) / (1 + 1 / 0.7)
    p = jax.nn.softmax(prior_corrected(logits, mask, 2))
    expected = np.exp(logits) * prior
    np.testing.assert_allclose(p, expected / expected.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(prior_corrected(logits, mask, 2, True), logits * prior, rtol=1e-5)


def test_rotta_steps_after_every_so_many_images(nnx, images):
    """However they come in batches."""
    adapter = METHODS["rotta"](nnx, None, augment=lambda key, index, image: image)
    flat, step = images.reshape(-1, 32, 32, 3)[:24], jax.jit(adapter.step)
    found = []
    for size in (24, 8):
        state, updates = adapter.init(nnx.params), []
        for start in range(0, 24, size):
            state, prediction = step(nnx.params, state, flat[start : start + size])
            updates.append(int(prediction.metrics["updates"]))
        found.append((state, updates))
    assert [updates for _, updates in found] == [[3], [1, 1, 1]]
    # The teacher labels a batch before it moves, so that only the images that came are alike.
    np.testing.assert_array_equal(found[0][0].seen, found[1][0].seen)


def loop_of(labels, uncertainty, places, classes):
    """RoTTA's memory as lists: what is in it, as (number, label, age)."""
    memory = []  # in order of arrival

    def score(age, u):
        return 1 / (1 + np.exp(-age / places)) + u / np.log(classes)

    for number, (label, u) in enumerate(zip(labels, uncertainty, strict=True)):
        count = np.bincount([item[1] for item in memory], minlength=classes)
        goes_in = count[label] < places / classes and len(memory) < places
        if not goes_in:
            rivals = count == count.max() if count[label] < places / classes else None
            there = [
                item for item in memory if (item[1] == label if rivals is None else rivals[item[1]])
            ]
            there.sort(key=lambda item: (score(item[2], item[3]), item[1], item[0]))
            if score(there[-1][2], there[-1][3]) > score(0, u):
                memory.remove(there[-1])
                goes_in = True
        if goes_in:
            memory.append((number, label, 0, u))
        memory = [(n, c, age + 1, v) for n, c, age, v in memory]
    return {(n, c, age) for n, c, age, _ in memory}


@hypothesis.given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(6, 4), (8, 3), (3, 5)]))
def test_rottas_memory_is_what_a_loop_keeps(seed, shape):
    places, classes = shape
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, 40, p=rng.dirichlet(np.ones(classes))).astype(np.int32)
    uncertainty = rng.integers(0, 4, 40) / 4  # with ties
    with jax.enable_x64(True):
        numbers, zeros = jnp.arange(40, dtype=jnp.int32), jnp.zeros(40, jnp.int32)
        new = Bank(labels, zeros, jnp.asarray(uncertainty), numbers, numbers, numbers)
        images, pixels = jnp.zeros((places, 1, 1, 3)), numbers[:, None, None, None] * jnp.ones(3)
        bank, images = FILL(
            empty_bank(places, float), images, new, pixels, jnp.ones(40, bool), classes
        )
        kept = np.asarray(bank.label) >= 0
        ours = [np.asarray(x)[kept].tolist() for x in (bank.index, bank.label, bank.age)]
        assert set(zip(*ours, strict=True)) == loop_of(labels, uncertainty, places, classes)
        np.testing.assert_array_equal(images[kept][:, 0, 0, 0], bank.index[kept])


FILL = jax.jit(fill_bank, static_argnums=5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_patches_change_places(dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 6, 6, 3)).astype(dtype)
    orders = np.stack([rng.permutation(9), np.arange(9)])
    shuffled = shuffle_patches(jnp.asarray(images), jnp.asarray(orders))
    assert shuffled.dtype == dtype
    np.testing.assert_array_equal(shuffled[1], images[1])
    for place, patch in enumerate(orders[0]):
        (y, x), (v, u) = np.divmod(place, 3), np.divmod(patch, 3)
        ours = shuffled[0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        np.testing.assert_array_equal(ours, images[0, 2 * v : 2 * v + 2, 2 * u : 2 * u + 2])


def test_sides_that_patches_do_not_divide():
    images = jnp.full((1, 7, 7, 3), 51, jnp.uint8)
    shuffled = shuffle_patches(images, jnp.asarray([[3, 2, 1, 0]]))
    assert shuffled.shape == images.shape
    np.testing.assert_allclose(shuffled, 0.2, rtol=1e-5)


def test_strong_views(images, monkeypatch):
    image, keys = images[0][0], jax.random.split(jax.random.key(0), 16)
    draw = jax.jit(jax.vmap(partial(strong_views.strong_view, noisy=True), (0, None)))
    views = draw(keys, image)
    assert views.shape == (16, 32, 32, 3)
    assert views.min() >= 0 and views.max() <= 1
    same(draw(keys, image), views)
    assert len(np.unique(np.asarray(views[:, 3, 3, 0]))) == 16
    # the image again, or its mirror image, where the ranges are empty
    for name in ("BRIGHTNESS", "CONTRAST", "SATURATION", "GAMMA", "SCALE"):
        monkeypatch.setattr(strong_views, name, (1.0, 1.0))
    for name in ("HUE", "DEGREES", "SHIFT"):
        monkeypatch.setattr(strong_views, name, 0.0)
    views = jax.jit(jax.vmap(strong_views.strong_view, (0, None)))(keys, image)
    same_as = [
        [np.allclose(view, other, atol=2e-3) for other in (image, image[:, ::-1])] for view in views
    ]
    assert all(a != b for a, b in same_as)
    assert 0 < sum(a for a, _ in same_as) < 16


def test_top_blocks_stay_fixed(tiny):
    every = {p for p in tree.paths_of(tiny[1]) if normalisation_parameters("image")(p)}
    chosen = tree.below_block(normalisation_parameters("image"), 1)
    left_out = {p for p in every if not chosen(p)}
    assert {p.split("/")[3] for p in left_out} == {"1", "2"}
    assert len(left_out) == 8
    assert not chosen("vision_model/layer3/0/norm1/scale")
    stages = tree.below_block(normalisation_parameters("image"), 4)
    assert stages("vision_model/layer3/0/norm1/bias")
    assert not stages("vision_model/layer4/0/norm1/bias")
    assert not chosen("text_model/final_layer_norm/scale")
    with pytest.raises(TypeError, match="trainable is normalisation_parameters, expected"):
        tree.below_block(normalisation_parameters, 9)


# Bad input


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (sar, {"margin": -1.0}, "margin is -1.0, expected between 0 and inf"),
        (sar, {"radius": float("nan")}, "radius is nan, expected between 0 and inf"),
        (eata, {}, "EATA needs fisher, from eata_fisher"),
        (eata, {"fisher": FISHER, "fisher_weight": -1.0}, "fisher_weight is -1.0, expected"),
        (eta, {"similarity": -0.1}, "similarity is -0.1, expected between 0 and inf"),
        (deyo, {"threshold": 2.0}, "threshold is 2.0, expected between -1 and 1"),
        (deyo, {"patches": 0}, "patches is 0, expected at least 1"),
        (deyo, {"patches": 33}, "patches is 33, the model's images have 32 pixels a side"),
        (roid, {"temperature": 0.0}, "temperature is 0.0, expected between 1e-06 and inf"),
        (roid, {"source_share": 1.5}, "source_share is 1.5, expected between 0 and 1"),
        (rotta, {"places": 0}, "places is 0, expected at least 1"),
        (rotta, {"teacher_share": -1.0}, "teacher_share is -1.0, expected between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense(nnx, method, options, message):
    with pytest.raises(ValueError, match=message):
        method(nnx, None, **options)


def test_what_is_no_model_or_state_is_refused(name, nnx, adapter, images):
    with pytest.raises(TypeError, match="model is a list, expected a classifier"):
        METHODS[name]([], None)
    with pytest.raises(TypeError, match="optimizer is a float"):
        METHODS[name](nnx, None, optimizer=1e-3)
    state = adapter.init(nnx.params)
    with pytest.raises(TypeError, match="params and state are swapped"):
        adapter.step(state, nnx.params, images[0])
    other = tent(nnx, None, **({} if name == "rotta" else SGD)).init(nnx.params)
    with pytest.raises((ValueError, TypeError), match="another adapter"):
        jax.eval_shape(lambda: adapter.step(nnx.params, other, images[0]))


def test_fisher_of_other_parameters_or_of_no_images(nnx, images):
    with pytest.raises(ValueError, match="fisher is of other parameters than those"):
        eata(nnx, None, fisher={"head": np.ones(3)}).init(nnx.params)
    with pytest.raises(ValueError, match="batches has no images"):
        eata_fisher(nnx, None, nnx.params, [])
    nothing = batch_of(images[0], np.zeros(BATCH, bool))
    whole = eata_fisher(nnx, None, nnx.params, images[:1])
    same(eata_fisher(nnx, None, nnx.params, [images[0], nothing]), whole)
    spoilt = np.full(images[0].shape, np.nan, np.float32)
    with pytest.raises(ValueError, match="gradient of a batch of clean images is not finite"):
        eata_fisher(nnx, None, nnx.params, [spoilt])


def test_an_objective_with_a_memory_gives_it_back(nnx, images):
    adapter = online(
        lambda params, context, batch, memory: (jnp.zeros(()), (batch.images, {})),
        lambda params: (),
        normalisation_parameters("image"),
        optax.sgd(1e-3),
        memory=lambda params, context, key: jnp.zeros(3),
    )
    with pytest.raises(TypeError, match=r"expected \(loss, \(logits, metrics, memory\)\)"):
        adapter.step(nnx.params, adapter.init(nnx.params), images[0])


@pytest.mark.parametrize(
    ("text", "preset", "expected"),
    [
        ("roid", "cifar10-c", {"optimizer": "adam(0.001)"}),
        ("roid:lr=0.01", "cifar10-c", {"optimizer": "adam(0.01)"}),
        ("roid:lr=0.01", "imagenet-c", {"optimizer": "sgd(0.01, momentum=0.9, nesterov=True)"}),
        ("roid:optimizer=adamw", "imagenet-c", {"optimizer": "adamw(0.00025, weight_decay=0.01)"}),
        ("eta", "cifar10-c", {"similarity": 0.4, "optimizer": "adam(0.001)"}),
        ("eta", "imagenet-c", {"similarity": 0.05}),
        ("eta:similarity=0.2", "cifar10-c", {"similarity": 0.2}),
        ("watt:rounds=3,scale=100", "cifar10-c", {"rounds": 3, "scale": 100}),
    ],
)
def test_published_settings_go_with_a_name(text, preset, expected):
    """What a text does not say is as in the paper's runs on the benchmark."""
    spec = evaluate.parse_adapter(text)
    found = provenance.identity_of(spec, evaluate.AdapterConfig(preset), None)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sar:margin=low", "margin is 'low', expected type float"),
        ("sar:margin=true", "margin is True, expected type float"),
        ("watt:rounds=many", "rounds is 'many', expected type int"),
        ("watt:rounds=2.5", "rounds is 2.5, expected type int"),
        ("mint:scale=(1,2)", r"scale is \(1, 2\), expected type float"),
        ("roid:reference_quirks=1", "reference_quirks is 1, expected type bool"),
    ],
)
def test_settings_of_another_type_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        evaluate.parse_adapter(text)


def test_functions_and_arrays_are_no_settings_of_a_name():
    found = [*default_settings(sar)]
    assert found == ["margin", "radius", "recovery", "reference_quirks"]
    assert not {"fisher", "permute", "augment"} & {*default_settings(eata), *default_settings(deyo)}
