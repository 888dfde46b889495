"""Folders that hold something else than class folders: splits, corruptions, arrays, archives."""

import re
from collections.abc import Sequence
from pathlib import Path

from jaxtta.corruptions import CORRUPTIONS, SEVERITIES
from jaxtta.images import entries_of, is_folder, lone_images

_SPLIT = re.compile(
    r"((seg|img|images?)[-_ ])?(train|training|trainval|val|valid|validation|test|testing|dev|eval)"
    r"([-_ ]?(set|data|split|imgs?|images?|\d+))?",
    re.IGNORECASE,
)
_OTHERS = {
    (".npy",): "its .npy files are read with --layout cifar-c (five severities a file) or arrays",
    (".npz",): "an .npz file with images, labels and class_names is given by its own path",
    (".tfrecord", ".array_record", "dataset_info.json"): (
        "tensorflow-datasets are opened by name, with --layout tfds"
    ),
    (".parquet", ".arrow"): "write the images of its {} files into class folders",
    (".tar", ".zip", ".tgz", ".gz"): "unpack its {} files into class folders",
}


def folders_in(root: Path) -> list[Path]:
    """The sub-folders of a folder, sorted, without the system's."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    return [root / entry.name for entry in entries_of(root) if is_folder(entry)]


def refuse_other_layouts(root: Path, folders: Sequence[Path]) -> None:
    """Raise a ValueError if sub-folders are splits or corruptions, not classes, or too few."""
    splits = [folder for folder in folders if _SPLIT.fullmatch(folder.name)]
    if splits and len(splits) >= min(2, len(folders)):
        names = " and ".join(folder.name for folder in splits)
        raise ValueError(
            f"{root}: holds splits, not classes ({names}): give one, such as {splits[-1]}"
        )
    if _is_corruption(root):
        raise ValueError(
            f"{root}: holds the severities of one corruption, as in ImageNet-C: use --layout "
            f"imagenet-c with {root.parent}, or --layout imagenet with {folders[0]}"
        )
    for folder in folders:
        if any(map(_is_corruption, (folder, *_folders_alone(folder)))):
            raise ValueError(
                f"{root}: {folder.name} holds a corruption's severities, not images of a class: "
                "use --layout imagenet-c"
            )
    if len(folders) < 2:
        raise ValueError(
            f"{root}: has {len(folders)} class folders, expected at least two{hints(root, folders)}"
        )


def _is_corruption(folder: Path) -> bool:
    """Whether it is `<corruption>/<severity>/<class>/…`."""
    severities = _folders_alone(folder)
    if not {path.name for path in severities} <= {*map(str, range(1, SEVERITIES + 1))}:
        return False
    classes = _folders_alone(severities[0]) if severities else []
    known = folder.name in CORRUPTIONS
    return any(known or re.fullmatch(r"n\d{8}", path.name) for path in classes)


def _folders_alone(folder: Path) -> list[Path]:
    """Its sub-folders if it has no image of its own."""
    return [] if lone_images(folder) else folders_in(folder)


def hints(root: Path, folders: Sequence[Path]) -> str:
    """What a folder without class folders may hold: the end of a message, from its semicolon."""
    names = [entry.name.lower() for place in (root, *folders) for entry in entries_of(place)]
    known = (
        hint.format(suffix)
        for suffixes, hint in _OTHERS.items()
        for suffix in suffixes
        if any(name.endswith(suffix) or f"{suffix}-" in name for name in names)  # also shards
    )
    found = [*known][:1]
    if alone := len(lone_images(root)):
        found.append(f"{alone} images lie in no class folder")
    return "".join(f"; {hint}" for hint in found)
