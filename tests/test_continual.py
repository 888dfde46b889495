"""GNSP's mathematics against the published code's numbers, and the laws of null spaces."""

import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import golden, images_of, relative
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxtta
from jaxtta import continual, metrics
from jaxtta.continual import gnsp
from jaxtta.continual.gram import PROJECTION, _with_jax, _with_lapack, scaled
from jaxtta.data import ArrayDataset, StreamBatch
from jaxtta.evaluate import continual as sequence
from jaxtta.optim import null_space_projection, project_out

PRECISIONS = [("float32", 1e-5), ("float64", 1e-9)]


@pytest.fixture(scope="module")
def reference():
    return golden("gnsp")


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_gram_matrices_are_the_published_ones(reference, agrees, dtype, bound):
    with jax.enable_x64(dtype == "float64"):
        grams = []
        for task in ("task1", "task2", "task3"):
            batches = jnp.asarray(reference[task], dtype)
            grams.append(scaled(sum(continual.batch_gram(batch) for batch in batches)))
        sums: dict = {}
        for number, gram in enumerate(grams):
            sums = continual.combine_grams(sums, {"fc1": gram, PROJECTION: gram})
            name = "gram" + "123"[: number + 1]
            agrees("GNSP", "Gram matrices", sums["fc1"], reference[name], norm=bound)
            if number:
                expected = reference[f"{name}_projection"]
                agrees("GNSP", "Gram matrices", sums[PROJECTION], expected, norm=bound)


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
@pytest.mark.parametrize("tasks", ["1", "12"])
def test_projectors_are_the_published_ones(reference, agrees, dtype, bound, tasks):
    with jax.enable_x64(dtype == "float64"):
        gram = jnp.asarray(reference[f"gram{tasks}"], dtype)
        projector = continual.null_space_projector(gram, json.loads(str(reference["meta"]))["rho"])
        expected = reference[f"null_projector{tasks}"]
        agrees("GNSP", "projectors", projector.matrix(), expected, norm=bound)
        rank = int(reference[f"rank{tasks}"])  # of what is kept
        columns = projector.basis.shape[1]
        assert columns == (rank if projector.complement else len(gram) - rank)
        assert columns <= len(gram) // 2
        gradient = jnp.asarray(reference["grad"], dtype)
        expected = reference[f"projected_grad{tasks}"]
        agrees("GNSP", "projected gradients", projector(gradient), expected, norm=bound)


@pytest.mark.parametrize("tasks", ["1", "12"])
def test_projectors_found_on_the_device_are_the_published_ones(reference, tasks):
    gram = jnp.asarray(reference[f"gram{tasks}"], jnp.float32)
    rho = json.loads(str(reference["meta"]))["rho"]
    projector = continual.null_space_projectors({"a": gram}, rho, backend="device")["a"]
    assert relative(projector.matrix(), reference[f"null_projector{tasks}"]) < 1e-5
    gradient = jnp.asarray(reference["grad"], jnp.float32)
    assert relative(projector(gradient), reference[f"projected_grad{tasks}"]) < 1e-5


def test_where_no_input_was_all_is_free():
    projector = continual.null_space_projector(jnp.zeros((3, 3)), 0.15)
    np.testing.assert_array_equal(projector.matrix(), np.eye(3))


@pytest.mark.parametrize(("dtype", "bound"), PRECISIONS)
def test_losses_are_the_published_ones(reference, agrees, dtype, bound):
    meta = json.loads(str(reference["meta"]))
    with jax.enable_x64(dtype == "float64"):

        def unit(name):
            return jaxtta.models.l2_normalize(jnp.asarray(reference[name], dtype))

        scale, smoothing = meta["logit_scale"], meta["label_smoothing"]
        student = scale * unit("image_embeds") @ unit("text_embeds").T
        teacher = scale * unit("ref_image_embeds") @ unit("ref_text_embeds").T
        logits = scale * unit("image_embeds") @ unit("class_embeds").T
        labels, pairs = reference["labels"], jnp.asarray(reference["ref_labels"])
        distil, align = gnsp.contrastive_distillation, gnsp.modality_alignment
        terms = {
            "cross_entropy": gnsp.classification(logits, labels, smoothing),
            "distill_image": distil(student, teacher, meta["temperature"]),
            "distill_text": distil(student.T, teacher.T, meta["temperature"]),
            "map_image": align(student, pairs, smoothing),
            "map_text": align(student.T, pairs, smoothing),
        }
        for name, value in terms.items():
            agrees("GNSP", name.replace("_", " "), value, reference[name], norm=bound)


