r"""Label images with zero-shot CLIP or any adapter.

    jaxtta classify FOLDER_OR_IMAGES… --class-names cat dog
    jaxtta classify FOLDER --model openai/clip-vit-base-patch16 --class-names names.txt --top-k 3
    jaxtta classify FOLDER --adapter batclip --format csv > labels.csv

prints one line per image: its labels, their probabilities, and for an adapter how many updates of
the model the answer had. A batch is predicted before the model adapts to it. TENT's and BATCLIP's
losses are averages over a batch: on the demo model BATCLIP lost 21 points with one image per batch
and gained with four or more, so batches of fewer than `--min-adapt` images are not adapted to.

Exit codes: 0 if every image has a label; 1 for an error, also if no image could be read; 2 for
options that cannot be parsed; 3 if some images could not be read (they are named on stderr) or have
no finite answer.
"""

import csv
import itertools
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from PIL import Image

from jaxtta import data, evaluate
from jaxtta.adapters import TNTConfig, tnt
from jaxtta.cli.options import ModelOptions, group
from jaxtta.images import SUFFIXES, printable
from jaxtta.models import Batch

CANVAS = 512  # side in pixels to which full-size images are padded; larger ones are shrunk
INCOMPLETE = 3  # exit code if some images have no label


@group
class Options:
    """Label images.

    Attributes:
        images: images or folders of images, before --class-names, which takes all words after it.
        class_names: for the prompts, or a .json or .txt file of them (default: the demo model's).
        adapter: zero_shot, or any adapter as in jaxtta sweep --adapters.
        top_k: labels per image.
        format: text, JSON lines or CSV.
        batch_size: images per step.
        min_adapt: least number of images in a batch that is adapted to; TNT needs no batch.
        debug: show tracebacks.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    class_names: tuple[str, ...] = ()
    adapter: str = "zero_shot"
    top_k: int = 1
    format: Literal["text", "jsonl", "csv"] = "text"
    batch_size: int = 32
    min_adapt: int = 4
    model: ModelOptions = ModelOptions()
    debug: bool = False


def run(options: Options) -> int:
    """Print one line per image; return the exit code."""
    return label(options, "classify")[0]


def label(
    options: Options, command: str, config: TNTConfig | None = None, noise: Any = None
) -> tuple[int, Any]:
    """Print one line per image; return the exit code and the adapter's last state."""
    size, spec = options.batch_size, evaluate.parse_adapter(options.adapter)
    files, per_image = list_images(options, command), spec.name == "tnt"
    limits = {name: (getattr(options, name), 1) for name in ("batch_size", "min_adapt", "top_k")}
    evaluate.require_at_least(**limits)
    least = 1 if per_image or spec.name == "zero_shot" else options.min_adapt
    if size < least:
        few = f"--batch-size {size} is below --min-adapt {least}"
        print(f"the model is not adapted: {few}", file=sys.stderr)
    names = data.given_class_names(options.class_names)
    model, params = options.model.load()
    names = names or getattr(model, "class_names", ()) or data.CIFAR10_CLASSES
    task = evaluate.task_for(model, names, options.model.templates_for("folder"))
    settings = evaluate.AdapterConfig(tnt=config or TNTConfig())
    adapter, steps, kept = evaluate.make_adapter(spec, model, task, settings), 1, False
    if per_image:
        config = evaluate.tnt_config_of(spec, settings)
        steps, kept = config.steps, config.online
        adapter = tnt(model, task, config=config, noise=noise)
    say = writer(options, files, names, counted=spec.name != "zero_shot" and steps > 0)
    # The state is not donated: it is kept where a batch is too small to adapt to.
    state, step, seen, updates, unanswered = adapter.init(params), jax.jit(adapter.step), 0, 0, 0
    lost: list[Path] = []
    images = readable(files, lost)
    while batch := list(itertools.islice(images, size)):
        if not seen:
            print(f"compiling {options.adapter} …", file=sys.stderr)
        inputs = batch_of(model, [x for _, x in batch], size, seen, spec.needs_originals)
        after, prediction = step(params, state, inputs)
        for (file, _), logits in zip(batch, np.asarray(prediction.logits), strict=False):
            finite = bool(np.isfinite(logits).all())
            if per_image:  # each image has its own map, unless one is learnt over all
                updates = updates * kept + steps * finite
            say(file, np.asarray(jax.nn.softmax(logits)) if finite else np.zeros(0), updates)
            unanswered += not finite
        if len(batch) >= least:
            state = after
            updates += not per_image and not prediction.metrics.get("skipped", False)
        seen += len(batch)
    if not seen:
        raise ValueError(f"none of the {len(files)} images could be read")
    if lost:
        print(f"{len(lost)} of {len(files)} images could not be read", file=sys.stderr)
    if unanswered:
        print(f"{unanswered} of {len(files)} images have no finite answer", file=sys.stderr)
    return INCOMPLETE if lost or unanswered else 0, state


