"""Sequences of images and labels from other libraries as datasets."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxtta.images import UnreadableImageError, open_image, to_rgb
from jaxtta.io import nfc


@dataclasses.dataclass(frozen=True)
class SequenceDataset:
    """The images of another library's dataset; see `from_sequence`."""

    items: Any
    image: str | int
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        """One image in 8-bit RGB, or an UnreadableImageError."""
        name = f"image {number}"
        try:
            image = self.items[int(number)][self.image]
            if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:  # not decoded
                image = image["bytes"] or image["path"]
            if isinstance(image, bytes):
                return np.asarray(open_image(io.BytesIO(image), name))
            if isinstance(image, str | Path):
                return np.asarray(open_image(image))
            if isinstance(image, Image.Image):
                return np.asarray(to_rgb(image))
        except (OSError, ValueError) as error:  # Pillow's, for images that it cannot read
            raise UnreadableImageError(f"{name}: cannot be decoded ({error})") from error
        pixels = np.asarray(image)
        if pixels.dtype == np.uint8 and pixels.ndim in (2, 3) and pixels.shape[2:] in ((), (1,)):
            pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, -1)  # grey
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise TypeError(
                f"{name} is {pixels.dtype} of shape {pixels.shape}, expected a PIL image, the path "
                "of one, or uint8 of shape (height, width, 3), before any transform"
            )
        return pixels


def from_sequence(
    ds: Any,
    image: str | int = "image",
    label: str | int = "label",
    class_names: Sequence[str] | None = None,
) -> SequenceDataset:
    """Use a dataset of Hugging Face `datasets`, torchvision or Grain, or a list, as it is.

    Args:
        ds: a sequence whose items are dicts or tuples, with a PIL image, uint8 array, or the path
            or content of an image file, and a label: an index in `class_names`, or a name.
        image: the key of an item's image; torchvision's items are tuples, their images are 0.
        label: the key of its label; torchvision's is 1.
        class_names: names of the classes, in label order; None for those that `ds` has.

    Raises:
        ValueError: if the items lack the keys, the labels do not fit the class names, or there are
            no class names.
    """
    if not len(ds):
        raise ValueError("the dataset has no images")
    labels = _labels(ds, image, label)
    names = _own_class_names(ds, label) if class_names is None else tuple(class_names)
    if labels.dtype.kind in "OU":  # names
        names = names or tuple(np.unique(labels).tolist())
        unknown = sorted({*labels.tolist()} - {*names})
        if unknown:
            raise ValueError(f"label {unknown[0]!r} is none of the {len(names)} class names")
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.asarray([numbers[name] for name in labels.tolist()])
    if not names:
        raise ValueError("the dataset has no names for its labels: set class_names, in label order")
    low, high = labels.min(), labels.max()
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or low < 0 or high >= len(names):
        raise ValueError(
            f"labels are {labels.dtype}, from {low} to {high}, expected integers from 0 to "
            f"{len(names) - 1} for {len(names)} classes"
        )
    return SequenceDataset(ds, image, labels.astype(np.int32), tuple(map(nfc, names)))


def _labels(ds: Any, image: str | int, label: str | int) -> np.ndarray:
    """Every item's label; where the library has them apart, without decoding the images."""
    first = ds[0]
    try:
        _ = first[image], first[label]
    except (KeyError, IndexError, TypeError) as error:
        keys = [*first] if isinstance(first, Mapping) else [*range(len(first))]
        raise ValueError(
            f"items have no {error} but {', '.join(map(str, keys))}: say which are image and label"
        ) from error
    if label in (getattr(ds, "column_names", None) or ()):  # Hugging Face
        return np.asarray(list(ds[label]))
    targets = getattr(ds, "targets", None)  # torchvision
    if label == 1 and targets is not None and len(targets) == len(ds):
        return np.asarray(targets)
    return np.asarray([ds[number][label] for number in range(len(ds))])


def _own_class_names(ds: Any, label: str | int) -> tuple[str, ...]:
    features = getattr(ds, "features", None)  # Hugging Face
    if isinstance(features, Mapping) and label in features:
        return tuple(getattr(features[label], "names", None) or ())
    return tuple(getattr(ds, "classes", None) or ())  # torchvision
