"""Many streams over eight devices, and one batch over them, give what one device gives."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_adapters import change, make, same
from transformers import CLIPConfig

import jaxtta
from jaxtta import adapters, models, parallel
from jaxtta.models.resnet import ResNet, ResNetArchitecture

STREAMS, BATCH, STEPS, SIDE = 8, 8, 4, 32
KEYS = jax.random.split(jax.random.key(3), STREAMS)
COLLECTIVES = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"


@pytest.fixture(scope="module")
def small():
    """CLIPs of one layer, which compile fast: (model, params) with a ViT and a ResNet, a task."""
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    text = {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49}
    config = CLIPConfig(
        text_config=tower | text,
        vision_config=tower | {"image_size": SIDE, "patch_size": 16},
        projection_dim=8,
    )
    vit = models.from_config(config)
    resnet = dataclasses.replace(vit, vision=ResNet(ResNetArchitecture((1, 1, 1, 1), 8, 4), SIDE))
    return {
        "vit": (vit, jax.jit(vit.init)(jax.random.key(0))),
        "resnet": (resnet, jax.jit(resnet.init)(jax.random.key(1))),
        "task": models.task_from_token_ids(prompts_of(5)),
    }


def prompts_of(classes):
    """Token ids of prompts of two lengths, which share their first two tokens."""
    ids = np.zeros((classes, 7), np.int32)
    ids[:, :2] = 48, 1
    ids[:, 2], ids[:, 3] = 2 + np.arange(classes) % 45, 2 + np.arange(classes) // 45
    ids[::2, 4], ids[1::2, 4], ids[1::2, 5] = 49, 47, 49
    return ids


def adapter_of(method, model, task):
    """An adapter by its name, with settings that suit a small model."""
    if method == "tnt":
        return adapters.tnt(model, task, config=adapters.TNTConfig(views=4))
    if method == "tent":  # its updates are a few last bits of a parameter otherwise
        return adapters.tent(model, task, optimizer=optax.sgd(0.05))
    return make(method, model, task)


def batches_of():
    """Random images, (steps, streams, batch, …); the last batches have padding."""
    shape = (STEPS, STREAMS, BATCH)
    images = np.random.default_rng(0).integers(0, 256, (*shape, SIDE, SIDE, 3), np.uint8)
    mask = np.ones(shape, bool)
    mask[-1, :, -1] = False
    index = np.arange(STEPS)[:, None, None] * BATCH + np.arange(BATCH) + 0 * mask
    return [jaxtta.Batch(*batch) for batch in zip(images, mask, index, strict=True)]


def stream(tree, number):
    """One stream's part of a tree, on the host: to cut a sharded array is a program of its own."""
    return jax.tree.map(lambda x: x[number], jax.device_get(tree))


@pytest.fixture(scope="module")
def alone(small):
    """What single streams on one device give: (adapter, params, starts, ends, logits) by case."""
    made = {}

    def run(tower, method):
        model, params = small[tower]
        adapter = adapter_of(method, model, small["task"])
        step = jax.jit(adapter.step)
        starts, ends, logits = [], [], []
        for number in range(STREAMS):
            state = adapter.init(params, KEYS[number])
            starts.append(jax.device_get(state))
            for batch in batches_of():
                state, prediction = step(params, state, stream(batch, number))
                logits.append(prediction.logits)
            ends.append(jax.device_get(state))
        logits = np.stack(logits).reshape(STREAMS, STEPS, BATCH, -1).swapaxes(0, 1)
        return adapter, params, starts, ends, logits

    def get(tower, method):
        if (tower, method) not in made:
            made[tower, method] = run(tower, method)
        return made[tower, method]

    return get


def compiled_step(many, params, states, batch):
    """One program, which is called with nothing else than what it was compiled for."""
    return jax.jit(many.step, donate_argnums=1).lower(params, states, batch).compile()


def run(step, params, states, batches):
    """All batches; no step moves anything between devices."""
    logits = []
    with jax.transfer_guard("disallow"):
        for batch in batches:
            states, predictions = jax.block_until_ready(step(params, states, batch))
            logits.append(predictions.logits)
    return states, np.stack(logits)


def require_equal(method, states, logits, expected, tolerance=1e-5):
    """All streams' updates and predictions are those of single streams."""
    _, _, starts, ends, theirs = expected
    states = jax.device_get(states)
    np.testing.assert_array_equal(logits.argmax(-1), theirs.argmax(-1))
    exact = method == "zero_shot" and tolerance < 1e-4
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=0 if exact else 1e-4)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        state = stream(states, number)
        if method in ("zero_shot", "tnt"):
            same(state, end)
            continue
        assert state.seen == end.seen == STEPS * BATCH - 1
        moved, reference = (change(start.adapted, x.adapted) for x in (state, end))
        assert np.linalg.norm(reference) > 0
        assert np.linalg.norm(moved - reference) <= tolerance * np.linalg.norm(reference)


