"""Class names and prompt templates: of common datasets, and from files."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtta.io import nfc, read_text

log = logging.getLogger(__name__)

TABLES = Path(__file__).parent / "tables"


def read_table(name: str) -> Any:
    """One of the package's tables, such as "imagenet-templates"."""
    return json.loads((TABLES / f"{name}.json").read_text())


CIFAR10_CLASSES = tuple(read_table("cifar10-class-names"))
CIFAR100_CLASSES = tuple(read_table("cifar100-class-names"))  # fine classes, in label order
IMAGENET_CLASSES = dict(sorted(read_table("imagenet-class-names").items()))
"""CLIP's name for each of ImageNet's 1,000 classes, by wnid in label order."""
CROSS_DATASETS = read_table("cross-datasets")
"""By layout: the dataset's folder, list of images, folder of these, and usual prompt template."""


def templates_for(layout: str) -> tuple[str, ...]:
    """The usual prompt templates of a layout; `imagenet_templates` has ImageNet's ensemble."""
    return (CROSS_DATASETS.get(layout, {"template": "a photo of a {}."})["template"],)


def imagenet_templates() -> tuple[str, ...]:
    """CLIP's 80 prompt templates for ImageNet."""
    return tuple(read_table("imagenet-templates"))


def given_class_names(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[str, ...]:
    """Class names as an option gives them: names in label order, or one file with them.

    A file is text (.txt) with a name per line, or a JSON list (.json), both in label order (folder
    order, in which numbers are sorted as numbers), or a JSON object from folder to class name.
    """
    names = [str(names)] if isinstance(names, str | Path) else names
    path = Path(names[0] if len(names) == 1 else "")
    if path.suffix.lower() not in (".json", ".txt"):
        if path.is_file():
            raise ValueError(f"{path}: expected class names in a .txt or .json file")
        return tuple(map(nfc, names))
    try:
        text = read_text(path)
        found = json.loads(text) if path.suffix.lower() == ".json" else text.rstrip().split("\n")
        if isinstance(found, dict):
            by_folder = {nfc(folder): name for folder, name in found.items()}
            found = [by_folder[nfc(folder)] for folder in folders]
        listed = [nfc(name).strip() for name in found]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as class names ({error!r})") from error
    if not isinstance(found, list) or not all(listed) or not listed:
        raise ValueError(f"{path}: has an empty name or no names, expected a list of names")
    counts = Counter(" ".join(name.casefold().split()) for name in listed)
    if twice := [name for name, count in counts.items() if count > 1]:
        log.warning("%s: several classes are called %s; a tie counts for the first", path, twice)
    return tuple(listed)
