"""The code that runs, stores and reports stays small: lines, file sizes and repetitions."""

from collections import defaultdict

from conftest import EXPERIMENTS

ROOT = EXPERIMENTS.parent
PACKAGES = [ROOT / "jaxtta" / name for name in ("evaluate", "report", "cli", "data", "deploy")]
FOLDERS = [*PACKAGES, EXPERIMENTS, ROOT / "benchmarks"]
LOOP = [ROOT / "jaxtta" / "continual" / "training.py"]  # of its packages, the loop alone
SUFFIXES = (".py", ".j2", ".css")
# 6,000; 300 for sweeps over devices and hosts, packed images and buckets; 1,150 for experiments on
# all methods and guards; 5,050 for deployment: sessions, logs, bundles, HTTP, pilot and its report;
# 100 for making arrays as CIFAR-10-C's, and comparing them; 30 for fused attention, and for saying
# on which device and commit a timing was made.
TOTAL, LONGEST, RUN = 12630, 355, 10


def lines_by_file():
    """The lines of every Python file, template and style sheet of these folders, by its path."""
    files = [path for folder in FOLDERS for path in sorted(folder.rglob("*"))]
    files = [path for path in (*files, *LOOP) if path.suffix in SUFFIXES]
    return {str(path.relative_to(ROOT)): path.read_text().split("\n")[:-1] for path in files}


def without_imports(lines):
    """Line numbers and stripped text of the lines that are neither blank nor part of an import."""
    inside = False
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if inside or text.startswith(("import ", "from ")):
            inside = (inside or text.endswith("(")) and not text.endswith(")")
        elif text:
            yield number, text


def repetitions(files):
    """Places of the same ten lines; of longer repetitions, each pair of places once."""
    places = defaultdict(list)
    for name, lines in files.items():
        kept = [*without_imports(lines)]
        for start in range(len(kept) - RUN + 1):
            block = kept[start : start + RUN]
            places[tuple(text for _, text in block)].append((name, block[0][0]))
    found, pairs = [], set()
    for same in places.values():
        pair = tuple(sorted({name for name, _ in same}))
        if len(same) > 1 and pair not in pairs:
            pairs.add(pair)
            found.append(" = ".join(f"{name}:{number}" for name, number in same))
    return found


def test_the_code_is_small():
    assert sum(map(len, lines_by_file().values())) <= TOTAL


def test_files_are_short():
    assert {name: len(x) for name, x in lines_by_file().items() if len(x) > LONGEST} == {}


def test_nothing_stands_twice():
    assert repetitions(lines_by_file()) == []


def test_repetitions_are_found():
    block = [f"x{number} = {number}" for number in range(RUN)]
    imports = ["from a import (", *(f"    b{number}," for number in range(RUN)), ")"]
    assert repetitions(
        {"a.py": [*imports, *block], "b.py": [*imports, "", *block[:5], "", *block[5:]]}
    )
    assert not repetitions({"a.py": [*imports, *block[1:]], "b.py": [*imports, *block]})
