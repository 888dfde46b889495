"""Tasks for continual learning: the MTIL sequences, small real datasets, and folders.

task = open_task("dtd", DATA, model.preprocessing)
task = open_task("digits", None, model.preprocessing)
task = open_task("own=FOLDER", None, model.preprocessing)   # with train/<class> and test/<class>
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxtta.data.class_names import templates_for
from jaxtta.data.folders import ImageFolder, image_folder
from jaxtta.data.layouts import open_source
from jaxtta.data.memory import Arrays, InMemory, Part, every, shape_of
from jaxtta.data.sources import CorruptedOnTheFly, Images, Preprocess, Source

ORDERS = {
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
SMALL = ("textile", "digits", "turned-digits")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class TaskData(NamedTuple):
    """A task's images.

    Attributes:
        name: its name.
        template: its prompt template.
        train: its training images; None for a task that is only tested.
        test: its test images.
    """

    name: str
    template: str
    train: Source | None
    test: Source


def open_task(name: str, root: str | None, preprocess: Preprocess) -> TaskData:
    """Open a task's training and test images.

    Args:
        name: one of MTIL's, "textile", "digits", "turned-digits", or NAME=FOLDER with a folder that
            holds `train/<class>/…` and `test/<class>/…`.
        root: the folder that contains the MTIL sets; needed for these only.
        preprocess: the model's preprocessing.

    Returns:
        The task.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: for an unknown task, one with a single class, or one with different training and
            test classes.
    """
    own, equals, folder = name.partition("=")
    if name in ("digits", "turned-digits"):
        template = "a photo of the digit {}."
        both = split(digits(turned=name == "turned-digits"), preprocess)
    elif name == "textile":
        template, both = "a photo of a textile with {}.", split(textile(), preprocess)
    elif name in ORDERS["order-1"]:
        template = MNIST if name == "mnist" else templates_for(name)[0]
        if name in FROM_TFDS:
            layout, place = "tfds", name
        elif root is not None:
            layout, place = name, root
        else:
            raise ValueError(f"{name} needs --data, the folder that contains the MTIL sets")
        both = (open_source(layout, place, preprocess, split=s) for s in ("train", "test"))
    elif equals:
        template = "a photo of a {}."
        both = (open_source("folder", Path(folder) / s, preprocess) for s in ("train", "test"))
    else:
        known = ", ".join((*ORDERS, *ORDERS["order-1"], *SMALL))
        raise ValueError(f"unknown task {name!r}, expected NAME=FOLDER or one of {known}")
    return TaskData(own, template, *_both(own, both))


def _both(name: str, opened: Iterable[Source]) -> tuple[Source, Source]:
    """A task's training and test images, checked to have the same classes."""
    try:
        train, test = opened
    except ValueError as error:
        raise ValueError(f"the task {name}: {error}") from error
    if len(train.class_names) < 2:
        raise ValueError(f"the task {name} has one class, expected at least two")
    if tuple(train.class_names) != tuple(test.class_names):
        odd = sorted(set(train.class_names) ^ set(test.class_names))
        raise ValueError(
            f"the task {name} has different training and test classes: "
            f"{', '.join(odd[:5]) or 'the same names in another order'}"
        )
    return train, test


def digits(turned: bool = False) -> Arrays:
    """scikit-learn's digits, or their negatives rotated by 90°."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = (np.asarray(pixels).reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    if turned:
        grey = np.rot90(255 - grey, axes=(1, 2))
    images = np.repeat(grey[..., None], 3, axis=-1)
    return Arrays(images, np.asarray(labels, np.int32), DIGITS, "digit")


def textile() -> ImageFolder:
    """Simulated textile images with a global, a local or no defect."""
    import conformal_clip_data

    listed = image_folder(conformal_clip_data.textile_simulated_root())
    names = {"global": "a large defect", "local": "a small defect", "nominal": "no defect"}
    return listed._replace(class_names=tuple(names[name] for name in listed.class_names))


def split(images: Images, preprocess: Preprocess, nth: int = 4) -> tuple[Source, Source]:
    """Split images into training and test images, stratified by class.

    Args:
        images: all images.
        preprocess: the model's preprocessing.
        nth: every nth image is a test image.

    Returns:
        The training and the test images.
    """
    tested, source = every(images.labels, nth), CorruptedOnTheFly(images, preprocess)
    train, test = (Part(source, np.flatnonzero(mask)) for mask in (~tested, tested))
    return train, test


def in_memory(tasks: Sequence[TaskData], room: float = 2e9) -> list[TaskData]:
    """Cache the tasks' images in memory, for each source that fits as a whole.

    Args:
        tasks: the tasks.
        room: available memory in bytes.

    Returns:
        The same tasks, with cached sources where they fit.
    """
    found = []
    for task in tasks:
        sources = {}
        for which in ("train", "test"):
            source = getattr(task, which)
            if source is None:
                continue
            size = np.prod(shape_of(source), dtype=float)
            if size <= room:
                room -= size
                sources[which] = InMemory(source)
        found.append(task._replace(**sources))
    return found
