"""Time, memory and arithmetic of one step of the adapters, beside the same step in PyTorch.

    python experiments/benchmark.py --classes 100 --batch 16
    python experiments/benchmark.py --classes 1000 --frameworks jax --adapters batclip
    python experiments/benchmark.py --classes 1000 --adapters tnt-1 tnt-3 --steps 1
    python experiments/benchmark.py --model tiny --classes 10   # does it run?
    python experiments/benchmark.py --adapters zero_shot --frameworks jax --reading FOLDER
    python experiments/benchmark.py --adapters zero_shot --frameworks jax --projectors

A CLIP model with random weights adapts to random images. The prompts are synthetic token ids with
the lengths of ImageNet's "a photo of a {}.": start, four shared tokens, 1 to 11 for the name, "."
and end of text, so that the longest has 18. JAX runs jaxtta's adapters. PyTorch runs transformers'
CLIPModel, in eval mode and with its fused attention, twice: on prompts padded to 77 tokens, as in
the reference implementations, and on prompts cut to the longest. The loss and the optimiser are the
same; all but BATCLIP encode the text once, beforehand. 1,000 classes at batch 16 and 77 tokens do
not fit in 24 GB in PyTorch: run JAX only, or set --memory-limit-gb.

A step of tnt-1 is one image, 64 views and one update of the noise; tnt-3 makes three updates.
jaxtta cuts the views from the image within the step. PyTorch gets ready-made views and
follows the reference implementation: every update runs all views forward and backward and then
selects.

Every row is measured in a separate process. The columns:

- s/step: the shortest of the measured steps, and their median, after compilation and a first step.
  Images per second and the other columns use the shortest.
- peak GB: peak memory of the process up to the last measured step, including weights, libraries and
  compilation; on a GPU, its peak allocation. JAX rows hide PyTorch, which transformers would
  otherwise load if it is installed.
- GFLOP: floating-point operations of a step's matrix products, including recomputed ones; PyTorch
  counts whole score matrices for causal attention.
- of peak: those operations per second in % of peak matmul throughput, measured just before in the
  same library and process at its default precision.
- faster, less memory, fewer FLOPs: PyTorch's row with 77 tokens for the same adapter in this run,
  divided by this row.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:  # each library is only imported in the processes that measure it
    import jax
    import torch
    from transformers import CLIPConfig

    import jaxtta

Result = dict[str, Any]

NAME_LENGTHS = (0, 246, 508, 155, 49, 24, 9, 7, 1, 0, 0, 1)
"""Number of ImageNet's 1,000 class names with 0, 1, 2, … tokens."""
START, SHARED, FULL_STOP, END = 49406, (320, 1125, 539, 320), 269, 49407
MAX_LENGTH = 77


@dataclasses.dataclass(frozen=True)
class Settings:
    """Benchmark settings."""

    model: Literal["ViT-B/16", "ViT-B/32", "ViT-L/14", "tiny"] = "ViT-B/16"
    """Size of the model; tiny only checks that everything runs."""
    classes: int = 100
    """Number of classes, with one prompt per class."""
    batch: int = 16
    """Images per step (TNT: always one)."""
    views: int = 64
    """Views per image (TNT)."""
    views_per_chunk: int = 8
    """Views encoded at once (TNT's JAX rows); use more on an accelerator."""
    adapters: tuple[Literal["zero_shot", "tent", "batclip", "tnt-1", "tnt-3", "mgtta"], ...] = (
        "zero_shot",
        "tent",
        "batclip",
    )
    """Adapters to measure; mgtta in JAX only."""
    frameworks: tuple[Literal["jax", "torch"], ...] = ("jax", "torch")
    """Libraries to measure; each adapter has one row in JAX and two in PyTorch (TNT one, since its
    prompts are encoded beforehand)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products; the parameters are float32."""
    remat: bool = False
    """Recompute activations in the backward pass (JAX rows only): less memory, more time."""
    steps: int = 3
    """Measured steps per row, after one warm-up step."""
    memory_limit_gb: float | None = None
    """Stop a row whose process uses more main memory than this (Linux only)."""
    reading: Path | None = None
    """Class folders of images: also time reading them without a model, and corrupting one image."""
    workers: int = 2
    """Processes that read images."""
    projectors: bool = False
    """Also time what GNSP adds to training: projectors from Gram matrices, compared with the full
    SVDs of the reference implementation in PyTorch if installed; and a training step without and
    with the projection, on --batch images and as many reference pairs."""
    output: Path | None = None
    """JSON file for settings and rows, rewritten after each row."""
    debug: bool = False
    """Show the traceback of an error."""


