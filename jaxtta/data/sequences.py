"""Sequences of images and labels from other libraries as datasets."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxtta.data.arrays import check_labels
from jaxtta.data.class_names import IMAGENET_CLASSES, given_class_names
from jaxtta.data.datasets import Domain
from jaxtta.images import UnreadableImageError, printable, read_image, to_rgb
from jaxtta.io import digest_files, nfc, read_json


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
    files: tuple[str, ...] = ()  # names of the files that the images were, if they are known

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        number = range(len(self))[number]  # Grain's repeat without end
        name = self.name(number)
        try:
            image = self.items[number][self.image]
            if isinstance(image, Mapping):  # Hugging Face's, not decoded
                image = image.get("bytes") or image.get("path")
            if image is None:
                raise ValueError("is missing")
            if isinstance(image, bytes | str | Path):
                image = io.BytesIO(image) if isinstance(image, bytes) else image
                return read_image(image, name, self.raw)
            pixels = np.asarray(to_rgb(image) if isinstance(image, Image.Image) else image)
        except (OSError, ValueError, RuntimeError) as error:  # of libraries, for damaged images
            raise UnreadableImageError(f"{name}: cannot be read ({printable(error)})") from error
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((1,), (3,)):  # grey or RGB
            found = f"{name} is {pixels.dtype} of shape {pixels.shape}"
            raise TypeError(f"{found}, expected a PIL image, a file, or uint8 before any transform")
        return np.repeat(pixels, 3 // pixels.shape[2], -1)

    def name(self, number: int) -> str:
        """An image's name for messages."""
        return f"{self.what} {number}"

    def content(self) -> str | None:
        """A digest of the files that the images are stored in, if they are known."""
        return f"{self.what} {digest_files(self.stored_in)}" if self.stored_in else None


def from_sequence(
    ds: Any, image: str | int = "image", label: str | int = "label", class_names: Sequence[str] = ()
) -> SequenceDataset:
    """Use a dataset of Hugging Face `datasets`, torchvision or Grain, or a list, as it is.

    Args:
        ds: a sequence whose items are dicts or tuples, with a PIL image, uint8 array, or the path
            or content of an image file, and a label: an index in `class_names`, or a name.
        image: the key of an item's image; torchvision's items are tuples, their images are 0.
        label: the key of its label; torchvision's is 1.
        class_names: names of the classes, in label order, or a file; empty for those that `ds` has.

    Examples:
        >>> items = [{"image": np.zeros((8, 8, 3), np.uint8), "label": x} for x in ("cat", "dog")]
        >>> jaxtta.data.from_sequence(items).class_names
        ('cat', 'dog')
    """
    if isinstance(ds, Mapping) or not (hasattr(ds, "__len__") and hasattr(ds, "__getitem__")):
        raise TypeError(f"expected a sequence of images and labels, not a {type(ds).__name__}")
    columns, targets = getattr(ds, "column_names", None), getattr(ds, "targets", None)
    as_stored = (image, label) == (0, 1) and getattr(ds, "target_transform", None) is None
    if as_stored and targets is not None:  # torchvision; no image is decoded for labels
        labels = np.asarray(targets)
    else:
        first = columns or ds[0]
        keys = [*first] if columns or isinstance(first, Mapping) else [*range(len(first))]
        if not {image, label} <= {*keys}:
            raise ValueError(f"items have {keys}, not {image!r} and {label!r}: set image and label")
        found = ds[label] if columns else (ds[number][label] for number in range(len(ds)))
        labels = np.asarray([*found])
    features = getattr(ds, "features", None)
    feature = features.get(label) if isinstance(features, Mapping) else None
    own = getattr(feature, "names", None) or getattr(ds, "classes", None) or ()
    own = [name if isinstance(name, str) else name[0] for name in own]  # torchvision's synonyms
    names = given_class_names(class_names) or tuple(map(nfc, own))
    if labels.dtype.kind in "OU":
        if not all(isinstance(name, str) for name in labels.tolist()):
            raise ValueError("expected an index or a name as the label of every item")
        given = [nfc(name) for name in labels.tolist()]
        names = names or tuple(sorted({*given}))
        labels = np.asarray([names.index(name) if name in names else -1 for name in given])
    if not names or len(names) != len(own or names):
        raise ValueError(f"{len(names)} class names for {len(own)} classes: set class_names")
    if len(labels) != len(ds):
        raise ValueError(f"the dataset has {len(labels)} labels for {len(ds)} images")
    check_labels("the dataset", labels, len(names))
    return SequenceDataset(ds, image, labels.astype(np.int32), names)


def open_tfds(name: str, split: str = "test", data_dir: Path | None = None) -> SequenceDataset:
    """Open a split of a prepared dataset; wnids become ImageNet's class names."""
    import tensorflow_datasets as tfds

    try:
        if (Path(name) / "dataset_info.json").is_file():
            builder: Any = tfds.builder_from_directory(name)
            name = builder.info.full_name  # the same wherever the folder is
        else:
            builder = tfds.builder(name, data_dir=data_dir)
        image, label = builder.info.supervised_keys or ("image", "label")
        names = builder.info.features[label].names
        names = [IMAGENET_CLASSES.get(name, name).replace("_", " ") for name in names]
        # Images are decoded by Pillow, as files are, so that OpenCV is not needed.
        skip = {image: tfds.decode.SkipDecoding()}
        dataset = from_sequence(builder.as_data_source(split, decoders=skip), image, label, names)
    except Exception as error:  # tensorflow-datasets may raise any exception
        what, reason = f"{split!r} of {name!r} as images and labels", str(error).split("\n")[0]
        how = f"tfds.builder({name!r}, file_format='array_record').download_and_prepare()"
        raise ValueError(f"cannot read {what} ({reason}); to prepare it: {how}") from error
    files = tuple(sorted(path for path in Path(builder.data_path).glob("*") if path.is_file()))
    return dataclasses.replace(dataset, what=f"{name} {split} image", raw=True, stored_in=files)


def open_array_records(root: Path) -> dict[Domain, SequenceDataset]:
    """Open the domains that `tpu/data_to_array_record.py` wrote: `<corruption>/<severity>/…`."""
    import tensorflow_datasets as tfds

    listed, benchmark = read_json(root / "images.json"), {}
    skip = {"image": tfds.decode.SkipDecoding()}
    try:
        labels, names, files = (listed[key] for key in ("labels", "class_names", "files"))
        shared = {"image": "image", "labels": np.asarray(labels, np.int32), "raw": True}
        shared |= {"class_names": tuple(names), "files": tuple(files)}
        for info in sorted(root.glob("*/**/dataset_info.json")):  # has a digest of the shards
            corruption, *severity = info.parent.relative_to(root).parts
            domain = Domain(corruption, *map(int, severity))
            builder: Any = tfds.builder_from_directory(info.parent)
            items = builder.as_data_source("test", decoders=skip)
            whole = all(path.exists() for path in builder.info.splits["test"].filepaths)
            if not whole or len(items) != len(files):
                raise ValueError(f"{domain} lacks some of its {len(files)} images")
            own = {"what": f"{domain} image", "stored_in": (root / "images.json", info)}
            benchmark[domain] = SequenceDataset(items, **shared, **own)
        if not benchmark:
            raise ValueError("no <corruption>/<severity> is finished")
    except Exception as error:  # tensorflow-datasets may raise any exception
        said = f"{root}: is not what tpu/data_to_array_record.py writes ({printable(error)})"
        raise ValueError(said) from error
    return benchmark
