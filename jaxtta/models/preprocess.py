"""From images to the model's input: resize, crop, RGB, as the checkpoint's settings say."""

from typing import Any, Literal, NamedTuple, cast

import numpy as np
from PIL import Image

from jaxtta.images import to_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
DEFAULTS = "CLIP's defaults"
"""Where a checkpoint without any file of preprocessing has its settings from."""
HALF_MEAN = (0.5, 0.5, 0.5)  # SigLIP's and supervised ViTs' mean and std, unless they say otherwise


class Preprocessing(NamedTuple):
    """A checkpoint's image preprocessing.

    Attributes:
        image_size: side of the model's input in pixels.
        resize: (height, width) to resize to, an integer for one side (see `resize_longer`), None
            not to resize.
        crop: (height, width) of the centre crop; None for none.
        resample: PIL's number for the resampling filter (3 is bicubic).
        mean: of the normalisation, per channel, for values in [0, 1].
        std: likewise.
        rounding: whose centre it is where the margins are odd; torchvision's is OpenCLIP's.
        resize_longer: whether an integer `resize` is for the longer side, not the shorter.
        fill: grey level around an image that is smaller than the crop.

    Examples:
        >>> print(jaxtta.models.Preprocessing(224, resize=224, crop=(224, 224)))  # CLIP's
        224, shorter side resized to 224, bicubic, centre crop 224 (transformers), mean ...
    """

    image_size: int
    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: int = int(Image.Resampling.BICUBIC)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    rounding: Literal["transformers", "torchvision"] = "transformers"
    resize_longer: bool = False
    fill: int = 0

    def __str__(self) -> str:
        """The settings in one line."""
        parts = [f"{self.image_size}"]
        if isinstance(self.resize, tuple):
            parts.append(f"resized to {_product(self.resize)}")
        elif self.resize is not None:
            side = "longer" if self.resize_longer else "shorter"
            parts.append(f"{side} side resized to {self.resize}")
        if self.resize is not None:
            parts.append(Image.Resampling(self.resample).name.lower())
        if self.crop is not None:
            parts.append(f"centre crop {_product(self.crop)} ({self.rounding})")
        numbers = ("mean", self.mean), ("std", self.std)
        parts += [f"{name} ({', '.join(f'{x:.4g}' for x in values)})" for name, values in numbers]
        return ", ".join(parts)

    @staticmethod
    def rgb(image: Image.Image) -> Image.Image:
        """Convert an image of any mode to 8-bit RGB, as `jaxtta.images.to_rgb` does."""
        return to_rgb(image)

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
            image = image.resize(self._resized(image.size), resample=self.resample)
        if self.crop is not None:
            image = self._centre_crop(image, *self.crop)
        if image.size != (self.image_size, self.image_size):
            raise ValueError(
                f"the checkpoint's preprocessing gives an image of {image.height}×{image.width}, "
                f"its model takes {self.image_size}×{self.image_size}"
            )
        return np.asarray(image)

    def leaves(self, height: int, width: int) -> bool:
        """Whether an RGB image of this size comes out as it is."""
        side = (self.image_size, self.image_size)
        resized = self.resize is None or self._resized((width, height)) == side
        return (width, height) == side and resized and self.crop in (None, side)

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """PIL's (width, height) after the resize."""
        width, height = size
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        side = cast(int, self.resize)
        if self.resize_longer:  # rounded as OpenCLIP does, which alone has this
            ratio = max(size) / side
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        if width <= height:  # both libraries round the longer side down
            return side, int(side * height / width)
        return int(side * width / height), side

    def _centre_crop(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """Cut the middle out, with `fill` around an image that is smaller."""
        top, left = self._start(image.height, height), self._start(image.width, width)
        canvas = Image.new("RGB", (width, height), (self.fill,) * 3)
        canvas.paste(image, (-left, -top))
        return canvas

    def _start(self, length: int, window: int) -> int:
        """Where the crop begins on an axis; below 0 where the image is smaller."""
        if self.rounding == "transformers":
            return (length - window) // 2
        margin = length - window
        return round(margin / 2) if margin >= 0 else -(-margin // 2)


def describe_preprocessing(model: Any) -> str:
    """What images go through before a model sees them, and where that was read, in one line.

    Args:
        model: one that `jaxtta.load` gave, or a configuration.

    Returns:
        As `preprocessing: 224, shorter side resized to 224, bicubic, …, from FILE`.

    Examples:
        With `model` of `jaxtta.load`'s example:

        >>> jaxtta.models.describe_preprocessing(model)
        'preprocessing: 32, shorter side resized to 32, ..., from ...preprocessor_config.json'
    """
    return f"preprocessing: {model.preprocessing}, from {model.preprocessing_origin}"


def _product(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}×{size[1]}"
