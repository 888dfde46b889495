"""ZERO, VTE, MTA, TPT and C-TPT against the published codes' numbers, and the laws they keep."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import NNXClassifier, golden

import jaxtta
from jaxtta import models, parallel
from jaxtta.adapters.image_views import cut_views
from jaxtta.adapters.mta import mean_shift, mta
from jaxtta.adapters.of_views import of_views
from jaxtta.adapters.prompt_tuning import initial_context, tune_context
from jaxtta.adapters.tpt import TPT_OPTIMIZER, ctpt, tpt
from jaxtta.adapters.vte import vte, vte_logits
from jaxtta.adapters.zero import HALF_PRECISION, zero, zero_soft_votes, zero_votes

# CLIP's own, in float64: the model's constants are float32.
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
METHODS = {"zero": zero, "vte": vte, "mta": mta, "tpt": tpt, "ctpt": ctpt}
VIEWS = 6


@pytest.fixture(params=["float32", "float64"])
def precise(request):
    """Whether numbers are float64, which they are in the test then."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param == "float64"


@pytest.fixture
def near(precise, agrees):
    def compare(method, quantity, ours, theirs):
        agrees(method, quantity, ours, theirs, 1e-9 if precise else 1e-4)

    return compare


def encoded(tiny, name, precise):
    """The golden views' unit embeddings, the class embeddings and the scale."""
    model, params = tiny
    reference = golden(name)
    params = jax.tree.map(lambda x: jnp.asarray(x, float if precise else jnp.float32), params)
    pixels = jnp.asarray((reference["views"] / 255 - MEAN) / STD, params["logit_scale"].dtype)
    pictures, views = pixels.shape[:2]
    embeddings = jax.jit(model.encode_image)(params, pixels.reshape(-1, *pixels.shape[2:]))
    prompts = model.prompts(models.task_from_token_ids(reference["token_ids"]))
    classes = jax.jit(model.class_embeddings)(params, prompts)
    unit = models.l2_normalize(embeddings).reshape(pictures, views, -1)
    return reference, unit, classes, model.logit_scale(params), params, prompts


def test_zero_equals_the_published_code(tiny, precise, near):
    reference, unit, classes, scale, *_ = encoded(tiny, "zero", precise)
    logits = scale * unit @ classes.T
    near("zero", "cosines", logits / scale, reference["cosines"])
    votes = jax.jit(jax.vmap(zero_votes))(logits)
    np.testing.assert_array_equal(votes, reference["votes"])
    np.testing.assert_array_equal(votes.argmax(-1), reference["prediction"])
    soft = jax.jit(jax.vmap(lambda x: zero_soft_votes(x, scale, HALF_PRECISION)))(logits)
    near("zero", "votes", np.exp(soft), reference["soft_votes"])


def test_ties_are_broken_by_the_views_that_follow():
    count = jax.jit(zero_votes, static_argnums=1)

    def votes(choices, sure, fraction):
        """Of views for these classes, the more certain the larger `sure`; ranks among the rest."""
        logits = np.array(sure)[:, None] * np.eye(4)[choices]
        return np.asarray(count(jnp.asarray(logits), fraction)).tolist()

    # The third in order is for a class that is not tied, the fourth decides, not the fifth.
    assert votes([0, 1, 2, 1, 0], [9, 8, 7, 6, 5], 0.4) == [1, 2, 0, 0]
    assert votes([0, 1, 2, 1, 0], [9, 8, 7, 5, 6], 0.4) == [2, 1, 0, 0]
    assert votes([0, 0, 1], [3, 2, 1], 1.0) == [2, 1, 0, 0]  # no tie
    # Nobody is for a tied class: the surest of the others prefers one of them.
    logits = np.array([[9, 0, 0.0, 0], [0, 0, 0, 8], [0, 0, 6, 2.0], [3, 2, 5.0, 1]])
    assert count(jnp.asarray(logits), 0.5).tolist() == [1, 0, 0, 2]
    # All have voted: the surest of all.
    assert votes([0, 1], [5, 9], 1.0) == [1, 2, 0, 0]


