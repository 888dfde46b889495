r"""Diagnose a CLIP model: its features, and its accuracy under distribution shift.

    jaxtta diagnose --output runs/diagnosis

diagnoses the bundled demo model on the bundled images and on four corruptions of them, prints the
table and writes report.html, result.json and plots. Other models, images and shifts:

    # two models side by side, on ImageNet and three natural distribution shifts
    jaxtta diagnose --models openai/clip-vit-base-patch16 FOLDER --output runs/two \
        --layout imagenet --data IMAGENET/val --corruptions --reference-points published \
        --shifted imagenet-v2=imagenet-v2=IMAGENET-V2 imagenet-r=imagenet=IMAGENET-R \
        imagenet-sketch=imagenet=SKETCH
    # ready corrupted arrays, all 15 corruptions
    jaxtta diagnose --layout arrays --data FOLDER --class-names NAMES.txt \
        --corruptions imagenet-c --output runs/arrays

With --target, a folder of your own images is compared with --data instead and, if some have labels,
adapters are tried on those:

    jaxtta diagnose --target FOLDER --class-names cat dog --output runs/target
    jaxtta diagnose --target TEXTILES --class-names "global=a large defect" "local=a small defect" \
        "nominal=no defect" --output runs/textiles
    # many images in one folder, with a file of labels for a few of them
    jaxtta diagnose --target FOLDER --class-names cat dog --target-labels FEW.csv --output runs/few

Each model's answers to the images are in images.csv: file (from the folder), class, confidence,
entropy in nats, and distance of the features from the tenth nearest of the reference images.
Images that cannot be read are left out, named and counted.
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxtta import assets, data, diagnose, evaluate, models, report
from jaxtta.adapters import TNTConfig
from jaxtta.bootstrap import accuracy_interval
from jaxtta.cli import options as groups
from jaxtta.data.arrays import read_labels
from jaxtta.data.folders import image_folder, list_folders
from jaxtta.data.layouts import require_meaning
from jaxtta.data.recognise import entries_of, folders_in, is_folder
from jaxtta.diagnose import error_context, truncate
from jaxtta.images import SUFFIXES, printable
from jaxtta.io import nfc, read_rows, read_text
from jaxtta.report import diagnosis

KINDS = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")
"""A corruption of each kind: noise, blur, weather, digital."""


@groups.group
class ShiftOptions:
    """The shifted sets, and the models that effective robustness is measured against.

    Attributes:
        corruptions: corruptions of the base set, may be empty; "imagenet-c" are its 15.
        severity: 1 to 5 (default: 5; 1 on the bundled images; fixed for arrays).
        shifted: other shifted sets as NAME=LAYOUT=FOLDER, with heads of their own class names;
            --class-names are also those of sets of layout folder or arrays.
        references: at least two of --models that are not robust; a line is fitted to them.
        reference_points: instead, accuracies of such models on the same sets: a .json list of
            objects or a .csv, with base and shifted, both in (0, 1); or "published", for ImageNet
            and --shifted sets named imagenet-v2, -r, -sketch or -a.
    """

    corruptions: tuple[str, ...] = KINDS
    severity: int | None = None
    shifted: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    reference_points: str | None = None


@groups.group
class TargetOptions(groups.AdapterOptions):
    """A check of your own images, with --data as the reference.

    Attributes:
        target: folder of images, with class folders or without labels; --class-names are of its
            classes then: its class folders among them, or FOLDER=NAME to name one otherwise.
        target_labels: labels for some of the images if there are no class folders: a .csv with
            columns image (path from the folder) and class (one of --class-names).
        adapters: adapters to try on the labelled images, as in jaxtta sweep; tnt is slow: half a
            minute per image for ViT-B/16 on two CPU cores.
        try_batch: images per step (default: a tenth of the labelled images, from 4 to 100).
    """

    target: Path | None = None
    target_labels: Path | None = None
    adapters: Annotated[tuple[str, ...], tyro.conf.arg(name="try-adapters")] = (
        *("zero_shot", "tent", "batclip"),
    )
    try_batch: int | None = None


@groups.group
class Options:
    """Models, and how they run.

    Attributes:
        output: folder for the results.
        models: folders or hub ids of CLIP models (default: the bundled demo model).
        templates: prompt templates, with {} for the class; "imagenet" are CLIP's 80.
        batch_size: images encoded at a time.
        seed: of images, corruptions, permutations and the order of the trial.
        workers: processes that read images; 0 to read in the main process.
        trust_data: take an earlier trial without checking that the images are unchanged.
        debug: show tracebacks.
    """

    output: Path
    models: tuple[str, ...] = (str(assets.MODEL),)
    templates: tuple[str, ...] = ()
    batch_size: int = 100
    seed: int = 1
    workers: int = 1
    trust_data: bool = False
    debug: bool = False
    data: groups.DataOptions = groups.DataOptions()
    shifts: ShiftOptions = ShiftOptions()
    measured: diagnose.Settings = diagnose.Settings()
    own: TargetOptions = TargetOptions()


class Model(NamedTuple):
    """A loaded model and its name in the report."""

    name: str
    clip: models.CLIP
    params: models.Params

    def head(self, options: Options, names: Sequence[str], layout: str) -> jax.Array:
        """The head of these classes."""
        texts = groups.ModelOptions(templates=options.templates).templates_for(layout)
        task = models.zero_shot_task(self.clip, names, texts)
        return diagnose.head_of(self.clip, self.params, task)


def run(options: Options) -> None:
    """Diagnose models, or check target images."""
    check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    run_one = check_images if options.own.target else compare_models
    title, content, found = run_one(options)
    settings = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    ran = "; ".join(f"{name}: {each['preprocessing']}" for name, each in found["models"].items())
    about = evaluate.about(data=options.data.data, preprocessing=ran)
    title = f"{title}: {', '.join(found['models'])}"
    diagnosis.write(options.output, title, content, found | {"settings": settings, "about": about})


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    shifts, own = options.shifts, options.own
    options.measured.check()
    evaluate.require_distinct(models=options.models, try_adapters=own.adapters)
    names = {"class_names": options.data.class_names, "templates": options.templates}
    names |= {"corruptions": shifts.corruptions, "references": shifts.references}
    evaluate.require_distinct(**{name: given for name, given in names.items() if given})
    evaluate.require_at_least(
        max_images=(options.data.max_images, 2),
        batch_size=(options.batch_size, 1),
        try_batch=(own.try_batch, 1),
        workers=(options.workers, 0),
    )
    if options.data.layout == "arrays" and shifts.severity:
        raise ValueError("--layout arrays has a fixed severity, omit --severity")
    if odd := sorted(set(shifts.references) - set(options.models)):
        raise ValueError(f"--references has {odd[0]!r}, which is not one of --models")
    if shifts.references and (len(shifts.references) < 2 or shifts.reference_points):
        raise ValueError("--references needs at least two models, and no --reference-points")
    if own.target_labels and not own.target:
        raise ValueError("--target-labels needs --target")
    if "zero_shot" not in [evaluate.parse_adapter(text).name for text in own.adapters]:
        raise ValueError("--try-adapters needs zero_shot, the baseline for gains")


def models_of(options: Options) -> Iterator[Model]:
    """Load the models one after another."""
    names = [Path(given).name for given in options.models]
    for given, name in zip(options.models, names, strict=True):
        model = Model(given if names.count(name) > 1 else name, *models.load_clip(given))
        with diagnose.error_context(f"{model.name}: --outlier-threshold"):
            nothing = np.zeros((1, model.clip.projection))
            diagnose.outlier_stats(nothing, threshold=options.measured.outlier_threshold)
        tqdm.write(f"compiling the image tower of {model.name} …", file=sys.stderr)
        yield model


def batches_of(
    options: Options, model: Model, images: data.Benchmark, names: Sequence[str], severity: int = 0
) -> data.Batches:
    """A stream for each corruption or name, all of the same images."""
    drawn = {"seed": options.seed, "limit": options.data.max_images}
    labels = data.labels_of(images)
    streams = data.make_streams("reset_each_shift", names, (severity,), labels, **drawn)
    data.select(images, [stream.segments[0] for stream in streams])
    return data.Batches(images, tuple(streams), options.batch_size, model.clip.preprocessing)


def read(
    options: Options, model: Model, batches: data.Batches
) -> Iterator[tuple[str, diagnose.FeatureSet]]:
    """Yield the name and features of one stream after another."""
    reader = data.read_ahead(batches, options.workers)
    for number, stream in enumerate(batches.streams):
        count, desc = len(batches.of(number)), f"{model.name} on {stream.name}"
        own = tqdm(itertools.islice(reader, count), desc, count, leave=False, unit="batch")
        name_of = functools.partial(data.name_of, batches.benchmark[stream.segments[0]])
        with diagnose.error_context(desc):
            features = diagnose.read_features(model.clip, model.params, own, name_of)
        yield stream.name, features
    next(reader, None)  # ends the reader processes


# --- diagnosis ---


def compare_models(options: Options) -> tuple[str, diagnosis.Report, dict[str, Any]]:
    """Diagnose every model; the title, the report and what result.json holds."""
    points, fractions = points_of(options), options.measured.fractions
    found, features = {}, {}
    for model in models_of(options):
        prepared = models.describe_preprocessing(model.clip)
        found[model.name], features[model.name] = diagnose.diagnose_model(
            model.name, labelled_sets(options, model), options.measured, prepared
        )
    names = dict(zip(options.models, found, strict=True))
    references = [names[given] for given in options.shifts.references]
    robustness = diagnose.measure_robustness(found, points, references)
    whole = diagnose.Diagnosis(found, diagnose.compare_models(found, features), robustness)
    return "Diagnosis", diagnosis.diagnosis_report(whole, fractions), dataclasses.asdict(whole)


def labelled_sets(options: Options, model: Model) -> Iterator[diagnose.LabelledSet]:
    """The base set with its corruptions, then the other shifted sets."""
    shifts, layout, root = options.shifts, options.data.layout, options.data.data
    severity = evaluate.default_severity(layout, root, shifts.severity)
    corruptions = shifts.corruptions
    corruptions = data.IMAGENET_C if corruptions == ("imagenet-c",) else corruptions
    domains = [*dict.fromkeys((data.CLEAN, *corruptions))]
    base = batches_of(options, model, options.data.open(model.clip), domains, severity)
    sets = [(layout, base)]
    for text in shifts.shifted:
        name, _, place = text.partition("=")
        layout, _, root = place.partition("=")
        if not (name and root) or name in domains:
            raise ValueError(f"--shifted has {text!r}, expected NAME=LAYOUT=FOLDER, a new name")
        names = names_for(options, layout, root)
        with diagnose.error_context(f"--shifted {name}"):
            images = {data.Domain(name): data.open_dataset(layout, root, names)}
        sets.append((layout, batches_of(options, model, images, [name])))
    for layout, batches in sets:
        names = data.class_names_of(batches.benchmark)
        with diagnose.error_context(f"{model.name} on {batches.streams[0].name}"):
            head = model.head(options, names, layout)
        for name, features in read(options, model, batches):
            yield diagnose.LabelledSet(name, head, names, features)


def names_for(options: Options, layout: str, root: str) -> tuple[str, ...]:
    """Class names for a shifted set from the options; empty for the layout's names."""
    own = options.data
    if not own.class_names or layout not in ("folder", "arrays"):
        return ()
    by_folder = Path(own.class_names[0]).suffix == ".json"
    if layout == own.layout == "folder" and not by_folder:
        both = ({folder.name for folder in class_folders(place)} for place in (root, own.data))
        if odd := sorted(set.symmetric_difference(*both)):
            raise ValueError(
                f"{root}: its class folders are not those of {own.data}, {diagnose.truncate(odd)} "
                "being in one of them, so --class-names must be a .json by folder name"
            )
    return groups.class_names_of(own.class_names, layout, root)


