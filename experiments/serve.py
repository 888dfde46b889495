r"""Label images as they come, adapting all the while.

    python experiments/serve.py FOLDER_OR_IMAGES… --class-names cat dog

prints a line an image: its label, the confidence, and whether the model adapted to it. The model
sees `--batch-size` images at a time and answers before it adapts to them; a last batch that is
not full is padded. `--class-names` and `--model` default to the embedded model and its ten classes.

What to expect of small batches: TENT's and BATCLIP's losses are averages over a batch. Of one
image BATCLIP sees one class and has nothing to separate it from: at a learning rate of 1e-3 it
lost 21 points on the embedded model, and TENT 3; from four images a batch on BATCLIP gained (the
table is in the README). Serve single images with zero_shot. A step whose loss or update is not
finite is not taken, and the line says so.

TNT needs no batch: it tunes a small noise map on each image for itself, at the cost of more than
a hundred passes. One map for a camera is learnt once and then costs nothing:

    python experiments/serve.py IMAGES… --adapter tnt --learn-noise camera.safetensors
    python experiments/serve.py FOLDER --adapter tnt --noise camera.safetensors
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import optax
import tyro
from PIL import Image

import jaxtta
from jaxtta import assets, data, evaluate
from jaxtta.adapters import TNTConfig, load_noise, save_noise
from jaxtta.data.folders import SUFFIXES

CANVAS = 512
"""Side of the canvas of TNT's originals; larger ones are shrunk to fit."""
CARRIED = TNTConfig(online=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """Label images with an adapting model."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images, or folders of them, in the order in which the model is to see them."""
    class_names: tuple[str, ...] = ()
    """Names for the prompts (default: the embedded model's ten)."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP checkpoint."""
    adapter: Literal["zero_shot", "tent", "batclip", "tnt"] = "batclip"
    """How to adapt."""
    learn_noise: Path | None = None
    """Carry one noise map along all images, and save it here (tnt)."""
    noise: Path | None = None
    """A map learnt so, applied as it is (tnt); with --learn-noise where learning goes on."""
    learning_rate: float = 1e-3
    """Of TENT's SGD or BATCLIP's AdamW."""
    batch_size: int = 8
    """Images a step."""
    debug: bool = False
    """Show tracebacks."""


def main(options: Options) -> None:
    """Print a line an image."""
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}, expected at least 1")
    if not 0 < options.learning_rate < math.inf:
        raise ValueError(f"--learning-rate is {options.learning_rate}, expected a positive number")
    if options.adapter != "tnt" and (options.noise or options.learn_noise):
        raise ValueError("--noise and --learn-noise are for --adapter tnt")
    files = list_images(options.images)
    model, params = jaxtta.load(options.model)
    own = getattr(model, "class_names", ())
    names = options.class_names or own or data.image_folder(assets.IMAGES).class_names
    task = evaluate.task_for(model, names, data.templates_for("folder"))
    adapter = {
        "zero_shot": lambda: jaxtta.adapters.zero_shot(model, task),
        "tent": lambda: jaxtta.adapters.tent(
            model, task, optimizer=optax.sgd(options.learning_rate, 0.9)
        ),
        "batclip": lambda: jaxtta.adapters.batclip(
            model, task, optimizer=optax.adamw(options.learning_rate, weight_decay=1e-2)
        ),
        "tnt": lambda: make_tnt(model, task, options),
    }[options.adapter]()
    images = readable(files)
    width = max(len(str(file)) for file in files)
    for file, (label, confidence, adapted) in serve(model, params, adapter, images, options):
        said = f"{names[label]:<16}  {confidence:6.1%}  {'adapted' if adapted else 'not adapted'}"
        print(f"{file!s:<{width}}  {said}", flush=True)


def make_tnt(
    model: jaxtta.models.CLIP, task: jaxtta.models.Task, options: Options
) -> jaxtta.Adapter:
    """TNT with a map for each image, or one that is learnt along them, or a ready one."""
    noise = load_noise(options.noise)[0] if options.noise else None
    tuning = TNTConfig(views=1, steps=0) if options.noise else TNTConfig()
    config = CARRIED if options.learn_noise else tuning
    return jaxtta.adapters.tnt(model, task, config=config, noise=noise)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """The files that are meant, those of a folder by name."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        chosen = [file for file in found if file.suffix.lower() in SUFFIXES]
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not chosen:
            raise ValueError(f"{path}: no image ({', '.join(SUFFIXES)})")
        files += chosen
    return files


def readable(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Images one by one, without those that cannot be decoded."""
    for file in files:
        try:
            yield file, data.open_image(file)
        except data.UnreadableImageError as error:
            print(error, file=sys.stderr)


def serve(
    model: jaxtta.models.CLIP,
    params: jaxtta.models.Params,
    adapter: jaxtta.Adapter,
    files: Iterator[tuple[Path, Image.Image]],
    options: Options,
) -> Iterator[tuple[Path, tuple[int, float, bool]]]:
    """Label, confidence and whether the model adapted, for each image."""
    state, step = adapter.init(params), jax.jit(adapter.step, donate_argnums=1)
    seen, size = 0, options.batch_size
    while batch := list(itertools.islice(files, size)):
        padding = size - len(batch)
        mask = np.arange(size) < len(batch)
        index = (seen + np.arange(size)).astype(np.int32)
        sizes = None
        if options.adapter == "tnt":  # which cuts its own views
            rgb = [model.preprocessing.rgb(image) for _, image in batch]
            images, sizes = map(
                np.stack, zip(*(data.on_canvas(np.asarray(x), CANVAS) for x in rgb), strict=True)
            )
            sizes = np.pad(sizes, ((0, padding), (0, 0)), constant_values=1)
        else:
            images = model.preprocess([image for _, image in batch])
        images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
        state, prediction = step(params, state, jaxtta.Batch(images, mask, index, sizes))
        probabilities = np.asarray(jax.nn.softmax(prediction.logits))
        adapted = options.adapter != "zero_shot" and not prediction.metrics["skipped"]
        for (file, _), row in zip(batch, probabilities, strict=False):
            yield file, (int(row.argmax()), float(row.max()), adapted)
        seen += len(batch)
    if options.learn_noise:
        save_noise(options.learn_noise, state.noise, CARRIED)


if __name__ == "__main__":
    from jaxtta.cli import run_script

    run_script(Options, main, __doc__)
