"""Common mistakes in calls: one sentence each, before anything is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import GOLDEN, golden
from PIL import Image

import jaxtta
from jaxtta import adapters, continual, models, optim, tree
from jaxtta.continual.gnsp import classification

LAYER = "vision_model/post_layernorm/scale"


@pytest.fixture(scope="module")
def task():
    return models.task_from_token_ids(golden("clip_forward")["token_ids"])


@pytest.fixture(scope="module")
def statistics(tiny):
    shape = tiny[0].feature_shape
    return models.FeatureStatistics(jnp.array(9.0), jnp.zeros(shape), jnp.ones(shape))


@pytest.fixture(scope="module")
def step_of(tiny, task):
    """Trace a step of TENT, BATCLIP, TNT or zero-shot; nothing is compiled."""
    model, params = tiny
    made = {name: getattr(adapters, name)(model, task) for name in ("tent", "batclip", "zero_shot")}
    made["tnt"] = adapters.tnt(model, task, config=adapters.TNTConfig(views=2))
    states = {name: adapter.init(params) for name, adapter in made.items()}

    def step(name, params=params, state=None, batch=np.zeros((2, 32, 32, 3), np.uint8)):  # noqa: B008
        state = states[state or name] if isinstance(state, str | None) else state
        return jax.eval_shape(lambda: made[name].step(params, state, batch))

    return step


def online(model, task, **changes):
    """An adapter of TENT's objective with one argument changed."""
    arguments = {
        "objective": adapters.tent_objective(model),
        "context": lambda params: model.init_context(params, task),
        "trainable": lambda path: path == LAYER,
        "optimizer": optax.sgd(1e-3),
    }
    return adapters.online(**arguments | changes)


@pytest.mark.parametrize(
    ("optimizer", "given"),
    [(1e-3, "float"), (0.0, "float"), ("adam", "str"), (optax.adam, "function")],
)
def test_an_optimizer_that_is_none_is_refused(tiny, task, statistics, optimizer, given):
    model = tiny[0]
    message = f"optimizer is a {given}, expected an optax transformation"
    makers = (
        lambda: adapters.tent(model, task, optimizer=optimizer),
        lambda: adapters.batclip(model, task, optimizer=optimizer),
        lambda: adapters.mgtta(model, task, optimizer=optimizer, statistics=statistics),
        lambda: online(model, task, optimizer=optimizer),
        lambda: optim.init_meta_training({}, {}, optimizer),
        lambda: optim.meta_step(lambda adapted, batch: 0.0, optimizer, 1e-3),
        lambda: continual.train_step(model, continual.GNSPConfig(), optimizer),
    )
    for make in makers:
        with pytest.raises(TypeError, match=message):
            make()


@pytest.mark.parametrize("trainable", [[LAYER], [], "image", {LAYER}])
def test_trainable_is_a_predicate(tiny, task, statistics, trainable):
    model, params = tiny
    message = f"trainable is a {type(trainable).__name__}, expected a function"
    sgd = optax.sgd(1e-3)
    makers = (
        lambda: adapters.tent(model, task, trainable=trainable),
        lambda: adapters.batclip(model, task, trainable=trainable),
        lambda: adapters.mgtta(
            model, task, optimizer=sgd, statistics=statistics, trainable=trainable
        ),
        lambda: online(model, task, trainable=trainable),
        lambda: tree.partition(params, trainable),
    )
    for make in makers:
        with pytest.raises(TypeError, match=message):
            make()
    with pytest.raises(TypeError, match=r"trainable is normalisation_parameters, .*\('image'\)"):
        adapters.tent(model, task, trainable=tree.normalisation_parameters)
    with pytest.raises(TypeError, match="trainable gives a function, not a bool: call it"):
        tree.partition(params, lambda path: lambda path: True)
    with pytest.raises(TypeError, match="chosen is a list"):
        continual.task_grams(model, params, [], [LAYER])


