"""TNT's settings, and files of a noise map with the settings that it was optimised with."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.core import Tracer

from jaxtta.io import load_arrays, save_arrays


@dataclasses.dataclass(frozen=True)
class TNTConfig:
    """TNT's settings; the defaults are the paper's.

    Attributes:
        views: N, the views of an image; the first is the plain preprocessing.
        steps: updates of the map; 0 to apply it as it is. With `views=1` the confidence is then the
            model's own; of several views the most confident ones are averaged still.
        learning_rate: size of an update.
        epsilon: the map's greatest magnitude, in [0, 1] pixel values.
        select_fraction: share of the views, those of lowest entropy, that the loss is taken over.
        ensemble_fraction: share of the views, those of lowest entropy, whose probabilities are
            averaged.
        entropy_weight: of the marginal entropy in the loss (0.1 in the reference implementation).
        temperature: of the averaged probabilities: a number on the cosines (the paper's divides
            them by 0.007, whatever the model's own scale), "model" for the model's own scale, or
            "code" for what the reference implementation does in half precision. It belongs to
            the vote of tuned views: without steps the model's own scale holds.
        scale: least and greatest share of a random crop's area.
        ratio: least and greatest width over height of a random crop.
        augmix: severity of AugMix on the random crops, up to 10; 0 for none, as in the paper.
        online: update one map along the stream, image by image.
        views_per_chunk: views of an image that are embedded at once where no gradient is taken;
            fewer need less memory. With gradient, all selected views are embedded at once.
        images_per_map: images that are mapped over at once; 1 on a CPU, more fill an accelerator.
    """

    views: int = 64
    steps: int = 1
    learning_rate: float = 1e-3
    epsilon: float = 1 / 255
    select_fraction: float = 0.1
    ensemble_fraction: float = 0.1
    entropy_weight: float = 1.0
    temperature: float | Literal["code", "model"] = 7e-3
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    augmix: float = 0.0
    online: bool = False
    views_per_chunk: int = 8
    images_per_map: int = 1

    def __post_init__(self) -> None:
        """Validate the settings."""
        for name, least in (
            ("views", 1),
            ("steps", 0),
            ("views_per_chunk", 1),
            ("images_per_map", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        for name in ("select_fraction", "ensemble_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0 and at most 1")
        for name, greatest in (("scale", 1), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= greatest:
                limits = " at most 1" if greatest == 1 else ""
                raise ValueError(
                    f"{name} is {low} to {high}, expected positive numbers in order{limits}"
                )
        if not 0 <= self.augmix <= 10:
            raise ValueError(f"augmix is {self.augmix}, expected 0 to 10")
        value = self.temperature
        if value not in ("code", "model") if isinstance(value, str) else not 0 < value < math.inf:
            raise ValueError(f"temperature is {value}, expected a positive number, code or model")


TNT_PRESETS = {"paper": TNTConfig(), "code": TNTConfig(entropy_weight=0.1, temperature="code")}
"""The settings of the paper, and the defaults of its reference implementation."""


def require_noise(noise: Any, shape: tuple[int, ...] | None = None) -> None:
    """Check a noise map.

    Args:
        noise: the map.
        shape: the model's, (size, size, 3); None for any (height, width, 3).

    Raises:
        TypeError: if it is not an array: a file's name, or all that `load_noise` gives.
        ValueError: if it has another shape, or a value that is NaN or beyond 1, the whole range of
            pixels; values are looked at outside `jit` only.
    """
    if isinstance(noise, str | Path | tuple) or not np.ndim(noise):
        raise TypeError(
            f"noise is a {type(noise).__name__}, expected an array: noise, _ = load_noise(FILE)"
        )
    given = np.shape(noise)
    if given != shape if shape else len(given) != 3 or given[2] != 3:
        expected = f"{shape} for this model" if shape else "(height, width, 3)"
        raise ValueError(f"a noise map of shape {given}, expected {expected}")
    if not isinstance(noise, Tracer) and not (np.abs(np.asarray(noise)) <= 1).all():
        raise ValueError("a noise map with values that are NaN or beyond 1, on pixels in [0, 1]")


def save_noise(path: str | Path, noise: Any, config: TNTConfig) -> None:
    """Save a noise map with the settings that it was optimised with.

    Args:
        path: of the `.safetensors` file.
        noise: (height, width, 3).
        config: the settings, kept as JSON in the file's metadata.

    Raises:
        ValueError: if it is not a noise map, or holds numbers beyond 1.

    Examples:
        >>> config = jaxtta.adapters.TNTConfig(online=True)
        >>> jaxtta.adapters.save_noise("noise.safetensors", np.zeros((32, 32, 3)), config)
        >>> noise, config = jaxtta.adapters.load_noise("noise.safetensors")
        >>> noise.shape, config.online
        ((32, 32, 3), True)
    """
    require_noise(noise)
    save_arrays(path, {"noise": np.asarray(noise, np.float32)}, dataclasses.asdict(config))


def load_noise(path: str | Path) -> tuple[np.ndarray, TNTConfig]:
    """Load what `save_noise` saved.

    Args:
        path: of the file.

    Returns:
        The map (height, width, 3) and its settings.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no noise map.
    """
    arrays, settings = load_arrays(path)
    if "noise" not in arrays or not settings:
        raise ValueError(f"{path}: holds no noise map of TNT, or no settings")
    try:
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()
        }
        require_noise(arrays["noise"])
        return arrays["noise"], TNTConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: holds no noise map of TNT ({error!r})") from error
