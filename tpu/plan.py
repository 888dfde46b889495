r"""Where does a sweep spend its time on 1, 8 and 256 chips: reading, host CPUs, memory, compute?

    python tpu/plan.py --read 3000 --decode 500 --cpus 112
    python tpu/plan.py --read 3000 --decode 500 --cpus 112 --adapters tnt:steps=1 --cells 15
    python tpu/plan.py --read 3000 --decode 500 --cpus 112 --step-seconds zero_shot=0.03 tent=0.09

A bound by arithmetic, not a measurement, and only as good as its inputs: `--decode` is what
`python benchmarks/run.py --adapters zero_shot --frameworks jax --reading` prints for the host, and
`--step-seconds` what `jaxtta sweep --dry-run` prints for the chip. Without the latter, a step is as
long as its floating-point operations take at an assumed share of the chip's published peak, or as
its bytes take at its published bandwidth, whatever is longer. A stream is one corruption at one
severity; every device has one stream at a time. Loading, copying and compilation are not in it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import pandas as pd
from aot_check import CHIPS, Chip

from jaxtta import cli

# Of matrix products, 1,000 classes, batches of 64; computed, as `tpu/aot_check.py --table` prints.
GFLOP_AN_IMAGE = {
    "ViT-B/16": {
        **{"zero_shot": 32.7, "tent": 66.5, "mgtta": 66.5, "batclip": 76.2},
        **{"tnt:steps=1": 4594.1, "tnt:steps=3": 5394.6},
    },
    "ViT-L/14": {
        **{"zero_shot": 156.4, "tent": 318.7, "mgtta": 318.7, "batclip": 340.3},
        **{"tnt:steps=1": 21940.5, "tnt:steps=3": 25768.5},
    },
}
# A step of 64 images in bfloat16 on v5e, as `aot_check.py --scan` counted them in the compiled
# programs, up to 10 % too many: an operand that an instruction takes twice was counted twice.
HBM_GB_A_STEP = {
    "ViT-B/16": {
        **{"zero_shot": 4.3, "tent": 30.1, "mgtta": 33.3, "batclip": 51.2},
        "tnt:steps=1": 64 * 8.67,
    },
    "ViT-L/14": {},
}


class Step(NamedTuple):
    """Seconds that one step of an adapter takes a device: the longer of the two."""

    compute: float
    memory: float = 0.0


class Plan(NamedTuple):
    """What a sweep takes; seconds of each resource as if it were the only one."""

    rounds: int  # of streams on a device, one after another
    reading: float
    cpus: float
    memory: float
    compute: float
    stepping: float  # memory or compute, whichever is longer for an adapter
    seconds: float  # of the whole sweep
    device_hours: float  # of all devices, idle ones too
    busy: float  # share of the device hours in which a device steps

    @property
    def bottleneck(self) -> str:
        """The resource that is the slowest."""
        host = max(self.reading, self.cpus)
        if host > self.stepping:
            return "reading" if host == self.reading else "host CPUs"
        return "HBM" if self.memory > self.compute else "compute"


def plan(
    cells: int,
    images: int,
    batch_size: int,
    steps: Sequence[Step],
    devices: int,
    hosts: int = 1,
    read: float = math.inf,
    decode: float = math.inf,
    split: Literal["streams", "batch"] = "streams",
) -> Plan:
    """Time of a sweep whose hosts each have an equal share of the cells, read once.

    Reading, decoding and stepping go on at the same time, so that each round of streams takes as
    long as the slowest of them. Time runs from the first step: loading, copying the data and
    compilation are not in it.

    Args:
        cells: streams, such as 75 corruptions and severities.
        images: of each stream.
        batch_size: images of a step.
        steps: one for each adapter; a device takes them one after another.
        devices: of all hosts together.
        hosts: each has the same number of devices.
        read: images a second that a host gets from its disk or bucket.
        decode: images a second that all CPUs of a host decode and resize.
        split: over a host's devices go streams, or the images of one stream's batch, which are
            taken to cost each device its part and nothing more.

    Returns:
        The plan, of the busiest host.

    Raises:
        ValueError: for counts below 1, hosts that do not divide the devices, or rates that are not
            positive.
    """
    counts = {"cells": cells, "images": images, "batch_size": batch_size, "hosts": hosts}
    for name, value in (counts | {"devices": devices}).items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if devices % hosts:
        raise ValueError(f"{devices} devices are not a multiple of {hosts} hosts")
    if not (read > 0 and decode > 0):
        raise ValueError(f"read and decode are {read} and {decode}, expected above 0")
    own, share = devices // hosts, -(-cells // hosts)
    wide = own if split == "streams" else 1  # streams at once
    rounds, per_stream = -(-share // wide), -(-images // batch_size)
    part = per_stream if split == "streams" else per_stream / own
    compute, memory = (part * sum(step[kind] for step in steps) for kind in (0, 1))
    device = part * sum(max(step) for step in steps)
    sizes = [min(wide, share - wide * place) for place in range(rounds)]
    slowest = min(read, decode)
    seconds = sum(max(device, size * images / slowest) for size in sizes)
    used = device * cells * (1 if split == "streams" else own)
    return Plan(
        rounds,
        share * images / read,
        share * images / decode,
        rounds * memory,
        rounds * compute,
        rounds * device,
        seconds,
        devices * seconds / 3600,
        used / (devices * seconds) if seconds else 0.0,
    )


def step_of(gflop: float, gigabytes: float, batch_size: int, chip: Chip, share: float) -> Step:
    """A step by its operations at a share of the chip's peak, and by its bytes.

    Args:
        gflop: of one image.
        gigabytes: of the whole step.
        batch_size: images of a step.
        chip: the chip.
        share: of the peak that is assumed to be reached.

    Returns:
        The step.
    """
    return Step(gflop * batch_size / (share * 1e3 * chip.peak), gigabytes / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Options:
    """A sweep, its hosts and its chips."""

    read: float  # images a second that a host gets from its disk or bucket
    decode: float  # images a second that one CPU core of a host decodes and resizes
    cpus: int  # cores of a host
    devices: tuple[int, ...] = (1, 8, 256)  # chips, a line of the table for each
    per_host: int = 8  # chips of a host
    cells: int = 75  # streams: corruptions x severities (x seeds)
    images: int = 50_000  # of each
    batch_size: int = 64  # images of a step
    # zero_shot, tent, batclip, mgtta, tnt:steps=1, tnt:steps=3, or others with --step-seconds
    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    model: Literal["ViT-B/16", "ViT-L/14"] = "ViT-B/16"
    chip: Literal["v4", "v5e", "v6e"] = "v5e"
    peak_share: float = 0.4  # of the chip's peak that matrix products are assumed to reach
    hbm_gb: tuple[str, ...] = ()  # GB of memory traffic of a step, as tent=32.6
    step_seconds: tuple[str, ...] = ()  # measured seconds of a step, as tent=0.09
    split: Literal["streams", "batch"] = "streams"  # as for jaxtta sweep


def main(options: Options) -> None:
    """Print a line for each number of devices."""
    if options.per_host < 1:
        raise ValueError(f"--per-host is {options.per_host}, expected at least 1")
    steps = steps_of(options)
    lines = {}
    for count in options.devices:
        found = plan(
            options.cells,
            options.images,
            options.batch_size,
            steps,
            count,
            -(-count // options.per_host),
            options.read,
            options.decode * options.cpus,
            options.split,
        )
        hours = {
            name: getattr(found, name) / 3600 for name in ("reading", "cpus", "memory", "compute")
        }
        lines[count] = {
            "rounds": found.rounds,
            **hours,
            "hours": found.seconds / 3600,
            "chip-hours": found.device_hours,
            "chips busy": f"{found.busy:.0%}",
            "bottleneck": found.bottleneck,
        }
    kind = "measured steps" if options.step_seconds else f"{options.peak_share:.0%} of the peak"
    print(
        f"{options.cells} x {options.images} images, {', '.join(options.adapters)}, "
        f"{options.model} on {options.chip}, {kind}; hours, computed and not measured"
    )
    table = pd.DataFrame(lines).T.rename(columns={"cpus": "host CPUs", "memory": "HBM"})
    print(table.rename_axis("chips").to_string(float_format="{:.3g}".format))
    timed = numbers("step_seconds", options.step_seconds, options.adapters)
    pairs = zip(options.adapters, steps, strict=True)
    if without := [name for name, step in pairs if not step.memory and name not in timed]:
        print(f"HBM is without {', '.join(without)}: give --hbm-gb, as aot_check.py prints it")


def steps_of(options: Options) -> list[Step]:
    """The adapters' steps, as measured or by their operations and bytes."""
    measured, moved = (
        numbers(name, getattr(options, name), options.adapters)
        for name in ("step_seconds", "hbm_gb")
    )
    known, traffic = GFLOP_AN_IMAGE[options.model], HBM_GB_A_STEP[options.model]
    if not 0 < options.peak_share <= 1:
        raise ValueError(f"--peak-share is {options.peak_share}, expected above 0 and up to 1")
    steps = []
    for name in options.adapters:
        if name in measured:
            steps.append(Step(measured[name]))
            continue
        if name not in known:
            raise ValueError(f"--adapters has {name!r}: give its --step-seconds {name}=…")
        usual = traffic.get(name, 0) * options.batch_size / 64
        how = (options.batch_size, CHIPS[options.chip], options.peak_share)
        steps.append(step_of(known[name], moved.get(name, usual), *how))
    return steps


def numbers(option: str, given: Sequence[str], adapters: Sequence[str]) -> Mapping[str, float]:
    """The numbers of an option's NAME=NUMBER texts."""
    found = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = -1.0
        if name not in adapters or not 0 <= found[name] < math.inf:
            shown = f"--{option.replace('_', '-')} has {text!r}"
            raise ValueError(f"{shown}, expected ADAPTER=NUMBER, an adapter of --adapters")
    return found


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
