r"""Write the tables and figures of the documents from the files in docs/results.

    python docs/render.py           # fill what stands between the markers of every page
    python docs/render.py --check   # say which pages are out of date; exit code 1 if any is

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, a figure in a sentence between
`<!-- value: NAME -->` and `<!-- end -->`. NAME is a function of docs/tables.py that returns the
text; words after it are its arguments: `<!-- value: gain mint reset -->`, "batch 1" in quotes.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import tables

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "tpu/README.md")
FENCE = r"^ *```.*?^ *```$"  # what is shown as code is left alone
MARKER = re.compile(
    rf"{FENCE}|(?P<start><!-- (?P<kind>table|value): (?P<call>.*?) -->)"
    r"(?P<old>.*?)<!-- end -->",
    re.M | re.S,
)


def pages() -> list[Path]:
    """Every document with tables."""
    return sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})


def content(kind: str, call: str) -> str:
    """What stands behind a marker; ValueError says what is wrong with it or its file."""
    name, *arguments = shlex.split(call)
    make = getattr(tables, name.replace("-", "_"), None)
    if name.startswith("_") or getattr(make, "__module__", None) != tables.__name__:
        known = [n for n, f in vars(tables).items() if getattr(f, "__module__", "") == "tables"]
        names = ", ".join(n for n in known if not n.startswith("_"))
        raise ValueError(f"unknown {kind} {name!r}, expected one of {names}")
    try:
        return make(*arguments).strip()
    except FileNotFoundError as missing:
        file = Path(missing.filename)
        raise ValueError(f"the {kind} {name!r} needs {file}, see docs/results/README.md") from None
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the {kind} {call!r}: {type(error).__name__}: {error}") from error


def render(text: str) -> str:
    """A page with its tables and figures as the result files have them."""

    def filled(found: re.Match[str]) -> str:
        if not found["start"]:
            return found[0]
        if "<!-- table:" in found["old"] or "<!-- value:" in found["old"]:
            raise ValueError(f"{found['start']} has no <!-- end -->")
        made = content(found["kind"], found["call"])
        made = f"\n{made}\n" if found["kind"] == "table" else made
        return f"{found['start']}{made}<!-- end -->"

    rest = re.sub(MARKER, "", text)
    if "<!-- table:" in rest or "<!-- value:" in rest:
        raise ValueError("the last marker has no <!-- end -->")
    return MARKER.sub(filled, text)


def main() -> int:
    """Render every page, or check that nothing would change."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    wrong = []
    for path in pages():
        text, name = path.read_text(), path.relative_to(ROOT)
        try:
            new = render(text)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
            continue
        if new != text and check:
            wrong.append(f"{name} is out of date, run python docs/render.py")
        elif new != text:
            path.write_text(new)
            print(f"wrote {name}")
    print("\n".join(f"error: {line}" for line in wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