def first_devices(count):
    return parallel.mesh(devices=jax.devices()[:count])


METHODS = ("zero_shot", "tent", "batclip", "mgtta", "tnt")
CASES = [("vit", method) for method in METHODS] + [("resnet", "tent")]
FORMS = {
    "map": parallel.streams,
    "vmap": lambda adapter: parallel.streams(adapter, within="vmap"),
    "two a device": lambda adapter: parallel.streams(adapter, first_devices(4)),
    "pmap": parallel.pmap,
}
RUNS = [(method, form) for method in METHODS for form in FORMS]
for run_elsewhere in (("tnt", "vmap"), ("tent", "two a device"), ("tent", "pmap")):
    RUNS.remove(run_elsewhere)  # what compiles long, or steps as BATCLIP, is run in fewer forms


@pytest.mark.parametrize(("method", "form"), RUNS)
def test_streams_over_devices_are_single_streams(alone, method, form):
    """Without a word between devices; a fully masked batch leaves its stream as it is."""
    expected = alone("vit", method)
    adapter, params, starts, _, _ = expected
    many = FORMS[form](adapter)
    params = parallel.replicate(params, first_devices(4 if form.startswith("two") else 8))
    states = many.init(params, KEYS)
    same(jax.device_get(states), jax.tree.map(lambda *x: np.stack(x), *starts))
    batches = jax.device_put(batches_of(), states.seen.sharding)
    step = compiled_step(many, params, states, batches[0])
    assert not re.search(COLLECTIVES, step.as_text())
    states, logits = run(step, params, states, batches)
    # A generator of updates makes more of a last bit.
    require_equal(method, states, logits, expected, 1e-3 if method == "mgtta" else 1e-5)

    ended, before = (1, 4, 5), jax.device_get(states)
    mask = np.ones((STREAMS, BATCH), bool)
    mask[ended, :] = False
    last = jax.device_put(batches_of()[0]._replace(mask=mask), states.seen.sharding)
    states = jax.device_get(step(params, states, last)[0])
    for number in range(STREAMS):
        if number in ended:
            same(stream(states, number), stream(before, number))
        else:
            assert states.seen[number] == before.seen[number] + BATCH


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_streams_whose_batches_lie_on_two_devices_each(alone, case):
    """Losses and batch norms are of the whole batch, wherever its images lie."""
    expected = alone(*case)
    adapter, params, _, _, _ = expected
    mesh = parallel.mesh(4, 2)
    many, params = parallel.streams(adapter, mesh), parallel.replicate(params, mesh)
    states = many.init(params, KEYS)
    batches = jax.device_put(batches_of(), NamedSharding(mesh, P("streams", "batch")))
    step = compiled_step(many, params, states, batches[0])
    states, logits = run(step, params, states, batches)
    require_equal(case[1], states, logits, expected, 1e-3)


@pytest.mark.parametrize("method", ["zero_shot", "tnt"])
def test_a_stream_that_carries_nothing_can_be_cut(alone, method):
    """One stream of eight batches on one device, and a batch on each of eight: the same bits."""
    adapter, params, *_ = alone("vit", method)
    pieces = batches_of()[0]
    pieces = pieces._replace(index=np.arange(STREAMS * BATCH).reshape(STREAMS, BATCH))
    logits = []
    for mesh, streams in ((first_devices(1), 1), (parallel.mesh(), STREAMS)):
        many = parallel.streams(adapter, mesh)
        place = NamedSharding(mesh, P("streams"))
        whole = parallel.replicate(params, mesh)
        states, step = many.init(whole, jnp.stack([KEYS[0]] * streams)), jax.jit(many.step)
        for start in range(0, STREAMS, streams):
            cut = jax.tree.map(lambda x, i=start, n=streams: x[i : i + n], pieces)
            states, predictions = step(whole, states, jax.device_put(cut, place))
            logits.append(np.asarray(predictions.logits))
    np.testing.assert_array_equal(np.concatenate(logits[:-1]), logits[-1])


