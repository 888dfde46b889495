r"""How much does adaptation gain on corrupted pictures?

    python experiments/corruption_sweep.py --output runs/demo

runs zero-shot CLIP, TENT and BATCLIP on 15 corruptions of the embedded pictures with the embedded
model, prints the table and leaves one JSON file a stream, `table.txt` and `accuracy.png`. Other
pictures and models:

    # your own pictures in folders by class, corrupted on the fly
    python experiments/corruption_sweep.py --pictures FOLDER --model openai/clip-vit-base-patch16 \
        --preset imagenet-c --severity 5 --output runs/own
    # ready corrupted arrays: <corruption>.npy and labels.npy in one folder
    python experiments/corruption_sweep.py --arrays FOLDER --class-names cat dog --output runs/npy
"""

import dataclasses
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax

import jaxtta
from jaxtta import assets, data, sweep
from jaxtta.adapters import BATCLIP_PRESETS, TENT_PRESETS

ADAPTERS = ("zero_shot", "tent", "batclip")


@dataclasses.dataclass(frozen=True)
class Options:
    """A sweep of adapters over corruptions."""

    output: Path
    """Folder for the results; made if it is missing."""
    pictures: Path | None = None
    """Clean pictures in folders by class (default: 2,000 embedded CIFAR-10 test pictures)."""
    arrays: Path | None = None
    """Ready corrupted pictures instead: a folder with <corruption>.npy and labels.npy."""
    class_names: tuple[str, ...] = ()
    """Names for the prompts, in the labels' order, or one file that holds them: .json (a list, or
    an object from folder name to class name) or text with a name a line. Default: the class
    folders' names; needed with --arrays."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP checkpoint (default: the embedded one)."""
    adapters: tuple[str, ...] = ADAPTERS
    """Which adapters to run."""
    corruptions: tuple[str, ...] = data.COMMON
    """Which corruptions to run; "clean" is one too."""
    severity: int = 1
    """1 to 5. The corruptions are made for 224-pixel photographs, where 5 is usual. On the
    embedded 32-pixel pictures 1 looks about as strong as CIFAR-10-C's 5, and is the default."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Prompt templates; several are averaged."""
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    """Published optimiser settings (TENT has two of its own: CIFAR and ImageNet)."""
    learning_rate: float | None = None
    """Run BATCLIP with AdamW at this learning rate in place of the preset's optimiser."""
    batch_size: int = 100
    """Pictures a batch."""
    limit: int | None = None
    """Use only so many pictures, drawn by the shuffle."""
    shuffle: bool = True
    """Shuffle the stream; stored order otherwise (folders are sorted by class)."""
    seed: int = 1
    """Seed of the shuffle and of the corruptions."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products."""
    workers: int = 1
    """Processes that decode and corrupt pictures; 0 does it in this one."""
    debug: bool = False
    """Show tracebacks."""


def main(options: Options) -> None:
    """Run the sweep and report."""
    check(options)
    model, params = jaxtta.clip.load(options.model, compute_dtype=jnp.dtype(options.compute_dtype))
    source = open_source(options, model)
    for corruption in options.corruptions:
        source.check(corruption)
    task = jaxtta.clip.zero_shot_task(model, source.class_names, options.templates)
    adapters = {name: make_adapter(name, options, model, task) for name in options.adapters}
    order = data.picture_order(
        len(source.labels), shuffle=options.seed if options.shuffle else None, limit=options.limit
    )
    batches = data.Batches(source, options.corruptions, order, options.batch_size)
    settings = describe(options)

    def save(row: sweep.Row) -> None:
        path = options.output / f"{row['adapter']}-{row['corruption']}.json"
        sweep.write_json(path, {**row, "settings": settings})

    options.output.mkdir(parents=True, exist_ok=True)
    rows = sweep.run(adapters, params, batches, finished=save, workers=options.workers)
    table = sweep.table(rows)
    (options.output / "table.txt").write_text(table + "\n")
    title = f"{Path(options.model).name}, severity {options.severity}, {len(order)} pictures"
    if options.arrays:
        title = f"{Path(options.model).name}, {options.arrays.name}, {len(order)} pictures"
    sweep.plot(rows, options.output / "accuracy.png", title)
    print(f"top-1 accuracy in % (gain over zero_shot in points), {title}\n\n{table}\n")
    report_skipped(rows)
    print(f"results and plot: {options.output}")


