"""Sequences of images and labels from other libraries as datasets."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxtta.data.arrays import check_labels
from jaxtta.images import UnreadableImageError, open_image, printable, to_rgb
from jaxtta.io import digest_files, nfc


@dataclasses.dataclass(frozen=True)
class SequenceDataset:
    """The images of another library's dataset; see `from_sequence`."""

    items: Any
    image: str | int
    labels: np.ndarray
    class_names: tuple[str, ...]
    what: str = "image"
    raw: bool = False  # as `jaxtta.data.ImageFolder.raw`
    stored_in: tuple[Path, ...] = ()  # files, if they are known

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        name = self.name(number)
        try:
            image = self.items[int(number)][self.image]
            if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:  # Hugging Face's
                image = image["bytes"] or image["path"]
            if isinstance(image, bytes | str | Path):
                image = io.BytesIO(image) if isinstance(image, bytes) else image
                return np.asarray(open_image(image, name, self.raw))
            pixels = np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image)
        except (OSError, ValueError, RuntimeError) as error:  # of damaged images or records
            raise UnreadableImageError(f"{name}: cannot be read ({printable(error)})") from error
        if pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2:] == (1,)):
            return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, -1)  # grey
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise TypeError(
                f"{name} is {pixels.dtype} of shape {pixels.shape}, expected a PIL image, a file, "
                "or uint8 of shape (height, width, 3), before any transform"
            )
        return pixels

    def name(self, number: int) -> str:
        """An image's name for messages."""
        return f"{self.what} {number}"

    def content(self) -> str | None:
        """A digest of the files that the images are stored in, if they are known."""
        return f"{self.what} {digest_files(self.stored_in)}" if self.stored_in else None


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
    """
    if not len(ds):
        raise ValueError("the dataset has no images")
    try:
        _ = ds[0][image], ds[0][label]
    except (KeyError, IndexError, TypeError) as error:
        keys = ", ".join(map(str, ds[0] if isinstance(ds[0], Mapping) else range(len(ds[0]))))
        raise ValueError(f"items have no {error} but {keys}: set image and label") from error
    # Where the library has the labels apart, no image is decoded for them.
    columns, targets = getattr(ds, "column_names", None) or (), getattr(ds, "targets", None)
    if label in columns:  # Hugging Face
        labels = np.asarray(list(ds[label]))
    elif label == 1 and targets is not None and len(targets) == len(ds):  # torchvision
        labels = np.asarray(targets)
    else:
        labels = np.asarray([ds[number][label] for number in range(len(ds))])
    own = getattr(getattr(ds, "features", {}).get(label), "names", None)
    names = tuple(class_names or own or getattr(ds, "classes", None) or ())
    if labels.dtype.kind in "OU":  # names
        names = names or tuple(np.unique(labels).tolist())
        numbers = {name: number for number, name in enumerate(names)}
        if unknown := [name for name in labels.tolist() if name not in numbers]:
            raise ValueError(f"label {unknown[0]!r} is none of the {len(names)} class names")
        labels = np.asarray([numbers[name] for name in labels.tolist()])
    if not names:
        raise ValueError("the dataset has no names for its labels: set class_names, in label order")
    check_labels("the dataset", labels, len(names))
    return SequenceDataset(ds, image, labels.astype(np.int32), tuple(map(nfc, names)))
