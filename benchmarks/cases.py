"""What both libraries measure: the same model, inputs and clock."""

import dataclasses
import json
import os
import platform
import re
import resource
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

NAME_LENGTHS = (0, 246, 508, 155, 49, 24, 9, 7, 1, 0, 0, 1)  # ImageNet's names of 0, 1, … tokens
START, SHARED, FULL_STOP, END = 49406, (320, 1125, 539, 320), 269, 49407
TINY = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
LARGE_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
MODELS = {  # what differs from transformers' default, ViT-B/32: vision, text, projection
    "ViT-B/16": ({"image_size": 224, "patch_size": 16}, {}, 512),
    "ViT-L/14": (LARGE | {"image_size": 224, "patch_size": 14}, LARGE_TEXT, 768),
    "tiny": (TINY | {"image_size": 32, "patch_size": 8}, TINY, 32),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Benchmark settings."""

    model: Literal["ViT-B/16", "ViT-L/14", "tiny"] = "ViT-B/16"  # size; tiny is a test
    classes: int = 100  # number of classes, with one prompt per class
    batch: int = 16  # images per step (TNT: always one)
    views: int = 64  # views per image (TNT)
    views_per_chunk: int = 8  # views encoded at once (TNT in JAX); use more on an accelerator
    # also tnt, tnt:steps=N, mgtta, and the parts of BATCLIP's step in JAX: text, text-gradient,
    # image, image-gradient, loss, update
    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    frameworks: tuple[Literal["jax", "torch"], ...] = ("jax", "torch")  # libraries to measure
    steps: int = 3  # measured steps per row, after one warm-up step
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products
    torch_float32: Literal["highest", "tf32"] = "highest"  # of PyTorch on a GPU; JAX's is TF32
    fused_attention: bool = False  # cuDNN's kernel for the images' tokens (JAX, bfloat16, NVIDIA)
    profile: bool = False  # also list the twenty kernels that take longest (JAX)
    reading: bool = False  # also time the reading of JPEG files
    projectors: bool = False  # also time what GNSP adds to training
    csv: str | None = None  # file for the rows; those of the same case there are replaced


def print_row(measure: Callable[[Settings, str, str], tuple]) -> None:
    """Measure the row of the command line: adapter, prompts, settings as JSON; print JSON."""
    *row, settings = sys.argv[1:]
    library, seconds, memory, flops, peak, more = measure(Settings(**json.loads(settings)), *row)
    found = {"library": library, "s/step": seconds, "peak GB": memory, "GFLOP": flops / 1e9}
    print(json.dumps(found | {"% of peak": 100 * flops / seconds / peak} | more))


def timed(step: Callable[[], Any], steps: int, wait: Callable[[Any], Any]) -> list[float]:
    """Seconds of each step after a warm-up step; `wait` waits for a result."""
    return timeit.repeat(lambda: wait(step()), number=1, repeat=steps + 1)[1:]


def matmul_peak(product: Callable[[], Any], size: int, wait: Callable[[Any], Any]) -> float:
    """Operations per second of large square products that queue."""

    def queued() -> Any:
        return [product() for _ in range(8)]

    return 8 * 2 * size**3 / min(timed(queued, 4, wait))


def resident_peak_gb() -> float:
    """Peak main memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def cores() -> str:
    """The machine's cores, as Linux names them."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def prompt_tokens(classes: int) -> np.ndarray:
    """Token ids (classes, 77) with the lengths of ImageNet's prompts, end of text as padding."""
    lengths = np.repeat(np.arange(len(NAME_LENGTHS)), NAME_LENGTHS)
    lengths = lengths[np.linspace(0, len(lengths) - 1, classes).round().astype(int)]
    random, token_ids = np.random.default_rng(0), np.full((classes, 77), END)
    for prompt, length in zip(token_ids, random.permutation(lengths), strict=True):
        tokens = [START, *SHARED, *random.integers(1000, 40000, length), FULL_STOP]
        prompt[: len(tokens)] = tokens
    return token_ids


def random_images(count: int, model: str) -> np.ndarray:
    """Random images (count, size, size, 3) in [0, 1]."""
    size = MODELS[model][0]["image_size"]
    return np.random.default_rng(1).random((count, size, size, 3), np.float32)


def clip_config(model: str) -> Any:
    """The CLIPConfig of a model size."""
    from transformers import CLIPConfig  # late, since JAX rows first hide PyTorch from it

    vision, text, projection = MODELS[model]
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)
