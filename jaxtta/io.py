"""Files: arrays with a JSON description in one safetensors file, states, text, atomic writes.

    save_state("state.safetensors", state)
    state = load_state("state.safetensors", like=adapter.init(params))

Every file is complete or not there at all.
"""

import contextlib
import csv
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
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

    Examples:
        >>> with jaxtta.io.atomic_write("table.txt") as path:
        ...     _ = path.write_text("complete, or not there")
        >>> Path("table.txt").read_text()
        'complete, or not there'
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


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, atomically.

    Args:
        path: of the file.
        text: may hold parts of file names that are not UTF-8; they are escaped.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


@contextlib.contextmanager
def error_context(context: object) -> Iterator[None]:
    """Put a context, such as a file's name, before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{context}: {error}") from error


def nfc(text: str) -> str:
    """Text in Unicode's composed form (NFC); macOS decomposes the names of files (NFD)."""
    return unicodedata.normalize("NFC", text)


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, with or without a byte-order mark.

    Args:
        path: the file.

    Returns:
        Its text; line ends are single line feeds, whatever the file has.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is in another encoding.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error.reason}), save it as UTF-8") from error


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Read a table in CSV, in UTF-8, separated by commas, semicolons or tabs.

    Args:
        path: the file, whose first line names the columns.
        columns: those that it must have.

    Yields:
        The file's name with the line's number, and the text in each of these columns, for each line
        that is not blank.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not UTF-8, cannot be read as CSV, lacks a column, or a line has more
            than the first.
    """
    lines = read_text(path).split("\n")
    separator = max(",;\t", key=lines[0].count)
    rows = csv.DictReader((f"{line}\n" for line in lines), delimiter=separator, restval="")
    try:
        if not set(columns) <= set(rows.fieldnames or ()):
            raise ValueError(f"{path}: has no columns {' and '.join(columns)}")
        for row in rows:
            if any(row.pop(None, ())):  # the rest of a text that holds the separator
                raise ValueError(
                    f"{path}: line {rows.line_num} has more than {len(row)} columns; text with "
                    f"{separator!r} needs quotes around it"
                )
            found = {column: row[column] for column in columns}
            if any(map(str.strip, found.values())):  # spreadsheets leave blank lines at the end
                yield f"{path}: line {rows.line_num}", found
    except csv.Error as error:
        raise ValueError(f"{path}: line {rows.line_num}: {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; a ValueError for anything else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: has a {type(value).__name__}, expected an object")
    return value


def digest_files(files: Sequence[Path], read_up_to: int = 512 * 2**20) -> str:
    """A digest of files, by which a run notices that they have changed.

    Args:
        files: in a fixed order, wherever they lie; missing ones count as such.
        read_up_to: bytes; if the files have more together, their sizes and modification times stand
            for their content.
    """
    stats = [file.stat() if file.exists() else None for file in files]
    whole = sum(stat.st_size for stat in stats if stat) <= read_up_to
    digest = hashlib.blake2b(digest_size=8)
    for file, stat in zip(files, stats, strict=True):
        text = str(stat.st_size) if stat else "missing"
        if stat and not whole:
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


def digest_leaves(tree: Any) -> str:
    """A digest of the values of a tree of arrays, such as a model's parameters."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def as_json(content: Any) -> Any:
    """A value as JSON gives it back: tuples are lists, and what it does not know is its text."""
    return json.loads(json.dumps(content, default=str))


def digest_of(content: Any) -> str:
    """A short hash of a JSON value, which may hold arrays."""
    words = json.dumps(content, sort_keys=True, default=digest_array).encode()
    return hashlib.blake2b(words, digest_size=16).hexdigest()


