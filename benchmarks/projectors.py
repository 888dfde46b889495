"""What GNSP adds to training: making the projectors, and projecting the updates."""

import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax_steps import random_params

from jaxtta import continual, models, tree


def projection_times(settings: cases.Settings) -> pd.Series:
    """Seconds to make the projectors, and of a training step without and with them."""
    model = models.from_config(cases.clip_config(settings.model))
    params = random_params(model)
    shown = np.split(cases.random_images(64, settings.model), 4)  # batches of 16, as published
    grams = jax.block_until_ready(continual.task_grams(model, params, shown))
    identities = {size: jnp.eye(size) for size in {len(gram) for gram in grams.values()}}
    seconds, projectors = {}, {}
    for backend, name in (("host", "on the host, float64"), ("device", "on the device")):
        make = functools.partial(continual.null_space_projectors, backend=backend)
        jax.block_until_ready(make(identities))  # load the libraries and compile
        seconds[f"{len(grams)} projectors {name}"], projectors = once(make, grams)
    if importlib.util.find_spec("torch"):
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrices = [torch.from_numpy(np.array(gram)).to(device) for gram in grams.values()]
        torch.linalg.svd(torch.eye(8, device=device))
        sizes = (torch.linalg.svd(matrix)[1].cpu() for matrix in matrices)
        seconds["full SVDs in PyTorch"], _ = once(list, sizes)

    images = jnp.asarray(cases.random_images(settings.batch, settings.model))
    labels = jnp.arange(settings.batch) % settings.classes
    texts = jax.random.normal(jax.random.key(0), (settings.classes, model.projection))
    texts = models.l2_normalize(texts)
    pairs = continual.ReferenceBatch(images, None, labels, *[texts[labels]] * 3)
    examples = continual.TaskBatch(images, labels, texts)
    trained, frozen = tree.partition(params, continual.gnsp_kernels)
    for name, how in (("training step", "none"), ("training step with projection", "before")):
        method = dataclasses.replace(continual.VARIANTS["gnsp"], projection=how)

        @jax.jit
        def step(projectors: Any, *inputs: Any, method: Any = method) -> Any:
            optimizer = continual.task_optimizer(method, projectors, 1e-5, 1000)
            return continual.train_step(model, method, optimizer)(*inputs)

        optimizer = continual.task_optimizer(method, projectors, 1e-5, 1000)
        state = continual.TrainState(trained, optimizer.init(trained))
        call = functools.partial(step, projectors, frozen, state, examples, pairs)
        seconds[name] = min(cases.timed(call, settings.steps, jax.block_until_ready))
    return pd.Series(seconds, name="seconds")


def once(make: Callable[..., Any], inputs: Any) -> tuple[float, Any]:
    """Seconds to make something, and what is made."""
    start = time.perf_counter()
    made = jax.block_until_ready(make(inputs))
    return time.perf_counter() - start, made
