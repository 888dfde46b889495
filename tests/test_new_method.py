"""A method written outside the package, in one file: this one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import golden

import jaxtta


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
