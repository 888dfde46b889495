r"""Label a stream of images with a model that adapts online.

    python experiments/serve.py FOLDER_OR_IMAGES… --class-names cat dog

prints one line per image: its label, the confidence, and how many updates of the model stand
behind the answer. Images are processed in batches of `--batch-size`; each batch is predicted before
the model adapts to it, so the answers to the first one are zero-shot's (`updates 0`). An incomplete
last batch is padded. `--class-names` and `--model` default to the bundled demo model and its ten
classes.

What to expect of small batches: TENT's and BATCLIP's losses are averages over a batch. With
one image BATCLIP's separation loss is undefined: at a learning rate of 1e-3 it lost 21 points on
the bundled demo model, and TENT lost 3; with four or more images per batch BATCLIP gained (see the
table in the README). Batches of fewer than `--min-adapt` images are therefore answered, but not
adapted to. A step whose loss or update is not finite is skipped and not counted.

TNT needs no batch: it optimises a small noise map for each image, at the cost of more than a
hundred forward passes. A noise map for a camera can be learnt once and then applied without
optimisation:

    python experiments/serve.py IMAGES… --adapter tnt --learn-noise camera.safetensors
    python experiments/serve.py FOLDER --adapter tnt --noise camera.safetensors

Exit codes: 0 if every image has a label; 1 for an error, also if no image could be read; 2 for
options that cannot be parsed; 3 if some images could not be read (they are named on stderr) or have
no finite answer.
"""

import dataclasses
import itertools
import math
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro
from PIL import Image

import jaxtta
from jaxtta import assets, data, evaluate
from jaxtta.adapters import TNTConfig, load_noise, save_noise
from jaxtta.images import SUFFIXES, printable

CANVAS = 512
"""Size in pixels to which TNT's full-size images are padded; larger images are shrunk first."""
INCOMPLETE = 3
"""Exit code if some images have no label."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Label images with an adapting model."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Images or folders of images, in the order in which they are processed. They come before
    --class-names, which takes all words that follow it."""
    class_names: tuple[str, ...] = ()
    """Class names for the prompts, or one file with them (.json, or text with one name per line).
    Default: the ten of the bundled demo model."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP, SigLIP or supervised ViT checkpoint."""
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
    min_adapt: int = 4
    """Least number of images in a batch that TENT and BATCLIP adapt to."""
    debug: bool = False
    """Show tracebacks."""


class Answer(NamedTuple):
    """What is said of an image.

    Attributes:
        file: the image.
        label: index of the class; None if the model's answer is not finite.
        confidence: probability of the class.
        updates: how many updates stand behind the answer; None for a method without any.
    """

    file: Path
    label: int | None
    confidence: float
    updates: int | None


def main(options: Options) -> int:
    """Print one line per image."""
    check(options)
    files, given = list_images(options.images), data.given_class_names(options.class_names)
    model, params = jaxtta.load(options.model)
    own = getattr(model, "class_names", ())
    names = given or own or data.image_folder(assets.IMAGES).class_names
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
    lost: list[Path] = []
    width, unanswered = max(len(printable(file)) for file in files), 0
    for answer in serve(model, params, adapter, readable(files, lost), options):
        label = "(not finite)" if answer.label is None else printable(names[answer.label])
        updates = "" if answer.updates is None else f"  updates {answer.updates}"
        said = f"{printable(answer.file):<{width}}  {label:<16}  {answer.confidence:6.1%}{updates}"
        print(said, flush=True)
        unanswered += answer.label is None
    if len(lost) == len(files):
        raise ValueError(f"none of the {len(files)} images could be read")
    for count, what in ((len(lost), "could not be read"), (unanswered, "have no finite answer")):
        if count:
            print(f"{count} of {len(files)} images {what}", file=sys.stderr)
    return INCOMPLETE if lost or unanswered else 0


def check(options: Options) -> None:
    """Raise an error for invalid options; warn if nothing will be adapted to."""
    if not options.images:
        raise ValueError(f"no images: {say_order(options.class_names)}")
    for name in options.class_names[1:]:  # a class may be called like a folder, but not like a path
        if (os.sep in name or name.lower().endswith(SUFFIXES)) and Path(name).exists():
            raise ValueError(f"--class-names took {name} for a name; give all images before it")
    evaluate.require_at_least(batch_size=(options.batch_size, 1), min_adapt=(options.min_adapt, 1))
    if not 0 < options.learning_rate < math.inf:
        raise ValueError(f"--learning-rate is {options.learning_rate}, expected a positive number")
    if options.adapter != "tnt" and (options.noise or options.learn_noise):
        raise ValueError("--noise and --learn-noise are for --adapter tnt")
    if options.learn_noise and not options.learn_noise.parent.is_dir():
        raise FileNotFoundError(f"{options.learn_noise.parent}: no such folder")
    if options.adapter in ("tent", "batclip") and options.batch_size < options.min_adapt:
        print(
            f"the model is not adapted: --batch-size {options.batch_size} is below --min-adapt "
            f"{options.min_adapt}",
            file=sys.stderr,
        )