def inputs_of_rank(rank, size, seed, rows=200):
    """Inputs in a subspace."""
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, rank)) @ random.normal(size=(rank, size))


@hypothesis.given(st.integers(1, 11), st.floats(0.01, 0.99), st.integers(0, 2**31 - 1))
def test_projectors_are_orthogonal_projections(rank, rho, seed):
    inputs = inputs_of_rank(rank, 12, seed) + 1e-3 * inputs_of_rank(12, 12, seed + 1)
    gram = continual.batch_gram(jnp.asarray(inputs, jnp.float32))
    projector = continual.null_space_projector(gram, rho)
    matrix = np.asarray(projector.matrix())
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-5)
    np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-5)
    # what is free is what the smallest values together leave below rho, and no more would do
    free = round(np.trace(matrix))
    values = np.sort(np.linalg.eigvalsh(np.asarray(gram, np.float64)).clip(0))
    shares = np.cumsum(values) / values.sum()
    assert free == 0 or shares[free - 1] < rho
    assert shares[free] >= rho


@hypothesis.given(st.sampled_from([1, 2, 11, 40]), st.floats(0.01, 0.99), st.integers(0, 2**31 - 1))
def test_projectors_are_those_of_a_whole_eigendecomposition(size, rho, seed):
    gram = scaled(jnp.asarray(np.cov(inputs_of_rank(size, size, seed).T), jnp.float32))
    gram = gram.reshape(size, size)
    values, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
    free = int((np.cumsum(values) / values.sum() < rho).sum())
    expected = vectors[:, :free] @ vectors[:, :free].T
    for backend, bound in (("host", 2e-6), ("device", 1e-4)):
        projector = continual.null_space_projector(gram, rho, backend)
        assert projector.basis.shape == (size, min(free, size - free))
        np.testing.assert_allclose(projector.matrix(), expected, atol=bound, err_msg=backend)
    for found, vectors_of in (_with_lapack(np.asarray(gram)), _with_jax(gram)):
        np.testing.assert_allclose(found, values, atol=1e-5)
        basis = np.asarray(vectors_of(slice(free)))
        np.testing.assert_allclose(basis @ basis.T, expected, atol=1e-4)


@functools.partial(jax.jit, static_argnames="before")
def hundred_steps(projector, kernel, inputs, before):
    """A layer's kernel after 100 steps of AdamW on new inputs."""
    projection = null_space_projection({"layer/kernel": projector})
    adamw = optax.adamw(1e-2, weight_decay=0.0)
    optimizer = optax.chain(*((projection, adamw) if before else (adamw, projection)))
    params = {"layer": {"kernel": kernel}}

    def step(carry, _):
        params, state = carry
        loss = lambda p: ((inputs @ p["layer"]["kernel"] - 1) ** 2).mean()  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=100)
    return params["layer"]["kernel"]


@hypothesis.given(st.sampled_from([1, 3, 8]), st.integers(0, 2**31 - 1))
def test_after_the_optimiser_kept_inputs_see_no_change(rank, seed):
    kept = jnp.asarray(inputs_of_rank(rank, 16, seed), jnp.float32)
    projector = continual.null_space_projector(continual.batch_gram(kept), 1e-6)
    first = jax.random.normal(jax.random.key(seed), (16, 8))
    new = jnp.asarray(np.random.default_rng(seed + 1).normal(size=(50, 16)), jnp.float32)
    drift = {}
    for before in (False, True):
        trained = hundred_steps(projector, first, new, before=before)
        assert np.linalg.norm(new @ (trained - first)) > 1
        with jax.default_matmul_precision("highest"):
            drift[before] = relative(kept @ trained, kept @ first)
    assert drift[False] < 1e-5
    assert drift[True] > 1e-3  # AdamW's scaling leaves the null space again
    hypothesis.event(f"drift with the projection before the optimiser: {drift[True]:.2g}")


