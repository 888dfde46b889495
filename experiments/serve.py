r"""Label a stream of images with a model that adapts online.

    python experiments/serve.py FOLDER_OR_IMAGES… --class-names cat dog

prints one line per image: its label, the confidence, and whether the model adapted to it. Images
are processed in batches of `--batch-size`; each batch is predicted before the model adapts to it,
and an incomplete last batch is padded. `--class-names` and `--model` default to the bundled demo
model and its ten classes.

What to expect of small batches: TENT's and BATCLIP's losses are averages over a batch. With
one image BATCLIP's separation loss is undefined: at a learning rate of 1e-3 it lost 21 points on
the bundled demo model, and TENT lost 3; with four or more images per batch BATCLIP gained (see the
table in the README). Use zero_shot for single images. A step whose loss or update is not finite is
skipped, and the output line says so.

TNT needs no batch: it optimises a small noise map for each image, at the cost of more than a
hundred forward passes. A noise map for a camera can be learnt once and then applied without
optimisation:

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
"""Size in pixels to which TNT's full-size images are padded; larger images are shrunk first."""
ONLINE = TNTConfig(online=True)


@dataclasses.dataclass(frozen=True)
class Options:
    """Label images with an adapting model."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Images or folders of images, in the order in which they are processed."""
    class_names: tuple[str, ...] = ()
    """Class names for the prompts (default: the ten of the bundled demo model)."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP or supervised ViT checkpoint."""
    adapter: Literal["zero_shot", "tent", "batclip", "tnt"] = "batclip"
    """Adaptation method."""
    learn_noise: Path | None = None
    """Learn one noise map over all images and save it here (tnt only)."""
    noise: Path | None = None
    """A saved noise map to apply unchanged (tnt only); with --learn-noise, the initial map."""
    learning_rate: float = 1e-3
    """Learning rate of TENT's SGD or BATCLIP's AdamW."""
    batch_size: int = 8
    """Images per step."""
    debug: bool = False
    """Show tracebacks."""


def main(options: Options) -> None:
    """Print one line per image."""
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
    """TNT with one map per image, one map learnt over all images, or a saved map."""
    noise = load_noise(options.noise)[0] if options.noise else None
    tuning = TNTConfig(views=1, steps=0) if options.noise else TNTConfig()
    config = ONLINE if options.learn_noise else tuning
    return jaxtta.adapters.tnt(model, task, config=config, noise=noise)


def list_images(paths: Sequence[Path]) -> list[Path]:
    """List the image files; those of a folder are sorted by name."""
    files: list[Path] = []
    for path in paths:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        chosen = [file for file in found if file.suffix.lower() in SUFFIXES]
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if not chosen:
            raise ValueError(f"{path}: not an image ({', '.join(SUFFIXES)})")
        files += chosen
    return files


def readable(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield images one by one, skipping those that cannot be decoded."""
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
        if options.adapter == "tnt":  # TNT makes its own views
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
        save_noise(options.learn_noise, state.noise, ONLINE)


if __name__ == "__main__":
    from jaxtta.cli import run_script

    run_script(Options, main, __doc__)
