r"""Label images with zero-shot CLIP or any adapter.

    jaxtta classify FOLDER_OR_IMAGES… --class-names cat dog
    jaxtta classify FOLDER --model openai/clip-vit-base-patch16 --class-names names.txt --top-k 3
    jaxtta classify FOLDER --adapter batclip --format csv > labels.csv

prints one line per image: its labels, their probabilities, and for TENT or BATCLIP how many updates
of the model the answer had. A batch is predicted before the model adapts to it. Their losses are
averages over a batch: on the demo model BATCLIP lost 21 points with one image per batch and gained
with four or more, so batches of fewer than `--min-adapt` images are not adapted to.

Exit codes: 0 if every image has a label; 1 for an error; 2 for options that cannot be parsed; 3 if
images could not be read (they are named on stderr) or have no finite answer.
"""

import csv
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from jaxtta import data, evaluate
from jaxtta.adapters import TNTConfig, load_noise, save_noise, tnt
from jaxtta.cli.options import ModelOptions, group
from jaxtta.deploy.session import Answer, Session
from jaxtta.images import printable

INCOMPLETE = 3  # exit code if some images have no label


@group
class Options:
    """Label images."""

    # images or folders of images, before --class-names, which takes all words after it
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    # for the prompts, or a .json or .txt file of them (default: the demo model's)
    class_names: tuple[str, ...] = ()
    adapter: str = "zero_shot"  # or any adapter as in jaxtta sweep --adapters
    top_k: int = 1  # labels per image
    format: Literal["text", "jsonl", "csv"] = "text"  # text, JSON lines or CSV
    batch_size: int = 32  # images per step
    min_adapt: int = 4  # least number of images in a batch that is adapted to; TNT needs no batch
    learn_noise: Path | None = None  # learn one noise map over all images; save it here (tnt only)
    noise: Path | None = None  # saved map to apply (tnt only), or to begin with if it is learnt
    model: ModelOptions = ModelOptions()


def run(options: Options) -> int:
    """Print one line per image; return the exit code."""
    size, spec = options.batch_size, evaluate.parse_adapter(options.adapter)
    if (spec.name != "tnt" or spec.guard) and (options.noise or options.learn_noise):
        raise ValueError("--noise and --learn-noise are for --adapter tnt")
    if options.learn_noise and not options.learn_noise.parent.is_dir():
        raise FileNotFoundError(f"{options.learn_noise.parent}: no such folder")
    evaluate.require_at_least(batch_size=(size, 1), top_k=(options.top_k, 1))
    found = [data.list_images(path) if path.is_dir() else [path] for path in options.images]
    files, names = [*itertools.chain(*found)], options.class_names
    taken = [Path(name) for name in names[1:] if os.sep in name or Path(name).is_file()]
    if not files or any(path.exists() for path in taken):
        raise ValueError(
            "no images: give files or folders before --class-names, which takes all words after it"
        )
    if size < options.min_adapt and spec.name not in ("zero_shot", "tnt"):
        print("the model is not adapted: --batch-size is below --min-adapt", file=sys.stderr)
    model, params = options.model.load()
    names = data.given_class_names(names) or getattr(model, "class_names", data.CIFAR10_CLASSES)
    task = evaluate.task_for(model, names, options.model.templates_for("folder"))
    frozen = TNTConfig(views=1, steps=0) if options.noise else TNTConfig()
    settings = evaluate.AdapterConfig(tnt=TNTConfig(online=True) if options.learn_noise else frozen)
    adapter = evaluate.make_adapter(spec, model, task, settings)
    if options.noise:
        noise: Any = load_noise(options.noise)[0]
        adapter = tnt(model, task, config=evaluate.tnt_config_of(spec, settings), noise=noise)
    say = writer(options, files, names, counted=spec.name not in ("zero_shot", "tnt"))
    # TNT takes images one by one: no batch is too small for it.
    least = 1 if spec.name == "tnt" else options.min_adapt
    session = Session(
        *(model, params, task, adapter),
        batch_size=size,
        min_adapt=least,
        full_size=spec.needs_originals,
    )
    answered = 0
    print(f"compiling {options.adapter} …", file=sys.stderr)
    images = readable(files)
    while batch := list(itertools.islice(images, size)):
        for answer in session.answer([x for _, x in batch], [file for file, _ in batch]):
            say(answer)
            answered += answer.finite
    if not session.seen:
        raise ValueError(f"none of the {len(files)} images could be read")
    if options.learn_noise:
        save_noise(options.learn_noise, session.state.noise, settings.tnt)
    if answered == len(files):
        return 0
    print(f"{len(files) - answered} of {len(files)} images have no answer", file=sys.stderr)
    return INCOMPLETE


def readable(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield images one by one; those that cannot be decoded are named."""
    for file in files:
        try:
            yield file, data.open_image(file)
        except data.UnreadableImageError as error:
            print(printable(error), file=sys.stderr)


def writer(
    options: Options, files: Sequence[Path], names: Sequence[str], counted: bool
) -> Callable[[Answer], None]:
    """A function that prints an image's likeliest classes, and the updates if `counted`."""
    width, places = max(len(printable(file)) for file in files), min(options.top_k, len(names))
    table = csv.writer(sys.stdout, lineterminator="\n")
    if options.format == "csv":
        ranks = ["", *(f"_{place}" for place in range(2, places + 1))]
        columns = [f"{what}{rank}" for rank in ranks for what in ("label", "score")]
        table.writerow(["file", *columns, *["updates"] * counted])

    def say(answer: Answer) -> None:
        file, scores, updates = answer.name, answer.scores, answer.updates
        best = np.argsort(-scores, kind="stable")[:places] if answer.finite else []
        labels, values = [names[n] for n in best], [float(scores[n]) for n in best]
        pairs, more = [*zip(labels, values, strict=True)], {"updates": updates} if counted else {}
        # Readers of JSON and CSV refuse what is not UTF-8; line breaks they can read.
        name = os.fsencode(file).decode("utf-8", "backslashreplace")
        if options.format == "jsonl":
            print(json.dumps({"file": name, "labels": labels, "scores": values, **more}))
        elif options.format == "csv":
            table.writerow([name, *itertools.chain(*pairs or [("", "")] * places), *more.values()])
        else:
            pairs = pairs or [("(not finite)", math.nan)]
            words = [f"{printable(label):<16}  {score:6.1%}" for label, score in pairs]
            words += [f"updates {updates}"] * counted
            print(f"{printable(file):<{width}}", *words, sep="  ")
        sys.stdout.flush()

    return say
