"""Loaders for the folder and file layouts of common datasets.

Class names are the usual ones for CLIP, of the classes that are present. Images of benchmarks are
read as they are stored, as in published results, whatever their EXIF orientation or transparency;
own images (the layout "folder") are turned upright and laid over white.
"""

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.corruptions import CLEAN
from jaxtta.data import class_names as tables
from jaxtta.data.arrays import check_labels, open_arrays, open_npz, read_labels
from jaxtta.data.class_names import given_class_names
from jaxtta.data.datasets import Benchmark, Dataset, Domain, Preprocess, corrupted
from jaxtta.data.folders import ImageFolder, class_folders, image_folder, imagenet_c, list_folders
from jaxtta.data.tfds import open_tfds
from jaxtta.images import printable
from jaxtta.io import read_json, read_text

log = logging.getLogger(__name__)
_WNIDS = "one of ImageNet's 1,000 wnids (such as n01440764)"


def _named_folders(root: Path, layout: str) -> ImageFolder:
    """Class folders named by wnid, or in ImageNet-V2 by the wnid's index."""
    names, what = tables.imagenet_classes(), _WNIDS
    if layout == "imagenet-v2":
        names = {str(number): name for number, name in enumerate(names.values())}
        what = "a class number from 0 to 999"
    folders = class_folders(root)
    own = _names_of(root, [folder.name for folder in folders], names, what)
    return list_folders(root, folders, own, raw=True)


def _names_of(root: Path, folders: Sequence[str], names: Mapping[str, str], what: str) -> list[str]:
    for folder in folders:
        if folder not in names:
            raise ValueError(f"{root}: folder {folder} is not {what}")
    return [names[folder] for folder in folders]


def _objectnet(root: Path) -> ImageFolder:
    """ObjectNet's images of classes that are also in ImageNet, without their red border."""
    mapping = root / "mappings" / "folder_to_objectnet_label.json"
    labels = read_json(mapping)
    overlap = read_json(mapping.with_name("objectnet_to_imagenet_1k.json"))
    folders = class_folders(root / "images")
    for folder in folders:
        if folder.name not in labels:
            raise ValueError(f"{mapping}: has no label for folder {folder.name}")
    folders = [folder for folder in folders if labels[folder.name] in overlap]
    if not folders:
        raise ValueError(f"{root / 'images'}: has no folder of a class that is in ImageNet")
    names = [labels[folder.name] for folder in folders]
    listed = list_folders(root / "images", folders, names, raw=True)
    return dataclasses.replace(listed, border=2)  # they have a red border


def listed_split(path: Path, images: Path, split: str = "test") -> ImageFolder:
    """Images of a `split_zhou_….json`: `{"train": [[path in images, label, class name], …], …}`."""
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
    check_labels(path, np.asarray([*names]), len(names))
    paths, labels, _ = zip(*lists[split], strict=True)
    classes = tuple(names[label].replace("_", " ") for label in range(len(names)))
    return ImageFolder(images, paths, np.asarray(labels, np.int32), classes, raw=True)


def _fgvc_aircraft(variants: Path, images: Path, split: str) -> ImageFolder:
    """FGVC-Aircraft's images by variant, in the order of `variants.txt`."""
    listed = variants.with_name(f"images_variant_{split}.txt")
    names = [*filter(None, map(str.strip, read_text(variants).split("\n")))]
    lines = [*filter(str.strip, read_text(listed).split("\n"))]
    pairs = [(file, variant.strip()) for file, _, variant in (x.partition(" ") for x in lines)]
    for line, (_, variant) in zip(lines, pairs, strict=True):
        if variant not in names:
            raise ValueError(f"{listed}: line {line!r} has none of the {len(names)} variants")
    if not pairs:
        raise ValueError(f"{listed}: lists no images")
    labels = np.asarray([names.index(variant) for _, variant in pairs], np.int32)
    paths = tuple(f"{file}.jpg" for file, _ in pairs)
    return ImageFolder(images, paths, labels, tuple(names), raw=True)


