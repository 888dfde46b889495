r"""Time, memory and arithmetic of one step of the adapters, beside the same step in PyTorch.

    python benchmarks/run.py --classes 1000 --adapters tnt:steps=1 tnt:steps=3 --steps 1
    python benchmarks/run.py --classes 1000 --adapters mgtta --frameworks jax --csv mgtta.csv
    python benchmarks/run.py --adapters zero_shot --frameworks jax --projectors --steps 3
    python benchmarks/run.py --adapters batclip text-gradient image-gradient loss update \
        --frameworks jax --classes 1000 --batch 64 --dtype bfloat16 --profile
    python benchmarks/run.py --adapters zero_shot --frameworks jax --reading

A CLIP model with random weights adapts to random images; the prompts have the lengths of ImageNet's
"a photo of a {}.". PyTorch runs BATCLIP and TNT on prompts padded to 77 tokens, as the reference
implementations do, and BATCLIP on prompts cut to the longest. A step of TNT is one image: jaxtta
cuts its views; PyTorch gets them, and selects after running all of them.

Every row is measured in a process of its own. s/step is the shortest step after a first one; peak
GB is of the process, with libraries and compilation, or of a GPU; GFLOP are of matrix products;
"% of peak" compares them per second with large products, "faster" with PyTorch at 77 tokens. JAX's
float32 is TF32 on a GPU unless JAX_DEFAULT_MATMUL_PRECISION says otherwise, PyTorch's is not.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
from cases import Settings
from projectors import projection_times
from reading import reading_times
from tqdm import tqdm

from jaxtta import cli

CASE = ("model", "classes", "batch", "dtype")  # of a row of the file
PROMPTS = {"batclip": ("77 tokens", "cut"), "tnt": ("77 tokens",)}  # in PyTorch


def main(settings: Settings) -> None:
    """Measure every row and print the table."""
    if settings.fused_attention and "torch" in settings.frameworks:
        raise ValueError("--fused-attention is of JAX's rows: give --frameworks jax")
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
    reference = rows[rows.prompts == "77 tokens"].set_index("adapter")
    rows["faster"] = rows.adapter.map(reference["s/step"]) / rows["s/step"]
    shown = rows.drop(columns="device")
    print(shown.to_string(index=False, na_rep="–", float_format="{:,.4g}".format))
    if settings.csv:
        new = rows.assign(**{key: getattr(settings, key) for key in CASE}, commit=commit())
        old = pd.read_csv(settings.csv) if Path(settings.csv).exists() else new[:0]
        both = pd.concat([old, new]) if len(old) else new
        both = both.drop_duplicates(["adapter", "library", "prompts", "device", *CASE], keep="last")
        both.to_csv(settings.csv, index=False, float_format="%.5g")
    if settings.reading:
        print(reading_times().to_string())
    if settings.projectors:
        print(projection_times(settings).to_string())


def commit() -> str:
    """The commit that is measured, with a + if files differ from it; "unknown" outside of git."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    cli.run_script(Settings, main, __doc__)
