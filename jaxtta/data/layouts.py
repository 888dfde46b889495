"""Loaders for the folder and file layouts of common datasets.

Class names are the usual ones for CLIP, of the classes that are present. Images of benchmarks are
read as they are stored, as in published results, whatever their EXIF orientation or transparency;
own images (the layout "folder") are turned upright and laid over white.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.data.arrays import open_arrays, open_npz, read_labels
from jaxtta.data.class_names import (
    CIFAR10_CLASSES,
    cifar100_classes,
    given_class_names,
    imagenet_classes,
)
from jaxtta.data.corruptions import CLEAN
from jaxtta.data.datasets import Benchmark, Dataset, Domain, Preprocess, corrupted
from jaxtta.data.folders import (
    ImageFolder,
    class_folders,
    image_folder,
    imagenet_c,
    list_folders,
)
from jaxtta.data.tfds import open_tfds
from jaxtta.images import printable
from jaxtta.io import read_json, read_text

log = logging.getLogger(__name__)

# Layout: the dataset's folder, its list of images, the folder that paths in it are relative to.
_SPLITS = {
    "caltech101": ("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories"),
    "oxford-pets": ("oxford_pets", "split_zhou_OxfordPets.json", "images"),
    "stanford-cars": ("stanford_cars", "split_zhou_StanfordCars.json", ""),
    "oxford-flowers": ("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg"),
    "food101": ("food-101", "split_zhou_Food101.json", "images"),
    "sun397": ("sun397", "split_zhou_SUN397.json", "SUN397"),
    "dtd": ("dtd", "split_zhou_DescribableTextures.json", "images"),
    "eurosat": ("eurosat", "split_zhou_EuroSAT.json", "2750"),
    "ucf101": ("ucf101", "split_zhou_UCF101.json", "UCF-101-midframes"),
}
_OBJECTNET_BORDER = 2  # ObjectNet images have a 2-px red border


def _imagenet(root: Path) -> ImageFolder:
    """`root/<wnid>/…`: ImageNet's train or val folder, ImageNet-A, -R or -Sketch."""
    folders = class_folders(root)
    names = _names_of_wnids(root, [folder.name for folder in folders])
    return list_folders(root, folders, names, raw=True)


def _names_of_wnids(root: str | Path, wnids: Sequence[str]) -> list[str]:
    names = imagenet_classes()
    unknown = [wnid for wnid in wnids if wnid not in names]
    if unknown:
        raise ValueError(
            f"{root}: folder {unknown[0]} is not one of ImageNet's 1,000 wnids (such as n01440764)"
        )
    return [names[wnid] for wnid in wnids]


def _imagenet_v2(root: Path) -> ImageFolder:
    """`root/<0 to 999>/…`, folders named by the index of ImageNet's wnid."""
    folders, names = class_folders(root), tuple(imagenet_classes().values())
    for folder in folders:
        if not re.fullmatch("0|[1-9][0-9]{0,2}", folder.name):
            raise ValueError(f"{root}: folder {folder.name} is not a class number from 0 to 999")
    return list_folders(root, folders, [names[int(folder.name)] for folder in folders], raw=True)


def _objectnet(root: Path) -> ImageFolder:
    """ObjectNet's images of classes that are also in ImageNet, without their red border."""
    images, mappings = root / "images", root / "mappings"
    labels = read_json(mappings / "folder_to_objectnet_label.json")
    overlap = read_json(mappings / "objectnet_to_imagenet_1k.json")
    folders = class_folders(images)
    unknown = [folder.name for folder in folders if folder.name not in labels]
    if unknown:
        raise ValueError(
            f"{mappings / 'folder_to_objectnet_label.json'}: has no label for folder {unknown[0]}"
        )
    folders = [folder for folder in folders if labels[folder.name] in overlap]
    if not folders:
        raise ValueError(f"{images}: has no folder of a class that is in ImageNet")
    names = [labels[folder.name] for folder in folders]
    listed = list_folders(images, folders, names, raw=True)
    return dataclasses.replace(listed, border=_OBJECTNET_BORDER)


