"""Class names and prompt templates of common datasets."""

import functools
import json
import types
from pathlib import Path
from typing import Any

_TABLES = Path(__file__).parent / "tables"

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
"""CIFAR-10's classes in label order."""

TEMPLATES = types.MappingProxyType(
    {
        "caltech101": ("a photo of a {}.",),
        "oxford-pets": ("a photo of a {}, a type of pet.",),
        "stanford-cars": ("a photo of a {}.",),
        "oxford-flowers": ("a photo of a {}, a type of flower.",),
        "food101": ("a photo of {}, a type of food.",),
        "fgvc-aircraft": ("a photo of a {}, a type of aircraft.",),
        "sun397": ("a photo of a {}.",),
        "dtd": ("{} texture.",),
        "eurosat": ("a centered satellite photo of {}.",),
        "ucf101": ("a photo of a person doing {}.",),
    }
)
"""The usual prompt template of each cross-dataset set, by layout."""


def templates_for(layout: str) -> tuple[str, ...]:
    """The usual prompt templates of a layout; `imagenet_templates` has ImageNet's ensemble.

    Args:
        layout: its name.

    Returns:
        Templates with `{}` for the class; "a photo of a {}." by default.
    """
    return TEMPLATES.get(layout, ("a photo of a {}.",))


@functools.cache
def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 prompt templates for ImageNet."""
    return tuple(read_table("imagenet-templates.json"))


@functools.cache
def imagenet_classes() -> types.MappingProxyType[str, str]:
    """CLIP's name for each of ImageNet's 1,000 classes, by wnid in label order."""
    return types.MappingProxyType(dict(sorted(read_table("imagenet-class-names.json").items())))


@functools.cache
def cifar100_classes() -> tuple[str, ...]:
    """CIFAR-100's fine classes in label order."""
    return tuple(read_table("cifar100-class-names.json"))


def read_table(name: str) -> Any:
    """Read one of the package's tables.

    Args:
        name: the file name, such as "imagenet-templates.json".

    Returns:
        Its lists and dictionaries.
    """
    return json.loads((_TABLES / name).read_text())