@pytest.mark.parametrize(
    ("method", "kind"),
    [(method, "explicit") for method in METHODS[:4]] + [("batclip", "automatic")],
)
def test_one_batch_over_eight_devices(alone, method, kind):
    """On the axes of `jax.make_mesh`, which are explicit, and on ours."""
    adapter, params, starts, _, theirs = alone("vit", method)
    start, batch = starts[0], stream(batches_of()[0], 0)
    end, _ = jax.jit(adapter.step)(params, start, batch)
    mesh = jax.make_mesh((8,), ("batch",)) if kind == "explicit" else parallel.mesh(1, 8)
    whole = parallel.replicate((params, start), mesh)
    batch = jax.device_put(batch, parallel.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        state, prediction = jax.jit(adapter.step)(*whole, batch)
    assert prediction.logits.sharding.spec[0] == "batch"
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(prediction.logits, theirs[0, 0], atol=1e-5)
    moved, reference = (change(start.adapted, x.adapted) for x in (state, end))
    assert np.linalg.norm(moved - reference) <= 1e-3 * np.linalg.norm(reference)


def test_tnt_refuses_a_batch_on_explicit_axes(alone):
    adapter, params, starts, _, _ = alone("vit", "tnt")
    mesh = jax.make_mesh((8,), ("batch",))
    whole = parallel.replicate((params, starts[0]), mesh)
    batch = jax.device_put(stream(batches_of()[0], 0), parallel.batch_sharding(mesh))
    with pytest.raises(ValueError, match=r"split the stream with jaxtta\.parallel\.streams"):
        jax.eval_shape(adapter.step, *whole, batch)


def test_class_prompts_are_split_over_devices():
    """An eighth of the work on each of eight devices; embeddings and gradients stay."""
    tower = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    text = {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 48, "eos_token_id": 49}
    config = CLIPConfig(
        text_config=tower | text | {"num_hidden_layers": 2},
        vision_config=tower | {"num_hidden_layers": 1, "image_size": SIDE, "patch_size": 16},
        projection_dim=32,
    )
    model = models.from_config(config)
    mesh = parallel.mesh(1, 8)
    params = parallel.replicate(jax.jit(model.init)(jax.random.key(0)), mesh)
    prompts = model.prompts(models.task_from_token_ids(prompts_of(300)))

    def loss(params):
        embeddings = model.class_embeddings(params, prompts)
        return (embeddings**3).sum(), embeddings

    flops, results = [], []
    for context in (contextlib.nullcontext, lambda: jax.set_mesh(mesh)):
        with context():
            step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()
        flops.append(step.cost_analysis()["flops"])
        results.append(step(params))
    assert flops[1] <= 1.2 / 8 * flops[0]
    ((_, whole), whole_gradient), ((_, split), split_gradient) = results
    np.testing.assert_allclose(split, whole, atol=1e-5)
    greatest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole_gradient))
    for ours, theirs in zip(*map(jax.tree.leaves, (split_gradient, whole_gradient)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * greatest)


def test_class_prompts_are_as_they_were_on_any_other_mesh(small, monkeypatch):
    """Without a mesh, with one device for the batch and on explicit axes."""
    model, params = small["vit"]
    prompts = model.prompts(small["task"])

    def program(mesh=None):
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            return str(jax.make_jaxpr(model.class_embeddings)(params, prompts))

    ours = program(), program(parallel.mesh(8, 1)), program(parallel.mesh(1, 8))
    explicit = program(jax.make_mesh((8,), ("batch",)))
    monkeypatch.setattr(models.prompts, "over_devices", lambda *rows: rows)
    assert ours[0] == program()
    assert ours[1] == program(parallel.mesh(8, 1))
    assert ours[2] != program(parallel.mesh(1, 8))
    assert "sharding_constraint" in ours[2]
    assert explicit == program(jax.make_mesh((8,), ("batch",)))


def test_class_prompts_are_split_within_streams(alone):
    adapter, params, *_ = alone("vit", "batclip")
    for batch, split in ((1, False), (2, True)):
        mesh = parallel.mesh(None, batch)
        many = parallel.streams(adapter, mesh)
        states = jax.eval_shape(many.init, params, KEYS)
        program = str(jax.make_jaxpr(many.step)(params, states, batches_of()[0]))
        assert ("sharding_constraint" in program) == split


def counting(params, key):
    return {"sum": jnp.zeros(()) + params["w"][0], "noise": jax.random.uniform(key)}


def add(params, state, batch):
    logits = batch * params["w"]
    return state | {"sum": state["sum"] + batch.sum()}, adapters.Prediction(logits, {})


COUNT = adapters.Adapter(counting, add)
WEIGHTS = {"w": jnp.ones(3)}


def test_parameters_are_placed_once():
    """A step is compiled once and moves nothing; parameters elsewhere would be moved by each."""
    mesh = parallel.mesh()
    many, params = parallel.streams(COUNT, mesh), parallel.replicate(WEIGHTS, mesh)
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(params)} == {P()}
    states, step = many.init(params, KEYS), jax.jit(many.step, donate_argnums=1)
    batches = jax.device_put(np.ones((8, 3), np.float32), NamedSharding(mesh, P("streams")))
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            states, predictions = step(params, states, batches)
        assert step._cache_size() == 1
        with pytest.raises(Exception, match=r"Disallowed .* transfer"):
            step(WEIGHTS, states, batches)
    np.testing.assert_array_equal(predictions.logits, np.ones((8, 3)))
    states, _ = many.step(params, many.init(params, KEYS), batches)  # and without jit
    np.testing.assert_array_equal(states["sum"], np.full(8, 4))


