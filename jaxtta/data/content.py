"""Digests of stored images, by which a run notices that they have changed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

READ_UP_TO = 512 * 2**20
"""Bytes; larger sets of files are told apart by names, sizes and times, without reading them."""
_CHUNK = 2**20


def digest_files(files: Sequence[Path], read_up_to: int = READ_UP_TO) -> str:
    """A digest of files that does not depend on their folder.

    Args:
        files: in a fixed order; missing ones count as such.
        read_up_to: bytes; if the files have more together, their sizes and modification times stand
            for their content.

    Returns:
        A short text.
    """
    found = []
    for file in files:
        try:
            found.append(file.stat())
        except OSError:
            found.append(None)
    whole = sum(stat.st_size for stat in found if stat) <= read_up_to
    digest = hashlib.blake2b(digest_size=8)
    for file, stat in zip(files, found, strict=True):
        said = "missing" if stat is None else str(stat.st_size)
        if stat is not None and not whole:
            said += f" {stat.st_mtime_ns // 10**9}"  # copies keep whole seconds only
        digest.update(f"{file.name!r} {said}\n".encode())
        if stat is not None and whole and file.is_file():
            _add(digest, file)
    return f"{'bytes' if whole else 'sizes and times'} {digest.hexdigest()}"


def _add(digest: "hashlib.blake2b", file: Path) -> None:
    try:
        with file.open("rb") as content:
            while chunk := content.read(_CHUNK):
                digest.update(chunk)
    except OSError:  # the reader of the images will say so
        digest.update(b"unreadable")


def digest_array(array: np.ndarray) -> str:
    """A digest of an array in memory."""
    words = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=8)
    words.update(np.ascontiguousarray(array).tobytes())
    return f"bytes {words.hexdigest()}"
