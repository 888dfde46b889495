"""Images in class folders, with captions, or in ImageNet-C's folders."""

import dataclasses
import functools
import itertools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxtta import images
from jaxtta.corruptions import CLEAN, SEVERITIES
from jaxtta.data.datasets import Domain
from jaxtta.data.recognise import folders_in, hints, refuse_other_layouts
from jaxtta.images import find_images, open_image, printable
from jaxtta.io import digest_files, nfc, read_rows

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A dataset of image files.

    Raw images are read as they are stored, as benchmarks are: not turned by their EXIF orientation,
    and without transparency. Own images are turned upright.
    """

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
        pixels = np.asarray(open_image(self.root / self.paths[number], raw=self.raw))
        height, width, _ = pixels.shape
        if min(height, width) <= 2 * self.border:
            inside = f"{width}×{height} pixels leave nothing within a border of {self.border}"
            raise images.UnreadableImageError(f"{self.name(number)}: {inside}")
        return pixels[self.border : height - self.border, self.border : width - self.border]

    def name(self, number: int) -> str:
        """The image's path, for messages."""
        return printable(self.root / self.paths[number])

    def content(self) -> str:
        """A digest of the files, with how they are read."""
        how = "as stored" if self.raw else "upright"
        return f"{digest_files(self.files)}, {how}, border {self.border}"


def class_folders(root: str | Path) -> list[Path]:
    """The class folders of a folder, sorted; an error for splits, corruptions or fewer than two."""
    folders = _in_class_order(folders_in(Path(root)))
    refuse_other_layouts(Path(root), folders)
    return folders


def _in_class_order(folders: Iterable[Path]) -> list[Path]:
    """Sort class folders by name, with the numbers in names as numbers (0 to 11; c1 to c12)."""

    def key(folder: Path) -> tuple[list[str | int], str]:
        parts = re.split("([0-9]+)", nfc(folder.name))  # text and numbers in turn
        return [int(part) if place % 2 else part for place, part in enumerate(parts)], folder.name

    folders = sorted(folders, key=key)
    for folder, following in itertools.pairwise(folders):
        if nfc(folder.name) == nfc(following.name):
            raise ValueError(f"{folder}: two class folders have this name, in two Unicode forms")
    return folders


def list_folders(
    root: str | Path, folders: Sequence[Path], class_names: Sequence[str], raw: bool = False
) -> ImageFolder:
    """List the images of class folders in label order, without opening them.

    Files of other formats are logged by suffix, and how many images lie in sub-folders of the class
    folders; these are of the class folder's class. `root` contains the folders, or is the only one.
    """
    root = Path(root)
    paths, labels, others, nested = [], [], Counter[str](), []
    for label, folder in enumerate(folders):
        listed, passed = find_images(folder, root)
        if not listed:
            others = f", it has {images.count_suffixes(passed)}, which cannot be read here"
            raise ValueError(f"{folder}: class folder without images{others if passed else ''}")
        paths += listed if folder == root else [f"{folder.name}/{path}" for path in listed]
        labels += [label] * len(listed)
        others += passed
        nested += [folder / path for path in listed if "/" in path]
    images.log_passed_over(root, others)
    if nested and len(folders) > 1:
        log.warning(
            "%s: %d of %d images lie in sub-folders of the class folders, such as %s, and are of "
            "the class folder's class; if they are the classes, give the folder that holds them",
            *(printable(root), len(nested), len(paths), printable(nested[0].parent)),
        )
    labels = np.asarray(labels, np.int32)
    return ImageFolder(root, tuple(paths), labels, tuple(class_names), raw=raw)


def image_folder(root: str | Path) -> ImageFolder:
    """List the images of `root/<class>/…`, to be opened upright; see `class_folders`."""
    folders = class_folders(root)
    if alone := len(images.lone_images(root)):
        log.warning("%s: %d images outside the class folders passed over", printable(root), alone)
    return list_folders(root, folders, [nfc(folder.name) for folder in folders])