def test_vte_equals_the_published_code(tiny, precise, near):
    reference, unit, classes, scale, *_ = encoded(tiny, "vte", precise)
    near("vte", "class embeddings", classes, reference["text_embeds"])
    logits = jax.jit(jax.vmap(lambda views: vte_logits(views, classes, scale)))(unit)
    near("vte", "logits", logits, reference["logits"])


def test_mta_equals_the_published_code(tiny, precise, near):
    reference, unit, classes, scale, *_ = encoded(tiny, "mta", precise)
    found = jax.jit(jax.vmap(lambda views: mean_shift(views, classes, scale)))(unit)
    theirs = {"weights": "inlierness"}
    for name, value in found._asdict().items():
        near("mta", name, value, reference[theirs.get(name, name)])


@pytest.mark.parametrize(("part", "dispersion"), [("", 0.0), ("ctpt/", 20.0)])
def test_tpt_equals_the_published_code(tiny, precise, near, agrees, part, dispersion):
    name = part.strip("/") or "tpt"
    reference, unit, _, scale, params, prompts = encoded(tiny, "tpt", precise)
    model, tolerance = tiny[0], 1e-9 if precise else 2e-4
    start = initial_context(params, prompts)
    near(name, "initial context", start, reference["context"])

    def encode(context):
        return model.class_embeddings(params, prompts, context)

    @jax.jit
    @jax.vmap
    def run(views):
        how = {"dispersion": dispersion, "first": jax.vjp(encode, start)}
        arguments = encode, start, views, scale
        tuned = tune_context(*arguments, TPT_OPTIMIZER(), steps=3, **how)
        return tune_context(*arguments, optax.sgd(1.0), **how).context, tuned

    moved, tuned = run(unit)
    agrees(name, "gradients", start - moved, reference[f"{part}gradients"], norm=tolerance)
    np.testing.assert_array_equal(tuned.selected, reference[f"{part}selected"])
    near(name, "loss", tuned.losses, reference[f"{part}losses"])  # each with the context so far
    change = reference[f"{part}contexts"][:, -1] - reference["context"]
    agrees(name, "update", tuned.context - start, change, norm=tolerance)
    texts = reference[f"{part}text_embeds"][:, -1]
    near(name, "class embeddings", tuned.class_embeddings, texts)
    near(name, "logits", tuned.logits, reference[f"{part}logits"][:, -1])
    assert tuned.finite.all()


@pytest.fixture(scope="module")
def task():
    return models.task_from_token_ids(golden("tpt")["token_ids"])


@pytest.fixture(scope="module")
def images():
    return np.asarray(jax.random.uniform(jax.random.key(1), (5, 32, 32, 3)))


@pytest.fixture(scope="module", params=["zero", "vte", "mta", "ctpt"])
def case(request, tiny, task):
    """A method's name, its adapter, the jitted step, and the state of a new stream."""
    model, params = tiny
    adapter = METHODS[request.param](model, task, views=VIEWS, views_per_chunk=4)
    return request.param, adapter, jax.jit(adapter.step), adapter.init(params, jax.random.key(7))


def batch_of(images, mask=None, index=None, sizes=None):
    mask = np.ones(len(images), bool) if mask is None else mask
    index = np.arange(len(images)) if index is None else index
    return jaxtta.Batch(images, mask, index, sizes)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(case, tiny, images):
    """The state after the images, and their prediction."""
    return case[2](tiny[1], case[3], batch_of(images))


def test_a_batch_is_its_images_one_by_one(case, tiny, task, images, straight):
    name, _, step, state = case
    model, params = tiny
    logits = np.asarray(straight[1].logits)
    assert logits.shape == (5, 8) and np.isfinite(logits).all()
    assert not straight[1].metrics["skipped"]
    one = step(params, state, batch_of(images[3:4], index=np.array([3])))
    np.testing.assert_allclose(one[1].logits[0], logits[3], atol=2e-3)
    order = np.array([2, 0, 4, 1, 3])
    _, permuted = step(params, state, batch_of(images[order], index=order))
    np.testing.assert_allclose(permuted.logits, logits[order], atol=2e-3)

    @jax.jit
    def from_views(image):
        """What the function of an image's views gives."""
        views = cut_views(model, jax.random.fold_in(jax.random.key(7), 3), image, None, VIEWS)
        prompts, scale = model.prompts(task), model.logit_scale(params)
        unit = models.l2_normalize(model.encode_image(params, model.normalize(views)))

        def encode(context=None):
            return model.class_embeddings(params, prompts, context)

        if name == "zero":
            votes = zero_votes(scale * unit @ encode().T)
            return views, jnp.log(jnp.maximum(votes / votes.sum(), 1e-10))
        if name == "vte":
            return views, vte_logits(unit, encode(), scale)
        if name == "mta":
            return views, mean_shift(unit, encode(), scale).logits
        start = initial_context(params, prompts)
        return views, tune_context(
            encode, start, unit, scale, TPT_OPTIMIZER(), dispersion=20.0
        ).logits

    views, expected = from_views(images[3])
    np.testing.assert_array_equal(views[0], images[3])
    np.testing.assert_allclose(logits[3], expected, atol=5e-3)