def test_inputs_are_those_of_the_forward_pass(tiny):
    model, params = tiny
    images = images_of(model, golden("batclip_adamw")["images"])[0][:3].astype(np.float32)
    inputs = jax.jit(lambda p, x: continual.kernel_inputs(model, p, x))(params, images)
    layers = model.vision.arch.layers
    assert len(inputs) == 2 * layers + 1
    encode = jax.jit(functools.partial(model.image_features, all_tokens=True))
    features = encode(params, model.normalize(images))
    embeddings = inputs[PROJECTION][:, 0] @ params["visual_projection"]["kernel"]
    assert relative(embeddings, features.embeddings) < 1e-5
    for layer in range(layers):
        path = f"vision_model/encoder/layers/{layer}/mlp"
        block = params["vision_model"]["encoder"]["layers"][str(layer)]
        hidden = inputs[f"{path}/fc1/kernel"] @ block["mlp"]["fc1"]["kernel"]
        hidden = hidden + block["mlp"]["fc1"]["bias"]
        activated = hidden * jax.nn.sigmoid(1.702 * hidden)
        assert relative(activated, inputs[f"{path}/fc2/kernel"]) < 1e-5
    paths = {"/".join(path): leaf.shape for path, leaf in flatten_dict(params).items()}
    for name, value in inputs.items():  # every name is a kernel's, which fits
        assert paths[name][0] == value.shape[-1]


def test_gram_matrices_of_a_task(tiny):
    model, params = tiny
    images = images_of(model, golden("batclip_adamw")["images"])[0][:5].astype(np.float32)
    padded = np.concatenate([images[3:], np.full((1, *images.shape[1:]), np.nan, np.float32)])
    batches = [
        jaxtta.Batch(images[:3], np.ones(3, bool), np.arange(3)),
        jaxtta.Batch(padded, np.array([True, True, False]), np.arange(3)),
        jaxtta.Batch(padded, np.zeros(3, bool), np.arange(3)),
    ]
    grams = continual.task_grams(model, params, batches)
    inputs = jax.jit(functools.partial(continual.kernel_inputs, model))(params, images)
    for name, gram in grams.items():
        rows = np.asarray(inputs[name], np.float64)
        parts = [part.reshape(-1, part.shape[-1]) for part in (rows[:3], rows[3:])]
        expected = sum(x.T @ x / np.linalg.norm(x.T @ x) for x in parts)
        assert relative(gram, expected / np.linalg.norm(expected)) < 1e-4, name
    only = continual.task_grams(model, params, batches, lambda path: path == PROJECTION)
    assert only.keys() == {PROJECTION}
    np.testing.assert_allclose(only[PROJECTION], grams[PROJECTION], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="no images"):
        continual.task_grams(model, params, batches[2:])
    with pytest.raises(ValueError, match="visual_projection/kernel"):
        continual.task_grams(model, params, batches, lambda path: path == "head")


def test_leaves_without_a_projector_pass_through():
    projector = continual.null_space_projector(jnp.diag(jnp.array([1.0, 0.0])), 0.5)
    projection = null_space_projection({"a/kernel": projector})
    params = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": jnp.ones(2)}
    updates, _ = projection.update(params, projection.init(params))
    np.testing.assert_allclose(updates["a"]["kernel"], [[0, 0, 0], [1, 1, 1]], atol=1e-6)
    np.testing.assert_array_equal(updates["a"]["bias"], params["a"]["bias"])
    np.testing.assert_array_equal(updates["b"], params["b"])


def test_bad_input_is_one_sentence():
    gram = jnp.eye(3)
    for rho in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=f"rho is {rho}, .*0 and 1"):
            continual.null_space_projectors({"a": gram}, rho)
    with pytest.raises(ValueError, match=r"fc1: .*not finite"):
        continual.null_space_projectors({"fc1": gram.at[0, 0].set(jnp.nan)})
    with pytest.raises(ValueError, match=r"fc1: .*shape \(2, 3\)"):
        continual.null_space_projectors({"fc1": gram[:2]})
    with pytest.raises(ValueError, match=r"of fc1$"):
        continual.combine_grams({"fc1": gram, "fc2": gram}, {"fc2": gram})
    with pytest.raises(ValueError, match="backend is 'moon'"):
        continual.null_space_projector(gram, 0.5, backend="moon")
    with pytest.raises(ValueError, match=r"warmup is 100, .* 30"):
        continual.task_optimizer(continual.VARIANTS["gnsp"], {}, 1e-5, 30)
    projection = null_space_projection(continual.null_space_projectors({"a": gram}, 0.5))
    with pytest.raises(ValueError, match=r"there are b, .* for a"):
        projection.init({"b": jnp.ones((3, 2))})
    with pytest.raises(ValueError, match=r"a has shape \(4, 2\), .* 3"):
        projection.init({"a": jnp.ones((4, 2))})


