"""Measure a step of one of jaxtta's adapters.

python benchmarks/jax_steps.py '{"adapter": "batclip", "classes": 1000}'
"""

import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import (
    Case,
    Measured,
    clip_config,
    print_measured,
    prompt_tokens,
    random_images,
    resident_peak_gb,
    timed,
)

from jaxtta import adapters, models, optim


def measure(case: Case) -> Measured:
    """Measure a step, its operations and its memory."""
    dtype, wait = jnp.dtype(case.dtype), jax.block_until_ready
    size = 2048 if jax.default_backend() == "cpu" else 4096
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    peak = 2 * size**3 / min(timed(lambda: product(a, b), 20, wait))
    compute_dtype = None if dtype == jnp.float32 else dtype
    config = clip_config(case.model)
    model = models.from_config(config, compute_dtype=compute_dtype, remat=case.remat)
    adapter, generator = make_adapter(case, model)
    params = random_params(model)
    images = jnp.asarray(random_images(1 if case.tnt_steps else case.batch, case.model))
    state, prediction = wait(adapter.init(params)), None
    start = time.perf_counter()
    traced = jax.jit(adapter.step, donate_argnums=1).trace(params, state, images)
    compiled = traced.lower().compile()
    compilation = time.perf_counter() - start

    def step() -> Any:
        nonlocal state, prediction
        state, prediction = compiled(params, state, images)
        return state, prediction

    seconds = timed(step, case.steps, wait)
    if not jnp.isfinite(prediction.logits).all():
        raise FloatingPointError("the logits are not finite")
    device = jax.local_devices()[0]
    allocated = (device.memory_stats() or {}).get("peak_bytes_in_use")
    memory = allocated / 1e9 if allocated else resident_peak_gb()
    flops = count_flops(traced.jaxpr.jaxpr)
    found = Measured(device.device_kind, seconds, memory, flops, peak, compilation)
    if generator is None:
        return found
    update = jax.jit(generator.update)
    own = timed(lambda: update(state.adapted, state.optimizer), case.steps, wait)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))
    return found._replace(optimizer_seconds=min(own), optimizer_mb=held / 1e6)


def make_adapter(case: Case, model: models.CLIP) -> tuple[adapters.Adapter, Any]:
    """The case's adapter, and MGTTA's generator or None."""
    task = models.task_from_token_ids(prompt_tokens(case.classes))
    if case.tnt_steps:
        tuning = adapters.TNTConfig(
            case.views, case.tnt_steps, views_per_chunk=case.views_per_chunk
        )
        return adapters.tnt(model, task, config=tuning), None
    if case.adapter != "mgtta":
        return getattr(adapters, case.adapter)(model, task), None
    shape = model.feature_shape
    clean = models.FeatureStatistics(jnp.array(2.0), jnp.zeros(shape), jnp.ones(shape))
    phi = optim.init_meta_gradient_generator(jax.random.key(0))
    generator = optim.meta_gradient_generator(phi, 1e-3)
    return adapters.mgtta(model, task, optimizer=generator, statistics=clean), generator


def random_params(model: models.CLIP) -> dict[str, Any]:
    """Random parameters; `model.init` would need a multiple of their memory."""
    random = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key.endswith("scale"):
            return jnp.ones(leaf.shape)
        return jnp.asarray(0.02 * random.standard_normal(leaf.shape, np.float32))

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def count_flops(program: Any) -> int:
    """Operations of a jaxpr's matrix products; XLA counts loops as one iteration."""
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        turns = equation.params.get("length", 1)
        for inner in equation.params.values():  # loop bodies, jitted and derived functions
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += turns * count_flops(getattr(inner, "jaxpr", inner))
    return total


if __name__ == "__main__":
    sys.modules["torch"] = None  # transformers would import it, and its memory would count
    print_measured(measure)
