"""Sequences of images and labels from other libraries as datasets."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxtta.data.arrays import check_labels
from jaxtta.data.class_names import given_class_names
from jaxtta.images import UnreadableImageError, open_image, printable, to_rgb
from jaxtta.io import digest_files, nfc

_BROKEN = (OSError, ValueError, RuntimeError)  # what libraries raise for damaged images or records


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
        number = range(len(self))[number]  # Grain's repeat without end
        name = self.name(number)
        try:
            image = self.items[number][self.image]
            if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:  # Hugging Face's
                image = image["bytes"] or image["path"]
            if image is None:
                raise ValueError("is missing")
            if isinstance(image, bytes | str | Path):
                image = io.BytesIO(image) if isinstance(image, bytes) else image
                return np.asarray(open_image(image, name, self.raw))
            pixels = np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image)
        except _BROKEN as error:
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
    class_names: Sequence[str] = (),
) -> SequenceDataset:
    """Use a dataset of Hugging Face `datasets`, torchvision or Grain, or a list, as it is.

    Args:
        ds: a sequence whose items are dicts or tuples, with a PIL image, uint8 array, or the path
            or content of an image file, and a label: an index in `class_names`, or a name.
        image: the key of an item's image; torchvision's items are tuples, their images are 0.
        label: the key of its label; torchvision's is 1.
        class_names: names of the classes, in label order, or a file; empty for those that `ds` has.
    """
    if isinstance(ds, Mapping) or not (hasattr(ds, "__len__") and hasattr(ds, "__getitem__")):
        parts = f" of {', '.join(map(str, ds))}: give one" if isinstance(ds, Mapping) else ""
        raise TypeError(
            f"expected a sequence of images and labels, not a {type(ds).__name__}{parts}"
        )
    if not len(ds):
        raise ValueError("the dataset has no images")
    labels = _labels(ds, image, label)
    features = getattr(ds, "features", None)
    feature = features.get(label) if isinstance(features, Mapping) else None
    own = getattr(feature, "names", None) or getattr(ds, "classes", None) or ()
    own = [name if isinstance(name, str) else name[0] for name in own]  # torchvision's synonyms
    names = given_class_names(class_names) or given_class_names(own)
    if own and len(names) != len(own):
        raise ValueError(f"{len(names)} class names for {len(own)} classes")
    if labels.dtype.kind in "OU":  # names
        odd = [n for n, name in enumerate(labels.tolist()) if not isinstance(name, str)]
        if odd:
            first = min(odd, key=lambda n: labels[n] is not None)
            what = f"the label of item {first} is {labels[first]!r}"
            raise ValueError(f"{what}, expected an index or a name for every item")
        given = [nfc(name) for name in labels.tolist()]
        names = names or tuple(sorted({*given}))
        if unknown := [name for name in given if name not in names]:
            raise ValueError(f"label {unknown[0]!r} is none of the {len(names)} class names")
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.asarray([numbers[name] for name in given])
    if not names:
        raise ValueError("the dataset has no names for its labels: set class_names, in label order")
    if len(labels) != len(ds):
        raise ValueError(f"the dataset has {len(labels)} labels for {len(ds)} images")
    check_labels("the dataset", labels, len(names))
    return SequenceDataset(ds, image, labels.astype(np.int32), names)


def _labels(ds: Any, image: str | int, label: str | int) -> np.ndarray:
    """Labels or names (items,); no image is decoded for them if the library has them apart."""
    columns, targets = getattr(ds, "column_names", None), getattr(ds, "targets", None)
    as_stored = (image, label) == (0, 1) and getattr(ds, "target_transform", None) is None
    if as_stored and targets is not None:  # torchvision
        return np.asarray(targets)
    first = columns or _item(ds, 0)
    keys = [*first] if columns or isinstance(first, Mapping) else range(len(first))
    for key in (image, label):
        if key not in keys:
            own = ", ".join(map(str, keys))
            raise ValueError(f"items have {own}, not {key!r}: set image and label")
    if columns:  # Hugging Face
        return np.asarray(list(ds[label]))
    return np.asarray([_item(ds, number)[label] for number in range(len(ds))])


def _item(ds: Any, number: int) -> Any:
    try:
        return ds[number]
    except _BROKEN as error:
        where = f"item {number}, whose label is needed, cannot be read"
        raise ValueError(f"{where} ({printable(error)})") from error