class Row(NamedTuple):
    """One line of the table; `prompts` is "packed" in JAX, "77 tokens" or "cut" in PyTorch."""

    adapter: str
    framework: str
    prompts: str


def main(settings: Settings) -> None:
    """Measure every row and print the table."""
    from jaxtta.io import write_json

    check(settings)
    if settings.reading:
        from jaxtta.data import image_folder

        image_folder(settings.reading)  # fail early for a wrong folder
    rows = plan(settings)
    results: list[Result] = []
    with tqdm(total=len(rows), unit="row", disable=None) as progress:
        for row in rows:
            progress.set_description(" ".join(row))
            results.append(row._asdict() | supervise(settings, row))
            progress.update()
            tqdm.write(f"{' '.join(row)}: {summary(results[-1])}", file=sys.stderr)
            if settings.output:
                report = {"settings": dataclasses.asdict(settings), "rows": results}
                report = json.loads(json.dumps(report, default=str))
                write_json(settings.output, report)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    batch = 1 if all(map(is_tnt, settings.adapters)) else settings.batch
    print(f"{settings.model}, {settings.classes} classes, batch {batch}, ", end="")
    print(f"{settings.dtype}{', remat' * settings.remat}, {cores} CPU cores\n")
    print(table(results))
    for result in results:
        if "optimizer_seconds" in result:
            share = result["optimizer_seconds"] / result["seconds"]
            print(
                f"\n{result['adapter']}: the generator alone takes "
                f"{1000 * result['optimizer_seconds']:.3g} ms, {share:.2%} of a step; its state "
                f"holds {result['optimizer_mb']:.1f} MB"
            )
    if settings.reading:
        print(f"\n{reading_table(settings, results)}")
    if settings.projectors:
        print(f"\n{projection_times(settings)}")
    if all("error" in result for result in results):
        sys.exit("no row could be measured")


def check(settings: Settings) -> None:
    """Raise a ValueError for invalid options."""
    least_of = {"classes": 2, "batch": 1, "views": 1, "views_per_chunk": 1, "steps": 1}
    for name, least in least_of.items():
        if getattr(settings, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(settings, name)}")
    for name in ("adapters", "frameworks"):
        chosen = getattr(settings, name)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"--{name} needs one or more different values, not {' '.join(chosen) or 'none'}"
            )
    if settings.workers < 0:
        raise ValueError(f"--workers must be at least 0, not {settings.workers}")
    limit = settings.memory_limit_gb
    if limit is not None and not limit > 0:
        raise ValueError(f"--memory-limit-gb must be positive, not {limit}")
    if limit is not None and not Path("/proc/self/statm").exists():
        raise ValueError("--memory-limit-gb needs Linux's /proc, which this machine does not have")
    if settings.output and (settings.output.is_dir() or not settings.output.parent.is_dir()):
        raise ValueError(f"--output {settings.output}: is a folder, or its folder does not exist")


