"""Fingerprints of data and model, and versions, for the result files."""

import hashlib
import platform
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from jaxtta.data import Source
from jaxtta.models import Params

PACKAGES = ("jaxtta", "jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")


def fingerprints(source: Source, params: Params) -> dict[str, Any]:
    """Fingerprints of the images (number and labels), the class names and the weights.

    Args:
        source: the images.
        params: the weights.

    Returns:
        Settings that must match in another run, independent of file locations.
    """
    weights = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(params):
        weights.update(np.asarray(leaf).tobytes())
    labels = hashlib.blake2b(source.labels.tobytes(), digest_size=8).hexdigest()
    return {
        "images": f"{len(source.labels)}, labels {labels}",
        "class_names": source.class_names,
        "weights": weights.hexdigest(),
    }


def about(**places: str) -> dict[str, Any]:
    """Versions and device.

    Args:
        places: paths of data and model.

    Returns:
        Information for the cells that does not affect results.
    """
    versions = {"python": platform.python_version()}
    return {
        **places,
        "versions": versions | {name: version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
    }
