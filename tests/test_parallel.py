"""Many streams over eight devices, and one batch over them, give what one device gives."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import size_of
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_adapters import change, make, same

import jaxtta
from jaxtta import adapters, models, parallel

STREAMS, BATCH, STEPS = 8, 4, 4
CASES = [("vit", name) for name in ("zero_shot", "tent", "batclip", "mgtta", "tnt")]
CASES += [("resnet", "batclip")]
FORMS = {
    "map": parallel.streams,
    "vmap": lambda adapter: parallel.streams(adapter, within="vmap"),
    "two streams a device": lambda adapter: parallel.streams(adapter, four_devices()),
    "streams × batch": lambda adapter: parallel.streams(adapter, parallel.mesh(4, 2)),
    "pmap": parallel.pmap,
}
COLLECTIVES = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"


def four_devices():
    return parallel.mesh(devices=jax.devices()[:4])


def adapter_of(method, model, task):
    if method == "tnt":
        return adapters.tnt(model, task, config=adapters.TNTConfig(views=4))
    return make(method, model, task)


def batches_of(steps=STEPS):
    """Random images (steps, streams, batch, …); the last batches have padding."""
    images = np.random.default_rng(0).integers(
        0, 256, (steps, STREAMS, BATCH, 32, 32, 3), np.uint8
    )
    mask = np.ones(images.shape[:3], bool)
    mask[-1, :, -1] = False
    index = np.arange(steps)[:, None, None] * BATCH + np.arange(BATCH) + 0 * mask
    return [jaxtta.Batch(*batch) for batch in zip(images, mask, index, strict=True)]


KEYS = jax.random.split(jax.random.key(3), STREAMS)


def stream(tree, number):
    return jax.tree.map(lambda x: x[number], tree)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, towers):
    """An adapter, its parameters, and what single streams on one device give."""
    model, params, task = towers[request.param[0]]
    adapter = adapter_of(request.param[1], model, task)
    step = jax.jit(adapter.step)
    starts, ends, logits = [], [], []
    for number in range(STREAMS):
        starts.append(adapter.init(params, KEYS[number]))
        state, predictions = starts[-1], []
        for batch in batches_of():
            state, prediction = step(params, state, stream(batch, number))
            predictions.append(prediction.logits)
        ends.append(state)
        logits.append(np.stack(predictions))
    return request.param[1], adapter, params, starts, ends, np.stack(logits, 1)


@pytest.mark.parametrize("form", FORMS)
def test_streams_over_devices_are_single_streams(case, form):
    """Four steps of one program, which moves no parameters and needs no other device."""
    method, adapter, params, starts, ends, expected = case
    many = FORMS[form](adapter)
    mesh = parallel.mesh(4, 2) if "batch" in form else parallel.mesh()
    mesh = four_devices() if form.startswith("two") else mesh
    params = parallel.replicate(params, mesh)
    states = many.init(params, KEYS)
    for number, start in enumerate(starts):
        same(stream(states, number), start)
    axes = ("streams", "batch")[: 1 + ("batch" in form)]
    place = NamedSharding(mesh, PartitionSpec(*axes))
    if form == "pmap":
        place = jax.tree.leaves(states)[0].sharding
    batches = jax.device_put(batches_of(), place)
    compiled = jax.jit(many.step, donate_argnums=1).lower(params, states, batches[0]).compile()
    assert bool(re.search(COLLECTIVES, compiled.as_text())) == ("batch" in form)
    logits = []
    with jax.transfer_guard("disallow"):
        for batch in batches:
            states, predictions = compiled(params, states, batch)
            logits.append(predictions.logits)
    logits = np.stack(logits)
    print(method, form, "logits", np.abs(logits - expected).max(), np.array_equal(logits, expected))
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
    if hasattr(states, "adapted"):
        worst = 0
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            ours = change(start.adapted, stream(states.adapted, number))
            theirs = change(start.adapted, end.adapted)
            worst = max(worst, np.linalg.norm(ours - theirs) / (np.linalg.norm(theirs)+1e-30))
        print(method, form, "change", worst)
