r"""Compile every adapter for TPUs or H100s, with none attached, and say what its step needs there.

    python tpu/aot_check.py --topology v5litepod-8
    python tpu/aot_check.py --topology h100-1 --models ViT-B/16 --modes streams --dtypes bfloat16
    python tpu/aot_check.py --topology v4-8 v6e-8 --scan --quick --models ViT-B/16
    python tpu/aot_check.py --topology v5litepod-8 --table --price 1.2

For TPUs it needs `libtpu`, in the version that jax asks for (`pip install 'libtpu==0.0.42.*'`
beside jax 0.10), for H100s jax's plugin (`pip install jax-cuda12-plugin==V jax-cuda12-pjrt==V` for
jax V; with `--fused-attention` also `nvidia-cudnn-cu12`), and none of these devices. One row a
program, as soon as it is compiled. Streams: every chip adapts to its own stream, in batches of
`--batch` images. Batch: all chips share one stream's batch. A step of TNT is one image.

arg, temp and peak GB are a chip's, by the compiler; all of the model's parameters are among the
arguments. A peak is what is in use at once; the compiler lays it out with gaps, so that a program
needs arguments, temp, outputs that take no argument's place, and its code. GF are the matrix
products of a chip's step, loops counted, bytes those of its main memory (HBM) by the compiled
program's text; "XLA GB" is the compiler's own count, which takes a loop's body once and what lies
in fast memory too. `kernels` are the operations that are started one after another; for a GPU all
products are cuBLAS's, since the compiler can try out no others. `bound ms` and `images/s` are what
a chip would need at its published peak and bandwidth: a bound, not a measurement. A float32 product
is one bfloat16 pass on a TPU, and TF32 on a GPU, where no higher precision is asked for, which
column "highest" counts, of all products.

Exit codes: 0; 1 where a program does not fit or compile, holds float64, callbacks or dynamic
shapes, or collectives between independent streams; 2 for options that cannot be parsed.
"""

import contextlib
import csv
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hlo
import jax
import jax.numpy as jnp
import pandas as pd
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jaxtta import adapters, cli, models, optim, parallel
from jaxtta.flops import count_flops

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import cases
import jax_steps


class Chip(NamedTuple):
    """One chip as its manufacturer publishes it: GB, GB/s, and TF/s in bfloat16 and float32."""

    memory: float
    bandwidth: float
    peak: float
    peak_float32: float


