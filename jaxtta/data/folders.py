"""Images in class folders, with captions, or in ImageNet-C's folders."""

import dataclasses
import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxtta import images
from jaxtta.corruptions import CLEAN, CORRUPTIONS, SEVERITIES
from jaxtta.data.datasets import Domain
from jaxtta.images import find_images, printable, read_image
from jaxtta.io import digest_files, nfc, read_rows

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A dataset of image files: upright, or raw, as benchmarks are read."""

    root: Path
    paths: tuple[str, ...]  # in the folder `root`
    labels: np.ndarray  # (images,) int32
    class_names: tuple[str, ...]
    border: int = 0  # pixels to crop from every side of an image
    raw: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """Every image's path."""
        return tuple(map(self.root.joinpath, self.paths))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> np.ndarray:
        pixels = read_image(self.root / self.paths[number], raw=self.raw)
        height, width, _ = pixels.shape
        return pixels[self.border : height - self.border, self.border : width - self.border]

    def name(self, number: int) -> str:
        """The image's path, for messages."""
        return printable(self.root / self.paths[number])

    def content(self) -> str:
        """A digest of the files, with how they are read."""
        how = "as stored" if self.raw else "upright"
        return f"{digest_files(self.files)}, {how}, border {self.border}"


def folders_in(root: Path) -> list[Path]:
    """The sub-folders of a folder, sorted, without the system's."""
    return [root / entry.name for entry in images.entries_of(root) if images.is_folder(entry)]


def class_folders(root: str | Path) -> list[Path]:
    """The class folders of a folder, sorted; an error for splits, corruptions or fewer than two."""
    root, folders = Path(root), folders_in(Path(root))
    split = re.compile("(.*[-_ ])?(train|val|test|dev|eval)", re.IGNORECASE)
    splits = [folder for folder in folders if split.match(folder.name)]
    inner = [place for folder in folders for place in folders_in(folder)]
    few = len(folders) < 2 or len(splits) > max(1, len(folders) - 2)
    if few or any(map(_is_corruption, (root, *folders, *inner))):
        found = ", ".join(folder.name for folder in folders[:5]) or "no folders"
        raise ValueError(
            f"{root}: expected at least two class folders, has {found}: give one split, or "
            "--layout imagenet-c (corruption/severity/class), cifar-c or arrays (.npy files), tfds"
            "; images without labels are for jaxtta classify and pilot"
        )
    return sorted(folders, key=_with_numbers)


def _is_corruption(folder: Path) -> bool:
    """Whether it is `<corruption>/<severity>/<class>/…`."""
    levels = [folder / severity for severity in "12345" if (folder / severity).is_dir()]
    classes = [path.name for level in levels for path in folders_in(level)]
    return any(folder.name in CORRUPTIONS or re.fullmatch(r"n\d{8}", name) for name in classes)


def _with_numbers(folder: Path) -> tuple[list[str | int], str]:
    """A key that sorts the numbers in names as numbers (0 to 11; c1 to c12)."""
    parts = re.split("([0-9]+)", nfc(folder.name))  # text and numbers in turn
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], folder.name


def list_folders(
    root: Path, folders: Sequence[Path], class_names: Sequence[str], raw: bool = False
) -> ImageFolder:
    """List the images in and below class folders of `root`, or in `root` alone, in label order."""
    paths, labels, others = [], [], Counter[str]()
    for label, folder in enumerate(folders):
        listed, passed = find_images(folder, root)
        if not listed:
            raise ValueError(f"{folder}: class folder without images {dict(passed) or ''}")
        paths += listed if folder == root else [f"{folder.name}/{path}" for path in listed]
        labels += [label] * len(listed)
        others += passed
    images.log_passed_over(root, others)
    nested = [printable(path) for path in paths if path.count("/") > 1]
    if nested and len(folders) > 1:
        message = "%s: %d images are of the class folder's class though in a folder below it: %s"
        log.warning(message, printable(root), len(nested), nested[0])
    labels = np.asarray(labels, np.int32)
    return ImageFolder(root, tuple(paths), labels, tuple(class_names), raw=raw)