def save_arrays(
    path: str | Path, arrays: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write named arrays and a description to a safetensors file, atomically.

    Args:
        path: of the file.
        arrays: by name.
        metadata: anything JSON knows.

    Examples:
        >>> jaxtta.io.save_arrays("x.safetensors", {"x": np.arange(3)}, {"unit": "m"})
        >>> arrays, metadata = jaxtta.io.load_arrays("x.safetensors")
        >>> arrays["x"].tolist(), metadata
        ([0, 1, 2], {'unit': 'm'})
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


def save_state(path: str | Path, state: Any, note: Any = None) -> None:
    """Save the state of an adapter, to continue its stream later.

    Args:
        path: of the `.safetensors` file, written atomically.
        state: what the adapter's `init` or `step` gave, or any other tree of arrays.
        note: any JSON value, kept beside it.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.tent(model, task)
        >>> jaxtta.save_state("state.safetensors", adapter.init(params), note="no image yet")
    """
    leaves = _leaves(state)
    # Types that numpy lacks, bfloat16 for one, are kept as bytes.
    arrays = {name: _as_bytes(leaf) if leaf.dtype.kind == "V" else leaf for name, leaf in leaves}
    save_arrays(path, arrays, {"leaves": _describe(leaves), "note": note})


def load_state(path: str | Path, like: Any, *, part: bool = False) -> Any:
    """Load what `save_state` saved.

    Args:
        path: of the file.
        like: a state of the same adapter and model, `adapter.init(params)`.
        part: whether the file may hold more than `like`.

    Returns:
        A state of the structure of `like`, equal to the saved one bit for bit.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds no state, or one of another structure (another method, choice
            of parameters, optimiser or number of classes) or of other parameters.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example:

        >>> adapter = jaxtta.adapters.tent(model, task)
        >>> jaxtta.save_state("state.safetensors", adapter.init(params))
        >>> state = jaxtta.load_state("state.safetensors", like=adapter.init(params))
        >>> int(state.seen)
        0
    """
    arrays, metadata = load_arrays(path)
    saved, wanted = metadata.get("leaves"), _describe(_leaves(like))
    if not isinstance(saved, dict) or saved.keys() != arrays.keys():
        raise ValueError(f"{path}: holds no adapter's state")
    if part:
        saved = {name: saved[name] for name in wanted if name in saved}
        arrays = {name: arrays[name] for name in saved}
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())[0]
        where = "it has" if odd in saved else "it lacks"
        raise ValueError(
            f"{path}: is the state of another method, optimiser or model: {where} {odd}"
        )
    for name, shape_and_dtype in wanted.items():
        if saved[name] != shape_and_dtype:
            raise ValueError(
                f"{path}: is the state of another method, optimiser, task or model: "
                f"{name} is {saved[name]}, expected {shape_and_dtype}"
            )
    dtypes = {name: leaf.dtype for name, leaf in _leaves(like)}
    values = {
        name: jnp.asarray(
            array.view(dtypes[name]).reshape(wanted[name][0]) if dtypes[name].kind == "V" else array
        )
        for name, array in arrays.items()
    }
    for name, expected in _leaves(like):
        found = arrays[name]
        if name.rpartition("/")[2] == "fingerprint" and not np.array_equal(found, expected):
            raise ValueError(
                f"{path}: is the state of another model: its parameters have checksum "
                f"{int(np.ravel(found)[0]):08x}, expected {int(np.ravel(expected)[0]):08x}"
            )

    def restore(keys: tuple[Any, ...], leaf: Any) -> jax.Array:
        value = values[_path(keys)]
        return (
            jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else value
        )

    return jax.tree.map_with_path(restore, like)


def save_checkpoint(folder: Path, step: int, tree: Any, note: Any = None) -> None:
    """Save a tree of arrays and a JSON value after so many steps; only the newest step is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.safetensors"
    save_state(path, tree, note)
    for earlier in {*folder.glob("step-*.safetensors")} - {path}:
        earlier.unlink()


def restore_checkpoint(folder: Path, like: Any = None) -> tuple[int, Any, Any] | None:
    """Restore the newest step, its tree and its note; None without a checkpoint.

    `like` is a tree of the same structure; what the checkpoint has beside it is left out. Without,
    the tree is nested dicts of numpy arrays. Raises a ValueError if it is damaged or does not fit.
    """
    steps = {int(path.stem[5:]): path for path in folder.glob("step-*.safetensors")}
    if not steps:
        return None
    path = steps[max(steps)]
    with error_context("unusable checkpoint, remove it to start from the beginning"):
        arrays, metadata = load_arrays(path)
        tree = unflatten_dict(arrays, "/") if like is None else load_state(path, like, part=True)
    return max(steps), tree, metadata.get("note")


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _leaves(state: Any) -> list[tuple[str, np.ndarray]]:
    return [
        (_path(keys), np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf))
        for keys, leaf in jax.tree.leaves_with_path(state)
    ]


def _describe(leaves: list[tuple[str, np.ndarray]]) -> dict[str, list[Any]]:
    return {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in leaves}


def _as_bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), np.uint8)