def captioned_folder(root: str | Path) -> ImageFolder:
    """List the images in a folder's `captions.csv`, to be opened upright, with a class per caption.

    The file has columns file and caption; its paths are relative to the folder.
    """
    root, table = Path(root), Path(root) / "captions.csv"
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if not table.is_file():
        raise ValueError(f"{root}: has no captions.csv, with columns file and caption")
    captions: list[tuple[str, str]] = []
    for line, row in read_rows(table, ("file", "caption")):
        # disks and spreadsheets may have a name in different Unicode forms
        forms = row["file"], nfc(row["file"]), unicodedata.normalize("NFD", row["file"])
        path = next((form for form in forms if (root / form).is_file()), None)
        caption = nfc(row["caption"]).strip()
        if path is None:
            raise ValueError(f"{line}: no such image: {row['file']!r}")
        if not caption:
            raise ValueError(f"{table}: {row['file']} has no caption")
        captions.append((path, caption))
    names, labels = np.unique([caption for _, caption in captions], return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{table}: has {len(names)} different captions, expected at least two")
    paths = tuple(path for path, _ in captions)
    return ImageFolder(root, paths, labels.astype(np.int32), tuple(names.tolist()))


@dataclasses.dataclass(frozen=True)
class DomainFolder(ImageFolder):
    """One domain's images in ImageNet-C's layout; those that its folder lacks are unreadable."""

    others: tuple[Path, ...] = ()  # the folders of all domains

    def check(self) -> None:
        """Log which images are missing, once, and refuse a corruption with others than listed."""
        _ = self._compared

    @functools.cached_property
    def _compared(self) -> bool:
        stored = {path for path in find_images(self.root)[0] if "/" in path}
        missing = [path for path in self.paths if path not in stored]
        more = sorted(stored.difference(self.paths))
        if more and self.root.name != CLEAN:  # of clean images, some may not have been corrupted
            poor = next(place for place in self.others if not os.path.lexists(place / more[0]))
            raise ValueError(
                f"{self.root}: has {len(more)} images that {poor} lacks, such as "
                f"{printable(more[0])}: complete that folder, or remove them from this one"
            )
        for what, paths in (
            ("lacks %d of %d images, unreadable there", missing),
            ("has %d images besides the %d listed, left out", more),
        ):
            if paths:
                message = f"%s: {what}, such as %s"
                log.warning(message, self.root, len(paths), len(self), printable(paths[0]))
        return True


def imagenet_c(
    root: str | Path, names_of: Callable[[Sequence[str]], Sequence[str]] = tuple
) -> dict[Domain, DomainFolder]:
    """Open a folder with `<corruption>/<severity>/<class>/…` and optionally `clean/<class>/…`.

    These may also be in folders of the root (`noise/`, `blur/`), as in ImageNet-C's archives. The
    classes are those of all domains. The images of a class are listed from the domain with the most
    classes that has any; the others have the same file names. `names_of` makes class names from the
    names of the class folders in label order.
    """
    root = Path(root)
    domains, folders = _domains(root), folders_in(root)
    for folder in folders:
        if not any(folder in place.parents for place in domains.values()):
            for domain, place in _domains(folder).items():
                if domains.setdefault(domain, place) != place:
                    raise ValueError(f"{root}: {domain} is in {domains[domain]} and in {place}")
    if not domains:
        wanted = f"<corruption>/<severity 1 to {SEVERITIES}>"
        raise ValueError(f"{root}: has no {wanted} folders{hints(root, folders)}")
    classes = {place: {path.name for path in folders_in(place)} for place in domains.values()}
    places = sorted(classes, key=lambda place: -len(classes[place]))  # stable: the first of equals
    known = set().union(*classes.values())
    if len(known) < 2:
        raise ValueError(f"{places[0]}: has {len(known)} class folders, expected at least two")
    having = {  # the first domain with images of a class
        name: next((p for p in places if find_images(p / name)[0]), places[0]) for name in known
    }
    folders = _in_class_order(place / name for name, place in having.items())
    listed = list_folders(root, folders, names_of([nfc(folder.name) for folder in folders]))
    shared = listed.paths, listed.labels, listed.class_names
    others = tuple(domains.values())
    benchmark = {
        domain: DomainFolder(place, *shared, raw=True, others=others)
        for domain, place in domains.items()
    }
    for dataset in benchmark.values():
        if classes[dataset.root] != known:
            dataset.check()
    return benchmark


def _domains(root: Path) -> dict[Domain, Path]:
    domains = {}
    for folder in folders_in(root):
        if folder.name == CLEAN:
            domains[Domain(CLEAN)] = folder
            continue
        for severity in range(1, SEVERITIES + 1):
            if (folder / str(severity)).is_dir():
                domains[Domain(folder.name, severity)] = folder / str(severity)
    return domains
