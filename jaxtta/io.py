"""Files: arrays with a JSON description in one safetensors file, and writes that are atomic."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

_METADATA = "about"  # safetensors keeps strings only, so the description is JSON under one key


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file via a temporary name, so that it is complete or not there at all.

    Args:
        path: of the file.

    Yields:
        The temporary path to write to; it gets the file's name at the end, and is removed if
        the block raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically.

    Args:
        path: of the file; its folder is made.
        content: anything JSON knows; NaN is refused.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def save_arrays(
    path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write named arrays and a description to a safetensors file, atomically.

    Args:
        path: of the file.
        arrays: by name.
        metadata: anything JSON knows.
    """
    # The format keeps bytes in C order and does not notice another one.
    content = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(content, {_METADATA: json.dumps(metadata or {})}))


def load_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what `save_arrays` wrote.

    Args:
        path: of the file.

    Returns:
        The arrays by name, and the description.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no safetensors file, or its description is no JSON object.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(str(path), "np") as file:
            metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: is damaged or no safetensors file ({error})") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: its description is {metadata!r}, expected a JSON object")
    return arrays, metadata
