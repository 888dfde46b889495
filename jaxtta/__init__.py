"""jaxtta: test-time adaptation of CLIP in JAX.

Examples:
    >>> import jax, jaxtta
    >>> model, params = jaxtta.load(jaxtta.assets.MODEL)  # or "openai/clip-vit-base-patch16"
    >>> task = jaxtta.zero_shot_task(model, ["cat", "dog"], templates=["a photo of a {}."])
    >>> adapter = jaxtta.adapters.batclip(model, task)
    >>> state = adapter.init(params)
    >>> step = jax.jit(adapter.step, donate_argnums=1)
    >>> for batch in (images[:4], images[4:]):  # images: see `jaxtta.load`
    ...     state, prediction = step(params, state, batch)
    >>> prediction.logits.shape
    (4, 2)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtta import (
        adapters,
        assets,
        augmix,
        bootstrap,
        continual,
        data,
        deploy,
        diagnose,
        evaluate,
        images,
        io,
        losses,
        metrics,
        models,
        optim,
        parallel,
        remote,
        report,
        testing,
        tree,
        views,
    )
    from jaxtta.adapters import Adapter, Prediction, State, guarded
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
    "bootstrap",
    "continual",
    "data",
    "deploy",
    "diagnose",
    "evaluate",
    "guarded",
    "images",
    "io",
    "load",
    "load_state",
    "losses",
    "metrics",
    "models",
    "optim",
    "parallel",
    "remote",
    "report",
    "save_state",
    "testing",
    "tree",
    "views",
    "zero_shot_task",
]
__version__ = "0.1.0"

_FROM = {
    **dict.fromkeys(("Adapter", "Prediction", "State", "guarded"), "adapters"),
    **dict.fromkeys(("load_state", "save_state"), "io"),
    **dict.fromkeys(("Batch", "Classifier", "Outputs", "load", "zero_shot_task"), "models"),
}
"""Where each name that is no subpackage is from."""


def __getattr__(name: str) -> Any:
    """Import what is used when it is used: the `jaxtta` command's list needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"jaxtta.{_FROM.get(name, name)}")
    return getattr(module, name) if name in _FROM else module


def __dir__() -> list[str]:
    return [*globals(), *__all__]
