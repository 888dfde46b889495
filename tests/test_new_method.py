"""A method written outside the package, in one file: this one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import golden

import jaxtta
from jaxtta import evaluate
from jaxtta.evaluate import provenance


def diversity(model, weight=1.0):
    """Confident on each image, diverse over the batch."""

    def objective(params, context, batch):
        logits = model(params, context, batch).logits
        each = jaxtta.losses.masked_mean(jaxtta.losses.entropy(logits), batch.mask)
        mean = (jax.nn.softmax(logits) * batch.mask[:, None]).sum(0) / batch.mask.sum()
        loss = each - weight * jaxtta.losses.entropy(jnp.log(mean))
        return loss, (logits, {"entropy": each})

    return objective


def test_a_new_method_is_one_objective(tiny):
    model, params = tiny
    prompts = model.prompts(jaxtta.models.task_from_token_ids(golden("clip_forward")["token_ids"]))
    adapter = jaxtta.adapters.online(
        diversity(model),
        context=lambda params: model.class_embeddings(params, prompts),
        trainable=lambda path: path.startswith("vision_model/post_layernorm"),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, momentum=0.9)),
    )
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    state, step = adapter.init(params), jax.jit(adapter.step, donate_argnums=1)
    seen = []
    for _ in range(10):
        state, prediction = step(params, state, images)
        seen.append(float(prediction.metrics["loss"]))
    assert seen[-1] < seen[0]
    assert set(prediction.metrics) >= {"entropy", "loss", "update_norm", "skipped"}


def make(model, task, lr=1e-2, weight=1.0):
    """The method as `jaxtta sweep --adapters test_new_method:make` finds it."""
    return jaxtta.adapters.online(
        diversity(model, weight),
        context=lambda params: model.init_context(params, task),
        trainable=jaxtta.tree.normalisation_parameters("image"),
        optimizer=optax.sgd(lr),
    )


def see_originals(model, task):
    adapter = make(model, task)

    def step(params, state, batch):
        assert batch.images.shape[1:] == (40, 40, 3)
        return adapter.step(params, state, batch._replace(images=batch.images[:, :32, :32]))

    return jaxtta.Adapter(adapter.init, step)


see_originals.needs_originals = True


def test_a_new_method_runs_in_the_command_and_stands_in_the_report(run_jaxtta, short, tmp_path):
    own = [f"{__name__}:make", f"{__name__}:make:lr=0.1,weight=0.5", f"{__name__}:see_originals"]
    code, _, err = run_jaxtta(
        *("sweep", "--adapters", "zero_shot", *own, "--corruptions", "fog", "--max-images", "8"),
        *("--workers", "0", "--batch-size", "8", "--output", tmp_path, "--canvas", "40"),
        *("--model", short),
    )
    assert code == 0, err
    page = (tmp_path / "report.html").read_text()
    for name in own:
        assert name in page
    results = evaluate.load_predictions(tmp_path)
    assert [result.adapter for result in results] == ["zero_shot", *own]
    assert results[2].settings["adapter"]["settings"] == {"lr": 0.1, "weight": 0.5}
    assert results[3].settings["adapter"]["canvas"] == 40
    sources = {result.settings["adapter"].get("source") for result in results[1:]}
    assert len(sources) == 1  # of this file
    assert "missing" not in sources


def test_another_version_of_a_method_is_another_adapter(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="preset is 'imagenet', expected cifar10-c"):
        evaluate.make_adapter(
            evaluate.parse_adapter("tent"), None, None, evaluate.AdapterConfig("imagenet")
        )
    monkeypatch.chdir(tmp_path)  # modules in the current folder are found
    prints = []
    for version in range(2):
        (tmp_path / "own_method.py").write_text(f"def make(model, task): return {version}\n")
        spec = evaluate.parse_adapter("own_method:make")
        prints.append(provenance.identity_of(spec, evaluate.AdapterConfig()))
    assert prints[0] != prints[1]
    assert prints[0]["name"] == "own_method:make"
    with pytest.raises(ValueError, match=r"own_method:make: gives .*, expected an Adapter"):
        evaluate.make_adapter(spec, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tnet", "unknown adapter 'tnet', expected zero_shot, tent, batclip, tnt, mgtta, "),
        ("tent@1e-4", "unknown adapter .* as in tent:lr=1e-4"),
        ("tnt-3", "unknown adapter 'tnt-3'"),
        ("tnet:lr=1", "unknown adapter 'tnet:lr=1'"),
        ("tent:rate=1", "tent:rate=1: unknown setting 'rate', tent has lr, optimizer"),
        ("zero_shot:lr=1", "unknown setting 'lr', zero_shot has none"),
        ("tent:lr=high", "tent:lr=high: lr is high, expected a positive number"),
        ("tent:lr=-1", "lr is -1, expected a positive number"),
        ("tent:lr", "'lr' is no setting, expected KEY=VALUE"),
        ("tent:lr=1,lr=2", "'lr=2' is no setting, expected KEY=VALUE, each key once"),
        ("tent:optimizer=mgg", "optimizer is mgg, expected sgd, adam, adamw"),
        ("tnt:steps=-1", "tnt:steps=-1: steps is -1, expected at least 0"),
        ("tnt:steps=1.5", "steps is 1.5, expected type int"),
        ("mgtta:tower=x", "tower is 'x', expected image or both"),
        ("mgtta:weight=-1", "weight is -1, expected at least 0"),
        ("missing_module:make", "missing_module:make: the module cannot be imported"),
        (f"{__name__}:missing", f"{__name__}:missing: the module has no function of this name"),
        (f"{__name__}:make:rate=1", "unexpected keyword argument 'rate'.*takes .*lr=0.01"),
    ],
)
def test_adapters_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        evaluate.parse_adapter(text)


def test_settings_of_adapters_are_read():
    spec = evaluate.parse_adapter("tnt:steps=3,scale=(0.5,1),online=true,temperature=code")
    assert spec.needs_originals
    assert spec.settings == {
        "steps": 3,
        "scale": (0.5, 1),
        "online": True,
        "temperature": "code",
    }
    assert not evaluate.parse_adapter("tent:lr=1e-4").needs_originals


class Linear:
    """Another classifier in CLIP's place, of which only a call is needed."""

    def __call__(self, params, classes, batch):
        features = batch.images.astype(jnp.float32).reshape(len(batch.images), -1) / 255
        features = features * params["norm"]["scale"]
        return jaxtta.Outputs(features @ classes, features)


def test_another_classifier_takes_clips_place():
    rng = np.random.default_rng(0)
    adapter = jaxtta.adapters.online(
        jaxtta.adapters.tent_objective(Linear()),
        context=lambda params: jnp.asarray(rng.normal(size=(12, 3)), jnp.float32),
        trainable=lambda path: "norm" in path,
        optimizer=optax.sgd(0.1),
    )
    params = {"norm": {"scale": jnp.ones(12)}}
    images = rng.integers(0, 256, (5, 2, 2, 3), np.uint8)
    state, step = adapter.init(params), jax.jit(adapter.step)
    entropies = []
    for _ in range(5):
        state, prediction = step(params, state, images)
        entropies.append(float(prediction.metrics["entropy"]))
    assert entropies[-1] < entropies[0]