@pytest.mark.parametrize("method", ["zero_shot", "tent", "batclip", "tnt", "mgtta"])
def test_model_and_task_are_what_they_should_be(tiny, task, statistics, method):
    model, params = tiny
    options = {"optimizer": optax.sgd(1e-3), "statistics": statistics} if method == "mgtta" else {}

    def make(*arguments):
        return getattr(adapters, method)(*arguments, **options)

    with pytest.raises(TypeError, match="model is a Task, expected a classifier"):
        make(task, model)
    with pytest.raises(TypeError, match="model is a tuple, expected a classifier"):
        make(tiny, task)
    with pytest.raises(TypeError, match="model is a dict, expected a classifier"):
        make(params, task)
    for names in (["cat", "dog"], "cat", np.array(["cat", "dog"])):
        with pytest.raises(TypeError, match=f"task is a {type(names).__name__}, expected a Task"):
            make(model, names)
        with pytest.raises(TypeError, match=f"task is a {type(names).__name__}, expected a Task"):
            model.init_context(params, names)
    with pytest.raises(TypeError, match="params holds a CLIP, expected a tree of arrays"):
        make(model, task).init(model)
    with pytest.raises(TypeError, match="params holds a CLIP, expected a tree of arrays"):
        make(model, task).init(tiny)


def test_a_model_of_ones_own_says_what_its_task_is(tiny, task):
    """Here class names; only CLIP needs token ids."""
    model, params = tiny

    class Named:
        image_size, mixes_batch, feature_shape = 32, False, None

        def prompts(self, names):
            return model.prompts(models.Task(task.token_ids[: len(names)], tuple(names)))

        def init_context(self, params, names):
            return model.class_embeddings(params, self.prompts(names))

        def __call__(self, params, context, batch):
            return model(params, context, batch)

    state = adapters.zero_shot(Named(), ["cat", "dog"]).init(params)
    assert state.context.shape[0] == 2


def test_functions_that_are_values_are_refused(tiny, task):
    model, params = tiny
    for context in (model.prompts(task), model.init_context(params, task), None):
        with pytest.raises(TypeError, match=r"context is a .*, expected a function: lambda params"):
            online(model, task, context=context)
    with pytest.raises(TypeError, match="objective is a float, expected a function: objective"):
        online(model, task, objective=1.0)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda loss, logits: (loss, logits), TypeError, r"gives \(an array, an array\), expected"),
        (lambda loss, logits: loss, TypeError, "gives an array, expected"),
        (lambda loss, logits: (loss, logits, {}), TypeError, r"gives \(an array, .*, a dict\)"),
        (lambda loss, logits: (loss, (logits, loss)), TypeError, "with a dict of metrics"),
        (lambda loss, logits: (logits, (loss, {})), ValueError, r"loss has shape \(2, 6\)"),
    ],
)
def test_an_objective_gives_loss_logits_and_metrics(tiny, task, result, error, message):
    model, params = tiny

    def objective(params, context, batch):
        logits = model(params, context, batch).logits
        return result(logits.mean(), logits[:, :6])

    adapter = online(model, task, objective=objective)
    state = adapter.init(params)
    with pytest.raises(error, match=message):
        jax.eval_shape(adapter.step, params, state, np.zeros((2, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    ("name", "state", "error", "message"),
    [
        ("tent", "batclip", ValueError, "text_model/.* is adapted by the state alone"),
        ("batclip", "tent", ValueError, "text_model/.* is adapted by this adapter alone"),
        ("tent", "zero_shot", ValueError, "vision_model/.* is adapted by this adapter alone"),
        ("zero_shot", "tent", ValueError, "the state adapts vision_model/.*, which zero_shot"),
        ("tent", "tnt", TypeError, "state is a TNTState, expected this adapter's State"),
        ("tnt", "tent", TypeError, "state is a State, expected this adapter's TNTState"),
        ("tent", (1, 2), TypeError, r"state is a tuple, .* the first of what step gives"),
        ("tent", {}, TypeError, "state is a dict, expected this adapter's State"),
    ],
)
def test_the_state_of_another_adapter_is_refused(step_of, name, state, error, message):
    with pytest.raises(error, match=message):
        step_of(name, state=state)


def test_the_state_of_another_optimizer_is_refused(tiny, task, step_of):
    model, params = tiny
    for optimizer in (optax.sgd(1e-3), optax.adam(1e-3), optax.chain(optax.sgd(1e-3, 0.9))):
        other = adapters.tent(model, task, optimizer=optimizer).init(params)
        with pytest.raises(ValueError, match=r"state.optimizer is not of this adapter's optimizer"):
            step_of("tent", state=other)
    same = adapters.tent(model, task, optimizer=optax.sgd(1.0, 0.9, nesterov=True)).init(params)
    step_of("tent", state=same)  # another rate is no other optimiser


def test_a_context_of_another_method_is_refused(tiny, task, statistics):
    model, params = tiny
    sgd = optax.sgd(1e-3)
    mgtta = adapters.mgtta(model, task, optimizer=sgd, statistics=statistics)
    state = adapters.tent(model, task, optimizer=sgd).init(params)
    with pytest.raises(TypeError, match=r"context is a .*, not MGTTA's"):
        jax.eval_shape(mgtta.step, params, state, np.zeros((2, 32, 32, 3), np.uint8))


def test_arguments_of_a_step_in_another_order_are_refused(tiny, task, step_of):
    model, params = tiny
    state = adapters.tent(model, task).init(params)
    with pytest.raises(TypeError, match=r"params and state are swapped, expected step\(params, "):
        step_of("tent", params=state, state=params)
    for name in ("tent", "zero_shot", "tnt"):
        with pytest.raises(TypeError, match="params holds a CLIP, expected a tree of arrays"):
            step_of(name, params=tiny)
    with pytest.raises(TypeError, match="state is a ndarray, expected this adapter's State"):
        step_of("tent", state=np.zeros((2, 32, 32, 3)), batch=state)
    with pytest.raises(ValueError, match=r"params/.* by this adapter alone"):
        step_of("tent", params={"params": params})


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
PIL = [Image.fromarray(image) for image in IMAGES]


@pytest.mark.parametrize("name", ["tent", "zero_shot", "tnt"])
@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (PIL, TypeError, "batch holds a list, .* model.preprocess makes one of PIL images"),
        (list(IMAGES), TypeError, "batch holds a list, .* np.stack of arrays"),
        (None, TypeError, "batch holds a NoneType"),
        ("cat.jpg", TypeError, "batch holds a str"),
        (jaxtta.Batch(PIL, np.ones(2, bool), np.arange(2)), TypeError, "batch holds a list"),
        (IMAGES[0], ValueError, r"images .*shape.*\(batch, .*3\)"),
        (IMAGES.transpose(0, 3, 1, 2), ValueError, r"images .*shape.*\(batch, .*3\)"),
        (IMAGES[0].transpose(2, 0, 1), ValueError, r"images .*shape.*\(batch, .*3\)"),
        (IMAGES[..., :1], ValueError, r"images .*shape.*\(batch, .*3\)"),
        (IMAGES.astype(np.int32), ValueError, r"images must be uint8 or float .* not int32"),
        (IMAGES > 100, ValueError, "images must be uint8 or float .* not bool"),
    ],
    ids=lambda value: None,  # numbered: a PIL image's name has its address
)
def test_batches_that_are_no_images_are_refused(step_of, name, batch, error, message):
    with pytest.raises(error, match=message):
        step_of(name, batch=batch)