def test_steps_orthogonal_to_the_outputs_leave_them():
    """A linear model, whose outputs' gradients do not depend on its parameters."""
    random = np.random.default_rng(0)
    clean, new = (jnp.asarray(random.normal(size=(n, 12)), jnp.float32) for n in (4, 30))
    params = {"a": {"kernel": jnp.zeros((12, 2))}, "b": jnp.asarray([1.0, -1.0])}

    def forward(params, x):
        return x @ params["a"]["kernel"] + params["b"]

    def answers(scale, params, x):
        return scale * forward(params, x)

    basis = continual.output_gradient_basis(answers, 2.0, params, clean, 4)
    assert basis["a"]["kernel"].shape == (4, 12, 2)
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(basis)
    np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-5)
    changes = {}
    for name, chain in (
        ("free", (optax.adam(1e-2),)),
        ("kept", (optax.adam(1e-2), project_out(basis))),
    ):
        optimizer, moved = optax.chain(*chain), params
        state = optimizer.init(moved)
        for _ in range(20):
            gradient = jax.grad(lambda p: ((forward(p, new) - 1) ** 2).mean())(moved)
            updates, state = optimizer.update(gradient, state, moved)
            moved = optax.apply_updates(moved, updates)
        # two classes: the answer is the difference of their logits
        before, after = (jnp.diff(forward(p, clean)) for p in (params, moved))
        changes[name] = np.abs(after - before).max(), jnp.abs(forward(moved, new)).max()
    assert changes["kept"][0] < 1e-4
    assert changes["free"][0] > 1e-2
    assert changes["kept"][1] > 0.05
    with pytest.raises(ValueError, match="a/kernel of shape"):
        project_out(basis).init({"b": params["b"]})
    with pytest.raises(ValueError, match=r"rank is 5, expected 1 to 4, .* images"):
        continual.output_gradient_basis(answers, 2.0, params, clean, 5)
    with pytest.raises(ValueError, match=r"rank is 27, expected 1 to 26, .* parameters"):
        continual.output_gradient_basis(answers, 2.0, params, jnp.tile(clean, (9, 1)), 27)
    with pytest.raises(ValueError, match="not finite"):
        continual.output_gradient_basis(answers, jnp.inf, params, clean, 4)
    # however many parameters there are
    wide = {"a": {"kernel": jnp.zeros((12, 2))}, "b": jnp.zeros(2), "unused": jnp.zeros(10**7)}
    many = continual.output_gradient_basis(answers, 1.0, wide, clean, 4)
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(many)
    np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-5)
    # what is there twice gives no direction of chance
    twice = continual.output_gradient_basis(answers, 2.0, params, jnp.tile(clean[:2], (2, 1)), 4)
    flat = jax.vmap(lambda tree: ravel_pytree(tree)[0])(twice)
    np.testing.assert_allclose(flat @ flat.T, np.diag([1, 1, 0, 0]), atol=1e-5)


@pytest.fixture(scope="module")
def lesson(tiny):
    """Images of a task and reference pairs, with what the model makes of them before."""
    model, params = tiny
    task = jaxtta.models.task_from_token_ids(golden("batclip_adamw")["token_ids"])
    images = images_of(model, golden("batclip_adamw")["images"]).astype(np.float32)
    classes = jax.jit(model.class_embeddings)(params, model.prompts(task))
    examples = continual.TaskBatch(images[0], jnp.arange(len(images[0])) % len(classes), classes)
    labels = jnp.arange(6) % len(task.token_ids)
    captions = jnp.asarray(task.token_ids[:, 0])[labels]
    encode_image = jax.jit(model.encode_image)
    pairs = continual.ReferenceBatch(
        images[1][:6],
        captions,
        labels,
        jaxtta.models.l2_normalize(encode_image(params, model.normalize(images[1][:6]))),
        jaxtta.models.l2_normalize(jax.jit(model.encode_text)(params, captions)),
    )
    return examples, pairs


