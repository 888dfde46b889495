"""What each room of the house may import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "jaxtta"
PRIMITIVES = {"clip", "tree", "losses", "metrics", "views", "augmix"}
MAY_IMPORT = {
    "clip": set(),
    "tree": set(),
    "losses": set(),
    "metrics": set(),
    "views": set(),
    "augmix": set(),
    "data": set(),
    "assets": set(),
    "optim": {"tree"},
    "objectives": PRIMITIVES,
    "adapters": PRIMITIVES | {"objectives", "optim", "assets"},
    "diagnose": PRIMITIVES,
    "continual": PRIMITIVES | {"optim", "objectives"},
    "sweep": PRIMITIVES
    | {"optim", "objectives", "adapters", "continual", "data", "assets", "diagnose"},
}


def room_of(path):
    return path.relative_to(HOUSE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "jaxtta":
                yield from (alias.name for alias in node.names)
            elif node.module.startswith("jaxtta."):
                yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("jaxtta."))


FILES = [p for p in sorted(HOUSE.rglob("*.py")) if p.parent != HOUSE or p.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_rooms_import_only_what_they_may(path):
    room = room_of(path)
    assert set(imported_rooms(path)) <= MAY_IMPORT[room] | {room}


def test_importing_jaxtta_brings_in_nothing_heavy():
    """No TensorFlow, plotting, command-line or corruption library."""
    code = (
        "import sys, jaxtta; "
        "heavy = {'tensorflow', 'matplotlib', 'imagecorruptions', 'tyro', 'grain'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
