r"""Find out on your own images whether to switch adaptation on: go, no-go or undecided.

    jaxtta pilot FOLDER --class-names cat dog --output runs/pilot
    jaxtta pilot FOLDER --class-names cat dog --labels few.csv --adapter guarded:tent \
        --least-gain 2 --most-ms 50 --output runs/pilot

A guarded adapter answers all images in their order, beside zero-shot, and nothing depends on it
yet. Labels come from class folders, or from a .csv with the columns file and label (or image and
class) for some of the images. The folder of results has report.html for people; result.json for
programs, shares in per cent and gains in points; log.jsonl of the run; and to_label.csv: images on
which the two models differ, in random order. Labels of the first hundred usually decide: fill in
the column label and give the file to --labels; labels that it has stay in it.

Without labels nobody can tell which model is right: the verdict is then no-go or undecided, unless
--without-labels allows go on signals alone. Images that the model does not fit end in no-go before
anything is adapted.

Exit codes: 0 for go, 3 for no-go, 4 for undecided; 1 for an error; 2 for options that cannot be
parsed.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import tyro

from jaxtta import assets, data, evaluate
from jaxtta.adapters.guard import DECISIONS, REASONS
from jaxtta.cli.diagnose import target_folder
from jaxtta.cli.options import ModelOptions, group
from jaxtta.data import folders
from jaxtta.deploy.answers import Answer
from jaxtta.deploy.audit import AuditLog
from jaxtta.deploy.pilot import VERDICTS, Thresholds, judge
from jaxtta.deploy.rollout import STOPS
from jaxtta.deploy.session import Prepared, Session
from jaxtta.deploy.setup import Setup, header_of
from jaxtta.deploy.shadow import Shadow, Trial, ms_of
from jaxtta.report.pilot import write_pilot

LOG = "log.jsonl"  # jaxtta replay reads it
FIRST_LOOK = 500  # images that zero-shot is tried on before anything adapts


@group
class Options:
    """A pilot."""

    images: Annotated[Path, tyro.conf.Positional]  # a folder of images, or of class folders
    output: Path  # folder for the results, or its URL (gs://, s3://)
    # for the prompts: all classes, or FOLDER=NAME, or a .json or .txt file (default: class folders)
    class_names: tuple[str, ...] = ()
    labels: Path | None = None  # labels of some images: a .csv with file and label
    adapter: str = "guarded:batclip"  # any adapter as in jaxtta sweep --adapters, after guarded:
    batch_size: int = 16  # images per step
    # stored is by file name, which is the usual order for a flat folder; class folders are shuffled
    order: Literal["stored", "shuffled"] | None = None
    max_images: int | None = None  # use at most so many images
    seed: int = 1  # of the order and of the images that are taken
    workers: int = 1  # threads that read images
    without_labels: bool = False  # go may rest on signals alone, where no image has a label
    anyway: bool = False  # adapt though the model does not fit the images
    thresholds: tyro.conf.OmitArgPrefixes[Thresholds] = Thresholds()
    model: ModelOptions = ModelOptions()


def run(options: Options) -> int:
    """Run a pilot, write its report; return the exit code."""
    options.thresholds.check()
    spec = evaluate.parse_adapter(options.adapter)
    if not spec.guard:
        raise ValueError(
            f"--adapter is {spec.text}, expected one with a guard: guarded:{spec.text}"
        )
    for name in ("batch_size", "workers", "max_images"):
        evaluate.require_at_least(**{name: (getattr(options, name), 1)})
    model, params = options.model.load()
    flat, names = not folders.folders_in(options.images), options.class_names
    demo = options.model.model == str(assets.MODEL)
    if flat and not names:
        names = getattr(model, "class_names", ()) or (data.CIFAR10_CLASSES if demo else ())
    images = target_folder(options.images, names, options.labels)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / LOG).unlink(missing_ok=True)
    shared = ("model", "compute_dtype", "remat", "fused_attention")
    shared = {name: getattr(options.model, name) for name in shared}
    shared |= {"templates": options.model.templates_for("folder"), "seed": options.seed}
    shared |= {"class_names": images.class_names, "batch_size": options.batch_size}
    rng = np.random.default_rng(options.seed)
    numbers = rng.permutation(len(images))[: options.max_images]
    first = Setup("zero_shot", **shared, scan=options.model.scan_blocks)
    trial = ask(first.session(model, params), images, numbers[:FIRST_LOOK], options.workers)
    found = judge(trial.shadow, options.thresholds)
    if found.verdict != "no-go" or options.anyway:
        stored = (options.order or ("stored" if flat else "shuffled")) == "stored"
        numbers = np.sort(numbers) if stored else numbers
        setup = dataclasses.replace(first, adapter=options.adapter)
        session, alone = setup.session(model, params), ms_of(trial.shadow)
        with AuditLog(options.output / LOG, header_of(session, setup)) as session.log:
            trial = ask(session, images, numbers, options.workers)._replace(zero_shot_ms=alone)
        allowed = {"without_labels": options.without_labels}
        found = judge(trial.shadow, options.thresholds, **allowed)
    settings = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    made = {"settings": settings, "about": evaluate.about(model, data=str(options.images))}
    write_pilot(options.output, found, trial, images, options.thresholds, made)
    return VERDICTS[found.verdict]


def ask(session: Session, images: data.ImageFolder, numbers: np.ndarray, workers: int) -> Trial:
    """Have a session answer images in this order; those that cannot be read are named."""
    unreadable: list[str] = []
    answers: list[tuple[int, Answer]] = []
    steps: list[dict[str, Any]] = []
    ready = read(session, images, numbers, workers, unreadable)
    while batch := list(itertools.islice(ready, session.batch_size)):
        start = time.perf_counter()
        given = session.answer([image for _, image in batch], [images.paths[n] for n, _ in batch])
        metrics = session.prediction.metrics if session.prediction else {}
        seconds, scalars = time.perf_counter() - start, {k: v.item() for k, v in metrics.items()}
        steps.append({"images": len(batch), "seconds": seconds, **scalars})
        answers += [(n, answer) for (n, _), answer in zip(batch, given, strict=True)]
    finite = [(n, one) for n, one in answers if one.finite and not has_nan(one.reference)]
    if not finite:
        raise ValueError(f"{images.root}: none of the {len(numbers)} images has an answer")
    taken, answered = zip(*finite, strict=True)
    served = np.stack([answer.scores for answer in answered])
    references = [answer.reference for answer in answered]
    alone = references[0] is None
    table = pd.DataFrame(steps)
    shadow = Shadow(
        served if alone else np.stack(references),
        None if alone else served,
        images.labels[list(taken)],
        table["seconds"].to_numpy()[1:],  # the first is compiled
        session.batch_size,
        stopped_by(table),
    )
    places = np.array([answer.step for answer in answered])
    lost = len(answers) - len(finite)
    return Trial(shadow, np.array(taken), places, table, tuple(unreadable), lost)


def read(
    session: Session,
    images: data.ImageFolder,
    numbers: np.ndarray,
    workers: int,
    unreadable: list[str],
) -> Iterator[tuple[int, Prepared]]:
    """Yield images as the model takes them, read ahead by threads; add the others' names."""

    def prepared(number: int) -> Prepared | str:
        try:
            return session.prepare(images[number])
        except data.UnreadableImageError as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(numbers), size := 8 * session.batch_size):
            chunk = numbers[start : start + size].tolist()
            for number, found in zip(chunk, pool.map(prepared, chunk), strict=True):
                if isinstance(found, str):
                    unreadable.append(found)
                else:
                    yield number, found


def has_nan(scores: np.ndarray | None) -> bool:
    """Whether probabilities are given and not finite."""
    return scores is not None and not np.isfinite(scores).all()


def stopped_by(steps: pd.DataFrame) -> str:
    """Why the guard does not adapt any more; "" if it does."""
    if "decision" not in steps or DECISIONS[steps["decision"].iloc[-1]] not in STOPS:
        return ""
    places = np.flatnonzero(steps["decision"] == DECISIONS.index("stop"))
    stop, images = steps.iloc[places[-1]], int(steps["images"][: places[-1] + 1].sum())
    reason = REASONS[int(stop["reason"])].replace("_", " ")
    return f"it stopped adapting after {images} images ({reason})"