def test_padding_and_images_of_nan_change_nothing_for_the_others(case, tiny, images, straight):
    _, _, step, state = case
    params = tiny[1]
    mask = np.array([True, False, True, True, False])
    padded = np.where(mask[:, None, None, None], images, np.float32(np.nan))
    after, prediction = step(params, state, batch_of(padded, mask))
    np.testing.assert_allclose(prediction.logits[mask], straight[1].logits[mask], atol=2e-4)
    assert all(np.isfinite(value) for value in prediction.metrics.values())
    assert not prediction.metrics["skipped"]
    assert int(after.seen) == 3
    spoilt = images.copy()
    spoilt[1, 0, 0, 0] = np.nan
    after, prediction = step(params, state, batch_of(spoilt))
    same(after, state)
    assert prediction.metrics["skipped"]
    assert not np.isfinite(prediction.logits[1]).any()
    rest = np.array([0, 2, 3, 4])
    np.testing.assert_allclose(prediction.logits[rest], straight[1].logits[rest], atol=2e-4)
    after, prediction = step(params, straight[0], batch_of(images, np.zeros(5, bool)))
    same(after, straight[0])
    assert not prediction.metrics["skipped"]


def test_two_streams_are_each_alone(case, tiny, images):
    _, adapter, step, _ = case
    params = tiny[1]
    states = [adapter.init(params, jax.random.key(seed)) for seed in (7, 8)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    batches = jnp.stack([images, images[::-1]])
    after, together = jax.jit(jax.vmap(adapter.step, (None, 0, 0)))(params, stacked, batches)
    for stream in range(2):
        alone, prediction = step(params, states[stream], batch_of(batches[stream]))
        np.testing.assert_allclose(together.logits[stream], prediction.logits, atol=2e-3)
        same(jax.tree.map(lambda leaf, stream=stream: leaf[stream], after), alone)


def test_a_stream_compiles_once_without_scatters(case, tiny, images):
    _, adapter, _, state = case
    params = tiny[1]
    step = jax.jit(chex.assert_max_traces(adapter.step, n=1))
    made = step.trace(params, state, batch_of(images, np.arange(5) < 5))
    assert "scatter" not in str(made.jaxpr)
    for valid in (5, 3, 0):
        state, _ = step(params, state, batch_of(images, np.arange(5) < valid))
    chex.clear_trace_counter()
    assert int(state.seen) == 8


def test_a_batch_on_explicit_axes_is_refused(tiny, task):
    model, params = tiny
    mesh = jax.make_mesh((8,), ("batch",))
    whole, split = parallel.replicate(params, mesh), parallel.batch_sharding(mesh)
    adapter = zero(model, task, views=VIEWS)
    state = parallel.replicate(adapter.init(params), mesh)
    batch = jax.device_put(batch_of(np.zeros((8, 32, 32, 3), np.float32)), split)
    with pytest.raises(ValueError, match="ZERO takes images one after another and cannot split"):
        jax.eval_shape(adapter.step, whole, state, batch)


def test_full_size_images_give_their_own_views(tiny, task):
    model, params = tiny
    canvas = jax.random.randint(jax.random.key(1), (2, 50, 50, 3), 0, 256).astype(jnp.uint8)
    sizes = jnp.array([[50, 40], [33, 47]])
    adapter = vte(model, task, views=VIEWS)
    assert all(method.needs_originals for method in METHODS.values())
    batch = batch_of(canvas, index=jnp.array([7, 8]), sizes=sizes)
    state = adapter.init(params)
    _, prediction = jax.jit(adapter.step)(params, state, batch)

    @jax.jit
    def from_views(image, size):
        key = jax.random.fold_in(jax.random.key(0), 8)
        views = cut_views(model, key, image, size, VIEWS)
        unit = models.l2_normalize(model.encode_image(params, model.normalize(views)))
        return vte_logits(unit, state.context.model, model.logit_scale(params))

    expected = from_views(canvas[1], sizes[1])
    np.testing.assert_allclose(prediction.logits[1], expected, atol=2e-3)


def test_zero_on_a_users_own_model(images):
    model = NNXClassifier()
    adapter = zero(model, None, views=VIEWS, fraction=0.5)
    _, prediction = jax.jit(adapter.step)(model.params, adapter.init(model.params), images)
    np.testing.assert_allclose(np.exp(prediction.logits).sum(-1), 1, atol=1e-5)
    total = np.array([[3.0], [4.0]])[:, :, None]  # a vote each, and one more after a tie
    votes = total * np.exp(prediction.logits)
    assert (np.abs(votes - np.round(votes)).max(-1) < 1e-4).any(0).all()


def test_soft_votes_of_an_adapter_are_the_functions(tiny, task, images):
    model, params = tiny
    adapter = zero(model, task, temperature=HALF_PRECISION, views=VIEWS, fraction=0.5)
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[:1])
    classes, scale = model.init_context(params, task), model.logit_scale(params)

    @jax.jit
    def from_views(image):
        key = jax.random.fold_in(jax.random.key(0), 0)
        logits = model(params, classes, cut_views(model, key, image, None, VIEWS)).logits
        return zero_soft_votes(logits, scale, HALF_PRECISION, 0.5)

    votes = np.exp(from_views(images[0]))
    assert votes.sum() == pytest.approx(3, abs=1e-4)
    np.testing.assert_allclose(np.exp(prediction.logits[0]), votes / 3, atol=2e-3)