FLOATS = IMAGES / np.float32(255)
NORMALISED = (FLOATS - np.float32([0.48, 0.46, 0.41])) / np.float32(0.27)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (FLOATS * 255, "float images run from 0 to 255, expected 0 to 1"),
        (NORMALISED, "float images run from -1.7.* to 2.*, expected 0 to 1: the model normalises"),
        (FLOATS * 2 - 1, "float images run from -1 to 1, expected 0 to 1"),
        (np.where(FLOATS > 0.9, np.inf, FLOATS), "float images run from 0 to inf"),
        (IMAGES.astype(np.int64), "uint8 or float in .*, not int64"),
        (IMAGES.transpose(0, 3, 1, 2), r"shape \(2, 3, 32, 32\), expected \(batch, height, wid"),
        (IMAGES[0], r"shape \(32, 32, 3\), expected \(batch, height, width, 3\)"),
        (None, r"shape \(\), expected \(batch, height, width, 3\)"),
    ],
)
def test_images_on_the_host_are_looked_at(tiny, images, message):
    model, params = tiny
    with pytest.raises(ValueError, match=message):
        jaxtta.Batch.padded(images, 4)
    if images is None:
        return
    with pytest.raises(ValueError, match=message):
        models.require_images(jnp.asarray(images) if images.dtype == np.float32 else images)
    if images.dtype != np.int64:  # becomes int32
        for gather in (models.feature_statistics, continual.task_grams):
            with pytest.raises(ValueError, match=message):
                gather(model, params, [images])


