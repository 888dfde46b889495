"""From images to the model's input: resize, crop, RGB, as the checkpoint's settings say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF_MEAN = (0.5, 0.5, 0.5)  # SigLIP's and supervised ViTs' mean and std, unless they say otherwise


class Preprocessing(NamedTuple):
    """A checkpoint's image preprocessing, as in its `preprocessor_config.json`.

    Attributes:
        image_size: side of the model's input in pixels.
        resize: (height, width) to resize to, an integer for the shorter side, None not to resize.
        crop: (height, width) of the centre crop; None for none.
        resample: PIL's number for the resampling filter (3 is bicubic).
        mean: of the normalisation, per channel, for values in [0, 1].
        std: likewise.
    """

    image_size: int
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: int = int(Image.Resampling.BICUBIC)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @staticmethod
    def rgb(image: Image.Image) -> Image.Image:
        """Convert an image of any mode to 8-bit RGB (transparency is dropped, not blended)."""
        if image.mode == "F" or image.mode.startswith("I"):  # 16 bits; PIL would clip at 255
            values = np.asarray(image).astype(np.float32)
            image = Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
        return image if image.mode == "RGB" else image.convert("RGB")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize and crop one image.

        Args:
            image: in any mode.

        Returns:
            (image_size, image_size, 3) uint8.

        Raises:
            ValueError: if the settings lead to another size than the model's.
        """
        image = self.rgb(image)
        if self.resize is not None:
            image = image.resize(_target_size(image.size, self.resize), resample=self.resample)
        pixels = np.asarray(image)
        if self.crop is not None:
            pixels = _centre_crop(pixels, *self.crop)
        if pixels.shape[:2] != (self.image_size, self.image_size):
            raise ValueError(
                f"the checkpoint's preprocessing gives an image of {pixels.shape[0]}×"
                f"{pixels.shape[1]}, its model takes {self.image_size}×{self.image_size}"
            )
        return pixels


def _target_size(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """PIL's (width, height) after the resize; the longer side is rounded down."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _centre_crop(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop the middle, padding with black where the image is smaller."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + height, left : left + width]
    padded = np.zeros((max(height, pixels.shape[0]), max(width, pixels.shape[1]), 3), pixels.dtype)
    down = -(-(padded.shape[0] - pixels.shape[0]) // 2)
    right = -(-(padded.shape[1] - pixels.shape[1]) // 2)
    padded[down : down + pixels.shape[0], right : right + pixels.shape[1]] = pixels
    top, left = max(0, top + down), max(0, left + right)
    return padded[top : top + height, left : left + width]


def _side(size: Any) -> int | tuple[int, int]:
    """A size as configs of all ages write it."""
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"])
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple):
        return int(size[0]), int(size[1])
    return int(size)


def read_preprocessing(path: Path | None, image_size: int, crop: bool = True) -> Preprocessing:
    """Read a `preprocessor_config.json`.

    Args:
        path: the file; None where the checkpoint has none, for CLIP's own settings.
        image_size: side of the model's input in pixels.
        crop: whether images are cropped where the file does not say.

    Returns:
        The settings.

    Raises:
        ValueError: if the file is no JSON, a size cannot be read or is another than the model's,
            or the values are not scaled to [0, 1] before they are normalised.
    """
    if path is None:
        return Preprocessing(image_size, image_size, (image_size, image_size))
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
        resize = _side(config.get("size", image_size)) if config.get("do_resize", True) else None
        window = None
        if config.get("do_center_crop", crop):
            window = _side(config.get("crop_size", image_size))
            window = (window, window) if isinstance(window, int) else window
        factor = float(config.get("rescale_factor", 1 / 255))
        if not config.get("do_rescale", True) or abs(factor * 255 - 1) > 1e-3:
            raise ValueError("only images scaled by 1/255 are supported")
        final = window or resize
        if not isinstance(final, tuple):
            raise ValueError("gives images of different sizes")
        if final != (image_size, image_size):
            raise ValueError(
                f"gives images of {final[0]}×{final[1]}, the model takes {image_size}×{image_size}"
            )
        resample = int(Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)))
        mean, std = (0.0,) * 3, (1.0,) * 3
        if config.get("do_normalize", True):
            mean = tuple(map(float, config.get("image_mean", CLIP_MEAN)))
            std = tuple(map(float, config.get("image_std", CLIP_STD)))
        if not len(mean) == len(std) == 3 or min(std) <= 0:
            raise ValueError("mean and std need three numbers each, std above 0")
        return Preprocessing(image_size, resize, window, resample, mean, std)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read as preprocessing settings ({error!r})") from error
