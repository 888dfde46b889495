"""jaxtta: test-time adaptation of CLIP in JAX.

Use::

    import jax, jaxtta

    model, params = jaxtta.models.load("openai/clip-vit-base-patch16")
    task = jaxtta.models.zero_shot_task(model, ["cat", "dog"], templates=["a photo of a {}."])
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
    losses,
    metrics,
    models,
    objectives,
    optim,
    tree,
    views,
)
from jaxtta.adapters import Adapter, Prediction
from jaxtta.objectives import Batch

__all__ = [
    "Adapter",
    "Batch",
    "Prediction",
    "adapters",
    "assets",
    "augmix",
    "continual",
    "data",
    "diagnose",
    "losses",
    "metrics",
    "models",
    "objectives",
    "optim",
    "tree",
    "views",
]
__version__ = "0.1.0"