def check(options: Options) -> None:
    """Raise a ValueError for options that cannot be meant."""
    for name in options.adapters:
        if name not in ADAPTERS:
            raise ValueError(f"unknown adapter {name!r}, expected one of {', '.join(ADAPTERS)}")
    for what in ("adapters", "corruptions"):
        chosen = getattr(options, what)
        if not chosen or len(set(chosen)) < len(chosen):
            raise ValueError(f"--{what} needs one or more different names, not {list(chosen)}")
    for what, least in (("batch_size", 1), ("workers", 0)):
        if getattr(options, what) < least:
            option = what.replace("_", "-")
            raise ValueError(f"--{option} is {getattr(options, what)}, expected at least {least}")
    rate = options.learning_rate
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"--learning-rate is {rate}, expected a positive number")
    if options.pictures and options.arrays:
        raise ValueError("--pictures and --arrays exclude each other")
    if options.arrays and not options.class_names:
        raise ValueError("--arrays needs --class-names, in the labels' order")


def open_source(options: Options, model: jaxtta.clip.CLIP) -> data.Source:
    """Open the pictures that the options name."""
    folder = None if options.arrays else data.image_folder(options.pictures or assets.PICTURES)
    names = options.class_names or folder.class_names
    if len(names) == 1 and Path(names[0]).suffix in (".json", ".txt"):
        names = data.read_class_names(names[0], folder.class_names if folder else ())
    if folder is None:
        return data.corrupted_arrays(options.arrays, model.preprocessing, names)
    if len(names) != len(folder.class_names):
        raise ValueError(f"{len(names)} class names for {len(folder.class_names)} class folders")
    folder = folder._replace(class_names=names)
    return data.CorruptedOnTheFly(folder, model.preprocessing, options.severity, options.seed)


def make_adapter(
    name: str, options: Options, model: jaxtta.clip.CLIP, task: jaxtta.clip.Task
) -> jaxtta.Adapter:
    """Make an adapter with the preset's optimiser."""
    if name == "zero_shot":
        return jaxtta.adapters.zero_shot(model, task)
    if name == "tent":
        return jaxtta.adapters.tent(model, task, TENT_PRESETS[options.preset].optimizer())
    optimizer = BATCLIP_PRESETS[options.preset].optimizer()
    if options.learning_rate is not None:
        optimizer = optax.adamw(options.learning_rate, weight_decay=1e-2)
    return jaxtta.adapters.batclip(model, task, optimizer)


def describe(options: Options) -> dict:
    """All settings, versions and the device, for the result files."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
    }
    packages = ("jax", "jaxlib", "flax", "optax", "transformers", "numpy", "pillow")
    if options.arrays:
        settings["severity"] = None  # the arrays' own
    return {
        **settings,
        "versions": {"jaxtta": jaxtta.__version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "device": jax.devices()[0].device_kind,
    }


def report_skipped(rows: list[sweep.Row]) -> None:
    """Name the pictures and steps that were passed over."""
    lost = sorted({name for row in rows for name in row["unreadable"]})
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        print(f"{len(lost)} pictures could not be used: {', '.join(lost[:5])}{more}")
    for row in rows:
        if row["skipped_steps"]:
            print(
                f"{row['adapter']} on {row['corruption']}: {len(row['skipped_steps'])} steps "
                f"skipped, their loss or update not finite: batches {row['skipped_steps']}"
            )


if __name__ == "__main__":
    sweep.run_script(Options, main, __doc__)
