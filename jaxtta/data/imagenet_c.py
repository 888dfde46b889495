"""Corrupted images in ImageNet-C's layout: `<corruption>/<severity>/<class>/…`."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtta.data.corruptions import CLEAN, SEVERITIES
from jaxtta.data.datasets import Domain
from jaxtta.data.folders import ImageFolder, images_in, in_class_order, list_folders
from jaxtta.data.recognise import folders_in, hints
from jaxtta.images import printable
from jaxtta.io import nfc

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DomainFolder(ImageFolder):
    """One domain's images; those that its folder lacks are unreadable there.

    Attributes:
        clean: whether it may have more images than are listed: some may not have been corrupted.
        others: the folders of all domains.
    """

    clean: bool = False
    others: tuple[Path, ...] = ()

    def check(self) -> None:
        """Log which images are missing, once, and refuse a corruption with others than listed."""
        _ = self._compared

    @functools.cached_property
    def _compared(self) -> bool:
        stored, listed = {p for p in images_in(self.root) if "/" in p}, set(self.paths)
        missing, more = [p for p in self.paths if p not in stored], sorted(stored - listed)
        if more and not self.clean:
            poor = (place for place in self.others if not os.path.lexists(place / more[0]))
            raise ValueError(
                f"{self.root}: has {len(more)} images that {next(poor)} lacks, such as "
                f"{printable(more[0])}: complete that folder, or remove them from this one"
            )
        for what, paths in (
            ("lacks %d of %d images, unreadable there", missing),
            ("has %d images besides the %d listed, left out", more),
        ):
            if paths:
                message = f"%s: {what}, such as %s"
                log.warning(message, self.root, len(paths), len(listed), printable(paths[0]))
        return True


def imagenet_c(
    root: str | Path, names_of: Callable[[Sequence[str]], Sequence[str]] = tuple
) -> dict[Domain, DomainFolder]:
    """Open a folder in ImageNet-C's layout.

    The classes are those of all domains. The images of a class are listed from the domain with the
    most classes that has any; the others have the same file names.

    Args:
        root: contains `<corruption>/<severity>/<class>/…`, or folders that do (`noise/`, `blur/`,
            as in the public archives), and optionally `clean/<class>/…` with the same names.
        names_of: class names from the names of the class folders, which it gets in label order.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the layout is different, a domain is there twice, there are fewer than two
            classes, or a class has no image in any domain.
    """
    root = Path(root)
    domains, folders = _domains(root), folders_in(root)
    for folder in folders:
        if not any(folder in place.parents for place in domains.values()):
            for domain, place in _domains(folder).items():
                if domains.setdefault(domain, place) != place:
                    raise ValueError(f"{root}: {domain} is in {domains[domain]} and in {place}")
    if not domains:
        raise ValueError(
            f"{root}: has no <corruption>/<severity 1 to {SEVERITIES}> folders"
            f"{hints(root, folders)}"
        )
    classes = {place: {path.name for path in folders_in(place)} for place in domains.values()}
    places = sorted(classes, key=lambda place: -len(classes[place]))  # stable: the first of equals
    known = set().union(*classes.values())
    if len(known) < 2:
        raise ValueError(f"{places[0]}: has {len(known)} class folders, expected at least two")
    folders = in_class_order(_first_with_images(places, name) for name in known)
    names = tuple(names_of([nfc(folder.name) for folder in folders]))
    listed = list_folders(root, folders, names)
    benchmark = {
        domain: DomainFolder(
            *(place, listed.paths, listed.labels, names),
            raw=True,
            clean=domain == Domain(CLEAN),
            others=tuple(domains.values()),
        )
        for domain, place in domains.items()
    }
    for dataset in benchmark.values():
        if classes[dataset.root] != known:
            dataset.check()
    return benchmark


def _first_with_images(places: Sequence[Path], name: str) -> Path:
    """A class's folder in the first domain that has images of it."""
    folders = [place / name for place in places]
    return next((folder for folder in folders if any(images_in(folder))), folders[0])


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
