"""Time, memory and arithmetic of one step of the adapters, beside the same step in PyTorch.

    python benchmarks/run.py --classes 1000 --adapters tnt:steps=1 tnt:steps=3 --steps 1
    python benchmarks/run.py --classes 1000 --adapters mgtta --frameworks jax
    python benchmarks/run.py --adapters zero_shot --frameworks jax --projectors --steps 3
    python benchmarks/run.py --model tiny --classes 10   # does it run?

A CLIP model with random weights adapts to random images; the prompts have the lengths of ImageNet's
"a photo of a {}.". PyTorch runs BATCLIP and TNT with transformers' CLIPModel on prompts padded to
77 tokens, as in the reference implementations, and BATCLIP on prompts cut to the longest. All but
BATCLIP encode the text beforehand. A step of TNT is one image: jaxtta cuts its views; PyTorch gets
ready-made ones, runs all forward and backward in every update, and then selects.

Every row is measured in a process of its own. s/step is the shortest step, after compilation and a
first one; peak GB is of the process, with libraries and compilation, or on a GPU of its
allocations; GFLOP are the operations of matrix products, with recomputed ones; "of peak" compares
them per second with one large product. The last columns divide PyTorch's row with 77 tokens by it.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
from cases import Settings, tnt_steps
from tqdm import tqdm

from jaxtta import cli

PROMPTS = {"batclip": ("77 tokens", "cut"), "tnt": ("77 tokens",)}  # in PyTorch


def main(settings: Settings) -> None:
    """Measure every row and print the table."""
    planned = [
        (name, framework, prompts)
        for name in settings.adapters
        for framework in settings.frameworks
        for prompts in {"jax": ["packed"]}.get(framework, PROMPTS.get(name.partition(":")[0], ()))
    ]
    found = []
    for name, framework, prompts in tqdm(planned, unit="row", disable=None):
        script = str(Path(__file__).with_name(f"{framework}_steps.py"))
        given = [name, prompts, json.dumps(dataclasses.asdict(settings))]
        done = subprocess.run([sys.executable, script, *given], stdout=subprocess.PIPE, check=False)
        if done.returncode:  # -9 is the signal that a machine without memory sends
            tqdm.write(f"{name} {framework} {prompts}: ended with code {done.returncode}")
        else:
            found.append({"adapter": name, "prompts": prompts} | json.loads(done.stdout))
    if not found:
        raise ValueError("no row could be measured")
    rows = pd.DataFrame(found)
    images = rows.adapter.map(lambda name: 1 if tnt_steps(name) else settings.batch)
    rows.insert(4, "images/s", images / rows["s/step"])
    reference = rows[rows.prompts == "77 tokens"].set_index("adapter")
    for name, column in (
        ("faster", "s/step"),
        ("less memory", "peak GB"),
        ("fewer FLOPs", "GFLOP"),
    ):
        rows[name] = rows.adapter.map(reference[column]) / rows[column]
    print(f"{settings.model}, {settings.classes} classes, batch {settings.batch} (TNT 1)")
    print(rows.to_string(index=False, na_rep="–", float_format="{:,.4g}".format))
    if settings.projectors:
        from projectors import projection_times

        print(projection_times(settings).to_string())


if __name__ == "__main__":
    cli.run_script(Settings, main, __doc__)