def test_images_of_every_allowed_kind_pass():
    for images in (IMAGES, FLOATS, FLOATS.astype(np.float64), FLOATS.astype(jnp.bfloat16)):
        assert jaxtta.Batch.padded(images, 3).mask.tolist() == [True, True, False]
    overshoot = FLOATS * 1.2 - 0.1  # a float resize that was not clipped
    nan = np.where(FLOATS > 0.5, np.nan, FLOATS)  # a step skips it
    for images in (overshoot, nan):
        jaxtta.Batch.padded(images, 2)
    padding = jaxtta.Batch(np.stack([FLOATS[0], FLOATS[1] * 255]), np.array([True, False]), None)
    models.require_images(models.as_batch(padding).images)
    with pytest.raises(ValueError, match="2 images, expected at most 1"):
        jaxtta.Batch.padded(IMAGES, 1)


def test_one_warning_of_images_that_are_not_in_0_to_1(caplog):
    """In the first step outside `jit`; traced values cannot be seen."""
    params = {"norm": {"scale": jnp.ones(3)}}

    class Mean:
        image_size, mixes_batch, feature_shape = 32, False, None

        def init_context(self, params, task):
            return ()

        def __call__(self, params, context, batch):
            features = batch.images.mean((1, 2)) * params["norm"]["scale"]
            return jaxtta.Outputs(features, features)

    for make in (adapters.tent, adapters.zero_shot):
        caplog.clear()
        adapter = make(Mean(), None)
        state = adapter.init(params)
        jax.eval_shape(adapter.step, params, state, FLOATS * 255)
        assert not caplog.records
        for _ in range(2):
            state, _ = adapter.step(params, state, FLOATS * 255)
        assert [record.getMessage() for record in caplog.records] == [
            "float images run from 0 to 255, expected 0 to 1: the model normalises them itself"
        ]
        caplog.clear()
        adapter = make(Mean(), None)
        spoilt = np.concatenate([FLOATS, FLOATS * 255])  # the padding may hold anything
        batch = jaxtta.Batch(spoilt, np.arange(4) < 2, np.arange(4))
        adapter.step(params, adapter.init(params), batch)
        assert not caplog.records


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (PIL[0], TypeError, "images is a Image, expected a list of PIL images"),
        (IMAGES, TypeError, "images is a ndarray, expected a list of PIL images"),
        (list(IMAGES), TypeError, r"images\[0\] is a ndarray, expected a PIL image"),
        ([PIL[0], "cat.jpg"], TypeError, r"images\[1\] is a str, expected a PIL image"),
        ([], ValueError, "no images"),
    ],
)
def test_preprocess_takes_a_list_of_pil_images(towers, images, error, message):
    for name in ("vit", "supervised"):
        with pytest.raises(error, match=message):
            towers[name][0].preprocess(images)


@pytest.mark.parametrize("dtype", ["bf16", "half precision", jnp.int8, int, 16])
def test_a_dtype_that_is_none_is_refused(dtype):
    for name in ("dtype", "compute_dtype"):
        with pytest.raises(TypeError, match=f"{name} is .*, expected a floating dtype"):
            jaxtta.load(GOLDEN / "tiny-clip", **{name: dtype})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([1, 2, 3], "class_names holds 1, expected strings"),
        (["cat", None], "class_names holds None, expected strings"),
        (["cat", b"dog"], "class_names holds b'dog', expected strings"),
        (range(3), "class_names holds 0, expected strings"),
        ({"cat": 1, "dog": 2}, "class_names is a dict, expected a list of strings"),
        ({"cat", "dog"}, "class_names is a set, expected a list of strings"),
        (iter(["cat", "dog"]), "class_names is a list_iterator, expected a list of strings"),
    ],
)
def test_class_names_are_strings(embedded, names, message):
    with pytest.raises(TypeError, match=message):
        jaxtta.zero_shot_task(embedded[0], names)
    for other in (["cat", "dog"], "openai/clip-vit-base-patch16"):
        message = f"model is a {type(other).__name__}, expected a classifier"
        with pytest.raises(TypeError, match=message):
            jaxtta.zero_shot_task(other, embedded[0])
    with pytest.raises(TypeError, match="templates holds 1, expected strings"):
        jaxtta.zero_shot_task(embedded[0], ["cat", "dog"], [1])


