"""Many streams over eight devices, and one batch over them, give what one device gives."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from test_adapters import change, make, same
from transformers import CLIPConfig

import jaxtta
from jaxtta import adapters, models, parallel
from jaxtta.models.resnet import ResNet, ResNetArchitecture

STREAMS, BATCH, STEPS, SIDE = 8, 4, 4, 16
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
        vision_config=tower | {"image_size": SIDE, "patch_size": 8},
        projection_dim=8,
    )
    vit = models.from_config(config)
    resnet = dataclasses.replace(vit, vision=ResNet(ResNetArchitecture((1, 1, 1, 1), 4, 2), SIDE))
    return {
        "vit": (vit, vit.init(jax.random.key(0))),
        "resnet": (resnet, resnet.init(jax.random.key(1))),
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
    return make(method, model, task)


def batches_of(streams=STREAMS):
    """Random images, (steps, streams, batch, …); the last batches have padding."""
    shape = (STEPS, streams, BATCH)
    images = np.random.default_rng(0).integers(0, 256, (*shape, SIDE, SIDE, 3), np.uint8)
    mask = np.ones(shape, bool)
    mask[-1, :, -1] = False
    index = np.arange(STEPS)[:, None, None] * BATCH + np.arange(BATCH) + 0 * mask
    return [jaxtta.Batch(*batch) for batch in zip(images, mask, index, strict=True)]


def stream(tree, number):
    """One stream's part of a tree."""
    return jax.tree.map(lambda x: x[number], tree)


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
            starts.append(state := adapter.init(params, KEYS[number]))
            for batch in batches_of():
                state, prediction = step(params, state, stream(batch, number))
                logits.append(prediction.logits)
            ends.append(state)
        logits = np.stack(logits).reshape(STREAMS, STEPS, BATCH, -1).swapaxes(0, 1)
        return adapter, params, starts, ends, logits

    def get(tower, method):
        if (tower, method) not in made:
            made[tower, method] = run(tower, method)
        return made[tower, method]

    return get


def run_compiled(many, params, states, batches):
    """Run a stream's steps through one compiled program, which is given back too."""
    compiled = jax.jit(many.step, donate_argnums=1).lower(params, states, batches[0]).compile()
    logits = []
    with jax.transfer_guard("disallow"):  # no step moves parameters
        for batch in batches:
            states, predictions = jax.block_until_ready(compiled(params, states, batch))
            logits.append(predictions.logits)
    return compiled.as_text(), states, np.stack(logits)


def require_close(method, states, logits, expected, tolerance):
    """Compare all streams with single ones: updates within the tolerance, predictions the same."""
    _, _, starts, ends, theirs = expected
    np.testing.assert_array_equal(logits.argmax(-1), theirs.argmax(-1))
    np.testing.assert_allclose(logits, theirs, atol=1e-4)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        state = stream(states, number)
        assert state.seen == end.seen == STEPS * BATCH - 1
        if method in ("zero_shot", "tnt"):
            same(state, end)
            continue
        moved, reference = (change(start.adapted, x.adapted) for x in (state, end))
        print("CHANGE", method, np.linalg.norm(moved - reference) / np.linalg.norm(reference))
        assert np.linalg.norm(reference) > 0
        assert np.linalg.norm(moved - reference) <= tolerance * np.linalg.norm(reference)


METHODS = [("vit", name) for name in ("zero_shot", "tent", "batclip", "mgtta", "tnt")]
FORMS = {
    "map": lambda adapter: parallel.streams(adapter),
    "vmap": lambda adapter: parallel.streams(adapter, within="vmap"),
    "two a device": lambda adapter: parallel.streams(adapter, four_devices()),
    "pmap": parallel.pmap,
}


def four_devices():
    return parallel.mesh(devices=jax.devices()[:4])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", METHODS, ids="-".join)
def test_streams_over_devices_are_single_streams(alone, case, form):
    """In one compiled program without collectives, which is called four times."""
    expected = alone(*case)
    adapter, params, starts, _, theirs = expected
    many = FORMS[form](adapter)
    params = parallel.replicate(
        params, four_devices() if form.startswith("two") else parallel.mesh()
    )
    states = many.init(params, KEYS)
    for number, start in enumerate(starts):
        same(stream(states, number), start)
    batches = jax.device_put(batches_of(), states.seen.sharding)
    program, states, logits = run_compiled(many, params, states, batches)
    assert not re.search(COLLECTIVES, program)
    require_close(case[1], states, logits, expected, 1e-5)
    if case[1] in ("zero_shot", "tnt"):
        print("BITS", case, form, np.array_equal(logits, theirs))


@pytest.mark.parametrize("case", [*METHODS, ("resnet", "batclip")], ids="-".join)
def test_streams_whose_batches_lie_on_two_devices_each(alone, case):
    """Losses and batch norms are of the whole batch, wherever its images lie."""
    expected = alone(*case)
    adapter, params, _, _, _ = expected
    mesh = parallel.mesh(4, 2)
    many, params = parallel.streams(adapter, mesh), parallel.replicate(params, mesh)
    place = NamedSharding(mesh, PartitionSpec("streams", "batch"))
    batches = jax.device_put(batches_of(), place)
    program, states, logits = run_compiled(many, params, many.init(params, KEYS), batches)
    assert re.search(COLLECTIVES, program)
    require_close(case[1], states, logits, expected, 1e-3)
