"""What each subpackage may import."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxtta"
FUNCTIONS = {"losses", "metrics", "bootstrap", "tree", "views", "augmix", "corruptions"}
FUNCTIONS |= {"io", "images", "flops", "strong_views", "corruptions_cifar", "cifar_pickles"}
MODELS = FUNCTIONS | {"models", "optim", "assets"}
METHODS = MODELS | {"adapters", "continual", "diagnose", "data"}
MAY_IMPORT = {
    **{name: set() for name in FUNCTIONS},
    "assets": set(),
    "remote": set(),
    "testing": {"adapters", "io", "models"},
    "__main__": {"cli"},
    "models": {"io", "images"},
    "data": {"io", "images", "corruptions"},
    "optim": {"tree", "io"},
    "adapters": MODELS,
    "continual": MODELS,
    "diagnose": MODELS,
    "parallel": {"adapters"},
    "evaluate": METHODS | {"parallel"},
    "report": METHODS | {"evaluate", "deploy"},
    "deploy": METHODS,
    "cli": METHODS | {"deploy"} | {"evaluate", "report", "remote"},
}


def subpackage_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every module and name that a file imports, from the package's root."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module.split(".")[0] == "jaxtta":
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name != "jaxtta", "the root holds every subpackage: name those needed"
                if alias.name.startswith("jaxtta."):
                    yield alias.name


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.name != "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_subpackages_import_only_what_they_may(path):
    own = subpackage_of(path)
    assert {name.split(".")[1] for name in imports(path)} <= MAY_IMPORT[own] | {own}


def test_no_module_imports_itself_through_others():
    """No cycle, not even one that a function-level import hides."""
    modules = {
        ".".join(("jaxtta", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in FILES
    }
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}

    def module_of(name):
        return name if name in modules else name.rpartition(".")[0]

    graph = {
        name: {module_of(other) for other in imports(path)} - {name}
        for name, path in modules.items()
        if path.name != "__init__.py"  # it only gathers names; to import from it is importing all
    }
    graph = {name: edges & graph.keys() for name, edges in graph.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError


def test_importing_jaxtta_brings_in_nothing_heavy():
    """No TensorFlow, plotting, command-line or corruption library."""
    code = (
        "import sys, jaxtta; "
        "heavy = {'tensorflow', 'matplotlib', 'imagecorruptions', 'tyro', 'grain'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
