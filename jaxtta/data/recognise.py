"""Folders that hold something else than class folders: splits, corruptions, arrays, archives."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxtta.data.corruptions import IMAGENET_C, IMAGENET_C_EXTRA, SEVERITIES
from jaxtta.images import SUFFIXES

_SYSTEM = {  # made by operating systems, NAS servers and tools, in lower case
    *("__macosx", "__pycache__", "lost+found", "system volume information", "$recycle.bin"),
    *("recycler", "found.000", "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle"),
    *("#snapshot", "thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
}
_SPLIT = re.compile(
    r"((seg|img|images?)[-_ ])?(train|training|trainval|val|valid|validation|test|testing|dev|eval)"
    r"([-_ ]?(set|data|split|imgs?|images?|\d+))?",
    re.IGNORECASE,
)
_OTHERS = {
    ".npy": "its .npy files are read with --layout cifar-c (five severities a file) or arrays",
    ".npz": "an .npz file with images, labels and class_names is given by its own path",
    ".tfrecord": "tensorflow-datasets are opened by name, with --layout tfds",
    ".array_record": "tensorflow-datasets are opened by name, with --layout tfds",
    ".parquet": "write the images of its .parquet files into class folders",
    ".arrow": "write the images of its .arrow files into class folders",
    ".tar": "unpack its .tar files into class folders",
    ".zip": "unpack its .zip files",
    ".tgz": "unpack its .tgz files",
    ".gz": "unpack its .gz files",
}


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden or made by the system, such as ._fog.npy or Thumbs.db."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; False for links to nothing or themselves."""
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def entries_of(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder, without the system's, in any order."""
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not is_system(entry.name))


def folders_in(root: Path) -> list[Path]:
    """The sub-folders of a folder, sorted, without the system's."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    return sorted(root / entry.name for entry in entries_of(root) if is_folder(entry))


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
    names = {path.name for path in severities}
    if not names or names - {*map(str, range(1, SEVERITIES + 1))}:
        return False
    classes = _folders_alone(severities[0])
    known = folder.name in (*IMAGENET_C, *IMAGENET_C_EXTRA)
    return bool(classes) and (known or any(re.fullmatch(r"n\d{8}", c.name) for c in classes))


def _folders_alone(folder: Path) -> list[Path]:
    """Its sub-folders if it has no image of its own; stops reading at the first image."""
    found = []
    for entry in entries_of(folder):
        if is_folder(entry):
            found.append(Path(entry))
        elif entry.name.lower().endswith(SUFFIXES):
            return []
    return sorted(found)


def hints(root: Path, folders: Sequence[Path]) -> str:
    """What a folder without class folders may hold: the end of a message, from its semicolon."""
    names = [entry.name.lower() for place in (root, *folders) for entry in entries_of(place)]
    if "dataset_info.json" in names:
        names.append(".tfrecord")
    known = (
        hint
        for suffix, hint in _OTHERS.items()
        if any(name.endswith(suffix) or f"{suffix}-" in name for name in names)  # also shards
    )
    found = [*known][:1]
    alone = sum(entry.name.lower().endswith(SUFFIXES) for entry in entries_of(root))
    if alone:
        found.append(f"{alone} images lie in no class folder")
    return "".join(f"; {hint}" for hint in found)