def plan(settings: Settings) -> list[Row]:
    """The rows that can be measured here, grouped by adapter."""
    frameworks = settings.frameworks
    if "torch" in frameworks and importlib.util.find_spec("torch") is None:
        message = "PyTorch is not installed, so its rows are skipped: `make parity` installs it"
        if frameworks == ("torch",):
            raise ValueError(message)
        print(message, file=sys.stderr)
        frameworks = ("jax",)
    prompts = {"jax": ("packed",), "torch": ("77 tokens", "cut")}
    return [
        Row(adapter, framework, form)
        for adapter in settings.adapters
        for framework in frameworks
        for form in prompts[framework]
        if not (is_tnt(adapter) and form == "cut")
        if not (adapter == "mgtta" and framework == "torch")
    ]


def is_tnt(adapter: str) -> bool:
    """Whether this is a TNT row."""
    return adapter.startswith("tnt-")


def supervise(settings: Settings, row: Row) -> Result:
    """Measure a row in a new process and report its failure, if any."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=measure, args=(settings, row, sender), daemon=True)
    child.start()
    sender.close()
    limit = settings.memory_limit_gb
    while child.is_alive():
        child.join(0.1)
        if limit and resident_gb(child.pid) > limit:
            child.kill()
            child.join()
            return {"error": f"stopped at more than {limit:g} GB"}
    try:
        return receiver.recv()
    except EOFError:  # the process ended without a message
        code = child.exitcode
    if code >= 0:
        return {"error": f"exit code {code}"}
    killed = "killed, probably out of memory: " if code == -signal.SIGKILL else ""
    return {"error": f"{killed}signal {signal.Signals(-code).name}"}


def resident_gb(pid: int) -> float:
    """Main memory that a process uses now; 0 if it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0.0
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure(settings: Settings, row: Row, sender: Connection) -> None:
    """Measure a row in this process and send the result, or an error in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    try:
        result = {"jax": jax_row, "torch": torch_row}[row.framework](settings, row)
        result["images_per_second"] = images_a_step(settings, row) / result["seconds"]
    except Exception as error:  # any exception, for example out of memory
        text = str(error).strip().partition("\n")[0]
        result = {"error": f"{type(error).__name__}: {text[:160]}"}
    sender.send(result)


# --- the same inputs for both libraries ---


def prompt_tokens(classes: int) -> np.ndarray:
    """Token ids (classes, 77) with the lengths of ImageNet's prompts, end of text as padding."""
    lengths = np.repeat(np.arange(len(NAME_LENGTHS)), NAME_LENGTHS)
    lengths = lengths[np.linspace(0, len(lengths) - 1, classes).round().astype(int)]
    random = np.random.default_rng(0)
    token_ids = np.full((classes, MAX_LENGTH), END)
    for prompt, length in zip(token_ids, random.permutation(lengths), strict=True):
        tokens = [START, *SHARED, *random.integers(1000, 40000, length), FULL_STOP]
        prompt[: len(tokens)] = tokens
    return token_ids


def clip_config(model: str) -> "CLIPConfig":
    """The configuration of a model size."""
    from transformers import CLIPConfig

    def tower(width: int, layers: int, heads: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
        }

    # vision tower, image size, patch size; text tower; projection
    vision, pixels, patch, text, projection = {
        "ViT-B/16": (tower(768, 12, 12), 224, 16, tower(512, 12, 8), 512),
        "ViT-B/32": (tower(768, 12, 12), 224, 32, tower(512, 12, 8), 512),
        "ViT-L/14": (tower(1024, 24, 16), 224, 14, tower(768, 12, 12), 768),
        "tiny": (tower(64, 2, 4), 32, 8, tower(64, 2, 4), 32),
    }[model]
    return CLIPConfig(
        vision_config=vision | {"image_size": pixels, "patch_size": patch},
        text_config=text | {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END},
        projection_dim=projection,
    )


def images_a_step(settings: Settings, row: Row) -> int:
    """Number of images per step."""
    return 1 if is_tnt(row.adapter) else settings.batch


def random_images(count: int, size: int) -> np.ndarray:
    """Random images (count, size, size, 3) in [0, 1]."""
    return np.random.default_rng(1).random((count, size, size, 3), np.float32)


