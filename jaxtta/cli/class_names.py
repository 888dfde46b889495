"""Class names from the command line."""

from collections.abc import Sequence

from jaxtta import data
from jaxtta.data.folders import class_folders


def class_names_of(given: Sequence[str], layout: str, root: str) -> tuple[str, ...]:
    """Parse the option for class names: names in label order, or one file with them.

    Args:
        given: the option's values; may be empty.
        layout: the dataset's layout; for "folder", a .json file may name classes by folder.
        root: the dataset's folder.

    Returns:
        The names; empty for the layout's own.

    Raises:
        ValueError: if the file cannot be read or has no name for a folder.
    """
    folders = class_folders(root) if given and layout == "folder" else ()
    return data.given_class_names(given, [folder.name for folder in folders])