def test_the_loss_is_its_terms_and_the_teacher_its_own_best_student(tiny, lesson):
    model, params = tiny
    examples, pairs = lesson
    method = continual.VARIANTS["gnsp"]
    loss_of = jax.jit(continual.continual_loss(model, method))
    loss, terms = loss_of(params, examples, pairs)
    expected = terms["task"] + terms["distillation"] + 0.75 * terms["alignment"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    known = pairs._replace(texts=pairs.teacher_texts)
    again, _ = loss_of(params, examples, known)
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    only = jax.jit(continual.continual_loss(model, continual.VARIANTS["fine-tuning"]))
    only = only(params, examples, None)
    np.testing.assert_allclose(only[0], terms["task"], rtol=1e-6)
    # nothing moves the student's matching away from the teacher's but the other terms
    alone = continual.GNSPConfig("none", alignment=0.0)
    loss_of = continual.continual_loss(model, alone)

    def distillation(kernel):
        changed = params | {"visual_projection": {"kernel": kernel}}
        return loss_of(changed, examples, pairs)[1]["distillation"]

    gradient = jax.jit(jax.grad(distillation))(params["visual_projection"]["kernel"])
    assert np.abs(gradient).max() < 1e-3


@pytest.mark.parametrize("name", ["fine-tuning", "gnsp-after"])
def test_a_task_is_learnt(tiny, lesson, name):
    model, params = tiny
    examples, pairs = lesson
    method = continual.VARIANTS[name]
    trained, frozen = jaxtta.tree.partition(params, continual.gnsp_kernels)
    assert len(jax.tree.leaves(trained)) == 2 * model.vision.arch.layers + 1
    grams = continual.task_grams(model, params, [pairs.images])
    projectors = continual.null_space_projectors(grams)
    optimizer = continual.task_optimizer(method, projectors, 1e-3, 30, warmup=3)
    step = jax.jit(continual.train_step(model, method, optimizer))
    state, found = continual.TrainState(trained, optimizer.init(trained)), []
    for _ in range(30):
        state, figures = step(frozen, state, examples, pairs)
        found.append(float(figures["task"]))
    assert found[-1] < found[0] - 0.1
    # the first layer's inputs do not change, so what it makes of kept ones must not either
    kernel = ("vision_model", "encoder", "layers", "0", "mlp", "fc1", "kernel")
    before, after = (flatten_dict(tree)[kernel] for tree in (trained, state.trained))
    inputs = jax.jit(functools.partial(continual.kernel_inputs, model))(params, pairs.images)
    inputs = inputs["/".join(kernel)]
    kept = continual.null_space_projector(grams["/".join(kernel)])
    kept = inputs.reshape(-1, len(before)) @ (np.eye(len(before)) - kept.matrix())
    change = relative(kept @ after, kept @ before)
    assert change < 1e-5 if name == "gnsp-after" else change > 1e-3


def test_unreadable_images_are_passed_over(embedded, monkeypatch):
    """Others of the batch stand in for them, whatever their pixels and labels are."""
    model, params = embedded
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (4, 32, 32, 3), np.uint8), np.arange(4, dtype=np.int32)
    task = sequence.TaskData("own", "a {}.", *[ArrayDataset(images, labels, tuple("abcd"))] * 2)
    config = continual.TrainingConfig(iterations=2, learning_rate=1e-3)
    shown = task._replace(name="reference", train=None)
    experiment = sequence.Experiment(model, params, [task], [], shown, config)

    def train(mask):
        images[1], labels[1] = 255, -1
        batch = StreamBatch(images, mask, labels, labels, labels, labels)
        monkeypatch.setattr(experiment, "read", lambda *given: [batch] * 2)
        return sequence.train_task(experiment, params, 0, "fine-tuning", {})[0]

    trained = train(np.arange(4) != 1)
    assert jaxtta.tree.all_finite(trained)
    before = flatten_dict(params, sep="/")
    moved = {
        path for path, x in flatten_dict(trained, sep="/").items() if (x != before[path]).any()
    }
    assert moved == set(filter(continual.gnsp_kernels, before))
    with pytest.raises(ValueError, match="own: none of the images"):
        train(np.zeros(4, bool))