def image_folder(root: str | Path) -> ImageFolder:
    """List the images of `root/<class>/…`, to be opened upright; see `class_folders`."""
    folders = class_folders(root)
    if alone := len(images.lone_images(root)):
        log.warning("%s: %d images outside the class folders passed over", printable(root), alone)
    return list_folders(Path(root), folders, [nfc(folder.name) for folder in folders])


def captioned_folder(root: str | Path) -> ImageFolder:
    """List the images in a folder's `captions.csv` (file, caption), with a class per caption."""
    root, table = Path(root), Path(root) / "captions.csv"
    rows = [row for _, row in read_rows(table, ("file", "caption"))]
    if missing := [row["file"] for row in rows if not (root / row["file"]).is_file()]:
        raise ValueError(f"{table}: no such image: {missing[0]!r}")
    captions = [nfc(row["caption"]).strip() for row in rows]
    names, labels = np.unique(captions, return_inverse=True)
    if len(names) < 2 or not all(captions):
        raise ValueError(f"{table}: expected a caption for each image, and at least two of them")
    paths = tuple(row["file"] for row in rows)
    return ImageFolder(root, paths, labels.astype(np.int32), tuple(names.tolist()))


class DomainFolder(ImageFolder):
    """One domain's images in ImageNet-C's layout; those that its folder lacks are unreadable."""

    def check(self) -> None:
        """Log which images are missing, once, and refuse a corruption with others than listed."""
        _compare(self.root, self.paths)


@functools.cache
def _compare(root: Path, paths: tuple[str, ...]) -> None:
    stored = {path for path in find_images(root)[0] if "/" in path}
    more = sorted(stored.difference(paths))
    if more and root.name != CLEAN:  # of clean images, some may not have been corrupted
        what = f"has {len(more)} images that other domains lack, such as {printable(more[0])}"
        raise ValueError(f"{root}: {what}")
    if missing := [path for path in paths if path not in stored]:
        message = "%s: lacks %d of %d images, unreadable there, such as %s"
        log.warning(message, root, len(missing), len(paths), printable(missing[0]))


def imagenet_c(root: Path) -> dict[Domain, DomainFolder]:
    """Open `<corruption>/<severity>/<class>/…` and `clean/<class>/…`, in `root` or its folders.

    A class's images are listed from the domain with the most classes; all have the same names.
    """
    folders = folders_in(root)
    known = {domain.corruption for domain in _domains(folders)}
    groups = [folder for folder in folders if folder.name not in known]
    domains = _domains([*folders, *(place for group in groups for place in folders_in(group))])
    places = sorted(domains.values(), key=lambda place: len(folders_in(place)), reverse=True)
    classes = {path.name: path for place in places[::-1] for path in folders_in(place)}
    if len(classes) < 2:
        raise ValueError(f"{root}: expected <corruption>/<severity 1 to 5>/<class>, two or more")
    folders = sorted(classes.values(), key=_with_numbers)
    listed = list_folders(root, folders, [nfc(folder.name) for folder in folders])
    shared = listed.paths, listed.labels, listed.class_names
    return {domain: DomainFolder(place, *shared, raw=True) for domain, place in domains.items()}


def _domains(folders: Iterable[Path]) -> dict[Domain, Path]:
    domains: dict[Domain, Path] = {}
    for folder in folders:
        clean = folder.name == CLEAN
        for severity in (0,) if clean else range(1, SEVERITIES + 1):
            domain, place = Domain(folder.name, severity), folder / str(severity or "")
            if place.is_dir() and domains.setdefault(domain, place) != place:
                raise ValueError(f"{domain} is in {domains[domain]} and in {place}")
    return domains
