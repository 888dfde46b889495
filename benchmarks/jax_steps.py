"""Measure a step of one of jaxtta's adapters.

python benchmarks/jax_steps.py batclip packed '{"classes": 1000}'
"""

import math
import sys
import time
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
from cases import Settings

from jaxtta import adapters, models, optim


def measure(settings: Settings, name: str, prompts: str = "packed") -> dict[str, Any]:
    """Measure a step, its operations and its memory."""
    del prompts  # jaxtta packs them always
    dtype, wait = jnp.dtype(settings.dtype), jax.block_until_ready
    size = 2048 if jax.default_backend() == "cpu" else 4096
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    peak = 2 * size**3 / min(cases.timed(lambda: product(a, b), 20, wait))
    config, steps = cases.clip_config(settings.model), cases.tnt_steps(name)
    compute_dtype = None if dtype == jnp.float32 else dtype
    model = models.from_config(config, compute_dtype=compute_dtype, remat=settings.remat)
    task = models.task_from_token_ids(cases.prompt_tokens(settings.classes))
    generator = None
    if steps:
        chunk = settings.views_per_chunk
        tuning = adapters.TNTConfig(settings.views, steps, views_per_chunk=chunk)
        adapter = adapters.tnt(model, task, config=tuning)
    elif name == "mgtta":
        ones = jnp.ones(model.feature_shape)
        clean = models.FeatureStatistics(jnp.array(2.0), 0 * ones, ones)
        phi = optim.init_meta_gradient_generator(jax.random.key(0))
        generator = optim.meta_gradient_generator(phi, 1e-3)
        adapter = adapters.mgtta(model, task, optimizer=generator, statistics=clean)
    else:
        adapter = getattr(adapters, name)(model, task)
    params = random_params(model)
    images = jnp.asarray(cases.random_images(1 if steps else settings.batch, settings.model))
    state, logits = wait(adapter.init(params)), None
    start = time.perf_counter()
    traced = jax.jit(adapter.step, donate_argnums=1).trace(params, state, images)
    compiled = traced.lower().compile()
    compilation = time.perf_counter() - start

    def step() -> Any:
        nonlocal state, logits
        state, prediction = compiled(params, state, images)
        logits = prediction.logits
        return state, prediction

    seconds = cases.timed(step, settings.steps, wait)
    if not jnp.isfinite(logits).all():
        raise FloatingPointError("the logits are not finite")
    device = jax.local_devices()[0]
    allocated = (device.memory_stats() or {}).get("peak_bytes_in_use")
    found = {
        "library": f"jax {jax.__version__}",
        "device": device.device_kind,
        "seconds": seconds,
        "compile_seconds": compilation,
        "peak_memory_gb": allocated / 1e9 if allocated else cases.resident_peak_gb(),
        "gflop": count_flops(traced.jaxpr.jaxpr) / 1e9,
        "matmul_gflop_per_second": peak / 1e9,
    }
    if generator:
        update = jax.jit(generator.update)
        own = cases.timed(lambda: update(state.adapted, state.optimizer), settings.steps, wait)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))
        found |= {"optimizer_seconds": min(own), "optimizer_mb": held / 1e6}
    return found


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
    cases.print_row(measure)