_CLEAN = ("folder", "imagenet", "imagenet-v2", "objectnet")
_STORED = ("imagenet-c", "cifar-c", "arrays")
LAYOUTS = (*_CLEAN, *tables.CROSS_DATASETS, *_STORED, "tfds")
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
        class_names: class names to use instead of the layout's, or one file with them; needed
            where the class folders are called by numbers.
        split: the split of a cross-dataset set, or of a tfds name without one.
        data_dir: folder of prepared datasets for "tfds"; None for the default.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    place = Path(root)
    if layout in _STORED:
        benchmark = _open_stored(layout, place, class_names)
        if Domain(CLEAN) not in benchmark:
            raise ValueError(f"{root}: has no clean images, only {_few(benchmark)}")
        return benchmark[Domain(CLEAN)]
    if layout == "tfds":  # "cifar10", "cifar10:train" or, with a version, "cifar10:3.0.2:train"
        match = re.fullmatch(r"([^:]*(?::\d+\.\d+\.\d+)?)(?::(.*))?", str(root))
        if match is None:
            raise ValueError(f"{str(root)!r} is not a dataset's name")
        images = open_tfds(match[1], match[2] or split, data_dir)
    elif layout in tables.CROSS_DATASETS:
        own = tables.CROSS_DATASETS[layout]
        place = place / own["folder"] if (place / own["folder"]).is_dir() else place
        opened = _fgvc_aircraft if layout == "fgvc-aircraft" else listed_split
        images = opened(place / own["list"], place / own["images"], split)
    elif layout == "objectnet":
        images = _objectnet(place)
    elif layout != "folder":
        images = _named_folders(place, layout)
    else:
        images = open_npz(place) if place.suffix == ".npz" else image_folder(place)
    folders = images.class_names if layout == "folder" else ()
    names = _class_names(images.class_names, class_names, folders)
    return dataclasses.replace(images, class_names=names)


def open_benchmark(
    layout: str,
    root: str | Path,
    preprocess: Preprocess,
    class_names: Sequence[str] = (),
    data_dir: str | Path | None = None,
    split: str = "test",
) -> Benchmark:
    """Open a dataset under all its domains: those stored, or clean images corrupted on the fly.

    Arguments and errors are those of `open_dataset`, with the model's preprocessing.
    """
    if layout in _STORED:
        return _open_stored(layout, Path(root), class_names)
    return corrupted(open_dataset(layout, root, class_names, split, data_dir), preprocess)


def _open_stored(layout: str, root: Path, given: Sequence[str]) -> Benchmark:
    def names_of(folders: Sequence[str]) -> Sequence[str]:
        if given or not any(folder in tables.imagenet_classes() for folder in folders):
            return _class_names(folders, given, folders)
        return _names_of(root, folders, tables.imagenet_classes(), _WNIDS)

    if layout == "imagenet-c":
        return imagenet_c(root, names_of)
    names = given_class_names(given)
    if not names and layout == "arrays":
        raise ValueError(f"{root}: arrays have no class names, set them")
    few = not names and read_labels(root).max() < len(tables.CIFAR10_CLASSES)
    names = names or (tables.CIFAR10_CLASSES if few else tables.cifar100_classes())
    return open_arrays(root, names, layout == "cifar-c")


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
    numbers = [int(match[0]) for folder in folders if (match := re.search("[0-9]+", folder))]
    counted = numbers[:1] in ([0], [1]) and numbers == [*range(numbers[0], numbers[0] + len(names))]
    if sorted(folders) != [*folders] and not counted:
        pairs = [f"{folder} is {name!r}" for folder, name in zip(folders, names, strict=True)]
        log.warning("class folders are sorted by number, with gaps: %s", _few(pairs))
    return names


def require_meaning(names: Sequence[str], folders: Sequence[str] = ()) -> None:
    """Refuse class names that mean nothing to a model: wnids; numbers or no text on disk."""
    for name in names:  # "a photo of a n01440764." or of "a 3." means nothing to a model
        if re.fullmatch(r"n\d{8}", name):
            hint = "use layout imagenet if all are ImageNet's, or set the class names"
            raise ValueError(f"class folder {name} is a wnid: {hint}")
    for folder in folders:
        number = re.fullmatch(r"-?\d+([.,]\d+)?", folder)
        if number or folder != printable(folder):
            what = "is a number" if number else "has a name that is not text"
            raise ValueError(f"class folder {printable(folder)} {what}: set the class names")


def _few(items: Iterable[Any]) -> str:
    items = list(map(str, items))
    return ", ".join(items[:5]) + (", …" if len(items) > 5 else "") or "none"
