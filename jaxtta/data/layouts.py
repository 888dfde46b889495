"""Loaders for the folder and file layouts of common datasets.

Benchmarks are read as they are stored, whatever their EXIF orientation or transparency; own images
(the layout "folder") are turned upright and laid over white.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxtta.corruptions import CLEAN
from jaxtta.data import class_names as tables
from jaxtta.data.arrays import open_arrays, open_npz, read_labels
from jaxtta.data.class_names import CROSS_DATASETS, IMAGENET_CLASSES, given_class_names
from jaxtta.data.datasets import Benchmark, Dataset, Domain, Preprocess, class_names_of, corrupted
from jaxtta.data.folders import ImageFolder, class_folders, image_folder, imagenet_c, list_folders
from jaxtta.data.sequences import open_array_records, open_tfds
from jaxtta.images import printable
from jaxtta.io import read_json, read_text

_STORED = ("imagenet-c", "cifar-c", "arrays", "arrayrecord")
_FOLDERS = ("folder", "imagenet", "imagenet-v2", "objectnet")
LAYOUTS = (*_FOLDERS, *CROSS_DATASETS, *_STORED, "tfds")
"""The layouts that `open_dataset` and `open_benchmark` can open."""


def open_dataset(
    layout: str, root: str | Path, class_names: Sequence[str] = (), split: str = "test"
) -> Dataset:
    """Open clean images by the name of their layout.

    Args:
        layout: one of `LAYOUTS`: "folder" for `<class>/…` or an `.npz` file; "imagenet" for wnid
            folders; "imagenet-c" for `<corruption>/<severity>/<class>/…`; "cifar-c" for `.npy`
            files with five severities each, "arrays" with one; "arrayrecord" for what
            `tpu/data_to_array_record.py` wrote; the cross-dataset sets in the folders that
            prompt-learning benchmarks use; "tfds" for tensorflow-datasets.
        root: the folder; for a cross-dataset set its own or the parent folder; for "tfds" a name or
            a prepared folder, with a split after a colon if it is not the test split
            ("cifar10:train").
        class_names: to use instead of the layout's, or a file with them; needed where class folders
            are called by numbers.
        split: the split of a cross-dataset set, or of a tfds name without one.
    """
    place = Path(root)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout in _STORED:
        benchmark = _open_stored(layout, place, class_names)
        if Domain(CLEAN) not in benchmark:
            raise ValueError(f"{root}: has no clean images, only {', '.join(map(str, benchmark))}")
        return benchmark[Domain(CLEAN)]
    if layout == "folder":
        images = open_npz(place) if place.suffix == ".npz" else image_folder(place)
    elif layout == "tfds":  # "cifar10", "cifar10:train" or, with a version, "cifar10:3.0.2:train"
        name, *own = re.split(r":(?!\d+\.\d+\.\d+(?::|$))", str(root), maxsplit=1)
        images = open_tfds(name, own[0] if own else split)
    elif layout in CROSS_DATASETS:
        own = CROSS_DATASETS[layout]
        place = place / own["folder"] if (place / own["folder"]).is_dir() else place
        opened = _fgvc_aircraft if layout == "fgvc-aircraft" else listed_split
        images = opened(place / own["list"], place / own["images"], split)
    elif layout == "objectnet":
        images = _objectnet(place)
    else:
        known = IMAGENET_CLASSES
        if layout == "imagenet-v2":  # folders are numbers
            known = {str(number): name for number, name in enumerate(known.values())}
        own = class_folders(place)
        images = list_folders(place, own, _named(place, [one.name for one in own], known), raw=True)
    names = own_or_given(images.class_names, class_names, layout == "folder")
    return dataclasses.replace(images, class_names=names)


def open_benchmark(
    layout: str, root: str | Path, preprocess: Preprocess, class_names: Sequence[str] = ()
) -> Benchmark:
    """Open a dataset, as `open_dataset`, under all domains: those stored, or made on the fly."""
    if layout in _STORED:
        return _open_stored(layout, Path(root), class_names)
    return corrupted(open_dataset(layout, root, class_names), preprocess)


def _open_stored(layout: str, root: Path, given: Sequence[str]) -> Benchmark:
    if layout == "imagenet-c":
        benchmark = imagenet_c(root)
        folders = class_names_of(benchmark)
        wnids = not given and any(folder in IMAGENET_CLASSES for folder in folders)
        own = _named(root, folders, IMAGENET_CLASSES) if wnids else folders
        names = own_or_given(own, given)
        named = (dataclasses.replace(images, class_names=names) for images in benchmark.values())
        return dict(zip(benchmark, named, strict=True))
    if layout == "arrayrecord":
        benchmark = open_array_records(root)
        names = own_or_given(class_names_of(benchmark), given)
        return {key: dataclasses.replace(one, class_names=names) for key, one in benchmark.items()}
    names = given_class_names(given)
    if not names and layout == "arrays":
        raise ValueError(f"{root}: arrays have no class names, give them (--class-names)")
    few = not names and read_labels(root).max() < 10
    names = names or (tables.CIFAR10_CLASSES if few else tables.CIFAR100_CLASSES)
    return open_arrays(root, names, layout == "cifar-c")


def own_or_given(
    own: Sequence[str], given: Sequence[str] = (), folders: bool = True
) -> tuple[str, ...]:
    """The given class names, or the layout's own; class folders' must mean something to a model."""
    names = given_class_names(given, own) or tuple(own)
    if len(names) != len(own):
        raise ValueError(f"{len(names)} class names for {len(own)} classes")
    for name in () if given or not folders else names:
        if re.fullmatch(r"n\d{8}|-?\d+([.,]\d+)?", name) or name != printable(name):
            what = f"class folder {printable(name)} means nothing to a model"
            raise ValueError(f"{what}: set the class names, or use layout imagenet for wnids")
    return names


def _named(root: Path, folders: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    if odd := [folder for folder in folders if folder not in names]:
        raise ValueError(f"{root}: folder {odd[0]} is none of those known, such as {min(names)}")
    return tuple(names[folder] for folder in folders)


def _objectnet(root: Path) -> ImageFolder:
    """The images of classes that are also in ImageNet, without their red border."""
    mapping = root / "mappings" / "folder_to_objectnet_label.json"
    overlap = read_json(mapping.with_name("objectnet_to_imagenet_1k.json"))
    folders = class_folders(root / "images")
    names = _named(root, [folder.name for folder in folders], read_json(mapping))
    kept = {key: name for key, name in zip(folders, names, strict=True) if name in overlap}
    listed = list_folders(root / "images", [*kept], [*kept.values()], raw=True)
    return dataclasses.replace(listed, border=2)


def listed_split(path: Path, images: Path, split: str = "test") -> ImageFolder:
    """Images of a `split_zhou_….json`: `{"train": [[path in images, label, class name], …], …}`."""
    lists = read_json(path)
    try:
        pairs = sorted({(label, name) for listed in lists.values() for _, label, name in listed})
        paths, labels, _ = zip(*lists[split], strict=True)
        classes = tuple(name.replace("_", " ") for _, name in pairs)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        expected = f"{path}: expected [path, label, class name] of images for {split!r}"
        raise ValueError(f"{expected} ({error!r})") from error
    if [label for label, _ in pairs] != [*range(len(pairs))]:
        raise ValueError(f"{path}: labels are not 0 to {len(pairs) - 1} with a name each")
    return ImageFolder(images, paths, np.asarray(labels, np.int32), classes, raw=True)


def _fgvc_aircraft(variants: Path, images: Path, split: str) -> ImageFolder:
    listed = variants.with_name(f"images_variant_{split}.txt")
    names, lines = (
        [*filter(None, map(str.strip, read_text(path).split("\n")))] for path in (variants, listed)
    )
    files, found = zip(*(line.split(maxsplit=1) for line in lines), strict=True)
    if odd := sorted({*found}.difference(names)):
        raise ValueError(f"{listed}: {odd[0]} is none of the {len(names)} variants")
    labels = np.asarray([names.index(variant) for variant in found], np.int32)
    paths = tuple(f"{file}.jpg" for file in files)
    return ImageFolder(images, paths, labels, tuple(names), raw=True)
