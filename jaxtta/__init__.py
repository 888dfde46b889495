"""jaxtta: test-time adaptation of CLIP in JAX.

Use::

    import jax, jaxtta

    model, params = jaxtta.load("openai/clip-vit-base-patch16")
    task = jaxtta.zero_shot_task(model, ["cat", "dog"], templates=["a photo of a {}."])
    adapter = jaxtta.adapters.batclip(model, task)
    state = adapter.init(params)
    step = jax.jit(adapter.step, donate_argnums=1)
    for images in batches:
        state, prediction = step(params, state, images)
"""

from jaxtta import (
    adapters,
    assets,
    augmix,
    continual,
    data,
    diagnose,
    images,
    io,
    losses,
    metrics,
    models,
    optim,
    tree,
    views,
)
from jaxtta.adapters import Adapter, Prediction, State
from jaxtta.io import load_state, save_state
from jaxtta.models import Batch, Classifier, Outputs, load, zero_shot_task

__all__ = [
    "Adapter",
    "Batch",
    "Classifier",
    "Outputs",
    "Prediction",
    "State",
    "adapters",
    "assets",
    "augmix",
    "continual",
    "data",
    "diagnose",
    "images",
    "io",
    "load",
    "load_state",
    "losses",
    "metrics",
    "models",
    "optim",
    "save_state",
    "tree",
    "views",
    "zero_shot_task",
]
__version__ = "0.1.0"