def test_vte_and_mta_on_siglip(siglip, images):
    model, params = siglip
    task = models.task_from_token_ids(golden("siglip")["token_ids"])
    for method in (vte, mta):
        adapter = method(model, task, views=VIEWS)
        small = images[:1, : model.image_size, : model.image_size]
        _, prediction = jax.jit(adapter.step)(params, adapter.init(params), small)
        assert np.isfinite(prediction.logits).all()


def test_views_that_are_all_the_same_are_their_own_mode(tiny, task):
    model, params = tiny
    grey = np.full((1, 32, 32, 3), 0.5, np.float32)
    adapter = mta(model, task, views=VIEWS)
    state = adapter.init(params)
    _, prediction = jax.jit(adapter.step)(params, state, grey)
    plain = jax.jit(model)(params, state.context.model, grey).logits
    np.testing.assert_allclose(prediction.logits, plain, atol=1e-3)


def test_tpt_takes_the_first_template_and_falls_back_to_it(tiny, task, images):
    model, params = tiny
    several = models.task_from_token_ids(
        np.concatenate([task.token_ids, golden("vte")["token_ids"]], 1)
    )
    answers = []
    for given, optimizer in ((task, None), (several, optax.sgd(jnp.inf))):
        adapter = tpt(model, given, optimizer=optimizer, views=VIEWS)
        state = adapter.init(params)
        answers.append((state, jax.jit(adapter.step)(params, state, images[:2])[1]))
    same(answers[0][0].context, answers[1][0].context)  # the prompts
    plain = jax.jit(model)(params, model.init_context(params, task), images[:2]).logits
    assert np.abs(answers[0][1].logits - plain).max() > 1e-2
    # An infinite step is not taken.
    np.testing.assert_allclose(answers[1][1].logits, plain, atol=1e-4)
    assert answers[1][1].metrics["skipped"]