def batch_of(model: Any, images: Sequence[Image.Image], size: int, seen: int, full: bool) -> Batch:
    """Pad a batch; of full-size images for methods that make their own views."""
    if not full:
        return Batch.padded(model.preprocess(images), size, seen)
    rgb = [np.asarray(model.preprocessing.rgb(image)) for image in images]
    pairs = [data.pad_to_canvas(image, CANVAS) for image in rgb]
    pixels, sizes = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
    sizes = np.pad(sizes, ((0, size - len(images)), (0, 0)), constant_values=1)
    return Batch.padded(pixels, size, seen)._replace(sizes=sizes)


def writer(
    options: Options, files: Sequence[Path], names: Sequence[str], counted: bool
) -> Callable[[Path, np.ndarray, int], None]:
    """A function that prints an image's likeliest classes, and the updates if `counted`."""
    width, places = max(len(printable(file)) for file in files), min(options.top_k, len(names))
    table = csv.writer(sys.stdout, lineterminator="\n")
    if options.format == "csv":
        ranks = ["", *(f"_{place}" for place in range(2, places + 1))]
        columns = [f"{what}{rank}" for rank in ranks for what in ("label", "score")]
        table.writerow(["file", *columns, *["updates"] * counted])

    def say(file: Path, scores: np.ndarray, updates: int) -> None:
        best = np.argsort(-scores, kind="stable")[:places]
        pairs = [(names[n], float(scores[n])) for n in best]
        # Readers of JSON and CSV refuse what is not UTF-8; line breaks they can read.
        name = os.fsencode(file).decode("utf-8", "backslashreplace")
        if options.format == "jsonl":
            labels, probabilities = ([pair[n] for pair in pairs] for n in (0, 1))
            line = {"file": name, "labels": labels, "scores": probabilities}
            print(json.dumps(line | ({"updates": updates} if counted else {})))
        elif options.format == "csv":
            cells = itertools.chain(*pairs or [("", "")] * places)
            table.writerow([name, *cells, *[updates] * counted])
        else:
            pairs = pairs or [("(not finite)", math.nan)]
            words = [f"{printable(name):<16}  {score:6.1%}" for name, score in pairs]
            words += [f"updates {updates}"] * counted
            print("  ".join([f"{printable(file):<{width}}", *words]))
        sys.stdout.flush()

    return say


def list_images(options: Options, command: str) -> list[Path]:
    """The image files; a folder's are sorted."""
    names = options.class_names
    if not options.images:
        # The last names that are paths may be the images; a first one is a file of names.
        paths = itertools.takewhile(lambda name: Path(name).exists(), reversed(names[1:]))
        if not (taken := [*paths][::-1]):
            raise ValueError("no images: give files or folders before the options")
        right = shlex.join(["jaxtta", command, *taken, "--class-names", *names[: -len(taken)]])
        raise ValueError(
            f"no images: --class-names took {taken[0]} for a name; give the images first: {right}"
        )
    for name in names[1:]:  # a class may be called like a folder, but not like a path
        if (os.sep in name or name.lower().endswith(SUFFIXES)) and Path(name).exists():
            raise ValueError(f"--class-names took {name} for a name; give all images before it")
    files: list[Path] = []
    for path in options.images:
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
