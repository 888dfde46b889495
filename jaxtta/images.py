"""Image files."""

import unicodedata


def printable(text: object) -> str:
    r"""Escape what cannot be printed on one line: file names may hold any bytes.

    Args:
        text: a path or other text.

    Returns:
        It in one line; bytes that are no UTF-8 as \xe9, line breaks as \n.
    """
    return "".join(map(_escaped, str(text)))


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python reads bytes that are no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return character.encode("unicode_escape").decode() if hidden else character
