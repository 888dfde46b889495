"""The corruptions of CIFAR-10-C: those of ImageNet-C with other constants, at 32 pixels.

    corrupt(image, "fog", severity=5, seed=1)  # (32, 32, 3) uint8

Comments say where the published data are not made as the paper says. Their motion blur is
ImageMagick's, which rounds to whole grey levels; here it is cut off as all others are.

References:
    Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and
    perturbations, ICLR 2019: https://arxiv.org/abs/1903.12261
"""

import functools
import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.color import hsv2rgb, rgb2hsv

SIDE = 32
CONSTANTS: dict[str, Sequence[Any]] = {  # by severity, 1 to 5
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons of white
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values
    "speckle_noise": (0.06, 0.10, 0.12, 0.16, 0.20),  # standard deviation, times the value
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # sigma
    "glass_blur": ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),  # sigma, passes
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius, sigma
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, sigma
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # end of the zooms, from 1 in steps of 0.01
    # mean and deviation of the flakes, their zoom, threshold, radius and sigma of their motion,
    # share of the image that is not bleached
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # of image and frost
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # factor, added
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # factor of the side
    # amount and sigma of the warp, shift of three points, in sides
    "elastic_transform": (
        (0, 0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    ),
    # mean and deviation of the drops, their sigma, threshold, amount or sigma, whether they are mud
    "spatter": (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    ),
}
_WATER, _MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255
_EDGES = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])  # a drop is lit from one side


def corrupt(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Corrupt one image.

    Args:
        image: (32, 32, 3) uint8.
        name: a key of `CONSTANTS`, or "clean".
        severity: 1 to 5.
        seed: of its own random numbers; numpy's global state is not touched.

    Returns:
        (32, 32, 3) uint8.

    Raises:
        ValueError: for an unknown name or severity, or an image of another size.

    Examples:
        >>> from jaxtta.corruptions_cifar import corrupt
        >>> image = np.full((32, 32, 3), 128, np.uint8)
        >>> corrupt(image, "brightness", severity=5, seed=0)[0, 0].tolist()  # 0.3 brighter
        [204, 204, 204]
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"an image is {image.dtype} of {image.shape}, expected uint8 of 32×32×3")
    if name == "clean":
        return image
    if name not in CONSTANTS:
        raise ValueError(f"unknown corruption {name!r}, expected one of {', '.join(CONSTANTS)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity is {severity}, expected 1 to 5")
    made = _FUNCTIONS[name](image, CONSTANTS[name][severity - 1], np.random.default_rng(seed))
    return made if made.dtype == np.uint8 else np.clip(made, 0, 255).astype(np.uint8)


def corrupt_all(images: np.ndarray, seeds: Sequence[int], name: str, severity: int) -> np.ndarray:
    """Corrupt images (images, 32, 32, 3), each with its seed; as `corrupt`."""
    pairs = zip(images, seeds, strict=True)
    return np.stack([corrupt(image, name, severity, seed) for image, seed in pairs])


