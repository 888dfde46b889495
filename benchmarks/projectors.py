"""What GNSP adds to training: making the projectors, and projecting the updates."""

import dataclasses
import functools
import importlib.util
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
    seconds, measured = {}, functools.partial(cases.timed, steps=1, wait=jax.block_until_ready)
    for backend in ("host", "device"):
        make = functools.partial(continual.null_space_projectors, grams, backend=backend)
        (seconds[f"{len(grams)} projectors on the {backend}"],) = measured(make)
    if importlib.util.find_spec("torch"):
        import torch

        matrices = [torch.from_numpy(np.array(gram)) for gram in grams.values()]
        (seconds["SVDs in PyTorch, CPU"],) = measured(lambda: [*map(torch.linalg.svd, matrices)])

    projectors = continual.null_space_projectors(grams)
    images = jnp.asarray(cases.random_images(settings.batch, settings.model))
    labels = jnp.arange(settings.batch) % settings.classes
    size = settings.classes, model.projection
    texts = models.l2_normalize(jax.random.normal(jax.random.key(0), size))
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
