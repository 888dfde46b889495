"""Tasks for continual learning: the MTIL sequences, small real datasets, and folders."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtta.data.arrays import ArrayDataset
from jaxtta.data.class_names import templates_for
from jaxtta.data.datasets import Dataset, Subset
from jaxtta.data.folders import ImageFolder, image_folder
from jaxtta.data.layouts import open_dataset

MTIL_ORDERS = {
    "order-1": (
        *("fgvc-aircraft", "caltech101", "cifar100", "dtd", "eurosat", "oxford-flowers"),
        *("food101", "mnist", "oxford-pets", "stanford-cars", "sun397"),
    ),
    "order-2": (
        *("stanford-cars", "food101", "mnist", "oxford-pets", "oxford-flowers", "sun397"),
        *("fgvc-aircraft", "caltech101", "dtd", "eurosat", "cifar100"),
    ),
}
"""The two orders of the MTIL benchmark."""
FROM_TFDS = ("cifar100", "mnist")
MNIST = 'a photo of the number: "{}".'  # CLIP's own prompt
DIGIT = "a photo of the digit {}."
SMALL = {"textile": "a photo of a textile with {}.", "digits": DIGIT, "turned-digits": DIGIT}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TaskData(NamedTuple):
    """A task's images; it has no training images if it is only tested."""

    name: str
    template: str
    train: Dataset | None
    test: Dataset


def open_task(name: str, root: str | Path | None = None) -> TaskData:
    """Open a task's training and test images.

    Args:
        name: one of MTIL's, "textile", "digits", "turned-digits", or NAME=FOLDER with a folder that
            holds `train/<class>/…` and `test/<class>/…`.
        root: the folder that contains the MTIL sets; needed for these only.
    """
    own, equals, folder = name.partition("=")
    if name in SMALL:
        images = textile() if name == "textile" else digits(turned=name == "turned-digits")
        tested = every_nth(images.labels, 4)
        train, test = (Subset(images, np.flatnonzero(mask)) for mask in (~tested, tested))
        return TaskData(own, SMALL[name], train, test)
    if name in MTIL_ORDERS["order-1"]:
        template = MNIST if name == "mnist" else templates_for(name)[0]
        if name not in FROM_TFDS and root is None:
            raise ValueError(f"{name} needs --data, the folder that contains the MTIL sets")
        places = [("tfds", name) if name in FROM_TFDS else (name, root or "")] * 2
    elif equals:
        template = "a photo of a {}."
        places = [("folder", Path(folder) / split) for split in ("train", "test")]
    else:
        known = ", ".join((*MTIL_ORDERS, *MTIL_ORDERS["order-1"], *SMALL))
        raise ValueError(f"unknown task {name!r}, expected NAME=FOLDER or one of {known}")
    try:
        train, test = (open_dataset(*places[i], split=s) for i, s in enumerate(("train", "test")))
    except ValueError as error:
        raise ValueError(f"the task {own}: {error}") from error
    if len(train.class_names) < 2:
        raise ValueError(f"the task {own} has one class, expected at least two")
    if train.class_names != test.class_names:
        odd = sorted(set(train.class_names) ^ set(test.class_names))
        raise ValueError(
            f"the task {own} has different training and test classes: "
            f"{', '.join(odd[:5]) or 'the same names in another order'}"
        )
    return TaskData(own, template, train, test)


def digits(turned: bool = False) -> ArrayDataset:
    """scikit-learn's digits, or their negatives rotated by 90°."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = (np.asarray(pixels).reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    if turned:
        grey = np.rot90(255 - grey, axes=(1, 2))
    images = np.repeat(grey[..., None], 3, axis=-1)
    return ArrayDataset(images, np.asarray(labels, np.int32), DIGITS, "digit")


def textile() -> ImageFolder:
    """Simulated textile images with a global, a local or no defect."""
    import conformal_clip_data

    listed = image_folder(conformal_clip_data.textile_simulated_root())
    names = {"global": "a large defect", "local": "a small defect", "nominal": "no defect"}
    classes = tuple(names[name] for name in listed.class_names)
    return dataclasses.replace(listed, class_names=classes)


def every_nth(labels: np.ndarray, nth: int) -> np.ndarray:
    """Select the first of every `nth` images, class by class: (images,) bool."""
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[::nth]] = True
    return chosen
