"""What a sweep was made from and with, for its result files."""

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
    """What was found where options point: images by number and label, names, weights.

    Args:
        source: the images.
        params: the weights.

    Returns:
        Settings that another run must agree with, wherever its files lie.
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
        places: where data and model were found.

    Returns:
        What cells say without deciding anything.
    """
    versions = {"python": platform.python_version()}
    return {
        **places,
        "versions": versions | {name: version(name) for name in PACKAGES},
        "device": jax.devices()[0].device_kind,
    }
