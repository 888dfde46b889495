"""The corruptions of ImageNet-C, applied on the fly and reproducibly."""

import hashlib

import numpy as np

IMAGENET_C = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur"),
    *("motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
)
IMAGENET_C_EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Held out for hyperparameter selection; never part of a result."""
CORRUPTIONS = (*IMAGENET_C, *IMAGENET_C_EXTRA)
CLEAN = "clean"
SEVERITIES = 5
SMALLEST = 32  # minimum side in pixels that the library accepts


def image_seed(seed: int, name: str, severity: int, number: int) -> int:
    """A seed for one image under one corruption, the same in every process.

    Examples:
        >>> from jaxtta.corruptions import image_seed
        >>> image_seed(1, "fog", 5, number=0) == image_seed(1, "fog", 5, number=1)
        False
    """
    words = f"{seed}/{name}/{severity}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest())


def corrupt(image: np.ndarray, name: str, severity: int, seed: int) -> np.ndarray:
    """Corrupt one image, (height, width, 3) uint8 with at least 32 pixels a side.

    Most of the library's corruptions use numpy's global random state. It is seeded here and
    restored afterwards, so call this from processes, not from threads.

    Raises:
        ValueError: for an unknown name or severity, or if the image is too small.

    Examples:
        >>> image = np.full((32, 32, 3), 128, np.uint8)
        >>> noisy = jaxtta.data.corrupt(image, "gaussian_noise", severity=5, seed=0)
        >>> noisy.shape, bool((noisy == jaxtta.data.corrupt(image, "gaussian_noise", 5, 0)).all())
        ((32, 32, 3), True)
    """
    if name == CLEAN:
        return image
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}, expected one of {', '.join(CORRUPTIONS)}")
    if severity not in range(1, SEVERITIES + 1):
        raise ValueError(f"severity is {severity}, expected 1 to {SEVERITIES}")
    if min(image.shape[:2]) < SMALLEST:
        raise ValueError(f"an image of {image.shape[:2]} is smaller than {SMALLEST} pixels")
    import imagecorruptions

    state = np.random.get_state()  # noqa: NPY002 (the library takes no generator)
    np.random.seed(seed)  # noqa: NPY002
    # two ignore numpy's global state
    own = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
    try:
        with np.errstate(invalid="raise"):
            return imagecorruptions.corrupt(image, severity, name, **own)
    except FloatingPointError:
        if name != "spatter":
            raise
        return image  # division by zero when no droplet was sampled
    finally:
        np.random.set_state(state)  # noqa: NPY002
