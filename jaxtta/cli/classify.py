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
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from PIL import Image

from jaxtta import data, evaluate
from jaxtta.adapters import save_noise, tnt_config_of
from jaxtta.cli.options import ModelOptions, group
from jaxtta.deploy.answers import Answer, described
from jaxtta.deploy.session import Session
from jaxtta.deploy.setup import Setup
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
    files = files_of(options)
    setup, session = session_of(options)
    header, line = lines_of(options, session, max(len(printable(file)) for file in files))
    print(header, end="")
    print(f"compiling {options.adapter} …", file=sys.stderr)
    images, answered = readable(files), 0
    while batch := list(itertools.islice(images, options.batch_size)):
        for answer in session.answer([x for _, x in batch], [file for file, _ in batch]):
            print(line(answer), end="", flush=True)
            answered += answer.finite
    if not session.seen:
        raise ValueError(f"none of the {len(files)} images could be read")
    keep_noise(options, setup, session)
    return code_of(answered, len(files))


def files_of(options: Options) -> list[Path]:
    """The files that are named, and those in the folders."""
    found = [data.list_images(path) if path.is_dir() else [path] for path in options.images]
    if not (files := [*itertools.chain(*found)]):
        raise ValueError(
            "no images: give files or folders before --class-names, which takes all words after it"
        )
    return files


def session_of(options: Options, **more: Any) -> tuple[Setup, Session]:
    """The model with its adapter, for a new stream."""
    spec, given = evaluate.parse_adapter(options.adapter), options.class_names
    if (options.noise or options.learn_noise) and (spec.name != "tnt" or spec.guard):
        raise ValueError("--noise and --learn-noise are for --adapter tnt")
    if options.learn_noise and not options.learn_noise.parent.is_dir():
        raise FileNotFoundError(f"{options.learn_noise.parent}: no such folder")
    least = (options.batch_size, 1), (options.min_adapt, 1), (options.top_k, 1)
    names = ("batch_size", "min_adapt", "top_k")
    evaluate.require_at_least(**dict(zip(names, least, strict=True)))
    taken = [Path(name) for name in given[1:] if os.sep in name or Path(name).is_file()]
    if any(path.exists() for path in taken):
        raise ValueError(
            "no images: give files or folders before --class-names, which takes all words after it"
        )
    if options.batch_size < options.min_adapt and learns(options):
        print("the model is not adapted: --batch-size is below --min-adapt", file=sys.stderr)
    model, params = options.model.load()
    class_names = data.given_class_names(given) or getattr(model, "class_names", None)
    text = options.adapter
    if options.learn_noise or options.noise:
        # A map that is learnt goes on from image to image; one that is applied stays as it is.
        own = {"online": True} if options.learn_noise else {"views": 1, "steps": 0}
        missing = [f"{key}={value}" for key, value in own.items() if key not in spec.settings]
        text = f"{text}{',' if spec.settings else ':'}{','.join(missing)}" if missing else text
    setup = Setup(
        text,
        tuple(class_names or data.CIFAR10_CLASSES),
        options.model.templates_for("folder"),
        options.model.model,
        options.model.compute_dtype,
        options.model.remat,
        options.model.scan_blocks,
        fused_attention=options.model.fused_attention,
        policy={"least_images": options.min_adapt} if spec.guard else {},
        batch_size=options.batch_size,
        min_adapt=options.min_adapt,
        noise=str(options.noise) if options.noise else None,
    )
    return setup, setup.session(model, params, **{"digests": False} | more)


def learns(options: Options) -> bool:
    """Whether the adapter has updates to count, which need a batch."""
    return evaluate.parse_adapter(options.adapter).name not in ("zero_shot", "tnt")


def keep_noise(options: Options, setup: Setup, session: Session) -> None:
    """Save the noise map if one was learnt."""
    if options.learn_noise:
        config = tnt_config_of(setup.spec, setup.config)
        save_noise(options.learn_noise, session.state.noise, config)


def code_of(answered: int, count: int) -> int:
    """The exit code, after so many of the images have an answer."""
    if answered == count:
        return 0
    print(f"{count - answered} of {count} images have no answer", file=sys.stderr)
    return INCOMPLETE


def readable(files: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """Yield images one by one; those that cannot be decoded are named."""
    for file in files:
        try:
            yield file, data.open_image(file)
        except data.UnreadableImageError as error:
            print(printable(error), file=sys.stderr)


def shown(file: Any) -> str:
    """A file's name in JSON and CSV, whose readers refuse what is not UTF-8."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def lines_of(
    options: Options, session: Session, width: int = 0
) -> tuple[str, Callable[[Answer], str]]:
    """How answers are printed.

    Args:
        options: which say the format.
        session: whose answers they are.
        width: of the longest name.

    Returns:
        What comes before all answers, and from an answer to its line; with line breaks.
    """
    names, counted = session.class_names, learns(options)
    guarded = evaluate.parse_adapter(options.adapter).guard
    places = min(options.top_k, len(names))
    extra = [*["updates"] * counted, *["decision", "share"] * guarded]

    def row(cells: Sequence[Any]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()

    def line(answer: Answer) -> str:
        found = described(answer, names, places)
        pairs = [*zip(found["labels"], found["scores"], strict=True)]
        more = {name: found[name] for name in extra}
        if options.format == "jsonl":
            content = {"file": shown(answer.name)} | {k: found[k] for k in ("labels", "scores")}
            return json.dumps(content | more) + "\n"
        if options.format == "csv":
            cells = itertools.chain(*pairs or [("", "")] * places)
            return row([shown(answer.name), *cells, *more.values()])
        pairs = pairs or [("(not finite)", math.nan)]
        words = [f"{printable(label):<16}  {score:6.1%}" for label, score in pairs]
        words += [f"updates {found['updates']}"] * counted + [str(found.get("decision"))] * guarded
        return "  ".join([f"{printable(answer.name):<{width}}", *words]) + "\n"

    ranks = ["", *(f"_{place}" for place in range(2, places + 1))]
    columns = [f"{what}{rank}" for rank in ranks for what in ("label", "score")]
    return row(["file", *columns, *extra]) if options.format == "csv" else "", line
