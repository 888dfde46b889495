"""Images of tensorflow-datasets, read without TensorFlow.

Preparing a dataset (downloading it and writing its records) needs TensorFlow; reading the records
does not. The first line can run once in another environment that has TensorFlow:

    tfds.builder("cifar10", file_format="array_record").download_and_prepare()
    dataset = open_dataset("tfds", "cifar10")
"""

import dataclasses
import functools
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from jaxtta.data.class_names import imagenet_classes
from jaxtta.data.content import digest_files
from jaxtta.images import UnreadableImageError, open_image


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """One split of a prepared dataset; pickled by name, without open files.

    Attributes:
        dataset: the dataset's name.
        split: the split's name.
        data_dir: folder of prepared datasets; None for tensorflow-datasets' default.
        image_key: the name of the image feature.
        labels: (images,) int32, each image's index in `class_names`.
        class_names: names of the classes.
    """

    dataset: str
    split: str
    data_dir: str | None
    image_key: str
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        """Open one image as it is stored, or raise an UnreadableImageError."""
        # Open records do not survive a fork, so each process opens its own.
        records = _records(os.getpid(), self.dataset, self.split, self.data_dir, self.image_key)
        try:
            content = records[number][self.image_key]
        except RuntimeError as error:  # a damaged block of records
            raise UnreadableImageError(f"{self.name(number)}: cannot be read ({error})") from error
        return np.asarray(open_image(io.BytesIO(content), self.name(number), raw=True))

    def name(self, number: int) -> str:
        """The image's index in the split."""
        return f"{self.dataset} {self.split} image {number}"

    def content(self) -> str:
        """A digest of the dataset's files, with the split of them."""
        folder = _tfds().builder(self.dataset, data_dir=self.data_dir).data_path
        files = sorted(path for path in Path(folder).iterdir() if path.is_file())
        return f"{self.split} {digest_files(files)}"


def open_tfds(name: str, split: str = "test", data_dir: str | Path | None = None) -> TfdsImages:
    """Open one split of a dataset that tensorflow-datasets has prepared.

    Args:
        name: the dataset, as `tfds.builder` takes it ("cifar10", "imagenet_v2/topimages").
        split: as tensorflow-datasets writes it ("test", "test[:50%]").
        data_dir: folder of prepared datasets; None for the default.

    Returns:
        The images, with the dataset's classes; wnids are replaced by ImageNet's class names and
        underscores by spaces. The labels are read, no image is decoded.

    Raises:
        FileNotFoundError: if the dataset is not prepared as array_record files.
        ImportError: if tensorflow-datasets is not installed.
        ValueError: if there is no such dataset or split, or one without an image and a class label.
    """
    tfds = _tfds()
    data_dir = None if data_dir is None else str(data_dir)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except Exception as error:  # tensorflow-datasets may raise any exception on bad names
        where = f" in {data_dir}" if data_dir else ""
        raise ValueError(
            f"tensorflow-datasets has no dataset {name!r}{where} ({_first_line(error)})"
        ) from error
    image_key, label_key = _keys(tfds, builder)
    try:
        records = _open(name, split, data_dir, image_key)
        labels = np.asarray([records[i][label_key] for i in range(len(records))], np.int64)
    except Exception as error:
        raise _explained(builder, name, split, data_dir, error) from error
    names = tuple(builder.info.features[label_key].names)
    if not len(labels):
        raise ValueError(f"{name}: split {split!r} has no images")
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"{name}: labels of split {split!r} run from {labels.min()} to {labels.max()}, "
            f"expected 0 to {len(names) - 1} for {len(names)} classes"
        )
    wnids = imagenet_classes()
    names = tuple(wnids.get(class_name, class_name).replace("_", " ") for class_name in names)
    return TfdsImages(name, split, data_dir, image_key, labels.astype(np.int32), names)


def _tfds() -> ModuleType:
    try:
        import importlib_resources  # noqa: F401 (an undeclared dependency of tensorflow-datasets)
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            'the layout "tfds" needs tensorflow-datasets and importlib_resources, install '
            f"jaxtta[experiments] ({error})"
        ) from error
    return tensorflow_datasets


def _keys(tfds: ModuleType, builder: Any) -> tuple[str, str]:
    """The names of the image and label features."""
    features, keys = dict(builder.info.features.items()), builder.info.supervised_keys
    if not isinstance(keys, tuple) or len(keys) != 2 or not all(isinstance(k, str) for k in keys):
        keys = ("image", "label")
    image, label = map(features.get, keys)
    if type(image) is not tfds.features.Image or type(label) is not tfds.features.ClassLabel:
        raise ValueError(
            f"{builder.info.full_name}: expected an image and a class label, has "
            f"{', '.join(f'{key} ({type(value).__name__})' for key, value in features.items())}"
        )
    return keys


def _open(name: str, split: str, data_dir: str | None, image_key: str) -> Sequence[dict[str, Any]]:
    tfds = _tfds()
    # Decoded later by Pillow, as files are, so that OpenCV is not needed.
    decoders = {image_key: tfds.decode.SkipDecoding()}
    return tfds.data_source(name, split=split, data_dir=data_dir, download=False, decoders=decoders)


@functools.lru_cache(maxsize=4)
def _records(
    process: int, name: str, split: str, data_dir: str | None, image_key: str
) -> Sequence[dict[str, Any]]:
    del process
    return _open(name, split, data_dir, image_key)


def _explained(
    builder: Any, name: str, split: str, data_dir: str | None, error: Exception
) -> Exception:
    """The error for a dataset that could not be opened."""
    if not builder.is_prepared() or isinstance(error, NotImplementedError):
        state = f"has {builder.info.file_format.value}" if builder.is_prepared() else "has none"
        place = f", data_dir={data_dir!r}" if data_dir else ""
        return FileNotFoundError(
            f"{name}: expected array_record files in {builder.data_dir}, which {state}; preparing "
            f"them needs TensorFlow: tfds.builder({name!r}{place}, file_format='array_record')"
            ".download_and_prepare()"
        )
    if split.partition("[")[0] in builder.info.splits:
        return ValueError(f"{name}: split {split!r} cannot be read ({_first_line(error)})")
    return ValueError(
        f"{name}: unknown split {split!r}, expected one of {', '.join(builder.info.splits)}"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".: ")
