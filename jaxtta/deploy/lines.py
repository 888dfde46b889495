r"""JSON lines that strict parsers read and that give any names and numbers back.

    line = encode("step", {"images": ["caf\udce9.png"], "signals": {"loss": float("nan")}})
    decode(line)["signals"]["loss"]     # nan

Numbers that are not finite are the texts NaN, Infinity and -Infinity. Code units of names that are
no text, and U+FFFD, are U+FFFD and their four hexadecimal digits.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

ANSWERS = ("reference", "adapted", "served")
"""The fields of a step's record that list what is answered."""
_TEXTS = ("NaN", "Infinity", "-Infinity")


def encode(event: str, content: Mapping[str, Any]) -> bytes:
    """A line of an event's name and content; a TypeError for what JSON has not."""
    text = json.dumps(
        _finite({"event": event, **content}),
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    text = re.sub("[\ud800-\udfff\ufffd]", lambda x: f"\ufffd{ord(x[0]):04x}", text)
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    """A value whose numbers that are not finite are texts."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def decode(line: bytes) -> dict[str, Any] | None:
    """What `encode` was given, with "event" beside it; None for a line that is torn or another."""
    try:
        text = re.sub("\ufffd([0-9a-f]{4})", lambda x: chr(int(x[1], 16)), line.decode())
        event = json.loads(text)
    except ValueError:
        return None
    if not isinstance(event, dict) or "event" not in event:
        return None
    # Numbers that were written as texts; elsewhere, a text may be called so.
    listed = (event.get(name) for name in ANSWERS)
    answers = [answer for each in listed if isinstance(each, list) for answer in each]
    numbers: list[Any] = [(event, ("share",)), (event.get("signals"), None)]
    for content, keys in (*numbers, *((answer, ("probability",)) for answer in answers)):
        for key in (keys or [*content]) if isinstance(content, dict) else ():
            if content.get(key) in _TEXTS:
                content[key] = float(content[key])
    return event


def number(value: Any) -> bool | int | float:
    """A scalar as JSON has it; a float32 by the shortest text that stands for it."""
    value = np.asarray(value)
    return float(str(value)) if value.dtype == np.float32 else value.item()