def test_files_and_pairs_in_place_of_what_they_hold_are_refused(tiny, task, statistics):
    model = tiny[0]
    sgd = optax.sgd(1e-3)
    for given in ("source.safetensors", (statistics, {}), tuple(statistics)):
        with pytest.raises(TypeError, match=f"statistics is a {type(given).__name__}, expected"):
            adapters.mgtta(model, task, optimizer=sgd, statistics=given)
    for phi in ("phi.safetensors", optim.load_mgg(jaxtta.assets.PHI)):
        with pytest.raises(TypeError, match=f"phi is a {type(phi).__name__}, expected a dict: phi"):
            optim.meta_gradient_generator(phi, 1e-3)
    with pytest.raises(TypeError, match="config is a str, expected a TNTConfig"):
        adapters.tnt(model, task, config="paper")
    for given in ("camera.safetensors", (np.zeros((32, 32, 3)), adapters.TNTConfig())):
        message = f"noise is a {type(given).__name__}, expected an array: noise, _ = load_noise"
        with pytest.raises(TypeError, match=message):
            adapters.tnt(model, task, noise=given)
    with pytest.raises(TypeError, match="adapted is a State, expected a nested dict"):
        tree.merge({"a": jnp.ones(2)}, adapters.State({}, (), (), 0))
    for gather in (models.feature_statistics, continual.task_grams):
        with pytest.raises(ValueError, match=r"images have shape \(32, 32, 3\), expected \(batch"):
            gather(model, tiny[1], IMAGES)
        with pytest.raises(TypeError, match="batch holds a str, expected an array"):
            gather(model, tiny[1], "folder")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": np.full((3, 32), np.nan)}, "not finite"),
        ({"squares": -np.ones((3, 32))}, "below 0"),
        ({"count": np.array(1.0)}, "of 1 images, expected at least two"),
    ],
)
def test_statistics_that_give_no_deviation_are_refused(tiny, task, statistics, changes, message):
    odd, sgd = statistics._replace(**changes), optax.sgd(1e-3)
    with pytest.raises(ValueError, match=message):
        adapters.mgtta(tiny[0], task, optimizer=sgd, statistics=odd)
    with pytest.raises(ValueError, match=message):
        models.save_statistics("never.safetensors", odd)
    with pytest.raises(ValueError, match="weight is -1, expected at least 0"):
        adapters.mgtta(tiny[0], task, optimizer=sgd, statistics=statistics, weight=-1)


def test_a_generator_that_is_not_finite_is_refused(tmp_path):
    phi = optim.init_meta_gradient_generator(jax.random.key(0))
    optim.save_mgg(tmp_path / "phi", phi | {"output": phi["output"] * jnp.nan})
    with pytest.raises(ValueError, match=r"phi: .* not finite"):
        optim.load_mgg(tmp_path / "phi")


def test_a_projector_for_no_kernel_is_refused(tiny):
    """Beside a right one too, whose kernel alone would be protected."""
    params = tiny[1]
    kernel = params["visual_projection"]["kernel"]
    own = optim.Projector(jnp.eye(len(kernel))[:, :2])
    optim.null_space_projection({"visual_projection/kernel": own}).init(params)
    both = {"visual_projection/kernel": own, "visual_projektion/kernel": own}
    message = (
        "visual_projektion/kernel, which is not a parameter; the nearest is visual_projection/"
    )
    with pytest.raises(ValueError, match=message):
        optim.null_space_projection(both).init(params)
    chained = continual.task_optimizer(continual.GNSPConfig(), both, 1e-3, 200)
    with pytest.raises(ValueError, match=message):
        chained.init(params)
    with pytest.raises(TypeError, match=r"kernel has a .*Array.*, expected a Projector"):
        optim.null_space_projection({"visual_projection/kernel": own.basis})
    with pytest.raises(TypeError, match="projectors is a list, expected a dict by path"):
        optim.null_space_projection([own])
    with pytest.raises(ValueError, match=r"no parameter has a projector: .* none"):
        optim.null_space_projection({}).init(params)


def test_labels_and_shares_of_training_are_looked_at():
    logits = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="labels run from -1 to 1, expected 0 to 2"):
        classification(logits, jnp.array([-1, 1]))
    with pytest.raises(TypeError, match="labels are float32, expected integers"):
        jax.eval_shape(classification, logits, jnp.ones(2))
    assert jnp.isnan(jax.jit(classification)(logits, jnp.array([-1, 1])))
    with pytest.raises(ValueError, match=r"share is 50, expected a number in \[0, 1\]"):
        continual.wise_ft(logits, logits, 50)