def listed_split(path: str | Path, images: str | Path, split: str = "test") -> ImageFolder:
    """List the images of a `split_zhou_….json`, the format of prompt-learning benchmarks.

    Args:
        path: the file: `{"train": [[path, label, class name], …], "val": …, "test": …}`.
        images: the folder that its paths are relative to.
        split: the list to use; the classes are those of all lists.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the format is different, or its labels are not consecutive from 0.
    """
    lists = read_json(path)
    if not all(isinstance(entries, list) for entries in lists.values()):
        raise ValueError(f"{path}: expected a list of images under each of {_few(lists)}")
    if not lists.get(split):
        raise ValueError(f"{path}: has no images for {split!r}, expected one of {_few(lists)}")
    names: dict[int, str] = {}
    for entry in (entry for entries in lists.values() for entry in entries):
        match entry:
            case [str(), int(label), str(name)]:
                if names.setdefault(label, name) != name:
                    raise ValueError(f"{path}: label {label} is both {names[label]!r} and {name!r}")
            case _:
                raise ValueError(f"{path}: has {entry!r}, expected [path, label, class name]")
    if sorted(names) != list(range(len(names))):
        raise ValueError(
            f"{path}: labels run from {min(names)} to {max(names)}, expected 0 to "
            f"{len(names) - 1} for {len(names)} classes"
        )
    paths, labels, _ = zip(*lists[split], strict=True)
    classes = tuple(names[label].replace("_", " ") for label in range(len(names)))
    return ImageFolder(Path(images), paths, np.asarray(labels, np.int32), classes, raw=True)


def _fgvc_aircraft(root: Path, split: str) -> ImageFolder:
    """FGVC-Aircraft's images by variant, in the order of `variants.txt`."""
    listed = root / f"images_variant_{split}.txt"
    names = filter(None, map(str.strip, read_text(root / "variants.txt").split("\n")))
    numbers = {variant: number for number, variant in enumerate(names)}
    paths, labels = [], []
    for line in filter(str.strip, read_text(listed).split("\n")):
        file, _, variant = line.partition(" ")
        if variant.strip() not in numbers:
            raise ValueError(f"{listed}: line {line!r} has none of the {len(numbers)} variants")
        paths.append(f"{file}.jpg")
        labels.append(numbers[variant.strip()])
    if not paths:
        raise ValueError(f"{listed}: lists no images")
    labels = np.asarray(labels, np.int32)
    return ImageFolder(root / "images", tuple(paths), labels, tuple(numbers), raw=True)


def _cross_dataset(layout: str, root: Path, split: str) -> ImageFolder:
    """A cross-dataset set, given its own folder or the parent folder."""
    folder, name, images = _SPLITS.get(layout, ("fgvc_aircraft", "", ""))
    root = root / folder if (root / folder).is_dir() else root
    if layout == "fgvc-aircraft":
        return _fgvc_aircraft(root, split)
    return listed_split(root / name, root / images, split)


def _folder(root: Path) -> Dataset:
    return open_npz(root) if root.suffix == ".npz" else image_folder(root)


_CLEAN: Mapping[str, Callable[[Path], Dataset]] = {
    "folder": _folder,
    "imagenet": _imagenet,
    "imagenet-v2": _imagenet_v2,
    "objectnet": _objectnet,
}
_CROSS_DATASET = (*_SPLITS, "fgvc-aircraft")
_STORED = ("imagenet-c", "cifar-c", "arrays")
LAYOUTS = (*_CLEAN, *_CROSS_DATASET, *_STORED, "tfds")
"""The layouts that `open_dataset` and `open_benchmark` can open."""