def test_a_context_is_what_a_table_with_other_embeddings_would_give(tiny, task):
    """In packed prompts, against prompts that are encoded whole; the gradient too."""
    model, params = tiny
    prompts = model.prompts(task)
    start = initial_context(params, prompts)
    shift = jnp.linspace(-0.5, 0.5, start.shape[1])
    assert prompts.prefix.tolist() == [62, 5, 9, 5, 11]

    def packed(shift):
        return model.class_embeddings(params, prompts, start.at[3].add(shift))

    def whole(shift):
        text = params["text_model"]
        table = text["embeddings"]["token_embedding"]["embedding"]
        table = {"embedding": jnp.asarray(table).at[11].add(shift)}  # which occurs nowhere else
        text = text | {"embeddings": text["embeddings"] | {"token_embedding": table}}
        encoded = model.encode_text(params | {"text_model": text}, task.token_ids[:, 0])
        return models.l2_normalize(encoded)

    assert (task.token_ids == 11).sum() == len(task.token_ids)
    weights = jax.random.normal(jax.random.key(0), (8, 16))

    def run(function):
        def weighted(shift):
            encoded = function(shift)
            return (weights * encoded).sum(), encoded

        return jax.jit(jax.grad(weighted, has_aux=True))

    (ours_pull, ours), (their_pull, theirs) = run(packed)(shift), run(whole)(shift)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(ours_pull, their_pull, atol=1e-5)
    assert np.abs(ours - model.init_context(params, task)).max() > 1e-3


def test_one_class_has_no_dispersion_to_keep(tiny, task, images):
    model, params = tiny
    one = task._replace(token_ids=task.token_ids[:1])
    adapter = ctpt(model, one, views=2)
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[:1])
    assert np.isfinite(prediction.logits).all() and not prediction.metrics["skipped"]


