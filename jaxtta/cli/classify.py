r"""Label images with zero-shot CLIP or any adapter.

    jaxtta classify FOLDER_OR_IMAGES… --class-names cat dog
    jaxtta classify FOLDER --model openai/clip-vit-base-patch16 --class-names names.txt --top-k 3
    jaxtta classify FOLDER --adapter batclip --format csv > labels.csv

prints one line per image: its labels, their probabilities, and for an adapter how many updates of
the model the answer had. Class names and model default to the bundled demo model's. A batch is
predicted before the model adapts to it. TENT's and BATCLIP's losses are averages over a batch: on
the demo model BATCLIP lost 21 points with one image per batch and gained with four or more, so
batches of fewer than `--min-adapt` images are answered but not adapted to.

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
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from PIL import Image

from jaxtta import data, evaluate
from jaxtta.adapters import Adapter, TNTConfig, tnt
from jaxtta.cli.options import ModelOptions, group
from jaxtta.images import SUFFIXES, printable
from jaxtta.models import Batch

CANVAS = 512
"""Side in pixels to which full-size images are padded; larger images are shrunk first."""
INCOMPLETE = 3
"""Exit code if some images have no label."""


@group
class Options:
    """Label images.

    Attributes:
        images: images or folders of images, before --class-names, which takes all words after it.
        class_names: names for the prompts, or one .json or .txt file with them.
        model: the model and its prompts.
        adapter: zero_shot, or any adapter as in jaxtta sweep --adapters.
        top_k: labels per image.
        format: text, JSON lines or CSV.
        batch_size: images per step.
        min_adapt: least number of images in a batch that is adapted to; TNT needs no batch.
        debug: show tracebacks.
    """

    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    class_names: tuple[str, ...] = ()
    model: ModelOptions = ModelOptions()
    adapter: str = "zero_shot"
    top_k: int = 1
    format: Literal["text", "jsonl", "csv"] = "text"
    batch_size: int = 32
    min_adapt: int = 4
    debug: bool = False


class Answer(NamedTuple):
    """What is said of an image.

    Attributes:
        file: the image.
        likeliest: classes and their probabilities; none if the model's answer is not finite.
        updates: how many updates the answer had.
        state: the adapter's, after this image's batch.
    """

    file: Path
    likeliest: list[tuple[str, float]]
    updates: int
    state: Any


def run(options: Options) -> int:
    """Print one line per image; return the exit code."""
    return label(options, "classify")[0]


def label(
    options: Options, command: str, config: TNTConfig | None = None, noise: Any = None
) -> tuple[int, Any]:
    """Print one line per image; return the exit code and the adapter's last state."""
    limits = {name: (getattr(options, name), 1) for name in ("batch_size", "min_adapt", "top_k")}
    evaluate.require_at_least(**limits)
    spec = evaluate.parse_adapter(options.adapter)
    files, lost, unanswered = list_images(options, command), [], 0
    if options.batch_size < options.min_adapt and spec.name not in ("zero_shot", "tnt"):
        few = f"--batch-size {options.batch_size} is below --min-adapt {options.min_adapt}"
        print(f"the model is not adapted: {few}", file=sys.stderr)
    model, params = options.model.load()
    given = data.given_class_names(options.class_names) or getattr(model, "class_names", ())
    names = given or data.CIFAR10_CLASSES
    task = evaluate.task_for(model, names, options.model.templates_for("folder"))
    settings = evaluate.AdapterConfig(tnt=config or TNTConfig())
    if spec.name == "tnt":
        config = evaluate.tnt_config_of(spec, settings)
        adapter = tnt(model, task, config=config, noise=noise)
    else:
        adapter = evaluate.make_adapter(spec, model, task, settings)
    counted = spec.name != "zero_shot" and not (config and not config.steps)
    write, answer = writer(options, files, names, counted), None
    images = readable(files, lost)
    for answer in answers(model, params, names, adapter, images, options, spec, config):
        write(answer)
        unanswered += not answer.likeliest
    if answer is None:
        raise ValueError(f"none of the {len(files)} images could be read")
    for count, what in ((len(lost), "could not be read"), (unanswered, "have no finite answer")):
        if count:
            print(f"{count} of {len(files)} images {what}", file=sys.stderr)
    return INCOMPLETE if lost or unanswered else 0, answer.state