CHIPS = {  # https://cloud.google.com/tpu/docs/v4, …/v5e and …/v6e; nvidia.com/h100 (SXM, dense)
    "v4": Chip(32, 1228, 275, 275),
    "v5e": Chip(16, 819, 197, 197),
    "v6e": Chip(32, 1638, 918, 918),
    "h100": Chip(80, 3350, 989, 494),
}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
RENTED = {  # the chip, and the layout by the number in the name; v4's is of cores, two a chip
    "v4": ("v4", {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4"}),
    "v5litepod": ("v5e", FLAT),
    "v6e": ("v6e", FLAT),
    "h100": ("h100", {1: "1x1x1", 2: "1x1x2", 4: "1x1x4", 8: "1x1x8"}),  # of one machine
}
# What the compiler has to know of a GPU that is not there, as XLA describes an H100 (SXM).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84900000000 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 8 patch: 0 } dnn_version_info { major: 9 minor: 7 }
"""
IMAGES, CELLS, SHARE = 50_000, (15, 75), 0.4  # of ImageNet-C; an assumed share of the peak
FORMATS = {  # what a row holds: place and format
    **{"topology": ("<11", ""), "model": ("<8", ""), "adapter": ("<9", ""), "mode": ("<7", "")},
    **{"dtype": ("<8", ""), "how": ("<10", ""), "remat": ("<5", ""), "arg GB": (">6", ".3f")},
    **{
        "temp GB": (">7", ".3f"),
        "peak GB": (">7", ".3f"),
        "need GB": (">7", ".3f"),
        "of GB": (">5", ".0f"),
        "GF": (">7", ",.0f"),
    },
    **{"HBM GB": (">6", ".2f"), "XLA GB": (">6", ".2f"), "FLOP/byte": (">9", ",.0f")},
    **{"bound ms": (">8", ",.1f"), "images/s": (">8", ",.0f"), "float64": (">7", "")},
    **{"callbacks": (">9", ""), "dynamic": (">7", ""), "collectives": (">11", "")},
    **{"aliased": (">7", ""), "highest": (">7", ""), "scatters": (">8", "")},
    **{"kernels": (">7", ",.0f")},
    **{"compile s": (">9", ".0f"), "verdict": ("", "")},
}
FORBIDDEN = {
    "float64": "float64",
    "callbacks": "callbacks to the host",
    "dynamic": "dynamic shapes",
}
LESS_EFFORT = {"exec_time_optimization_effort": -1.0}
UNTRIED = {"xla_gpu_enable_triton_gemm": False}  # Triton's products are chosen by trying them out
FITS = "fits"
NO_SPLIT = "not possible: TNT takes its images one by one; spread its streams"
PASSED = (FITS, NO_SPLIT)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    # as they are rented (v5litepod-8, v4-8, v6e-8, h100-1), or a chip and its layout (v5e:2x4)
    topology: tuple[str, ...] = ("v5litepod-8",)
    models: tuple[Literal["ViT-B/16", "ViT-L/14", "tiny"], ...] = ("ViT-B/16", "ViT-L/14")  # widths
    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip", "mgtta", "tnt")  # also tnt:steps=3
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")  # of the products
    modes: tuple[Literal["streams", "batch"], ...] = ("streams", "batch")
    classes: int = 1000  # number of classes, with one prompt per class
    batch: int = 64  # images per step of one stream (TNT: always one)
    layers: int | None = None  # cut both towers to so many blocks, for a quick check
    scan: bool = False  # blocks as one loop, as with jaxtta sweep --scan-blocks
    fused_attention: bool = False  # cuDNN's for the images' tokens, on H100s in bfloat16
    # compile several times faster, with less optimisation: for what a program holds and whether it
    # fits; its memory and bytes are more than those of what will run
    quick: bool = False
    # recompute activations in the backward pass: never, always, or where it does not fit without
    remat: Literal["no", "yes", "auto"] = "auto"
    output: Path | None = None  # also write the rows to this CSV file
    # print chip-hours for ImageNet-C instead, at an assumed 40 % of the peak; compiles nothing
    table: bool = False
    price: float | None = None  # of a chip-hour, for the table


class Case(NamedTuple):
    """One program to compile."""

    topology: str
    model: str
    adapter: str
    mode: str
    dtype: str


def main(options: Options) -> int:
    """Print a row per program; return the exit code."""
    for name, value, least in (("batch", options.batch, 1), ("classes", options.classes, 2)):
        if value < least:
            raise ValueError(f"--{name} is {value}, expected at least {least}")
    if options.layers is not None and options.layers < 1:
        raise ValueError(f"--layers is {options.layers}, expected at least 1")
    for name in options.adapters:
        adapters.parse_adapter(name)  # raises for an unknown one, before anything is compiled
    chips = {name: layout_of(name) for name in options.topology}
    fusable = {chip for chip, _ in chips.values()} == {"h100"} and not options.table
    if options.fused_attention and not (fusable and options.dtypes == ("bfloat16",)):
        raise ValueError("--fused-attention needs --topology h100-N and --dtypes bfloat16")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # the time to compile is shown
    if options.table:
        print(chip_hours(options))
        return 0
    devices = {name: devices_of(*layout) for name, layout in chips.items()}
    for name, given in devices.items():
        if "batch" in options.modes and options.batch % len(given):
            raise ValueError(
                f"--batch is {options.batch}, expected a multiple of the {len(given)} chips of "
                f"{name} (--modes streams for others)"
            )
    chosen = options.topology, options.models, options.adapters, options.modes, options.dtypes
    planned, failed = [*itertools.starmap(Case, itertools.product(*chosen))], 0
    with contextlib.ExitStack() as stack:
        file = options.output and stack.enter_context(options.output.open("w", newline=""))
        write = csv.writer(file).writerow if file else lambda values: None
        write(FORMATS)
        print(*(f"{title:{place}}" for title, (place, _) in FORMATS.items()), flush=True)
        for case in tqdm(planned, unit="program", disable=None):
            row = {}
            for row in attempts(case, devices[case.topology], options):
                tqdm.write(line(row))
                write(row.values())
                for stream in filter(None, (sys.stdout, file)):  # a long run loses nothing
                    stream.flush()
            failed += row["verdict"] not in PASSED
    print(f"{len(planned) - failed} of {len(planned)} programs are as they should be")
    return int(failed > 0)


def line(row: dict[str, Any]) -> str:
    """A row as it is printed; what is not known is a dash."""
    return " ".join(
        f"{'–' if row[title] is None else format(row[title], how):{place}}"
        for title, (place, how) in FORMATS.items()
    )


def layout_of(name: str) -> tuple[str, str]:
    """The chip and the layout of a topology: ("v5e", "2x4") for v5litepod-8 and for v5e:2x4."""
    family, _, size = name.rpartition("-")
    chip, layouts = RENTED.get(family, ("", {}))
    if size.isdecimal() and int(size) in layouts:
        return chip, layouts[int(size)]
    if (found := re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)) and found[1] in CHIPS:
        return found[1], found[2]
    known = ", ".join(f"{family}-{size}" for family in RENTED for size in RENTED[family][1])
    raise ValueError(
        f"--topology {name!r} is unknown, expected {known}, or one of {', '.join(CHIPS)} and its "
        "layout as in v5e:2x4"
    )


def devices_of(chip: str, layout: str) -> list[Any]:
    """The devices of a topology, which programs can be compiled for and not run on."""
    if chip == "h100":
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            wanted = " ".join(
                f"jax-cuda12-{part}=={jax.__version__}" for part in ("plugin", "pjrt")
            )
            raise ImportError(
                f"jax's plugin, which compiles for GPUs, is missing: pip install {wanted}"
            )
        how = {"platform": "cuda", "target_config": H100, "topology": layout}
        return described(f"{chip}:{layout}", **how)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "libtpu, which compiles for TPUs, is missing: pip install 'libtpu==0.0.42.*'"
        )
    sides = [int(side) for side in layout.split("x")]
    # libtpu would ask for the TPU that is not there, and refuse a second process.
    for key, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(key, value)
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip == "v4" else {}
    if len(sides) == 2 and math.prod(sides) <= 8:
        options["chips_per_host_bounds"] = (*sides, 1)  # one machine holds them
    return described(
        f"{chip}:{layout}", topology_name=f"{chip}:{layout}", platform="tpu", **options
    )


def described(name: str, **how: Any) -> list[Any]:
    """The devices of a topology; a ValueError if the compiler does not know it."""
    try:
        return topologies.get_topology_desc(**how).devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--topology {name}: {str(error).splitlines()[0]}") from error


def attempts(case: Case, devices: list[Any], options: Options) -> Iterator[dict[str, Any]]:
    """Compile a program: a row; with `--remat auto` a second one where it does not fit."""
    row = compile_case(case, devices, options, options.remat == "yes")
    yield row
    if options.remat == "auto" and not fits(row) and case.adapter != "zero_shot":
        yield compile_case(case, devices, options, remat=True)


def compile_case(case: Case, devices: list[Any], options: Options, remat: bool) -> dict[str, Any]:
    """Compile a program and say what its text tells."""
    chip = CHIPS[layout_of(case.topology)[0]]
    row = dict.fromkeys(FORMATS) | case._asdict()
    names = ("scan", "quick", "fused_attention")
    how = [name.partition("_")[0] for name in names if getattr(options, name)]
    row |= {"remat": "yes" if remat else "no", "how": " ".join(how) or None}
    row |= {"of GB": chip.memory, "verdict": NO_SPLIT}
    is_tnt, shared = case.adapter.partition(":")[0] == "tnt", case.mode == "batch"
    if is_tnt and shared:
        return row
    traced, state = trace(case, devices, options, remat)
    flops = count_flops(traced.jaxpr.jaxpr) / (len(devices) if shared else 1)
    lowered = traced.lower()
    row["GF"], start, exhausted = flops / 1e9, time.perf_counter(), None
    try:
        flags = (LESS_EFFORT if options.quick else {}) | (UNTRIED if chip == CHIPS["h100"] else {})
        compiled = lowered.compile(flags or None)
    except jax.errors.JaxRuntimeError as error:
        exhausted = needed_memory(str(error))
        if exhausted is None or exhausted <= chip.memory:  # not of its main memory
            return row | {"verdict": f"does not compile: {str(error).splitlines()[0]}"}
    row["compile s"] = time.perf_counter() - start
    if exhausted is not None:
        row["need GB"] = exhausted
        return row | {"verdict": verdict(row, options.batch)}
    program, memory = hlo.parse(compiled.as_text()), compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed += memory.generated_code_size_in_bytes
    counted = hlo.counts(program, lowered.as_text())
    names = ("float64", "callbacks", "dynamic", "collectives", "scatters")
    row |= {name: counted[name] for name in names}
    images = (1 if is_tnt else options.batch) / (len(devices) if shared else 1)
    peak = chip.peak if case.dtype == "bfloat16" else chip.peak_float32
    row |= bound(flops, hlo.memory_bytes(program), images, chip.bandwidth, peak)
    row |= {
        "arg GB": memory.argument_size_in_bytes / 1e9,
        "temp GB": memory.temp_size_in_bytes / 1e9,
        "peak GB": memory.peak_memory_in_bytes / 1e9,
        "need GB": needed / 1e9,
        "kernels": hlo.kernels(program),
        "aliased": f"{counted['aliased']}/{len(jax.tree.leaves(state))}",
        "highest": f"{counted['highest']}/{counted['products']}",
    }
    if cost := compiled.cost_analysis():  # a GPU's program has none
        row["XLA GB"] = cost["bytes accessed"] / 1e9
    return row | {"verdict": verdict(row, options.batch)}


def trace(case: Case, devices: list[Any], options: Options, remat: bool = False) -> tuple[Any, Any]:
    """Trace a step of shapes that lie on the devices as a sweep's arrays do.

    Returns:
        The traced step, its state donated, and the state's shapes.
    """
    config = cases.clip_config(case.model)
    if options.layers:
        for tower in (config.vision_config, config.text_config):
            tower.num_hidden_layers = min(options.layers, tower.num_hidden_layers)
    dtype = jnp.bfloat16 if case.dtype == "bfloat16" else None
    model = models.from_config(config, compute_dtype=dtype, remat=remat, scan=options.scan)
    model = models.with_fused_attention(model) if options.fused_attention else model
    task = models.task_from_token_ids(cases.prompt_tokens(options.classes))
    phi = optim.init_meta_gradient_generator(jax.random.key(0))
    generator = optim.meta_gradient_generator(phi, 1e-3)
    tnt = adapters.TNTConfig(views_per_chunk=64)  # all at once: fewer would not fill a chip
    adapter = jax_steps.make_adapter(case.adapter, model, task, tnt, generator)
    params = jax.eval_shape(model.init, jax.random.key(0))
    count = 1 if case.adapter.partition(":")[0] == "tnt" else options.batch
    shape = jax.ShapeDtypeStruct
    images = shape((count, model.image_size, model.image_size, 3), jnp.uint8)
    batch = models.Batch(images, shape((count,), bool), shape((count,), jnp.int32))
    if case.mode == "batch":
        mesh = parallel.mesh(streams=1, batch=len(devices), devices=devices)
        state, split = jax.eval_shape(adapter.init, params), parallel.batch_sharding(mesh)
        state = place(state, NamedSharding(mesh, P()))
    else:
        mesh = parallel.mesh(devices=devices)
        adapter, split = parallel.streams(adapter, mesh), NamedSharding(mesh, P("streams"))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), len(devices)))
        state = place(jax.eval_shape(adapter.init, params, keys), split)
        batch = jax.tree.map(lambda x: shape((len(devices), *x.shape), x.dtype), batch)
    params, batch = place(params, NamedSharding(mesh, P())), place(batch, split)
    step = jax.jit(adapter.step, donate_argnums=1, keep_unused=True)
    with jax.set_mesh(mesh) if case.mode == "batch" else contextlib.nullcontext():
        return step.trace(params, state, batch), state


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes that lie on devices in this way."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def needed_memory(message: str) -> float | None:
    """GB that a program needs, of the compiler's message that there is not enough."""
    found = re.search(r"([\d.]+)([MGT])\b", message) if "memory" in message else None
    return float(found[1]) * 2.0 ** {"M": 20, "G": 30, "T": 40}[found[2]] / 1e9 if found else None


def bound(
    flops: float, moved: float, images: float, bandwidth: float, peak: float
) -> dict[str, float]:
    """What a step would need at the chip's published peak and bandwidth.

    Args:
        flops: of its matrix products.
        moved: bytes from and to its main memory.
        images: of a step, a chip's share.
        bandwidth: the chip's, in GB/s.
        peak: its products, in TF/s.

    Returns:
        A row's columns.
    """
    seconds = max(flops / peak / 1e12, moved / bandwidth / 1e9)
    row = {"GF": flops / 1e9, "HBM GB": moved / 1e9, "FLOP/byte": flops / moved}
    return row | {"bound ms": 1e3 * seconds, "images/s": images / seconds}


def fits(row: dict[str, Any]) -> bool:
    """Whether what a program needs is within the chip's memory."""
    return row["need GB"] is None or row["need GB"] <= row["of GB"]


def verdict(row: dict[str, Any], batch: int) -> str:
    """What is wrong with a program, and what would help; `FITS` if nothing is."""
    found = []
    if not fits(row):
        helps = ["--remat"] if row["remat"] == "no" and row["adapter"] != "zero_shot" else []
        helps += ["bfloat16"] if row["dtype"] == "float32" else []
        helps += [f"a batch below {batch}"] if batch > 1 else []
        found.append("does not fit: try " + " or ".join(helps))
    found += [f"holds {what}" for name, what in FORBIDDEN.items() if row[name]]
    if row["collectives"] and row["mode"] == "streams":
        found.append("holds collectives, and streams should need none")
    return "; ".join(found) or FITS


def chip_hours(options: Options) -> str:
    """ImageNet-C's chip-hours by the operations of a step, as a table."""
    rows = []
    for model, adapter in itertools.product(options.models, options.adapters):
        case = Case("", model, adapter, "streams", "float32")
        traced, _ = trace(case, jax.devices()[:1], options)
        images = 1 if adapter.partition(":")[0] == "tnt" else options.batch
        flops = count_flops(traced.jaxpr.jaxpr) / images
        for topology in options.topology:
            row = {"topology": topology, "model": model, "adapter": adapter}
            row |= {"GF an image": flops / 1e9}
            for cells in CELLS:
                hours = hours_of(flops, cells, CHIPS[layout_of(topology)[0]])
                row |= {f"chip-hours, {cells} cells": hours}
                row |= {f"cost, {cells} cells": hours * options.price} if options.price else {}
            rows.append(row)
    table = pd.DataFrame(rows).to_string(index=False, float_format="{:,.2f}".format)
    return (
        f"Computed, not measured: matrix products at an assumed {SHARE:.0%} of the published peak, "
        f"{IMAGES:,} images a cell.\n{table}"
    )


def hours_of(flops: float, cells: int, chip: Chip) -> float:
    """Chip-hours for so many cells of ImageNet-C, of an image's operations."""
    return flops * cells * IMAGES / (SHARE * chip.peak * 1e12) / 3600


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