def test_passes_per_image_are_those_that_are_documented(tiny, task, monkeypatch):
    """Counted as the operations of the matrix products that one image more costs."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from jax_steps import count_flops

    model, params = tiny
    prompts = model.prompts(task)

    def count(function, *arguments):
        return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr)

    def image_of(size):
        return jnp.zeros((size, 32, 32, 3))

    def per_image(method, **settings):
        adapter = method(model, task, views=VIEWS, views_per_chunk=3, **settings)
        state = adapter.init(params)
        few, more = (count(adapter.step, params, state, image_of(size)) for size in (1, 2))
        return more - few - cutting

    key = jax.random.key(0)
    cutting = count(lambda image: cut_views(model, key, image, None, VIEWS), image_of(1)[0])
    image = count(lambda images: model.encode_image(params, images), image_of(1))
    start = initial_context(params, prompts)

    def texts(context):
        return model.class_embeddings(params, prompts, context)

    forward = count(texts, start)
    both = count(lambda context: jax.vjp(texts, context)[1](texts(context)), start) - forward
    classify = 2 * VIEWS * 8 * 16  # the cosines
    assert per_image(zero) == VIEWS * image + classify
    # The model's own logits are traced too, and left out by the compiler.
    assert per_image(vte) == VIEWS * image + 2 * classify
    # the affinities and their products too, which need no pass
    assert VIEWS * image < per_image(mta) < VIEWS * (image + 12_000)
    small = 4 * classify
    for steps in (1, 3):  # one pass less than in the published code: forward steps + 1
        cost = per_image(tpt, steps=steps) - VIEWS * image - steps * both
        assert 0 <= cost <= steps * small
    assert forward < both < 3 * forward


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (zero, {"views": 0}, "views is 0, expected at least 1"),
        (zero, {"views_per_chunk": 0}, "views_per_chunk is 0, expected at least 1"),
        (zero, {"fraction": 0.0}, "fraction is 0.0, expected above 0 and at most 1"),
        (zero, {"temperature": -1.0}, "temperature is -1.0, expected a positive number or None"),
        (zero, {"scale": (0.5, 0.2)}, r"scale is \(0.5, 0.2\), expected two numbers from 0 to"),
        (zero, {"scale": (0, 0.2)}, "the least scale is 0, expected above 0 and at most 1"),
        (zero, {"temperature": "warm"}, "temperature is 'warm', expected a positive number or"),
        (vte, {"fraction": 1.5}, "fraction is 1.5, expected above 0 and at most 1"),
        (mta, {"views": 1}, "views is 1, expected at least 2"),
        (mta, {"lambda_y": 0.0}, "lambda_y is 0.0, expected a positive number"),
        (tpt, {"steps": 0}, "steps is 0, expected at least 1"),
        (tpt, {"context_tokens": 9}, "share 4 tokens after the beginning of text, expected 9"),
        (ctpt, {"dispersion": -1.0}, "dispersion is -1.0, expected at least 0"),
    ],
)
def test_settings_that_make_no_sense(tiny, task, method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(tiny[0], task, **settings)


def test_what_a_model_lacks_is_said_in_one_sentence(tiny, task, siglip, images):
    model, params = tiny
    own = NNXClassifier()

    class Scaled(NNXClassifier):  # whose context is no class embeddings
        def logit_scale(self, params):
            return jnp.ones(())

    for method, name in ((vte, "VTE"), (mta, "MTA")):
        with pytest.raises(ValueError, match=f"{name} needs a model with cosine logits"):
            method(own, None)
        with pytest.raises(ValueError, match=rf"{name} needs class embeddings \(classes, 16\) as"):
            other = method(Scaled(), None, views=VIEWS)
            jax.eval_shape(other.step, own.params, other.init(own.params), images[:1])
    with pytest.raises(ValueError, match="ZERO with a temperature needs a model with cosine"):
        zero(own, None, temperature=1e-3)
    with pytest.raises(ValueError, match="TPT needs a text tower"):
        tpt(own, None)
    with pytest.raises(ValueError, match="as SigLIP, reads each prompt whole"):
        ctpt(siglip[0], task)
    mixing = NNXClassifier()
    mixing.mixes_batch = True
    with pytest.raises(ValueError, match="ZERO needs images that do not mix"):
        zero(mixing, None)
    with pytest.raises(ValueError, match="task is None"):
        vte(model, None)
    with pytest.raises(TypeError, match="expected an optax transformation"):
        tpt(model, task, optimizer=1e-3)
    with pytest.raises(TypeError, match="expected a classifier"):
        zero(task, task)
    boxed = dataclasses.replace(model, preprocessing=model.preprocessing._replace(resample=4))
    with pytest.raises(ValueError, match="PIL's filter 4, expected 2"):
        mta(boxed, task)
    adapter = zero(model, task, views=VIEWS)
    state = adapter.init(params)
    with pytest.raises(ValueError, match="an image of 40×40 pixels, expected 32×32, or"):
        jax.eval_shape(adapter.step, params, state, jnp.zeros((1, 40, 40, 3)))
    adapter = zero(own, None, views=VIEWS)
    with pytest.raises(ValueError, match="a full-size image, but the model has no preprocessing"):
        jax.eval_shape(
            adapter.step,
            own.params,
            adapter.init(own.params),
            batch_of(images[:1], sizes=np.array([[32, 32]])),
        )
    plain = jaxtta.adapters.zero_shot(model, task)
    with pytest.raises(ValueError, match="it is another adapter's"):
        adapter.step(params, plain.init(params), images[:1])


def test_a_method_of_ones_own_takes_two_functions(tiny, task, images):
    """As the module's docstring has it."""
    model, params = tiny

    def prepare(params, classes):
        return lambda logits: (logits.mean(0), {"spread": logits.std()})

    def encode(params, classes, images):
        return model(params, classes, images).logits

    adapter = of_views(model, task, encode, prepare, views=VIEWS)
    _, prediction = jax.jit(adapter.step)(params, adapter.init(params), images[:2])
    assert set(prediction.metrics) == {"spread", "skipped"}

    @jax.jit
    def from_views(image):
        views = cut_views(model, jax.random.fold_in(jax.random.key(0), 1), image, None, VIEWS)
        return model(params, model.init_context(params, task), views).logits

    logits = from_views(images[1])
    np.testing.assert_allclose(prediction.logits[1], logits.mean(0), atol=2e-3)


def test_golden_files_say_the_settings_that_are_the_defaults():
    settings = {name: json.loads(str(golden(name)["meta"])) for name in ("zero", "vte", "mta")}
    assert settings["zero"]["gamma"] == 0.3
    assert settings["vte"]["selection"] == 0.1
    assert (settings["mta"]["lambda_q"], settings["mta"]["lambda_y"]) == (4.0, 0.2)
