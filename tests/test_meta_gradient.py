"""The meta gradient generator against the published code's numbers, and the laws it keeps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from jax.flatten_util import ravel_pytree

from jaxtta import optim
from jaxtta.optim.meta_gradient import generate, generator_inputs

NAMES = tuple(optim.init_meta_gradient_generator(jax.random.key(0)))


@pytest.fixture(scope="module")
def reference():
    return golden("mgg")


def phi_of(reference, dtype):
    return {name: jnp.asarray(reference[f"phi/{name}"], dtype) for name in NAMES}


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def run(phi, grads, learning_rate=1e-3):
    """Inputs, outputs, memories and updates of every step, from the pieces and from the whole."""
    optimizer = optim.meta_gradient_generator(phi, learning_rate)
    state = optimizer.init(grads[0])
    steps = []
    for gradients in grads:
        before = state[0]
        updates, state = jax.jit(optimizer.update)(gradients, state)
        after = state[0]
        inputs = generator_inputs(gradients, after.mean, after.square, after.count, 0.9, 0.99)
        outputs, *memory = generate(phi, inputs, before.kernel, before.bias)
        np.testing.assert_allclose(memory[0], after.kernel, rtol=1e-4, atol=1e-6)
        steps.append((inputs, outputs, after.kernel, after.bias, updates))
    return [np.stack(x) for x in zip(*steps, strict=True)]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-9)])
def test_equal_to_the_published_code(reference, agrees, dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        phi = phi_of(reference, dtype)
        assert json.loads(str(reference["meta"]))["hidden"] == optim.check_mgg_params(phi)
        results = run(phi, jnp.asarray(reference["grads"], dtype))
        names = ("inputs", "outputs", "memory_kernel_state", "memory_bias_state")
        for name, ours in zip(names, results, strict=False):
            agrees("MGG", name.replace("_", " "), ours, reference[name], norm=bound)
        agrees("MGG", "updates", results[4], reference["updates"], norm=bound)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float64", 1e-8)])
def test_meta_gradients_are_the_published_ones(reference, agrees, dtype, bound):
    """Through one update; the memories that it starts from are constant, but for the first."""
    with jax.enable_x64(dtype == "float64"):
        phi = phi_of(reference, dtype)
        grads, target = (jnp.asarray(reference[n], dtype) for n in ("grads", "target"))

        def loss(phi, state, gradients):
            optimizer = optim.meta_gradient_generator(phi, 1.0)
            state = optimizer.init(gradients) if state is None else state
            updates, state = optimizer.update(gradients, state)
            return jnp.mean((-updates - target) ** 2), state

        state = None
        for number, gradients in enumerate(grads):
            (_, state), meta = jax.value_and_grad(loss, has_aux=True)(phi, state, gradients)
            for name in NAMES:
                theirs = reference[f"meta_grad/{number}/{name}"]
                if np.linalg.norm(theirs):
                    agrees("MGG", "meta-gradients", meta[name], theirs, norm=bound)
                else:
                    assert not np.any(meta[name]), (number, name)


@pytest.fixture(scope="module")
def phi(reference):
    return phi_of(reference, jnp.float32)


def trees(seed, count=3):
    """Gradients of odd shapes over some steps."""
    random = np.random.default_rng(seed)
    shapes = {"a": (3, 2), "b": {"c": (), "d": (5,)}}
    return [
        jax.tree.map(
            lambda s: jnp.asarray(random.normal(size=s), jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        for _ in range(count)
    ]


def updates_of(optimizer, gradients, update=None):
    state, found = optimizer.init(gradients[0]), []
    for step in gradients:
        updates, state = (update or optimizer.update)(step, state)
        found.append(updates)
    return found


def test_it_does_not_matter_how_a_tree_is_cut_into_leaves(phi):
    optimizer, gradients = optim.meta_gradient_generator(phi, 1e-3), trees(0)
    flat = [ravel_pytree(g)[0] for g in gradients]
    whole = updates_of(optimizer, gradients)
    assert jax.tree.structure(whole[0]) == jax.tree.structure(gradients[0])
    for tree, row in zip(whole, updates_of(optimizer, flat), strict=True):
        np.testing.assert_array_equal(ravel_pytree(tree)[0], row)
    jitted = updates_of(optimizer, gradients, jax.jit(optimizer.update))
    for tree, other in zip(whole, jitted, strict=True):
        np.testing.assert_allclose(ravel_pytree(tree)[0], ravel_pytree(other)[0], atol=1e-8)


def test_streams_map_over_states(phi):
    optimizer, streams = optim.meta_gradient_generator(phi, 1e-3), [trees(s) for s in (1, 2)]
    stacked = [
        jax.tree.map(lambda *x: jnp.stack(x), *steps) for steps in zip(*streams, strict=True)
    ]
    state = jax.vmap(optimizer.init)(stacked[0])
    alone = [updates_of(optimizer, [ravel_pytree(g)[0] for g in stream]) for stream in streams]
    step = jax.jit(jax.vmap(optimizer.update))
    for number, gradients in enumerate(stacked):
        updates, state = step(gradients, state)
        for stream in range(2):
            own = jax.tree.map(lambda x, k=stream: x[k], updates)
            np.testing.assert_allclose(ravel_pytree(own)[0], alone[stream][number], atol=1e-8)


def test_one_device_or_eight_give_the_same(phi):
    optimizer = optim.meta_gradient_generator(phi, 1e-3)
    gradients = [jnp.asarray(np.random.default_rng(s).normal(size=64), jnp.float32) for s in (0, 1)]
    mesh = jax.make_mesh((8,), ("parameters",))
    rows = jax.NamedSharding(mesh, jax.P("parameters"))
    split = [jax.device_put(g, rows) for g in gradients]
    one = updates_of(optimizer, gradients)
    eight = updates_of(optimizer, split, jax.jit(optimizer.update))
    assert len(eight[0].sharding.device_set) == 8
    for x, y in zip(one, eight, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-8)
    # a tree whose leaves are spread, against the row of its parts on one device
    tree = [{"a": g[:16], "b": g[16:].reshape(8, 6)} for g in gradients]
    spread = [jax.tree.map(lambda x: jax.device_put(x, rows), leaves) for leaves in tree]
    found = updates_of(optimizer, spread, jax.jit(optimizer.update))
    for x, y in zip(one, found, strict=True):
        np.testing.assert_allclose(x, ravel_pytree(y)[0], atol=1e-8)


def test_dtypes_are_the_gradients(phi):
    optimizer = optim.meta_gradient_generator(phi, 1e-3)
    gradients = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2)}
    (updates,) = updates_of(optimizer, [gradients])
    assert [x.dtype for x in jax.tree.leaves(updates)] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("hidden", [1, 3, 8])
def test_any_consistent_size_works(hidden):
    phi = optim.init_meta_gradient_generator(jax.random.key(1), hidden)
    assert optim.check_mgg_params(phi) == hidden
    (updates,) = updates_of(optim.meta_gradient_generator(phi, 1e-3), [jnp.ones(4)])
    assert np.all(np.abs(updates) <= 1e-3)


def test_bad_weights_are_refused(phi, tmp_path):
    for changed, message in (
        (
            {"output": jnp.zeros((4, 1))},
            r"phi: output has shape \(4, 1\), expected \(8, 1\) for a hidden size of 8",
        ),
        (
            {"gate": jnp.zeros(8)},
            "phi: .* gate, expected key, lr_bias",
        ),
        ({"query": jnp.zeros(3)}, r"phi: query has shape \(3,\), expected \(2, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            optim.meta_gradient_generator(phi | changed, 1e-3)
    with pytest.raises(ValueError, match=r"phi: .* value"):
        optim.check_mgg_params({name: array for name, array in phi.items() if name != "value"})
    optim.save_mgg(tmp_path / "phi.safetensors", phi, {"seed": 3})
    loaded, metadata = optim.load_mgg(tmp_path / "phi.safetensors")
    assert metadata == {"seed": 3}
    for name in phi:
        np.testing.assert_array_equal(loaded[name], phi[name])
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        optim.load_mgg(tmp_path / "nothing")
    (tmp_path / "odd").write_text("odd")
    with pytest.raises(ValueError, match="odd: "):
        optim.load_mgg(tmp_path / "odd")
