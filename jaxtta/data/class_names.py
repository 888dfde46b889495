"""Class names and prompt templates: of common datasets, and from files."""

import functools
import json
import logging
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtta.images import printable
from jaxtta.io import nfc, read_text

log = logging.getLogger(__name__)

TABLES = Path(__file__).parent / "tables"
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
"""CIFAR-10's classes in label order."""


def read_table(name: str) -> Any:
    """One of the package's tables, such as "imagenet-templates"."""
    return json.loads((TABLES / f"{name}.json").read_text())


CROSS_DATASETS = read_table("cross-datasets")
"""By layout: the dataset's folder, its list of images, the folder that the paths in it are relative
to, and the usual prompt template."""


def templates_for(layout: str) -> tuple[str, ...]:
    """The usual prompt templates of a layout; `imagenet_templates` has ImageNet's ensemble."""
    return (CROSS_DATASETS.get(layout, {"template": "a photo of a {}."})["template"],)


def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 prompt templates for ImageNet."""
    return tuple(read_table("imagenet-templates"))


@functools.cache
def imagenet_classes() -> types.MappingProxyType[str, str]:
    """CLIP's name for each of ImageNet's 1,000 classes, by wnid in label order."""
    return types.MappingProxyType(dict(sorted(read_table("imagenet-class-names").items())))


def cifar100_classes() -> tuple[str, ...]:
    """CIFAR-100's fine classes in label order."""
    return tuple(read_table("cifar100-class-names"))


def given_class_names(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[str, ...]:
    """Class names as an option gives them: names in label order, or one file with them.

    Args:
        names: may be empty. A file is plain text (.txt) with one name per line, or a JSON list
            (.json), both in label order (folder order, in which numbers are sorted as numbers), or
            a JSON object from folder name to class name. Equal names in a file are logged.
        folders: the class folders' names; may be empty if the file has a list.
    """
    names = [str(names)] if isinstance(names, str | Path) else names
    path = Path(names[0] if len(names) == 1 else "")
    if path.suffix.lower() not in (".json", ".txt"):
        if path.is_file():
            raise ValueError(f"{path}: expected class names in a .txt or .json file")
        return tuple(map(nfc, names))
    try:
        text = read_text(path)
        names = json.loads(text) if path.suffix.lower() == ".json" else text.rstrip().split("\n")
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as class names ({error})") from error
    if isinstance(names, dict):
        if not folders:
            raise ValueError(f"{path}: is an object by folder name, expected a list of names")
        by_folder = {nfc(folder): name for folder, name in names.items()}
        missing = [folder for folder in folders if nfc(folder) not in by_folder]
        if missing:
            raise ValueError(f"{path}: has no name for {', '.join(missing[:5])}")
        names = [by_folder[nfc(folder)] for folder in folders]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"{path}: has no names, expected a list of names")
    names = [nfc(name).strip() for name in names]
    if "" in names:
        raise ValueError(f"{path}: name {names.index('') + 1} of {len(names)} is empty")
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        before = first.setdefault(" ".join(name.casefold().split()), number)
        if before != number:
            log.warning(
                "%s: classes %d and %d have the same name (%s, %s); a tie counts for the first",
                *(printable(path), before, number, printable(names[before]), printable(name)),
            )
    return tuple(names)