@pytest.mark.parametrize(("iterations", "warmup"), [(12, 4), (5, 5), (4, 0)])
def test_the_learning_rate_is_the_published_one(iterations, warmup):
    optimizer = continual.task_optimizer(continual.VARIANTS["gnsp"], {}, 0.1, iterations, warmup)
    params, rates = jnp.zeros(()), []
    state = optimizer.init(params)
    for _ in range(iterations):  # of a constant gradient Adam makes steps of the rate
        updates, state = optimizer.update(jnp.ones(()), state, params)
        rates.append(-float(updates))
    rising = [0.1 * (turn + 1) / warmup for turn in range(warmup)]
    rest = iterations - warmup
    falling = [0.05 * (1 + np.cos(np.pi * turn / rest)) for turn in range(rest)]
    np.testing.assert_allclose(rates, rising + falling, rtol=1e-4)


def test_several_devices_make_of_a_batch_what_one_does(tiny, lesson):
    model, params = tiny
    examples, pairs = lesson
    sharding = NamedSharding(Mesh(jax.devices(), "data"), PartitionSpec("data"))
    images = np.concatenate([examples.images] * 8)[:16]
    labels = np.resize(np.asarray(examples.labels), 16)
    pairs = jax.tree.map(lambda x: np.resize(x, (8, *x.shape[1:])), pairs)
    method = continual.VARIANTS["gnsp"]
    trained, frozen = jaxtta.tree.partition(params, continual.gnsp_kernels)

    @jax.jit
    def step(projectors, images, labels, pairs):
        optimizer = continual.task_optimizer(method, projectors, 1e-3, 1, 1)
        state = continual.TrainState(trained, optimizer.init(trained))
        batch = examples._replace(images=images, labels=labels)
        return continual.train_step(model, method, optimizer)(frozen, state, batch, pairs)

    found = {}
    for name, place in (("one", jnp.asarray), ("many", lambda x: jax.device_put(x, sharding))):
        grams = continual.task_grams(model, params, [place(images)])
        projectors = continual.null_space_projectors(found["one"][0] if found else grams)
        some = jax.tree.map(place, (images, labels, pairs))
        assert len(some[0].sharding.device_set) == (8 if name == "many" else 1)
        state, figures = step(projectors, *some)
        found[name] = grams, figures, state.optimizer
    (one, figures, moments), (many, again, same) = found["one"], found["many"]
    for name, gram in one.items():
        assert relative(many[name], gram) < 1e-5, name
    for name, value in figures.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, err_msg=name)
    # the gradients, by their means: AdamW's first step is a sign, which rounding may turn
    flat = [ravel_pytree(optax.tree_utils.tree_get(s, "mu"))[0] for s in (same, moments)]
    assert relative(*flat) < 1e-4


def test_weights_between_two_models():
    a, b = {"x": jnp.zeros(2)}, {"x": jnp.ones(2)}
    np.testing.assert_allclose(continual.wise_ft(a, b, 0.25)["x"], 0.25)


def test_figures_of_a_sequence():
    matrix = np.array([[0.9, 0.2, 0.3], [0.8, 0.7, 0.4], [0.6, 0.5, 0.8]])
    assert metrics.transfer(matrix) == pytest.approx((0.2 + (0.3 + 0.4) / 2) / 2)
    assert metrics.last(matrix) == pytest.approx((0.6 + 0.5 + 0.8) / 3)
    assert metrics.average(matrix) == pytest.approx(matrix.mean())
    images, texts = jnp.eye(3)[:2], jnp.eye(3)[1:]
    assert float(metrics.modality_gap(images, texts)) == pytest.approx(np.sqrt(0.5))
    similarities = jnp.array([[0.1, 0.9, 0.5], [0.2, 0.3, 0.6]])
    matches = jnp.array([[True, False, False], [False, False, True]])
    recalls = [float(metrics.retrieval_recall(similarities, matches, k)) for k in (1, 2, 3)]
    assert recalls == [0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projection": "during"}, "projection is 'during'"),
        ({"smoothing": -0.1}, "smoothing is -0.1"),
        ({"distillation": -1.0}, "distillation is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_methods_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        continual.GNSPConfig(**options)
