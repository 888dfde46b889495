"""Images of tensorflow-datasets, read without TensorFlow.

Preparing a dataset (downloading it and writing its records) needs TensorFlow; reading the records
does not. The first line can run once in another environment that has TensorFlow:

    tfds.builder("cifar10", file_format="array_record").download_and_prepare()
    dataset = open_dataset("tfds", "cifar10")
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxtta.data.class_names import imagenet_classes
from jaxtta.data.sequences import SequenceDataset, from_sequence


def open_tfds(
    name: str, split: str = "test", data_dir: str | Path | None = None
) -> SequenceDataset:
    """Open one split of a dataset that tensorflow-datasets has prepared.

    Wnids among its classes become ImageNet's class names, underscores spaces.

    Args:
        name: the dataset, as `tfds.builder` takes it ("cifar10", "imagenet_v2/topimages").
        split: as tensorflow-datasets writes it ("test", "test[:50%]").
        data_dir: folder of prepared datasets; None for the default.
    """
    try:
        import importlib_resources  # noqa: F401 (an undeclared dependency of tensorflow-datasets)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            'the layout "tfds" needs tensorflow-datasets and importlib_resources, install '
            f"jaxtta[experiments] ({error})"
        ) from error
    place: dict[str, Any] = {} if data_dir is None else {"data_dir": str(data_dir)}
    try:
        builder: Any = tfds.builder(name, **place)
    except Exception as error:  # tensorflow-datasets may raise any exception on bad names
        where = f" in {data_dir}" if data_dir else ""
        raise ValueError(
            f"tensorflow-datasets has no dataset {name!r}{where} ({_first_line(error)})"
        ) from error
    image, label = _keys(tfds, builder)
    wnids, names = imagenet_classes(), builder.info.features[label].names
    names = [wnids.get(class_name, class_name).replace("_", " ") for class_name in names]
    # Images are decoded by Pillow, as files are, so that OpenCV is not needed.
    options = {"download": False, "decoders": {image: tfds.decode.SkipDecoding()}}
    try:
        records = tfds.data_source(name, split=split, **place, **options)
        dataset = from_sequence(records, image, label, names)
    except Exception as error:  # tensorflow-datasets may raise any exception here too
        if not builder.is_prepared() or isinstance(error, NotImplementedError):
            state = builder.info.file_format.value if builder.is_prepared() else "none"
            arguments = "".join(f"{key}={value!r}, " for key, value in place.items())
            raise FileNotFoundError(
                f"{name}: expected array_record files in {builder.data_dir}, which has {state}; "
                f"preparing them needs TensorFlow: tfds.builder({name!r}, {arguments}"
                "file_format='array_record').download_and_prepare()"
            ) from error
        raise ValueError(
            f"{name}: split {split!r} cannot be read ({_first_line(error)}); it has the splits "
            f"{', '.join(builder.info.splits)}"
        ) from error
    files = tuple(sorted(path for path in Path(builder.data_path).glob("*") if path.is_file()))
    what = f"{name} {split} image"
    return dataclasses.replace(dataset, what=what, raw=True, stored_in=files)


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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".: ")
