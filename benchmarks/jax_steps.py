"""Measure a step of one of jaxtta's adapters."""

import math
import sys
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np

from jaxtta import adapters, models, optim


def measure(settings: cases.Settings, name: str, _: str) -> tuple:
    """Measure a step, its operations and its memory."""
    wait, size = jax.block_until_ready, 2048 if jax.default_backend() == "cpu" else 4096
    a, b = jax.random.normal(jax.random.key(0), (2, size, size))
    product = jax.jit(jnp.matmul)
    peak = 2 * size**3 / min(cases.timed(lambda: product(a, b), 20, wait))
    model = models.from_config(cases.clip_config(settings.model))
    task = models.task_from_token_ids(cases.prompt_tokens(settings.classes))
    phi = optim.init_meta_gradient_generator(jax.random.key(0))
    generator = optim.meta_gradient_generator(phi, 1e-3)
    if name == "mgtta":
        ones = jnp.ones(model.feature_shape)
        clean = models.FeatureStatistics(jnp.array(2.0), 0 * ones, ones)
        adapter = adapters.mgtta(model, task, optimizer=generator, statistics=clean)
    else:
        tnt = adapters.TNTConfig(settings.views, views_per_chunk=settings.views_per_chunk)
        how = (model, task, adapters.AdapterConfig(tnt=tnt))
        adapter = adapters.make_adapter(adapters.parse_adapter(name), *how)
    params, count = random_params(model), 1 if name.startswith("tnt") else settings.batch
    images = jnp.asarray(cases.random_images(count, settings.model))
    state = wait(adapter.init(params))
    traced = jax.jit(adapter.step, donate_argnums=1).trace(params, state, images)
    compiled = traced.lower().compile()

    def step() -> Any:
        nonlocal state
        state, prediction = compiled(params, state, images)
        return state, prediction

    seconds = min(cases.timed(step, settings.steps, wait))
    allocated = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    memory = allocated / 1e9 if allocated else cases.resident_peak_gb()
    flops = count_flops(traced.jaxpr.jaxpr)
    more = {}
    if name == "mgtta":
        update = jax.jit(generator.update)
        own = cases.timed(lambda: update(state.adapted, state.optimizer), settings.steps, wait)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))
        more = {"generator s": min(own), "its MB": held / 1e6}
    return f"jax {jax.__version__}", seconds, memory, flops, peak, more


def random_params(model: models.CLIP) -> dict[str, Any]:
    """Random parameters; `model.init` would need a multiple of their memory."""
    random = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.02 * random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + path[-1].key.endswith("scale"))

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def count_flops(program: Any) -> int:
    """Operations of a jaxpr's matrix products; XLA counts loops as one iteration."""
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inside = sum(count_flops(program) for program in inner if hasattr(program, "eqns"))
        total += equation.params.get("length", 1) * inside  # loops, jitted and derived functions
    return total


if __name__ == "__main__":
    sys.modules["torch"] = None  # transformers would import it, and its memory would count
    cases.print_row(measure)