def points_of(options: Options) -> Sequence[tuple[float, float]]:
    """Base and shifted accuracies of the reference models, if given."""
    shifts, path = options.shifts, Path(options.shifts.reference_points or "")
    if shifts.reference_points == "published":
        if options.data.layout != "imagenet" or shifts.corruptions:
            raise ValueError(
                "--reference-points published needs --layout imagenet and empty --corruptions"
            )
        with diagnose.error_context("--reference-points published"):
            return data.reference_points([text.partition("=")[0] for text in shifts.shifted])
    if shifts.reference_points is None:
        return ()
    try:
        listed = path.suffix == ".json"
        rows = json.loads(read_text(path)) if listed else [
            row for _, row in read_rows(path, ("base", "shifted"))
        ]
        points = [(float(row["base"]), float(row["shifted"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected base and shifted of each model ({error!r})") from error
    with diagnose.error_context(path):
        diagnose.fit_baseline(*np.reshape(points, (-1, 2)).T)
    return points


# --- check of target images ---


def check_images(options: Options) -> tuple[str, diagnosis.Report, dict[str, Any]]:
    """Check the target images with every model; the title, the report and the results."""
    own = options.own
    images = target_folder(own.target, options.data.class_names, own.target_labels)
    checks, answers = {}, {}
    for model in models_of(options):
        checks[model.name], answers[model.name] = check_one(options, model, images)
    content = diagnosis.check_report(checks, answers, images, images.paths)
    found = {name: dataclasses.asdict(check) for name, check in checks.items()}
    return f"Check of {own.target.resolve().name}", content, {"models": found}


def check_one(
    options: Options, model: Model, images: data.ImageFolder
) -> tuple[diagnose.TargetCheck, diagnose.Answers]:
    """A model's check, with a trial of adapters if images have labels, and its answers."""
    names = ()
    if options.data.layout == "arrays":  # the reference's labels are not used
        names = tuple(map(str, range(read_labels(options.data.data).max() + 1)))
    reference = dataclasses.replace(options.data, class_names=names).open(model.clip)
    target = batches_of(options, model, {data.Domain("target"): images}, ["target"])
    sets = target, batches_of(options, model, reference, [data.CLEAN])
    with diagnose.error_context(options.own.target):
        head = model.head(options, images.class_names, "folder")
    features = [features for batches in sets for _, features in read(options, model, batches)]
    with diagnose.error_context(model.name):
        found, answers = diagnose.check_target(
            *features, head, images.class_names,
            scale=jnp.exp(model.params["logit_scale"]),
            outlier_threshold=options.measured.outlier_threshold,
            seed=options.seed,
        )
    return dataclasses.replace(
        found,
        trial=try_adapters(options, model, images, target.streams[0]),
        reference_name=REFERENCE if options.data.data == str(assets.IMAGES) else options.data.data,
        preprocessing=models.describe_preprocessing(model.clip),
    ), answers


def try_adapters(
    options: Options, model: Model, images: data.ImageFolder, stream: data.Stream
) -> diagnose.Trial | None:
    """Run every adapter once over those images of a stream that have labels."""
    drawn = np.sort(stream.items[:, 1])
    drawn = drawn[images.labels[drawn] >= 0]
    if (images.labels < 0).all():
        return None
    if not len(drawn):
        raise ValueError(
            f"{options.own.target}: --max-images {options.data.max_images} selects no labelled image"
        )
    size = options.own.try_batch or int(np.clip(len(drawn) // 10, 4, 100))
    labelled = {data.Domain("target"): data.Subset(images, drawn)}
    ...
