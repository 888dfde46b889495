"""Digests of stored images, by which a run notices that they have changed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

READ_UP_TO = 512 * 2**20
"""Bytes; larger sets of files are told apart by names, sizes and times, without reading them."""


def digest_files(files: Sequence[Path], read_up_to: int = READ_UP_TO) -> str:
    """A digest of files that does not depend on their folder.

    Args:
        files: in a fixed order; missing ones count as such.
        read_up_to: bytes; if the files have more together, their sizes and modification times stand
            for their content.
    """
    stats = [file.stat() if file.exists() else None for file in files]
    whole = sum(stat.st_size for stat in stats if stat) <= read_up_to
    digest = hashlib.blake2b(digest_size=8)
    for file, stat in zip(files, stats, strict=True):
        text = "missing" if stat is None else str(stat.st_size)
        if stat is not None and not whole:
            text += f" {stat.st_mtime_ns // 10**9}"  # copies keep whole seconds only
        digest.update(f"{file.name!r} {text}\n".encode())
        if whole and file.is_file():
            try:
                digest.update(file.read_bytes())
            except OSError:  # the reader of the images will say so
                digest.update(b"unreadable")
    return f"{'bytes' if whole else 'sizes and times'} {digest.hexdigest()}"


def digest_array(array: np.ndarray) -> str:
    """A digest of an array in memory."""
    digest = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(array).tobytes())
    return f"bytes {digest.hexdigest()}"