def difference(clean: np.ndarray, one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How nearly two corruptions of the same images agree, each (images, height, width, 3) uint8.

    Returns:
        The mean absolute difference in grey levels; the share of equal values; the PSNR, averaged
        over the images that differ (NaN if none does); the mean and the standard deviation of an
        image's difference from the clean one, averaged over the images, for both.
    """
    gap = one.astype(np.int16) - other
    errors = (gap.astype(float) ** 2).mean((1, 2, 3))
    errors = errors[errors > 0]
    found = {
        "mean_absolute_difference": np.abs(gap).mean(),
        "equal": (gap == 0).mean(),
        "psnr": (10 * np.log10(255**2 / errors)).mean() if len(errors) else np.nan,
    }
    for suffix, images in (("", one), ("_other", other)):
        change = images.astype(float) - clean
        found |= {f"mean{suffix}": change.mean(), f"std{suffix}": change.std((1, 2, 3)).mean()}
    return found


# Each takes an image (32, 32, 3) uint8, its constants and a generator, and returns uint8, or
# floats in [0, 255] that are cut off, not rounded.


def _gaussian_noise(image: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    return (image / 255 + rng.normal(0, scale, image.shape)) * 255


def _shot_noise(image: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(image / 255 * photons) / photons * 255


def _impulse_noise(image: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    hit, white = rng.random((2, *image.shape)) < np.reshape([share, 0.5], (2, 1, 1, 1))
    return np.where(hit, np.where(white, np.uint8(255), np.uint8(0)), image)


def _speckle_noise(image: np.ndarray, scale: float, rng: np.random.Generator) -> np.ndarray:
    return image / 255 * (1 + rng.normal(0, scale, image.shape)) * 255


def _gaussian_blur(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    del rng
    return _blurred(image / 255, sigma) * 255


def _glass_blur(image: np.ndarray, c: tuple[float, int], rng: np.random.Generator) -> np.ndarray:
    sigma, passes = c
    glass = (_blurred(image / 255, sigma) * 255).astype(np.uint8)
    inside = range(SIDE - 1, 1, -1)
    for moves in rng.integers(-1, 1, (passes, len(inside), len(inside), 2)):
        for row, own in zip(inside, moves, strict=True):
            for column, (down, right) in zip(inside, own.tolist(), strict=True):
                # The paper swaps the two, but its code only copies.
                glass[row, column] = glass[row + down, column + right]
    return _blurred(glass / 255, sigma) * 255


def _defocus_blur(
    image: np.ndarray, c: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    del rng
    radius, sigma = c
    places = np.arange(-8, 9) ** 2
    disk = (places[:, None] + places <= radius**2).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (3, 3), sigma)
    return cv2.filter2D(image / 255, -1, kernel) * 255


def _motion_blur(image: np.ndarray, c: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    return _moved(image, *c, rng.uniform(-45, 45))


def _zoom_blur(image: np.ndarray, end: float, rng: np.random.Generator) -> np.ndarray:
    del rng
    pixels = (image / 255).astype(np.float32)
    # Published so; its rounding decides whether the end is one of them, and some crops.
    zooms = np.arange(1, end, 0.01)
    total = sum((_zoomed(pixels, zoom) for zoom in zooms), np.zeros_like(pixels))
    return (pixels + total) / (len(zooms) + 1) * 255


def _snow(image: np.ndarray, c: tuple[float, ...], rng: np.random.Generator) -> np.ndarray:
    mean, scale, zoom, threshold, radius, sigma, kept = c
    flakes = _zoomed(rng.normal(mean, scale, (SIDE, SIDE, 1)), zoom)
    flakes = (np.clip(np.where(flakes < threshold, 0, flakes), 0, 1) * 255).astype(np.uint8)
    layer = np.round(_moved(flakes, radius, sigma, rng.uniform(-135, -45))) / 255
    pixels = (image / 255).astype(np.float32)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)[..., None]
    pixels = kept * pixels + (1 - kept) * np.maximum(pixels, grey * 1.5 + 0.5)
    return (pixels + layer + np.rot90(layer, 2)) * 255


def _frost(image: np.ndarray, c: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    photograph = _photographs()[rng.integers(5)]
    top, left = (rng.integers(side - SIDE) for side in photograph.shape[:2])
    return c[0] * image + c[1] * photograph[top : top + SIDE, left : left + SIDE]


def _fog(image: np.ndarray, c: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    amount, decay = c
    pixels, brightest = image / 255, image.max() / 255
    pixels = pixels + amount * _plasma(decay, rng)[..., None]
    return pixels * brightest / (brightest + amount) * 255


def _brightness(image: np.ndarray, added: float, rng: np.random.Generator) -> np.ndarray:
    del rng
    pixels = rgb2hsv(image / 255)
    pixels[..., 2] = np.clip(pixels[..., 2] + added, 0, 1)
    return hsv2rgb(pixels) * 255


def _contrast(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    del rng
    means = np.mean(image / 255, (0, 1), keepdims=True)
    return ((image / 255 - means) * factor + means) * 255


def _saturate(image: np.ndarray, c: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    del rng
    pixels = rgb2hsv(image / 255)
    pixels[..., 1] = np.clip(pixels[..., 1] * c[0] + c[1], 0, 1)
    return hsv2rgb(pixels) * 255


def _jpeg_compression(image: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    del rng
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _pixelate(image: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    del rng
    small = Image.fromarray(image).resize(2 * [int(SIDE * factor)], Image.Resampling.BOX)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BOX))


def _elastic_transform(
    image: np.ndarray, c: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    amount, sigma, shift = (SIDE * each for each in c)
    middle, third = SIDE // 2, SIDE // 3
    points = middle + third * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    moved = points + rng.uniform(-shift, shift, points.shape).astype(np.float32)
    pixels = cv2.warpAffine(
        (image / 255).astype(np.float32),
        cv2.getAffineTransform(points, moved),
        (SIDE, SIDE),
        borderMode=cv2.BORDER_REFLECT_101,
    )
    noise = rng.uniform(-1, 1, (2, SIDE, SIDE))
    rows, columns = np.indices((SIDE, SIDE)) + amount * np.stack(
        [ndimage.gaussian_filter(each, sigma, mode="reflect", truncate=3) for each in noise]
    )
    warped = [
        ndimage.map_coordinates(pixels[..., channel], (rows, columns), order=1, mode="reflect")
        for channel in range(3)
    ]
    return np.stack(warped, -1) * 255


def _spatter(image: np.ndarray, c: tuple[Any, ...], rng: np.random.Generator) -> np.ndarray:
    mean, scale, sigma, threshold, strength, mud = c
    pixels = (image / 255).astype(np.float32)
    drops = ndimage.gaussian_filter(rng.normal(mean, scale, (SIDE, SIDE)), sigma, mode="nearest")
    if mud:
        layer = (drops > threshold).astype(np.float32)
        layer = ndimage.gaussian_filter(layer, strength, mode="nearest")
        layer = np.where(layer < 0.8, 0, layer)[..., None]
        return (pixels * (1 - layer) + _MUD * layer) * 255
    drops = (np.where(drops < threshold, 0, drops) * 255).astype(np.uint8)
    far = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    far = cv2.equalizeHist(cv2.blur(np.minimum(far, 20), (3, 3)).astype(np.uint8))
    lit = drops * cv2.blur(cv2.filter2D(far, cv2.CV_8U, _EDGES), (3, 3)).astype(np.float32)
    if not lit.any():  # no drop fell on the image
        return image
    return (pixels + strength * _WATER * (lit / lit.max())[..., None]) * 255


_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    name: globals()[f"_{name}"] for name in CONSTANTS
}


def _blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (height, width, channels)."""
    return ndimage.gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest")


def _moved(pixels: np.ndarray, radius: float, sigma: float, angle: float) -> np.ndarray:
    """Blur along half a line, with the right half of a Gaussian; borders are continued."""
    steps = np.arange(2 * int(np.ceil(radius)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    turned = np.deg2rad(angle)
    down, right = (np.ceil(steps * f(turned) - 0.5).astype(int) for f in (np.sin, np.cos))
    places = np.arange(SIDE)
    moved = [
        pixels[np.clip(places + d, 0, SIDE - 1)][:, np.clip(places + r, 0, SIDE - 1)]
        for d, r in zip(down, right, strict=True)
    ]
    return np.tensordot(weights / weights.sum(), np.stack(moved).astype(float), 1)


def _zoomed(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The middle of (32, 32, channels), enlarged to the same size."""
    cut = int(np.ceil(SIDE / factor))
    start = (SIDE - cut) // 2
    inside = pixels[start : start + cut, start : start + cut]
    large = np.asarray(ndimage.zoom(inside, (factor, factor, 1), order=1))
    start = (len(large) - SIDE) // 2
    return large[start : start + SIDE, start : start + SIDE]


def _plasma(decay: float, rng: np.random.Generator) -> np.ndarray:
    """A fractal of diamonds and squares on a torus, (32, 32) in [0, 1]."""
    heights, step, spread = np.zeros((SIDE, SIDE)), SIDE, 1.0
    while step > 1:
        half = step // 2
        corners = heights[::step, ::step]
        below, beside = (corners + np.roll(corners, -1, axis) for axis in (0, 1))
        noise = spread * rng.uniform(-1, 1, (3, *corners.shape))
        middles = (below + np.roll(below, -1, 1)) / 4 + noise[0]
        heights[half::step, half::step] = middles
        heights[::step, half::step] = (beside + middles + np.roll(middles, 1, 0)) / 4 + noise[1]
        heights[half::step, ::step] = (below + middles + np.roll(middles, 1, 1)) / 4 + noise[2]
        step, spread = half, spread / decay**2
    heights -= heights.min()
    return heights / heights.max()


@functools.cache
def _photographs() -> list[np.ndarray]:
    """The photographs of frost that imagecorruptions has, at a fifth of their size.

    The published code draws one of the first five of six.
    """
    found = importlib.util.find_spec("imagecorruptions")
    if found is None or found.origin is None:
        raise ImportError("frost needs the photographs of imagecorruptions-imaug, install that")
    folder = Path(found.origin).parent / "frost"
    names = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
    opened = (np.asarray(Image.open(folder / name).convert("RGB")) for name in names)
    return [cv2.resize(each, (0, 0), fx=0.2, fy=0.2) for each in opened]