def timed(step: Callable[[], Any], steps: int) -> tuple[list[float], Any]:
    """Seconds of each step after a warm-up step, and the last result."""
    step()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        output = step()
        seconds.append(time.perf_counter() - start)
    return seconds, output


def matrix_size(device: str) -> int:
    """Side of the matrices whose product measures peak throughput."""
    return 2048 if device == "cpu" else 4096


def resident_peak() -> int:
    """Peak main memory of this process, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def figures(library: str, seconds: list[float], memory: int, flops: float, peak: float) -> Result:
    """The metrics that rows of both libraries report."""
    return {
        "library": f"{library} {importlib.metadata.version(library)}",
        "seconds": min(seconds),
        "median_seconds": statistics.median(seconds),
        "peak_memory_gb": memory / 1e9,
        "gflop": flops / 1e9,
        "peak_gflop_per_second": peak / 1e9,
        "share_of_peak": flops / min(seconds) / peak,
    }


# --- JAX ---


def jax_row(settings: Settings, row: Row) -> Result:
    """Measure a step of one of jaxtta's adapters."""
    sys.modules["torch"] = None  # transformers imports it if it is installed
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import jax
    import jax.numpy as jnp

    import jaxtta

    dtype = jnp.dtype(settings.dtype)
    peak = jax_peak(dtype)
    model = jaxtta.models.from_config(
        clip_config(settings.model),
        compute_dtype=None if dtype == jnp.float32 else dtype,
        remat=settings.remat,
    )
    task = jaxtta.models.task_from_token_ids(prompt_tokens(settings.classes))
    images = jnp.asarray(
        random_images(images_a_step(settings, row), model.preprocessing.image_size)
    )
    if is_tnt(row.adapter):
        tuning = jaxtta.adapters.TNTConfig(
            views=settings.views,
            steps=int(row.adapter[-1]),
            views_per_chunk=settings.views_per_chunk,
        )
        adapter = jaxtta.adapters.tnt(model, task, config=tuning)
    elif row.adapter == "mgtta":
        shape = model.feature_shape
        clean = jaxtta.models.FeatureStatistics(jnp.array(2.0), jnp.zeros(shape), jnp.ones(shape))
        phi = jaxtta.optim.init_meta_gradient_generator(jax.random.key(0))
        generator = jaxtta.optim.meta_gradient_generator(phi, 1e-3)
        adapter = jaxtta.adapters.mgtta(model, task, optimizer=generator, statistics=clean)
    else:
        adapter = getattr(jaxtta.adapters, row.adapter)(model, task)
    params = random_params(model)
    state = jax.block_until_ready(adapter.init(params))

    start = time.perf_counter()
    traced = jax.jit(adapter.step, donate_argnums=1).trace(params, state, images)
    compiled = traced.lower().compile()
    compilation = time.perf_counter() - start

    def step() -> jax.Array:
        nonlocal state
        state, prediction = jax.block_until_ready(compiled(params, state, images))
        return prediction.logits

    seconds, logits = timed(step, settings.steps)
    if not jnp.isfinite(logits).all():
        raise FloatingPointError("the logits are not finite")
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    flops = jax_flops(traced.jaxpr.jaxpr)
    result = figures("jax", seconds, memory or resident_peak(), flops, peak)
    if row.adapter == "mgtta":
        update = jax.jit(generator.update)
        own, _ = timed(
            lambda: jax.block_until_ready(update(state.adapted, state.optimizer)), settings.steps
        )
        result["optimizer_seconds"] = min(own)
        result["optimizer_mb"] = sum(x.nbytes for x in jax.tree.leaves(state.optimizer)) / 1e6
    return result | {"device": jax.devices()[0].device_kind, "compile_seconds": compilation}


