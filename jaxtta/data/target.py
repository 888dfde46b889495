"""A user's own images to be checked: in class folders, or in one folder, some with labels."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtta.data.class_names import given_class_names
from jaxtta.data.folders import ImageFolder, folders_in, image_folder, list_folders
from jaxtta.data.layouts import own_or_given
from jaxtta.images import lone_images, printable
from jaxtta.io import nfc, read_rows


def target_folder(
    root: Path, class_names: Sequence[str] = (), labels: Path | None = None
) -> ImageFolder:
    """List images of which all, some or none have labels; the label of the others is -1.

    Args:
        root: the folder, with class folders or with images.
        class_names: of the classes, or a file with them; FOLDER=NAME where a class folder, or a
            class in `labels`, has another name. May be empty with class folders.
        labels: a .csv with columns image (path in the folder) and class, without class folders.
    """
    lone = lone_images(root) if root.is_dir() else []
    if labelled := bool(folders_in(root)):
        if lone:
            first = printable(lone[0])
            raise ValueError(f"{root}: has images outside the class folders, such as {first}")
        if labels:
            raise ValueError(f"{root}: has class folders, omit --target-labels")
        listed = image_folder(root)
    elif lone:
        listed = list_folders(root, [root], [root.name])
    else:
        raise ValueError(f"{root}: folder without images")
    given = [text.partition("=") for text in given_class_names(class_names)]
    names = {folder: own or folder for folder, _, own in given}
    if labelled and not names:
        names = {name: name for name in own_or_given(listed.class_names)}
    for kind in ([folder for folder, *_ in given], [*names.values()]):
        if twice := next((name for name in kind if kind.count(name) > 1), None):
            raise ValueError(f"{root}: --class-names has {twice!r} twice")
    if len(names) < 2:
        raise ValueError(f"{root}: --class-names has {len(names)} classes, expected at least two")
    places = {name: label for label, name in enumerate(names)}
    if labelled:
        if odd := next((name for name in listed.class_names if name not in places), None):
            raise ValueError(
                f"{root / odd}: class folder is not one of --class-names, {', '.join(names)}; "
                f'use "{odd}=…" to give its class name'
            )
        numbers = np.array([places[name] for name in listed.class_names])[listed.labels]
    else:
        numbers = _read_labels(labels, listed, places) if labels else np.full(len(listed), -1)
    numbers, classes = numbers.astype(np.int32), tuple(names.values())
    return dataclasses.replace(listed, labels=numbers, class_names=classes)


def _read_labels(path: Path, listed: ImageFolder, places: dict[str, int]) -> np.ndarray:
    """Labels (images,) from a .csv, -1 for images not in it."""
    numbers = {nfc(name): number for number, name in enumerate(listed.paths)}
    labels = np.full(len(listed), -1)
    for line, row in read_rows(path, ("image", "class")):
        image, name = nfc(row["image"]).strip(), nfc(row["class"]).strip()
        if image not in numbers:
            raise ValueError(f"{line} names {image!r}, which is not an image in {listed.root}")
        if name not in places:
            known = ", ".join(places)
            raise ValueError(f"{line} has class {name!r}, not one of --class-names, {known}")
        if labels[numbers[image]] >= 0:
            raise ValueError(f"{line} names {image!r} again")
        labels[numbers[image]] = places[name]
    if (labels < 0).all():
        raise ValueError(f"{path}: lists no image")
    return labels