def say_order(names: Sequence[str]) -> str:
    """How to give images and class names, if the last names are paths of images."""
    taken = list(itertools.takewhile(lambda name: Path(name).exists(), reversed(names)))[::-1]
    taken = taken[1:] if len(taken) == len(names) else taken  # the first is a file of names
    if not taken:
        return "give files or folders before the options"
    right = shlex.join(["serve.py", *taken, "--class-names", *names[: -len(taken)]])
    return f"--class-names took {taken[0]} for a name; give the images first: {right}"


def make_tnt(
    model: jaxtta.models.CLIP, task: jaxtta.models.Task, options: Options
) -> jaxtta.Adapter:
    """TNT with one map per image, one map learnt over all images, or a saved map."""
    noise = load_noise(options.noise)[0] if options.noise else None
    return jaxtta.adapters.tnt(model, task, config=tnt_config(options), noise=noise)


def tnt_config(options: Options) -> TNTConfig:
    """TNT's settings."""
    if options.learn_noise:
        return TNTConfig(online=True)
    return TNTConfig(views=1, steps=0) if options.noise else TNTConfig()


def list_images(paths: Sequence[Path]) -> list[Path]:
    """List the image files; those of a folder are sorted."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        found = data.list_images(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"{path}: folder without images")
        if not path.is_dir() and not path.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{path}: not an image ({', '.join(SUFFIXES)})")
        files += found
    return files


def readable(files: Sequence[Path], lost: list[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield images one by one; those that cannot be decoded are named and added to `lost`."""
    for file in files:
        try:
            yield file, data.open_image(file)
        except data.UnreadableImageError as error:
            print(printable(error), file=sys.stderr)
            lost.append(file)


def serve(
    model: jaxtta.models.CLIP,
    params: jaxtta.models.Params,
    adapter: jaxtta.Adapter,
    files: Iterator[tuple[Path, Image.Image]],
    options: Options,
) -> Iterator[Answer]:
    """Answer image by image, and adapt batch by batch."""
    state, size, tnt = adapter.init(params), options.batch_size, options.adapter == "tnt"
    inputs = uncut_inputs if tnt else plain_inputs
    steps = tnt_config(options).steps if tnt else 0
    # The state is not donated: it is kept where a batch is too small to adapt to.
    step, seen, updates = jax.jit(adapter.step), 0, 0
    while batch := list(itertools.islice(files, size)):
        if not seen:
            print(f"compiling {options.adapter} …", file=sys.stderr)
        images, sizes = inputs(model, [image for _, image in batch])
        padding = size - len(batch)
        images, sizes = (
            None if x is None else np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), "edge")
            for x in (images, sizes)
        )
        mask = np.arange(size) < len(batch)
        index = (seen + np.arange(size)).astype(np.int32)
        after, prediction = step(params, state, jaxtta.Batch(images, mask, index, sizes))
        for (file, _), row in zip(batch, np.asarray(prediction.logits), strict=False):
            finite = bool(np.isfinite(row).all())
            if tnt:  # each image has its own map, unless one is learnt over all
                updates = (updates if options.learn_noise else 0) + steps * finite
            likeliest = int(row.argmax()) if finite else None
            confidence = float(np.asarray(jax.nn.softmax(row)).max())
            counted = steps > 0 if tnt else options.adapter != "zero_shot"
            yield Answer(file, likeliest, confidence, updates if counted else None)
        if tnt or len(batch) >= options.min_adapt:
            state = after
            updates += not (tnt or bool(prediction.metrics["skipped"]))
        seen += len(batch)
    if options.learn_noise and seen:
        save_noise(options.learn_noise, state.noise, tnt_config(options))


def plain_inputs(
    model: jaxtta.models.CLIP, images: Sequence[Image.Image]
) -> tuple[np.ndarray, None]:
    """Images at the model's resolution."""
    return model.preprocess(images), None


def uncut_inputs(
    model: jaxtta.models.CLIP, images: Sequence[Image.Image]
) -> tuple[np.ndarray, np.ndarray]:
    """Full-size images and their sizes, for TNT, which makes its own views."""
    rgb = (np.asarray(model.preprocessing.rgb(image)) for image in images)
    padded, sizes = zip(*(data.on_canvas(image, CANVAS) for image in rgb), strict=True)
    return np.stack(padded), np.stack(sizes)


if __name__ == "__main__":
    from jaxtta.cli import run_script

    run_script(Options, main, __doc__)