def answers(
    model: Any,
    params: Any,
    names: Sequence[str],
    adapter: Adapter,
    images: Iterator[tuple[Path, Image.Image]],
    options: Options,
    spec: evaluate.AdapterSpec,
    config: TNTConfig | None,
) -> Iterator[Answer]:
    """Answer image by image, and adapt batch by batch; `config` is TNT's."""
    least = 1 if spec.name in ("zero_shot", "tnt") else options.min_adapt
    # The state is not donated: it is kept where a batch is too small to adapt to.
    state, step, seen, updates = adapter.init(params), jax.jit(adapter.step), 0, 0
    while batch := list(itertools.islice(images, options.batch_size)):
        if not seen:
            print(f"compiling {options.adapter} …", file=sys.stderr)
        inputs = batch_of(model, [x for _, x in batch], options, seen, spec.needs_originals)
        before, (after, prediction) = state, step(params, state, inputs)
        if len(batch) >= least:
            state = after
        for (file, _), logits in zip(batch, np.asarray(prediction.logits), strict=False):
            scores, finite = np.asarray(jax.nn.softmax(logits)), bool(np.isfinite(logits).all())
            best = np.argsort(-scores, kind="stable")[: options.top_k * finite]
            if config:  # each image has its own map, unless one is learnt over all
                updates = updates * config.online + config.steps * finite
            yield Answer(file, [(names[n], float(scores[n])) for n in best], updates, state)
        updates += state is not before and not (config or prediction.metrics.get("skipped"))
        seen += len(batch)


def batch_of(
    model: Any, images: Sequence[Image.Image], options: Options, seen: int, originals: bool
) -> Batch:
    """A batch padded with its last image; of full-size images for methods that make views."""
    places, sizes = np.arange(options.batch_size, dtype=np.int32), None
    rows = np.minimum(places, len(images) - 1)
    if originals:
        rgb = [np.asarray(model.preprocessing.rgb(image)) for image in images]
        padded = [data.pad_to_canvas(image, CANVAS) for image in rgb]
        pixels, sizes = (np.stack(arrays)[rows] for arrays in zip(*padded, strict=True))
    else:
        pixels = model.preprocess(images)[rows]
    return Batch(pixels, places < len(images), seen + places, sizes)


def writer(
    options: Options, files: Sequence[Path], names: Sequence[str], counted: bool
) -> Callable[[Answer], None]:
    """A function that prints an answer: the likeliest classes, and the updates if `counted`."""
    width, places = max(len(printable(file)) for file in files), min(options.top_k, len(names))
    table = csv.writer(sys.stdout, lineterminator="\n")
    if options.format == "csv":
        ranks = ["", *(f"_{place}" for place in range(2, places + 1))]
        columns = [f"{what}{rank}" for rank in ranks for what in ("label", "score")]
        table.writerow(["file", *columns, *["updates"] * counted])

    def write(answer: Answer) -> None:
        updates = {"updates": answer.updates} if counted else {}
        if options.format == "jsonl":
            labels, scores = ([pair[n] for pair in answer.likeliest] for n in (0, 1))
            line = {"file": str(answer.file), "labels": labels, "scores": scores}
            print(json.dumps(line | updates))
        elif options.format == "csv":
            pairs = answer.likeliest or [("", "")] * places
            table.writerow([answer.file, *itertools.chain(*pairs), *updates.values()])
        else:
            pairs = answer.likeliest or [("(not finite)", math.nan)]
            words = [f"{printable(label):<16}  {score:6.1%}" for label, score in pairs]
            words += [f"updates {count}" for count in updates.values()]
            print("  ".join([f"{printable(answer.file):<{width}}", *words]))
        sys.stdout.flush()

    return write


def list_images(options: Options, command: str) -> list[Path]:
    """The image files; those of a folder are sorted."""
    if not options.images:
        raise ValueError(f"no images: {_right_order(options.class_names, command)}")
    for name in options.class_names[1:]:  # a class may be called like a folder, not like a path
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


def _right_order(names: Sequence[str], command: str) -> str:
    """How to give images and class names, if the last names are paths of images."""
    taken = list(itertools.takewhile(lambda name: Path(name).exists(), reversed(names)))[::-1]
    taken = taken[1:] if len(taken) == len(names) else taken  # the first is a file of names
    if not taken:
        return "give files or folders before the options"
    right = shlex.join(["jaxtta", command, *taken, "--class-names", *names[: -len(taken)]])
    return f"--class-names took {taken[0]} for a name; give the images first: {right}"


def readable(files: Sequence[Path], lost: list[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield images one by one; those that cannot be decoded are named and added to `lost`."""
    for file in files:
        try:
            yield file, data.open_image(file)
        except data.UnreadableImageError as error:
            print(printable(error), file=sys.stderr)
            lost.append(file)
