"""Time, memory and arithmetic of one step of the adapters, beside the same step in PyTorch.

    python benchmarks/run.py --classes 1000 --adapters tnt:steps=1 tnt:steps=3 --steps 1
    python benchmarks/run.py --classes 1000 --adapters mgtta --frameworks jax
    python benchmarks/run.py --adapters zero_shot --frameworks jax --projectors --steps 3
    python benchmarks/run.py --model tiny --classes 10   # does it run?

A CLIP model with random weights adapts to random images; the prompts have the lengths of ImageNet's
"a photo of a {}.". PyTorch runs transformers' CLIPModel on prompts padded to 77 tokens, as in the
reference implementations, and on prompts cut to the longest. All but BATCLIP encode the text once,
beforehand. A step of TNT is one image: jaxtta cuts its views; PyTorch gets ready-made ones and runs
all of them forward and backward in every update, and then selects.

Every row is measured in a process of its own, after compilation and a first step. s/step is the
shortest step, which the other columns use; peak GB is of the process, with libraries and
compilation, or on a GPU of its allocations; GFLOP are the operations of matrix products, with
recomputed ones; "of peak" compares them per second with one large product. The last columns divide
PyTorch's row with 77 tokens by the row.
"""

import dataclasses
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from cases import Settings, tnt_steps
from tqdm import tqdm

from jaxtta import cli, evaluate, io

FORMS = (("jax", "packed"), ("torch", "77 tokens"), ("torch", "cut"))  # frameworks and prompts


def main(settings: Settings) -> None:
    """Measure every row and print the table."""
    evaluate.require_distinct(adapters=settings.adapters, frameworks=settings.frameworks)
    for name in settings.adapters:
        if not re.fullmatch(r"zero_shot|tent|batclip|mgtta|tnt(:steps=[1-9]\d*)?", name):
            known = "zero_shot, tent, batclip, tnt, tnt:steps=N or mgtta"
            raise ValueError(f"--adapters has {name!r}, expected {known}")
    least = {"classes": 2, "batch": 1, "views": 1, "views_per_chunk": 1, "steps": 1}
    evaluate.require_at_least(**{name: (getattr(settings, name), n) for name, n in least.items()})
    frameworks = [*settings.frameworks]
    if "torch" in frameworks and not importlib.util.find_spec("torch"):
        print("PyTorch is not installed: `make parity` installs it", file=sys.stderr)
        frameworks.remove("torch")
    planned = [
        (name, framework, prompts)
        for name in settings.adapters
        for framework, prompts in FORMS
        if framework in frameworks
        if not (tnt_steps(name) and prompts == "cut") and (name, framework) != ("mgtta", "torch")
    ]
    rows: list[dict[str, Any]] = []
    for name, framework, prompts in tqdm(planned, unit="row", disable=None):
        found = {"adapter": name, "framework": framework, "prompts": prompts}
        found["images"] = 1 if tnt_steps(name) else settings.batch
        rows.append(found | measured(settings, name, framework, prompts))
        seconds = rows[-1].get("seconds")
        note = f"{min(seconds):.3g} s per step" if seconds else rows[-1]["error"]
        tqdm.write(f"{name} {framework} {prompts}: {note}", file=sys.stderr)
        if settings.output:
            io.write_json(settings.output, {"settings": dataclasses.asdict(settings), "rows": rows})
    print(f"{settings.model}, {settings.classes} classes, batch {settings.batch} (TNT 1), ", end="")
    print(f"{settings.dtype}{', remat' * settings.remat}, {os.cpu_count()} CPU cores")
    succeeded = [row for row in rows if "error" not in row]
    if not succeeded:
        raise ValueError("no row could be measured")
    print(table(pd.DataFrame(succeeded)))
    if settings.projectors:
        from projectors import projection_times

        print(projection_times(settings).to_string())


def measured(settings: Settings, name: str, framework: str, prompts: str) -> dict[str, Any]:
    """Measure a row in a process of its own: its figures, or an error."""
    script = Path(__file__).with_name(f"{framework}_steps.py")
    given = json.dumps(dataclasses.asdict(settings))
    command = [sys.executable, str(script), name, prompts, given]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:  # -9 is the signal that a machine without memory sends
        return {"error": f"ended with code {done.returncode} (-9: probably out of memory)"}
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: pd.DataFrame) -> str:
    """All rows, with ratios to the reference implementation in PyTorch."""
    rows = rows.assign(best=rows.seconds.map(min))
    shown = rows[["adapter", "library", "prompts"]].assign(
        **{
            "s/step": rows.best,
            "median": rows.seconds.map(statistics.median),
            "images/s": rows.images / rows.best,
            "peak GB": rows.peak_memory_gb,
            "GFLOP": rows.gflop,
            "% of peak": 100 * rows.gflop / rows.best / rows.matmul_gflop_per_second,
        }
    )
    reference = rows[rows.prompts == "77 tokens"].set_index("adapter")
    ratios = {"faster": "best", "less memory": "peak_memory_gb", "fewer FLOPs": "gflop"}
    for name, column in ratios.items():
        shown[name] = rows.adapter.map(reference[column]) / rows[column]
    if "optimizer_seconds" in rows:
        shown["generator s"], shown["its MB"] = rows.optimizer_seconds, rows.optimizer_mb

    def number(x: float) -> str:
        return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"

    return shown.to_string(index=False, na_rep="–", float_format=number)


if __name__ == "__main__":
    cli.run_script(Settings, main, __doc__)
