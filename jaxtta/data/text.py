"""Text files beside images: class names, captions and lists."""

import csv
import json
import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jaxtta.images import printable

log = logging.getLogger(__name__)


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


def read_class_names(path: str | Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Read class names for prompts; equal ones are logged.

    Args:
        path: a JSON object from folder name to class name (for example ImageNet's wnids), a JSON
            list, or plain text with one name per line; the last two in folder order, in which
            numbers are sorted as numbers.
        folders: the class folders' names; may be empty if the file has a list.

    Returns:
        One name per class.

    Raises:
        ValueError: if the file cannot be read or has no name for a folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: cannot be read as class names (no such file)")
    text = read_text(path)
    try:
        names = json.loads(text) if path.suffix.lower() == ".json" else text.rstrip().split("\n")
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as class names ({error})") from error
    if isinstance(names, dict):
        if not folders:
            raise ValueError(f"{path}: is an object by folder name, expected a list of names")
        by_folder = {nfc(folder): name for folder, name in names.items()}
        missing = [folder for folder in folders if nfc(folder) not in by_folder]
        if missing:
            raise ValueError(f"{path}: has no name for {', '.join(missing[:5])}")
        names = [by_folder[nfc(folder)] for folder in folders]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: expected a list of names")
    names = [nfc(name).strip() for name in names]
    if not names:
        raise ValueError(f"{path}: has no names")
    if "" in names:
        raise ValueError(f"{path}: name {names.index('') + 1} of {len(names)} is empty")
    _warn_of_equal(names, path)
    return tuple(names)


def given_class_names(names: Sequence[str], folders: Sequence[str] = ()) -> tuple[str, ...]:
    """Parse the class names of an option: names, or a single .json or .txt file with them.

    Args:
        names: the option's values; may be empty.
        folders: as for `read_class_names`.

    Returns:
        The names; empty if `names` is.

    Raises:
        ValueError: as `read_class_names`, and for a file of another suffix.
    """
    if len(names) == 1 and Path(names[0]).suffix.lower() in (".json", ".txt"):
        return read_class_names(names[0], folders)
    if len(names) == 1 and Path(names[0]).is_file():
        raise ValueError(f"{names[0]}: expected class names in a .txt or .json file")
    return tuple(map(nfc, names))


def _warn_of_equal(names: Iterable[str], path: Path) -> None:
    """Log classes whose names differ at most in case and spaces."""
    first: dict[str, tuple[int, str]] = {}
    for number, name in enumerate(names):
        before, other = first.setdefault(" ".join(name.casefold().split()), (number, name))
        if before != number:
            log.warning(
                "%s: classes %d and %d have the same name (%s, %s); a tie counts for the first",
                *(printable(path), before, number, printable(other), printable(name)),
            )