def jax_flops(jaxpr: "jax.extend.core.Jaxpr") -> int:
    """Operations of the matrix products in a program; XLA counts loops as one iteration."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            terms = math.prod(left[axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        inner = sum(jax_flops(getattr(x, "jaxpr", x)) for x in _programs(equation.params))
        total += inner * equation.params.get("length", 1)
    return total


def _programs(params: dict[str, Any]) -> list[Any]:
    """The programs among an equation's parameters: loop bodies, jitted and derived functions."""
    return [x for x in params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def random_params(model: "jaxtta.models.CLIP") -> dict[str, Any]:
    """Random parameters, initialised one by one.

    `model.init` uses a multiple of their size, which would be the peak memory of a row without
    gradients.
    """
    import jax
    import jax.numpy as jnp

    random = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key.endswith("scale"):
            return jnp.ones(leaf.shape)
        return jnp.asarray(0.02 * random.standard_normal(leaf.shape, np.float32))

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


def jax_peak(dtype: "jax.typing.DTypeLike") -> float:
    """Operations per second of a large matrix product."""
    import jax

    size = matrix_size(jax.default_backend())
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    product = jax.jit(lambda a, b: a @ b)
    seconds, _ = timed(lambda: product(a, b).block_until_ready(), 20)
    return 2 * size**3 / min(seconds)


# --- PyTorch ---


def torch_row(settings: Settings, row: Row) -> Result:
    """Measure the same step on transformers' CLIPModel."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = torch_peak(getattr(torch, settings.dtype), device)
    step = (torch_tnt if is_tnt(row.adapter) else torch_step)(settings, row, device)
    seconds, logits = timed(step, settings.steps)
    if not logits.isfinite().all():
        raise FloatingPointError("the logits are not finite")
    cuda = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if cuda else resident_peak()
    result = figures("torch", seconds, memory, torch_flops(step), peak)
    return result | {"device": torch.cuda.get_device_name() if cuda else "cpu"}


def torch_step(
    settings: Settings, row: Row, device: "torch.device"
) -> "Callable[[], torch.Tensor]":
    """Make the step; it returns the logits before the update."""
    import torch

    model, encode = torch_model(settings, device)
    optimizer = torch_optimizer(model, row.adapter)
    pixels = torch_pixels(settings.batch, model).sub(0.5).div(0.27).to(device)
    token_ids = torch.from_numpy(prompt_tokens(settings.classes)).to(device)
    if row.prompts == "cut":
        token_ids = token_ids[:, : int(token_ids.argmax(-1).max()) + 1].contiguous()

    def encode_text() -> torch.Tensor:
        return unit(encode(model.get_text_features, token_ids))

    with torch.no_grad():
        frozen_texts = None if row.adapter == "batclip" else encode_text()

    def step() -> torch.Tensor:
        with torch.set_grad_enabled(optimizer is not None):
            images = encode(model.get_image_features, pixels)
            texts = encode_text() if frozen_texts is None else frozen_texts
            logits = model.logit_scale.exp() * unit(images) @ texts.T
            if optimizer is not None:
                optimizer.zero_grad()
                torch_loss(row.adapter, logits, images, texts).backward()
                optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return logits.detach()

    return step


def torch_tnt(settings: Settings, row: Row, device: "torch.device") -> "Callable[[], torch.Tensor]":
    """Make a step of TNT's reference implementation; it returns the ensemble's mean cosines."""
    import torch

    model, encode = torch_model(settings, device)
    model.requires_grad_(False)
    views = torch_pixels(settings.views, model).to(device)
    token_ids = torch.from_numpy(prompt_tokens(settings.classes)).to(device)
    eps, rate, kept = 1 / 255, 1e-3, max(int(0.1 * settings.views), 1)  # size of the ensemble
    with torch.no_grad():
        texts = unit(encode(model.get_text_features, token_ids))

    def embed(noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = (views + noise).clamp(0, 1).sub(0.5).div(0.27)
        images = unit(encode(model.get_image_features, pixels))
        return images, model.logit_scale.exp() * images @ texts.T

    def surest(logits: torch.Tensor) -> torch.Tensor:
        log_p = logits.detach().log_softmax(-1)
        return (-(log_p.exp() * log_p).sum(-1)).argsort()[:kept]

    def step() -> torch.Tensor:
        noise, selected = torch.randn(views.shape[1:], device=device).clamp(-eps, eps), None
        for _ in range(int(row.adapter[-1])):
            noise.requires_grad_()
            images, logits = embed(noise)
            selected = surest(logits) if selected is None else selected
            loss = torch_tnt_loss(images[selected], logits[selected])
            gradient = torch.autograd.grad(loss, noise)[0]
            noise = (noise.detach() - rate * gradient.sign()).clamp(-eps, eps)
        with torch.no_grad():
            _, logits = embed(noise)
            voted = logits[surest(logits)].mean(0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return voted

    return step


def torch_tnt_loss(images: "torch.Tensor", logits: "torch.Tensor") -> "torch.Tensor":
    """TNT's loss of the selected views' normalised embeddings and logits."""
    import torch

    mean = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
    return -(mean.exp() * mean).sum() + torch.nn.functional.pdist(images).mean()


def torch_model(settings: Settings, device: "torch.device") -> "tuple[torch.nn.Module, Callable]":
    """The model with random weights, and a function that runs a tower in the settings' dtype."""
    import torch
    from transformers import AutoModel

    torch.manual_seed(0)
    config = clip_config(settings.model)
    model = AutoModel.from_config(config, attn_implementation="sdpa").eval().to(device)

    def encode(features: Callable, inputs: torch.Tensor) -> torch.Tensor:
        half = settings.dtype == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            outputs = features(inputs)
        return getattr(outputs, "pooler_output", outputs).float()  # transformers 5, 4

    return model, encode


def torch_pixels(count: int, model: "torch.nn.Module") -> "torch.Tensor":
    """The random images, (count, 3, size, size) in [0, 1]."""
    import torch

    size = model.config.vision_config.image_size
    return torch.from_numpy(random_images(count, size)).permute(0, 3, 1, 2).contiguous()


def torch_optimizer(model: "torch.nn.Module", adapter: str) -> "torch.optim.Optimizer | None":
    """The adapter's optimiser over the LayerNorms it adapts; everything else is frozen."""
    import torch

    model.requires_grad_(False)
    if adapter == "zero_shot":
        return None
    tower = model if adapter == "batclip" else model.vision_model
    norms = [module for module in tower.modules() if isinstance(module, torch.nn.LayerNorm)]
    adapted = [parameter.requires_grad_() for norm in norms for parameter in norm.parameters()]
    if adapter == "tent":
        return torch.optim.SGD(adapted, 2.5e-4, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(adapted, 5e-4, weight_decay=1e-2)


def torch_loss(
    adapter: str, logits: "torch.Tensor", images: "torch.Tensor", texts: "torch.Tensor"
) -> "torch.Tensor":
    """TENT's or BATCLIP's loss of logits, unnormalised image and normalised text embeddings."""
    import torch

    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    if adapter == "tent":
        return entropy
    present, members = logits.argmax(-1).unique(return_inverse=True)
    members = torch.nn.functional.one_hot(members, len(present)).to(images.dtype)
    prototypes = members.T @ images / members.sum(0)[:, None]
    image_text = (prototypes * texts[present]).sum(-1).mean()
    directions = unit(prototypes)
    # the sum over ordered pairs: twice the upper triangle
    separation = 2 * (1 - directions @ directions.T).triu(1).sum()
    return entropy - image_text - separation


def unit(x: "torch.Tensor") -> "torch.Tensor":
    """Scale vectors (…, size) to unit norm."""
    return x / x.norm(dim=-1, keepdim=True)


def torch_flops(step: Callable[[], Any]) -> int:
    """Operations of the matrix products in a step, forward and backward."""
    import torch
    from torch.utils import flop_counter

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(grad, query, key, value)

    # PyTorch counts its GPU kernels for attention, but takes the CPU's for free.
    aten = torch.ops.aten
    cpu_attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with flop_counter.FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        step()
    return counter.get_total_flops()


def torch_peak(dtype: "torch.dtype", device: "torch.device") -> float:
    """Operations per second of a large matrix product."""
    import torch

    size = matrix_size(device.type)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)

    def product() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds, _ = timed(product, 20)
    return 2 * size**3 / min(seconds)


# --- reading ---


def reading_table(settings: Settings, results: Iterable[Result]) -> str:
    """Images per second when reading, compared with zero-shot; milliseconds per corruption."""
    from jaxtta import data, models

    preprocessing = models.from_config(clip_config(settings.model)).preprocessing
    source = data.CorruptedOnTheFly(data.image_folder(settings.reading), preprocessing)
    streams = data.make_streams("reset_each_shift", [data.CLEAN], [0], source.labels, limit=1000)
    batches = data.Batches(source, tuple(streams), settings.batch)
    reader = data.read_ahead(batches, settings.workers)
    next(reader)  # the workers have started
    start = time.perf_counter()
    images = sum(int(batch.mask.sum()) for batch in reader)
    speed = images / (time.perf_counter() - start)
    lines = [f"reading, {settings.workers} workers: {speed:.1f} images/s"]
    for result in results:
        if (
            result["adapter"] == "zero_shot"
            and result["framework"] == "jax"
            and "error" not in result
        ):
            ratio = speed / result["images_per_second"]
            lines[0] += f", {ratio:.1f} times the speed of zero-shot here"
    image = source.read(data.Domain(data.CLEAN), 0, 0)
    lines += ["", f"ms to corrupt one image of {image.shape[0]} pixels, severity 1, 3, 5:"]
    for name in (*data.COMMON, *data.VALIDATION):
        milliseconds = []
        for severity in (1, 3, 5):
            seconds, _ = timed(lambda n=name, s=severity: data.corrupt(image, n, s, 0), 3)
            milliseconds.append(f"{1000 * min(seconds):8.1f}")
        lines.append(f"{name:<18}{''.join(milliseconds)}")
    return "\n".join(lines)


# --- GNSP ---


def projection_times(settings: Settings) -> str:
    """Seconds to make and use the projectors."""
    import jax
    import jax.numpy as jnp

    from jaxtta import continual, models, tree

    model = models.from_config(clip_config(settings.model))
    params = random_params(model)
    shown = random_images(64, model.preprocessing.image_size)
    batches = np.split(shown, 4)  # of 16, as in the reference implementation
    grams = jax.block_until_ready(continual.task_grams(model, params, batches))
    seconds = {}
    identities = {size: jnp.eye(size) for size in {len(gram) for gram in grams.values()}}
    for on in ("host", "device"):
        continual.null_space_projectors(identities, backend=on)  # load the libraries and compile
        start = time.perf_counter()
        projectors = jax.block_until_ready(continual.null_space_projectors(grams, backend=on))
        seconds[on] = time.perf_counter() - start
    counts = collections.Counter(map(len, grams.values()))
    sizes = ", ".join(f"{count} of {size} inputs" for size, count in counts.items())
    columns = {name: p.basis.shape[1] / len(p.basis) for name, p in projectors.items()}
    free = [1 - columns[name] if p.complement else columns[name] for name, p in projectors.items()]
    where = (
        f"{seconds['host']:.3g} s on the host in float64, {seconds['device']:.3g} s on the device"
    )
    lines = [f"projectors ({sizes}): {where}"]
    if importlib.util.find_spec("torch"):
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        matrices = [torch.from_numpy(np.array(gram)).to(device) for gram in grams.values()]
        torch.linalg.svd(torch.eye(8, device=device))
        start = time.perf_counter()
        for matrix in matrices:
            torch.linalg.svd(matrix)[1].cpu()  # synchronises
        published = time.perf_counter() - start
        faster = " and ".join(f"{published / seconds[on]:.2f}×" for on in seconds)
        lines[0] += f"; full SVDs in PyTorch: {published:.3g} s, {faster}"
    lines.append(f"free directions: {np.mean(free):.1%} on average")

    images = jnp.asarray(random_images(settings.batch, model.preprocessing.image_size))
    labels = jnp.arange(settings.batch) % settings.classes
    vectors = models.l2_normalize(
        jax.random.normal(jax.random.key(0), (settings.classes, model.projection))
    )
    texts = vectors[labels]
    pairs = continual.ReferenceBatch(images, None, labels, texts, texts, texts)
    examples = continual.TaskBatch(images, labels, vectors)
    trained, frozen = tree.partition(params, continual.gnsp_kernels)

    @functools.partial(jax.jit, static_argnums=0)
    def step(method: continual.GNSPConfig, projectors: Any, *inputs: Any) -> Any:
        optimizer = continual.task_optimizer(method, projectors, 1e-5, 1000)
        return continual.train_step(model, method, optimizer)(*inputs)

    found = {}
    for name in ("none", "before"):
        method = dataclasses.replace(continual.VARIANTS["gnsp"], projection=name)
        optimizer = continual.task_optimizer(method, projectors, 1e-5, 1000)
        state = continual.TrainState(trained, optimizer.init(trained))
        call = functools.partial(step, method, projectors, frozen, state, examples, pairs)
        found[name], _ = timed(lambda call=call: jax.block_until_ready(call()), settings.steps)
    plain, projected = min(found["none"]), min(found["before"])
    lines.append(
        f"training step: {plain:.3g} s, with the projection {projected:.3g} s "
        f"({projected / plain - 1:+.1%})"
    )
    return "\n".join(lines)


# --- the table ---


def summary(result: Result) -> str:
    """A short summary of one row."""
    if "error" in result:
        return result["error"]
    return f"{result['seconds']:.3g} s per step, {result['peak_memory_gb']:.2f} GB"


def table(results: Iterable[Result]) -> str:
    """All rows as a Markdown table, with ratios to the reference implementation in PyTorch."""
    results = list(results)
    published = {
        result["adapter"]: result
        for result in results
        if result["prompts"] == "77 tokens" and "error" not in result
    }
    header = ["adapter", "library", "prompts", "s/step", "median", "images/s", "peak GB"]
    header += ["GFLOP", "of peak", "faster", "less memory", "fewer FLOPs"]
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3)]
    for result in results:
        names = [result["adapter"], result.get("library", result["framework"]), result["prompts"]]
        lines.append(names + cells(result, published.get(result["adapter"])))
    # A failed row has one long fourth cell, which should not widen its column.
    whole = [line for line in lines if len(line) == len(header)]
    widths = [max(len(line[i]) for line in (lines if i < 3 else whole)) for i in range(len(header))]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def cells(result: Result, published: Result | None) -> list[str]:
    """A row's numbers, and its ratios to the reference implementation."""
    if "error" in result:
        return [result["error"]]
    measured = [
        f"{result['seconds']:.3g}",
        f"{result['median_seconds']:.3g}",
        f"{result['images_per_second']:.3g}",
        f"{result['peak_memory_gb']:.2f}",
        f"{result['gflop']:,.4g}",
        f"{result['share_of_peak']:.0%}",
    ]
    if published is None:
        return [*measured, *["–"] * 3]
    compared = ("seconds", "peak_memory_gb", "gflop")
    return measured + [f"{published[name] / result[name]:.2f}×" for name in compared]


if __name__ == "__main__":
    from jaxtta.cli import run_script  # here, because the rows' processes import this file

    run_script(Settings, main, __doc__)
