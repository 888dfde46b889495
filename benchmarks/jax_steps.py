"""Measure a step of one of jaxtta's adapters."""

import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtta import adapters, models, optim, tree
from jaxtta.flops import count_flops

PARTS = ("text", "text-gradient", "image", "image-gradient", "loss", "update")


def measure(settings: cases.Settings, name: str, _: str) -> tuple:
    """Measure a step, its operations and its memory."""
    wait, size = jax.block_until_ready, 2048 if jax.default_backend() == "cpu" else 8192
    dtype = jnp.dtype(settings.dtype)
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(jnp.matmul)
    peak = cases.matmul_peak(lambda: product(a, b), size, wait)
    compute_dtype = None if dtype == jnp.float32 else dtype
    model = models.from_config(cases.clip_config(settings.model), compute_dtype=compute_dtype)
    model = models.with_fused_attention(model) if settings.fused_attention else model
    task = models.task_from_token_ids(cases.prompt_tokens(settings.classes))
    params, count = random_params(model), 1 if name.startswith("tnt") else settings.batch
    images = jnp.asarray(cases.random_images(count, settings.model))
    phi = optim.init_meta_gradient_generator(jax.random.key(0))
    generator, state = optim.meta_gradient_generator(phi, 1e-3), None
    if name in PARTS:
        function, arguments = part(name, model, task, params, images)
    else:
        tnt = adapters.TNTConfig(settings.views, views_per_chunk=settings.views_per_chunk)
        adapter = make_adapter(name, model, task, tnt, generator)
        function, arguments, state = adapter.step, (images,), wait(adapter.init(params))
    start = time.perf_counter()
    if state is None:
        traced = jax.jit(function).trace(*arguments)
    else:
        traced = jax.jit(function, donate_argnums=1).trace(params, state, *arguments)
    compiled = traced.lower().compile()
    more: dict[str, Any] = {"compile s": time.perf_counter() - start}
    kind = jax.local_devices()[0].device_kind
    more["device"] = cases.cores() if kind == "cpu" else kind

    def step() -> Any:
        nonlocal state
        if state is None:
            return compiled(*arguments)
        state, prediction = compiled(params, state, *arguments)
        return state, prediction

    seconds = min(cases.timed(step, settings.steps, wait))
    if settings.profile:
        print(f"{name}:\n{profile(step).to_string()}", file=sys.stderr)
    allocated = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    memory = allocated / 1e9 if allocated else cases.resident_peak_gb()
    flops = count_flops(traced.jaxpr.jaxpr)
    if name == "mgtta":
        update = jax.jit(generator.update)
        own = cases.timed(lambda: update(state.adapted, state.optimizer), settings.steps, wait)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer))
        more |= {"generator s": min(own), "its MB": held / 1e6}
    library = f"jax {jax.__version__}" + ", fused" * settings.fused_attention
    return library, seconds, memory, flops, peak, more


def make_adapter(
    name: str, model: models.CLIP, task: models.Task, tnt: adapters.TNTConfig, generator: Any
) -> adapters.Adapter:
    """An adapter by name, MGTTA's with this generator and made-up statistics."""
    if name != "mgtta":
        spec, config = adapters.parse_adapter(name), adapters.AdapterConfig(tnt=tnt)
        return adapters.make_adapter(spec, model, task, config)
    ones = jnp.ones(model.feature_shape)
    clean = models.FeatureStatistics(jnp.array(2.0), 0 * ones, ones)
    return adapters.mgtta(model, task, optimizer=generator, statistics=clean)


def part(name: str, model: models.CLIP, task: Any, params: Any, images: jax.Array) -> tuple:
    """A part of BATCLIP's step, as a function and its arguments."""
    prompts = model.prompts(task)
    adapted, _ = tree.partition(params, tree.normalisation_parameters("both"))
    if name == "update":
        optimizer = optax.adamw(5e-4, weight_decay=1e-2)
        return optimizer.update, (adapted, optimizer.init(adapted), adapted)
    if name == "loss":
        batch = models.Batch.padded(np.asarray(images), len(images))
        shapes = (len(images), model.projection), (len(prompts.ends), model.projection)
        rows = [jax.random.normal(jax.random.key(0), shape) for shape in shapes]

        def outputs(rows: Any, context: Any, batch: models.Batch) -> models.Outputs:
            images, texts = map(models.l2_normalize, rows)
            return models.Outputs(100 * images @ texts.T, rows[0], texts, None)

        objective = adapters.batclip_objective(outputs)
        return jax.grad(lambda rows: objective(rows, None, batch)[0]), (rows,)

    def tower(adapted: Any, params: Any, images: jax.Array) -> jax.Array:
        params = tree.merge(params, adapted)
        if name.startswith("text"):
            return model.class_embeddings(params, prompts).sum()
        return model.encode_image(params, model.normalize(images)).sum()

    return jax.grad(tower) if name.endswith("gradient") else tower, (adapted, params, images)


def profile(step: Callable[[], Any], steps: int = 3, most: int = 20) -> Any:
    """The kernels that take longest: milliseconds a step, and their share of all kernels."""
    import pandas as pd

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                jax.block_until_ready(step())
        (path,) = Path(folder).rglob("*.xplane.pb")
        lines = [
            line for p in jax.profiler.ProfileData.from_file(str(path)).planes for line in p.lines
        ]
        kernels = [
            (re.sub(r"[.\d]+$", "", event.name), event.duration_ns / 1e6 / steps)
            for line in lines
            for event in line.events
            if any(key == "hlo_op" for key, _ in event.stats)
        ]
    table = (
        pd.DataFrame(kernels, columns=["kernel", "ms"]).groupby("kernel").ms.agg(["sum", "size"])
    )
    table = table.sort_values("sum", ascending=False).set_axis(["ms a step", "calls"], axis=1)
    table["share %"], table["calls"] = (
        100 * table["ms a step"] / table["ms a step"].sum(),
        table.calls / steps,
    )
    return table.head(most).round(2)


def random_params(model: models.CLIP) -> dict[str, Any]:
    """Random parameters; `model.init` would need a multiple of their memory."""
    random = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        noise = 0.02 * random.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + path[-1].key.endswith("scale"))

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


if __name__ == "__main__":
    sys.modules["torch"] = None  # transformers would import it, and its memory would count
    cases.print_row(measure)
