"""A user's own images to be checked: in class folders, in one folder, some with labels in a file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtta.data.class_names import given_class_names
from jaxtta.data.folders import ImageFolder, image_folder, list_folders
from jaxtta.data.layouts import require_meaning
from jaxtta.data.recognise import entries_of, folders_in, is_folder
from jaxtta.images import SUFFIXES, printable
from jaxtta.io import nfc, read_rows


def target_folder(
    root: str | Path, class_names: Sequence[str], labels: str | Path | None = None
) -> ImageFolder:
    """List images of which all, some or none have labels; the label of the others is -1.

    Args:
        root: the folder: with class folders, or with images.
        class_names: names of the classes, or a file with them; "FOLDER=NAME" for a class folder, or
            a class in `labels`, that has another name. May be empty with class folders.
        labels: a CSV file with columns image (path in the folder) and class, if there are no class
            folders.

    Raises:
        FileNotFoundError: if the folder or file is missing.
        ValueError: if the folder has images beside class folders or none at all, there are fewer
            than two classes, or a class or a line of the file is not one of them.
    """
    root = Path(root)
    labelled, suffixes = bool(folders_in(root)), SUFFIXES
    files = sorted(entry.name for entry in entries_of(root) if not is_folder(entry))
    lone = [name for name in files if name.lower().endswith(suffixes)]
    if labelled and lone:
        raise ValueError(
            f"{root}: has images outside the class folders, such as {printable(lone[0])}"
        )
    if not labelled and not lone:
        raise ValueError(f"{root}: folder without images")
    given = [text.partition("=") for text in given_class_names(class_names)]
    names = {folder: own or folder for folder, _, own in given}
    listed = image_folder(root) if labelled else list_folders(root, [root], [root.name])
    if labelled and not names:
        require_meaning(listed.class_names, listed.class_names)
        names = {name: name for name in listed.class_names}
    if len(names) < 2:
        raise ValueError(f"{root}: --class-names has {len(names)} classes, expected at least two")
    if not labelled:
        numbers = np.full(len(listed), -1, np.int32)
        if labels:
            _read_labels(Path(labels), listed, [*names], numbers)
    elif labels:
        raise ValueError(f"{root}: has class folders, omit --target-labels")
    else:
        for name in listed.class_names:
            if name not in names:
                raise ValueError(
                    f"{root / name}: class folder is not one of --class-names, {', '.join(names)}; "
                    f'use "{name}=…" to give its class name'
                )
        order = np.array([[*names].index(name) for name in listed.class_names], np.int32)
        numbers = order[listed.labels]
    return dataclasses.replace(listed, labels=numbers, class_names=tuple(names.values()))


def _read_labels(path: Path, listed: ImageFolder, classes: list[str], labels: np.ndarray) -> None:
    """Fill in labels (images,) from a .csv."""
    places = {nfc(name): number for number, name in enumerate(listed.paths)}
    for line, row in read_rows(path, ("image", "class")):
        image, name = nfc(row["image"]).strip(), nfc(row["class"]).strip()
        if image not in places:
            raise ValueError(f"{line} names {image!r}, which is not an image in {listed.root}")
        if name not in classes:
            raise ValueError(
                f"{line} has class {name!r}, which is not one of --class-names, "
                f"{', '.join(classes)}"
            )
        if labels[places[image]] >= 0:
            raise ValueError(f"{line} names {image!r} again")
        labels[places[image]] = classes.index(name)
    if (labels < 0).all():
        raise ValueError(f"{path}: lists no image")