def open_dataset(
    layout: str,
    root: str | Path,
    class_names: Sequence[str] = (),
    split: str = "test",
    data_dir: str | Path | None = None,
) -> Dataset:
    """Open clean images by the name of their layout.

    Args:
        layout: one of `LAYOUTS`: "folder" for `<class>/…` or an `.npz` file; "imagenet" for wnid
            folders (ImageNet, -A, -R, -Sketch), "imagenet-v2", "objectnet"; "imagenet-c" for
            `<corruption>/<severity>/<class>/…`; "cifar-c" for `.npy` files with five severities
            each, "arrays" for `.npy` files with one; the cross-dataset sets by name, in the folders
            that prompt-learning benchmarks use; "tfds" for tensorflow-datasets.
        root: the folder; for a cross-dataset set its own or the parent folder; for "tfds" a name,
            with a split after a colon if it is not the test split ("cifar10:train").
        class_names: class names to use instead of the layout's, or one file with them.
        split: the split of a cross-dataset set, or of a tfds name without one; the folders of the
            other layouts are one split each.
        data_dir: folder of prepared datasets for "tfds"; None for the default.

    Raises:
        FileNotFoundError: if a folder or file of the layout is missing.
        ImportError: for "tfds" if tensorflow-datasets is not installed.
        ValueError: for an unknown layout, data in a different format, class folders whose names
            mean nothing to a model (wnids, numbers) if no class names are given, or a number of
            class names that is not the number of classes.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout in _STORED:
        benchmark = _open_stored(layout, Path(root), class_names)
        if Domain(CLEAN) not in benchmark:
            raise ValueError(f"{root}: has no clean images, only {_few(benchmark)}")
        return benchmark[Domain(CLEAN)]
    if layout == "tfds":
        name, own = _name_and_split(str(root))
        images = open_tfds(name, own or split, data_dir)
    elif layout in _CROSS_DATASET:
        images = _cross_dataset(layout, Path(root), split)
    else:
        images = _CLEAN[layout](Path(root))
    folders = images.class_names if layout == "folder" else ()
    names = _class_names(images.class_names, class_names, folders)
    return dataclasses.replace(images, class_names=names)  # pyright: ignore[reportArgumentType]


def open_benchmark(
    layout: str,
    root: str | Path,
    preprocess: Preprocess,
    class_names: Sequence[str] = (),
    data_dir: str | Path | None = None,
    split: str = "test",
) -> Benchmark:
    """Open a dataset under all its domains, by the name of its layout.

    The domains are those that are stored; layouts with clean images only are corrupted on the fly.
    Arguments and errors are those of `open_dataset`, with the model's preprocessing.
    """
    if layout in _STORED:
        return _open_stored(layout, Path(root), class_names)
    return corrupted(open_dataset(layout, root, class_names, split, data_dir), preprocess)


def _open_stored(layout: str, root: Path, given: Sequence[str]) -> Benchmark:
    if layout == "imagenet-c":

        def names_of(folders: Sequence[str]) -> Sequence[str]:
            if given or not any(folder in imagenet_classes() for folder in folders):
                return _class_names(folders, given, folders)
            return _names_of_wnids(root, folders)

        return imagenet_c(root, names_of)
    names = given_class_names(given)
    if not names and layout == "arrays":
        raise ValueError(f"{root}: arrays have no class names, set them")
    if not names:
        few = read_labels(root).max() < len(CIFAR10_CLASSES)
        names = CIFAR10_CLASSES if few else cifar100_classes()
    return open_arrays(root, names, layout == "cifar-c")


def _name_and_split(text: str) -> tuple[str, str]:
    """Name and split from "cifar10", "cifar10:train" or, with a version, "cifar10:3.0.2:train"."""
    match = re.fullmatch(r"([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a dataset's name")
    return match[1], match[2] or ""


def _class_names(
    own: Sequence[str], given: Sequence[str], folders: Sequence[str] = ()
) -> tuple[str, ...]:
    """The given class names, or the layout's own if they can be; `folders` are as on disk."""
    names = given_class_names(given, folders)
    if not names:
        require_meaning(own, folders)
        return tuple(own)
    if len(names) != len(own):
        raise ValueError(f"{len(names)} class names for {len(own)} classes ({_few(own)})")
    if sorted(folders) != [*folders] and not _consecutive(folders):
        pairs = [f"{folder} is {name!r}" for folder, name in zip(folders, names, strict=True)]
        log.warning("class folders are sorted by number, with gaps: %s", _few(pairs))
    return names


def require_meaning(names: Sequence[str], folders: Sequence[str] = ()) -> None:
    """Check that class names that were not given mean something to a model.

    Args:
        names: of the classes.
        folders: their folders on disk; empty if the names are from elsewhere.

    Raises:
        ValueError: for wnids; for folders that are numbers or no text.
    """
    for name in names:  # "a photo of a n01440764." or of "a 3." means nothing to a model
        if re.fullmatch(r"n\d{8}", name):
            raise ValueError(
                f"class folder {name} is a wnid: use layout imagenet if all are "
                "ImageNet's, or set the class names"
            )
    for folder in folders:
        if re.fullmatch(r"-?\d+([.,]\d+)?", folder):
            raise ValueError(f"class folder {folder} is a number: set the class names")
        if folder != printable(folder):
            raise ValueError(
                f"class folder {printable(folder)} has a name that is not text: set the class names"
            )


def _consecutive(folders: Sequence[str]) -> bool:
    """Whether the first numbers in the names are consecutive from 0 or 1."""
    found = [re.search("[0-9]+", folder) for folder in folders]
    numbers = [int(match[0]) if match else -1 for match in found]
    return numbers[0] in (0, 1) and numbers == [*range(numbers[0], numbers[0] + len(numbers))]


def _few(items: Iterable[Any]) -> str:
    items = list(map(str, items))
    return ", ".join(items[:5]) + (", …" if len(items) > 5 else "") or "none"