def test_meshes():
    mesh = parallel.mesh()
    assert dict(mesh.shape) == {"streams": 8, "batch": 1}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert dict(parallel.mesh(batch=4).shape) == {"streams": 2, "batch": 4}
    assert dict(first_devices(3).shape) == {"streams": 3, "batch": 1}
    assert parallel.batch_sharding(parallel.mesh(2, 4)).spec == P("batch")


def step_of(states=8, images=8):
    return {"sum": np.zeros(states), "noise": np.zeros(states)}, np.ones((images, 3))


ON_ALL = parallel.replicate(WEIGHTS, parallel.mesh())
MANY = parallel.streams(COUNT)
NAMED = adapters.Adapter(lambda params, key: {"name": "x"} | counting(params, key), add)
MISTAKES = {
    "3 × 1 (streams × batch) does not hold 8 devices": lambda: parallel.mesh(3),
    "0 × 16 (streams × batch) does not hold 8 devices": lambda: parallel.mesh(batch=16),
    "8 × 0 (streams × batch) does not hold 8 devices": lambda: parallel.mesh(batch=0),
    "the mesh has the axes ('data',), expected \"streams\"": lambda: parallel.streams(
        COUNT, Mesh(jax.devices(), "data")
    ),
    "the mesh has the axes ('data',), expected \"batch\"": lambda: parallel.batch_sharding(
        Mesh(jax.devices(), "data")
    ),
    "the mesh has explicit axes": lambda: parallel.streams(
        COUNT, jax.make_mesh((8,), ("streams",))
    ),
    'within is "scan", expected "map" or "vmap"': lambda: parallel.streams(COUNT, within="scan"),
    "12 streams do not divide over 8 devices: fill up to 16 streams with fully masked": (
        lambda: MANY.init(ON_ALL, jax.random.split(KEYS[0], 12))
    ),
    "6 streams do not divide over 8 devices: fill up to 8": (
        lambda: jax.jit(MANY.step)(ON_ALL, *step_of(6, 6))
    ),
    "w of the parameters is not on all 8 devices of the mesh": lambda: MANY.init(WEIGHTS, KEYS),
    "params = jaxtta.parallel.replicate(params, mesh)": (
        lambda: MANY.step({"w": np.ones(3)}, *step_of())
    ),
    "not on all 4 devices": lambda: parallel.streams(COUNT, first_devices(4)).init(ON_ALL, KEYS),
    "states/noise has 8 streams in front and batches 4": (
        lambda: jax.jit(MANY.step)(ON_ALL, *step_of(8, 4))
    ),
    "states/step is a scalar, expected a leading axis": (
        lambda: MANY.step(ON_ALL, {"step": 1}, step_of()[1])
    ),
    "keys hold no array": lambda: MANY.init(ON_ALL),
    "name of the adapter's state is a str, expected an array": (
        lambda: parallel.streams(NAMED).init(ON_ALL, KEYS)
    ),
    "name of the adapter's state is a str": lambda: parallel.pmap(NAMED).init(WEIGHTS, KEYS),
    "16 streams are more than the 8 devices": (
        lambda: parallel.pmap(COUNT).init(WEIGHTS, jax.random.split(KEYS[0], 16))
    ),
    "9 streams are more than the 8 devices": (
        lambda: parallel.pmap(COUNT).step(WEIGHTS, *step_of(9, 9))
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_get_a_sentence(message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        MISTAKES[message]()


def test_an_adapter_may_call_back_to_the_host(small):
    model, params = small["vit"]
    inner = adapters.zero_shot(model, small["task"])

    def step(params, state, batch):
        state, prediction = inner.step(params, state, batch)
        logits = prediction.logits
        return state, prediction._replace(logits=jax.pure_callback(np.negative, logits, logits))

    params, batch = parallel.replicate(params, parallel.mesh()), batches_of()[0]
    found = []
    for adapter in (inner, inner._replace(step=step)):
        many = parallel.streams(adapter, parallel.mesh())
        found.append(jax.jit(many.step)(params, many.init(params, KEYS), batch)[1].logits)
    np.testing.assert_array_equal(-found[0], found[1])
