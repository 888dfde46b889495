"""Loaders for the folder and file layouts of common datasets.

`open_source` opens any of them:

    source = open_source("imagenet-c", "/data/imagenet-c", model.preprocessing)
    source.check(Domain("fog", 5))
    image = source.read(Domain("fog", 5), number=0, seed=0)

The other functions list clean images, of the test set if there is a public train and test set.
Class names are the usual ones for CLIP; if only some of ImageNet's class folders are present, as in
ImageNet-A and -R, only those classes are used.

The layouts of benchmarks are read as their published results read them: images as they are stored,
whatever their EXIF orientation or transparency. Own images (the layout "folder") are turned upright
and laid over white.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta.data.class_names import CIFAR10_CLASSES, cifar100_classes, imagenet_classes
from jaxtta.data.folders import ImageFolder, class_folders, image_folder, list_folders
from jaxtta.data.sources import (
    CorruptedOnTheFly,
    Preprocess,
    Source,
    corrupted_arrays,
    corrupted_folders,
    read_labels,
)
from jaxtta.data.text import read_text
from jaxtta.data.tfds import tfds_images
from jaxtta.images import printable

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


def imagenet(root: str | Path) -> ImageFolder:
    """List `root/<wnid>/…`: ImageNet's train or val folder, ImageNet-A, -R or -Sketch.

    Args:
        root: the folder with the wnid folders.

    Returns:
        The images; the classes are the wnids present, in their order.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a class folder is not one of ImageNet's 1,000 wnids, or has no image.
    """
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


def imagenet_v2(root: str | Path) -> ImageFolder:
    """List `root/<0 to 999>/…`, folders named by the index of ImageNet's wnid.

    Args:
        root: the folder of one of ImageNet-V2's three sets.

    Returns:
        The images; the classes are those present, in numerical order.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a class folder is not such a number, or has no image.
    """
    folders, names = class_folders(root), tuple(imagenet_classes().values())
    for folder in folders:
        if not re.fullmatch("0|[1-9][0-9]{0,2}", folder.name):
            raise ValueError(f"{root}: folder {folder.name} is not a class number from 0 to 999")
    return list_folders(root, folders, [names[int(folder.name)] for folder in folders], raw=True)


def objectnet(root: str | Path) -> ImageFolder:
    """List ObjectNet's images of classes that are also in ImageNet, without their red border.

    Args:
        root: the folder with `images/` and `mappings/`.

    Returns:
        The images; the classes are those present, in folder order, with ObjectNet's names.

    Raises:
        FileNotFoundError: if the images folder is missing.
        ValueError: if a mapping cannot be read or lacks a folder, or no class is in ImageNet.
    """
    images, mappings = Path(root) / "images", Path(root) / "mappings"
    labels = _json(mappings / "folder_to_objectnet_label.json", dict)
    overlap = _json(mappings / "objectnet_to_imagenet_1k.json", dict)
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
    listed = list_folders(root, folders, names, raw=True)
    return listed._replace(border=_OBJECTNET_BORDER)


def listed_split(path: str | Path, images: str | Path, split: str = "test") -> ImageFolder:
    """List the images of a `split_zhou_….json`, the format of prompt-learning benchmarks.

    Args:
        path: the file: `{"train": [[path, label, class name], …], "val": …, "test": …}`.
        images: the folder that its paths are relative to.
        split: the list to use.

    Returns:
        The images. The classes are those of all lists; underscores in names become spaces.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the format is different, or its labels are not consecutive from 0.
    """
    lists = _json(path, dict)
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
    files, labels, _ = zip(*lists[split], strict=True)
    return ImageFolder(
        Path(images),
        tuple(Path(images) / file for file in files),
        np.asarray(labels, np.int32),
        tuple(names[label].replace("_", " ") for label in range(len(names))),
        raw=True,
    )


def fgvc_aircraft(root: str | Path, split: str = "test") -> ImageFolder:
    """List FGVC-Aircraft's images by variant.

    Args:
        root: the folder with `variants.txt`, `images_variant_<split>.txt` and `images/`.
        split: the list to use.

    Returns:
        The images; the classes are the variants, in the order of their file.

    Raises:
        FileNotFoundError: if a list is missing.
        ValueError: if an image's variant is not listed.
    """
    root = Path(root)
    variants = read_text(root / "variants.txt").split("\n")
    listed = root / f"images_variant_{split}.txt"
    names = filter(None, map(str.strip, variants))
    numbers = {variant: number for number, variant in enumerate(names)}
    files, labels = [], []
    for line in filter(str.strip, read_text(listed).split("\n")):
        file, _, variant = line.partition(" ")
        if variant.strip() not in numbers:
            raise ValueError(f"{listed}: line {line!r} has none of the {len(numbers)} variants")
        files.append(root / "images" / f"{file}.jpg")
        labels.append(numbers[variant.strip()])
    if not files:
        raise ValueError(f"{listed}: lists no images")
    labels = np.asarray(labels, np.int32)
    return ImageFolder(root, tuple(files), labels, tuple(numbers), raw=True)


def _zhou(layout: str) -> Callable[[Path, str], ImageFolder]:
    folder, name, images = _SPLITS[layout]

    def listed(root: Path, split: str) -> ImageFolder:
        root = _within(root, folder)
        return listed_split(root / name, root / images, split)

    return listed


_LISTINGS: Mapping[str, Callable[[Path], ImageFolder]] = {
    "folder": image_folder,
    "imagenet": imagenet,
    "imagenet-v2": imagenet_v2,
    "objectnet": objectnet,
}
_WITH_SPLITS: Mapping[str, Callable[[Path, str], ImageFolder]] = {
    **{layout: _zhou(layout) for layout in _SPLITS},
    "fgvc-aircraft": lambda root, split: fgvc_aircraft(_within(root, "fgvc_aircraft"), split),
}
LAYOUTS = (*_LISTINGS, *_WITH_SPLITS, "imagenet-c", "cifar-c", "arrays", "tfds")
"""The layouts that `open_source` can open."""


def open_source(
    layout: str,
    root: str | Path,
    preprocess: Preprocess,
    class_names: Sequence[str] = (),
    data_dir: str | Path | None = None,
    split: str = "test",
) -> Source:
    """Open a dataset by the name of its layout.

    Layouts with clean images only are corrupted on the fly. The images of "folder" are turned
    upright by their EXIF orientation and laid over white where they are transparent; those of the
    other layouts are read as they are stored, as in published results.

    Args:
        layout: one of `LAYOUTS`: "folder" for `<class>/…`; "imagenet" for wnid folders (ImageNet,
            -A, -R, -Sketch), "imagenet-v2", "objectnet"; "imagenet-c" for
            `<corruption>/<severity>/<class>/…`; "cifar-c" for `.npy` files with five severities
            each, "arrays" for `.npy` files with one; the cross-dataset sets by name, in the folders
            that prompt-learning benchmarks use; "tfds" for tensorflow-datasets.
        root: the folder; for a cross-dataset set its own or the parent folder; for "tfds" a name,
            with a split after a colon if it is not the test split ("cifar10:train").
        preprocess: the model's preprocessing.
        class_names: class names to use instead of the layout's.
        data_dir: folder of prepared datasets for "tfds"; None for the default.
        split: the split of a cross-dataset set, or of a tfds name without one; the folders of the
            other layouts are one split each.

    Returns:
        The source.

    Raises:
        FileNotFoundError: if a folder or file of the layout is missing.
        ImportError: for "tfds" if tensorflow-datasets is not installed.
        ValueError: for an unknown layout, data in a different format, class folders whose names
            mean nothing to a model (wnids, numbers) if no class names are given, or a number of
            class names that is not the number of classes.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if layout in ("arrays", "cifar-c"):
        return corrupted_arrays(
            root, preprocess, class_names or _array_classes(layout, root), layout == "cifar-c"
        )
    if layout == "imagenet-c":

        def names_of(folders: Sequence[str]) -> Sequence[str]:
            if class_names or not any(folder in imagenet_classes() for folder in folders):
                return _class_names(folders, class_names, folders)
            return _names_of_wnids(root, folders)

        return corrupted_folders(root, preprocess, names_of)
    if layout == "tfds":
        name, own = _name_and_split(str(root))
        images = tfds_images(name, own or split, data_dir)
    elif layout in _WITH_SPLITS:
        images = _WITH_SPLITS[layout](Path(root), split)
    else:
        images = _LISTINGS[layout](Path(root))
    folders = images.class_names if layout == "folder" else ()
    names = _class_names(images.class_names, class_names, folders)
    return CorruptedOnTheFly(images._replace(class_names=names), preprocess)


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
    if not given:
        require_meaning(own, folders)
        return tuple(own)
    if len(given) != len(own):
        raise ValueError(f"{len(given)} class names for {len(own)} classes ({_few(own)})")
    if sorted(folders) != [*folders] and not _consecutive(folders):
        pairs = [f"{folder} is {name!r}" for folder, name in zip(folders, given, strict=True)]
        log.warning("class folders are sorted by number, with gaps: %s", _few(pairs))
    return tuple(given)


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


def _array_classes(layout: str, root: str | Path) -> tuple[str, ...]:
    if layout == "arrays":
        raise ValueError(f"{root}: arrays have no class names, set them")
    few = read_labels(root).max() < len(CIFAR10_CLASSES)
    return CIFAR10_CLASSES if few else cifar100_classes()


def _within(root: str | Path, folder: str) -> Path:
    """The dataset's folder, given the folder or its parent."""
    return Path(root) / folder if (Path(root) / folder).is_dir() else Path(root)


def _few(items: Any) -> str:
    items = list(map(str, items))
    return ", ".join(items[:5]) + (", …" if len(items) > 5 else "") or "none"


def _json(path: str | Path, kind: type) -> Any:
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: has a {type(value).__name__}, expected an object")
    return value
