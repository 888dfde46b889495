r"""Diagnose a CLIP model: its features, and its accuracy under distribution shift.

    python experiments/diagnose_model.py --output runs/diagnosis

diagnoses the bundled demo model on the bundled images and on four corruptions of them, prints the
table and writes `report.html`, `result.json` and plots. Other models, images and shifts:

    # two models side by side, on ImageNet and three natural distribution shifts
    python experiments/diagnose_model.py --models openai/clip-vit-base-patch16 FOLDER \
        --layout imagenet --data IMAGENET/val --corruptions --output runs/two \
        --shifted imagenet-v2=imagenet-v2=IMAGENET-V2 imagenet-r=imagenet=IMAGENET-R \
        imagenet-sketch=imagenet=SKETCH --reference-points published
    # ready corrupted arrays, all 15 corruptions
    python experiments/diagnose_model.py --layout arrays --data FOLDER --class-names NAMES.txt \
        --corruptions common --output runs/arrays

The field check compares a folder of your own images with --data instead and, if some have labels,
tries adapters on those:

    python experiments/diagnose_model.py --field FOLDER --class-names cat dog --output runs/field
    python experiments/diagnose_model.py --field TEXTILES --class-names "global=a large defect" \
        "local=a small defect" "nominal=no defect" --output runs/textiles
    # many images in one folder, with a file of labels for a few of them
    python experiments/diagnose_model.py --field FOLDER --class-names cat dog \
        --field-labels FEW.csv --output runs/few

Each model's answers to the images are in `images.csv`: file (from the folder), class, confidence,
entropy in nats, and distance from the reference images (of the features, from the tenth nearest
ones); `report.html` shows the images that it is least sure of. Images that cannot be read are left
out, named in the report and counted; the exit code is 0 then too, and 1 if fewer than two can be
read.

Features are image embeddings of unit norm, the head is the classes' text embeddings. Each model's
features of the base set stay in memory; shifted sets are processed one at a time.
"""

import dataclasses
import functools
import itertools
import json
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtta.data.sources import read_labels
from jaxtta.data.text import nfc, read_rows
from tqdm import tqdm

import jaxtta
from jaxtta import assets, cli, data, diagnose, evaluate, io, losses, report
from jaxtta.adapters import TNTConfig
from jaxtta.data.folders import list_folders
from jaxtta.data.layouts import require_meaning
from jaxtta.data.recognise import entries_of, is_folder
from jaxtta.evaluate.figures import (
    Answers,
    Features,
    Found,
    base_figures,
    confused,
    error_context,
    image_answers,
    interval_of,
    label_figures,
    logits_of,
    pair_figures,
    read_points,
    robustness_of,
    set_figures,
    smallest_sufficient_fraction,
    space_figures,
)
from jaxtta.evaluate.run import peak_memory_gb
from jaxtta.images import SUFFIXES, printable
from jaxtta.report.diagnosis import Report, diagnosis_report, field_report, some, write_diagnosis

PUBLISHED = "published"
REFERENCE = "CIFAR-10's bundled test images"
KINDS = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")
"""A corruption of each kind: noise, blur, weather, digital."""


@dataclasses.dataclass(frozen=True)
class Options:
    """A diagnosis of models, or a field check of images."""

    output: Path
    """Folder for the results; created if missing."""
    models: tuple[str, ...] = (str(assets.MODEL),)
    """Folders or hub ids of CLIP checkpoints (default: the bundled demo model)."""
    data: str = str(assets.IMAGES)
    """The base images: a folder, or NAME:SPLIT for tensorflow-datasets (default: 2,000 bundled
    CIFAR-10 test images). With --field, the reference set for the comparison."""
    layout: str = "folder"
    """Dataset layout, as in corruption_sweep.py; the error for an unknown name lists all."""
    class_names: tuple[str, ...] = ()
    """Class names for the prompts, in label order, or one file with them (.json, or text with one
    name per line). Default: the layout's names; required with arrays. Also used for --shifted sets
    of layout folder or arrays. With --field, the classes of its images: they must include its class
    folders, or FOLDER=NAME gives the name for each."""
    corruptions: tuple[str, ...] = KINDS
    """Corruptions of the base set; "common" = the 15 ImageNet-C corruptions. May be empty."""
    severity: int | None = None
    """Severity, 1 to 5. Default: 5; 1 on the bundled images; fixed for arrays."""
    shifted: tuple[str, ...] = ()
    """Other shifted sets as NAME=LAYOUT=FOLDER; the head is made from their own class names."""
    references: tuple[str, ...] = ()
    """At least two of --models that are not robust; effective robustness is measured relative to
    the line fitted to them."""
    reference_points: str | None = None
    """Instead of --references, accuracies of such models on the same sets: a .json list of objects
    or a .csv, with base and shifted, both in (0, 1); or "published", for ImageNet (--layout
    imagenet, no corruptions) and --shifted sets named imagenet-v2, -r, -sketch or -a."""
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Fractions of the head's directions to keep."""
    outlier_threshold: float = 6.0
    """Threshold for outlier dimensions, in standard deviations of an image's features."""
    detectors: Literal["axes", "directions"] = "axes"
    """Directions tested as class detectors: the coordinate axes or the head's singular vectors."""
    precision: float = 0.9
    """Threshold on average precision for a class to count as detected."""
    field: Path | None = None
    """Check this folder of images instead, with class folders or without labels."""
    field_labels: Path | None = None
    """Labels for some of --field's images if there are no class folders: a .csv with columns image
    (path relative to the folder) and class (one of --class-names)."""
    trial: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    """Adapters to try on the labelled images of --field, as in corruption_sweep.py. tnt can be
    added but is slow: half a minute per image for ViT-B/16 on two CPU cores. mgtta needs files
    made for the model."""
    trial_batch: int | None = None
    """Images per step in the trial. Default: a tenth of the labelled images, from 4 to 100."""
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    """Optimiser settings of the papers, for the trial."""
    tnt: TNTConfig = dataclasses.field(default_factory=TNTConfig)
    """TNT's settings in the trial."""
    mgtta: evaluate.MGTTAConfig = dataclasses.field(default_factory=evaluate.MGTTAConfig)
    """MGTTA's settings in the trial. The default files are for the bundled demo model."""
    synthetic: int | None = None
    """Only time the diagnosis, on this many synthetic features (ViT-B/16's size, 1,000 classes)."""
    templates: tuple[str, ...] = ()
    """Prompt templates; several are averaged. "imagenet" = CLIP's 80 templates. Default: the
    usual one of the layout."""
    limit: int | None = None
    """Use at most this many images of each set, sampled with the seed."""
    seed: int = 1
    """Random seed of images, corruptions, permutations and the order in the trial."""
    batch_size: int = 100
    """Images encoded at a time."""
    workers: int = 1
    """Processes that decode and corrupt images; 0 = main process."""
    trust_data: bool = False
    """Take the results of an earlier trial in the folder without checking that the stored images
    have not changed."""
    debug: bool = False
    """Show tracebacks."""


class Model(NamedTuple):
    """A loaded model.

    Attributes:
        name: its name in the report.
        clip: the model.
        params: its parameters.
    """

    name: str
    clip: jaxtta.models.CLIP
    params: jaxtta.models.Params


Sets = tuple[data.Source, list[data.Stream]]
"""A source, and one stream for each of its domains."""


def main(options: Options) -> None:
    """Diagnose models, run the field check, or time the diagnosis."""
    check(options)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.synthetic:
        time_synthetic(options)
        return
    found, report = (check_field if options.field else compare_models)(options)
    settings = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    preprocessing = "; ".join(
        f"{name}: {figures['preprocessing']}" for name, figures in found["models"].items()
    )
    about = evaluate.about(data=options.data, preprocessing=preprocessing)
    found |= {"settings": settings, "about": about}
    io.write_json(options.output / "result.json", found)
    title = f"Field check of {options.field.resolve().name}" if options.field else "Diagnosis"
    write_diagnosis(options.output, f"{title}: {', '.join(found['models'])}", report, found)


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    evaluate.require_distinct(
        models=options.models, fractions=options.fractions, trial=options.trial
    )
    for name in ("class_names", "corruptions", "references", "templates"):
        if getattr(options, name):
            evaluate.require_distinct(**{name: getattr(options, name)})
    evaluate.require_at_least(
        synthetic=(options.synthetic, 1000),
        limit=(options.limit, 2),
        batch_size=(options.batch_size, 1),
        trial_batch=(options.trial_batch, 1),
        workers=(options.workers, 0),
    )
    for name, given in (("fractions", options.fractions), ("precision", [options.precision])):
        if not all(0 < number <= 1 for number in given):
            raise ValueError(f"--{name} is {[*given]}, expected above 0, at most 1")
    if options.layout == "arrays" and options.severity:
        raise ValueError("--layout arrays has a fixed severity, omit --severity")
    if odd := sorted(set(options.references) - set(options.models)):
        raise ValueError(f"--references has {odd[0]!r}, which is not one of --models")
    if options.references and (len(options.references) < 2 or options.reference_points):
        raise ValueError("--references needs at least two models, and no --reference-points")
    if options.field_labels and not options.field:
        raise ValueError("--field-labels needs --field")
    evaluate.check_adapters(options.trial)
    if "zero_shot" not in options.trial:
        raise ValueError("--trial needs zero_shot, the baseline for gains")


# --- models and images ---


def models_of(options: Options) -> Iterator[Model]:
    """Load the models one after another."""
    names = [Path(given).name for given in options.models]
    for given, name in zip(options.models, names, strict=True):
        model = Model(given if names.count(name) > 1 else name, *jaxtta.models.load_clip(given))
        with error_context(f"{model.name}: --outlier-threshold"):
            nothing = np.zeros((1, model.clip.projection))
            diagnose.outlier_stats(nothing, threshold=options.outlier_threshold)
        yield model


def preprocessing_of(model: Model) -> str:
    """What the model's images go through, and where that was read."""
    return jaxtta.models.describe_preprocessing(model.clip).removeprefix("preprocessing: ")


def names_for(options: Options, layout: str, root: str) -> tuple[str, ...]:
    """Class names for a set from the options; empty for the layout's names."""
    if not options.class_names or layout != "folder":
        return data.given_class_names(options.class_names)
    folders = data.image_folder(root).class_names
    by_folder = Path(options.class_names[0]).suffix == ".json"
    if options.layout == layout and root != options.data and not by_folder:
        others = data.image_folder(options.data).class_names
        if odd := sorted({*folders} ^ {*others}):
            raise ValueError(
                f"{root}: its class folders are not those of {options.data}, {some(odd)} being in "
                "one of them, so --class-names must be a .json by folder name"
            )
    return data.given_class_names(options.class_names, folders)


def streams_of(
    options: Options, source: data.Source, names: Sequence[str], severity: int = 0
) -> list[data.Stream]:
    """One stream for each corruption or name, all of the same images."""
    chosen = {"seed": options.seed, "limit": options.limit}
    streams = data.make_streams("reset_each_shift", names, (severity,), source.labels, **chosen)
    for stream in streams:
        source.check(stream.segments[0])
    return streams


def sets_of(options: Options, model: Model) -> list[tuple[str, Sets]]:
    """The base set with its corruptions, then the other shifted sets, with their layouts."""
    prepare, layout = model.clip.preprocessing, options.layout
    base = data.open_source(layout, options.data, prepare, names_for(options, layout, options.data))
    severity = evaluate.default_severity(layout, options.data, options.severity)
    corruptions = data.COMMON if options.corruptions == ("common",) else options.corruptions
    domains = tuple(dict.fromkeys((data.CLEAN, *corruptions)))
    sets = [(layout, (base, streams_of(options, base, domains, severity)))]
    for text in options.shifted:
        name, _, place = text.partition("=")
        layout, _, root = place.partition("=")
        if not (name and root) or name in domains:
            raise ValueError(f"--shifted has {text!r}, expected NAME=LAYOUT=FOLDER, a new name")
        names = names_for(options, layout, root) if layout in ("folder", "arrays") else ()
        with error_context(f"--shifted {name}"):
            own = data.Named(data.open_source(layout, root, prepare, names), name)
        sets.append((layout, (own, streams_of(options, own, (name,)))))
    return sets


def task_of(
    options: Options, model: Model, names: Sequence[str], layout: str
) -> jaxtta.models.Task:
    """The classes as prompts."""
    templates = options.templates or data.templates_for(layout)
    if templates == ("imagenet",):
        templates = data.imagenet_templates()
    return jaxtta.zero_shot_task(model.clip, names, templates)


def head_of(model: Model, task: jaxtta.models.Task) -> jax.Array:
    """The head, (classes, projection)."""
    return jax.jit(model.clip.class_embeddings)(model.params, model.clip.prompts(task))


@functools.partial(jax.jit, static_argnums=0)
def encode(model: jaxtta.models.CLIP, params: jaxtta.models.Params, images: jax.Array) -> jax.Array:
    """Features (batch, projection)."""
    return jaxtta.models.l2_normalize(model.encode_image(params, model.normalize(images)))


@functools.cache
def say_once(text: str) -> None:
    """Say on stderr what takes its time, beside the progress bar."""
    tqdm.write(text, file=sys.stderr)


def read(options: Options, model: Model, sets: Sets) -> Iterator[Features]:
    """Yield a source's features, one stream after another."""
    source, streams = sets
    batches = data.Batches(source, tuple(streams), options.batch_size)
    reader = data.read_ahead(batches, options.workers)
    bar = tqdm(total=len(batches), desc=model.name, unit="batch", leave=False)
    for number, stream in enumerate(streams):
        rows, labels, numbers, lost = [], [], [], []
        for batch in itertools.islice(reader, len(batches.of(number))):
            say_once(f"compiling the image tower of {model.name} …")
            rows.append(np.asarray(encode(model.clip, model.params, batch.images))[batch.mask])
            labels.append(batch.labels[batch.mask])
            numbers.append(batch.source_index[batch.mask])
            missing = batch.source_index[~batch.mask & (batch.source_index >= 0)]
            lost += [source.name(stream.segments[0], int(image)) for image in missing]
            if bar.n == 0:
                bar.unpause()  # the time to compile says nothing of the time left
            bar.update()
        found = Features(*map(np.concatenate, (rows, labels)), lost, np.concatenate(numbers))
        with error_context(f"{model.name} on {stream.name}"):
            if len(found.rows) < 2:
                names = f" ({some(lost)} could not)" if lost else ""
                few = len(found.rows) or "none"
                raise ValueError(f"{few} of the images could be read{names}, expected at least two")
            if not np.ptp(found.rows, axis=0).any():
                raise ValueError("the features are identical for all images")
        yield found
    bar.close()
    next(reader, None)  # ends the reader processes


# --- diagnosis ---


def compare_models(options: Options) -> tuple[Found, Report]:
    """Diagnose every model."""
    points = points_of(options)
    results, features = {}, {}
    for model in models_of(options):
        results[model.name], features[model.name] = diagnose_one(options, model)
    pairs = [pair_figures(a, b, results, features) for a, b in itertools.combinations(results, 2)]
    names = dict(zip(options.models, results, strict=True))
    references = [names[given] for given in options.references]
    robustness = robustness_of(results, points, references)
    found = {"models": results, "pairs": pairs, "robustness": robustness}
    return found, diagnosis_report(found, options.fractions)


def points_of(options: Options) -> Sequence[tuple[float, float]]:
    """Base and shifted accuracies of the reference models, if given."""
    if options.reference_points is None:
        return ()
    if options.reference_points != PUBLISHED:
        return read_points(Path(options.reference_points))
    if options.layout != "imagenet" or options.corruptions:
        raise ValueError(
            "--reference-points published needs --layout imagenet and empty --corruptions"
        )
    with error_context("--reference-points published"):
        return data.reference_points([text.partition("=")[0] for text in options.shifted])


def diagnose_one(options: Options, model: Model) -> tuple[Found, np.ndarray]:
    """All metrics of one model, and its features of the base set."""
    found: Found = {"preprocessing": preprocessing_of(model), "sets": {}}
    chosen = {"threshold": options.outlier_threshold}
    chosen |= {"detectors": options.detectors, "precision": options.precision}
    for layout, (source, streams) in sets_of(options, model):
        with error_context(f"{model.name} on {streams[0].name}"):
            head, ranked = head_of(model, task_of(options, model, source.class_names, layout)), None
        for stream, features in zip(streams, read(options, model, (source, streams)), strict=True):
            with error_context(f"{model.name} on {stream.name}"):
                if not found["sets"]:
                    base = features.rows
                    figures, ranked = base_figures(head, features, source.class_names, **chosen)
                    found |= figures
                if ranked is None:  # ranked on the base set, whatever the classes of the head
                    ranked = diagnose.privileged_directions(head, base).directions
                figures = set_figures(head, ranked, features, options.fractions)
            found["sets"][stream.name] = figures
    first, *shifts = found["sets"].values()
    for name in ("accuracy", "kurtosis", "pruned"):
        mean = np.mean([each[name] for each in shifts], 0).tolist() if shifts else None
        found |= {f"base_{name}": first[name], f"shifted_{name}": mean}
    found["enough"] = smallest_sufficient_fraction(
        first["accuracy"], options.fractions, first["pruned"]
    )
    return found, base


def time_synthetic(options: Options) -> None:
    """Time the diagnosis of synthetic features: noise around class texts and one outlier axis."""
    count, classes, size = options.synthetic, 1000, 512
    rng = np.random.default_rng(options.seed)
    head = rng.standard_normal((classes, size), np.float32)
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    labels = np.arange(count, dtype=np.int32) % classes
    rows = rng.standard_normal((count, size), np.float32) + 5 * head[labels]
    rows[:, 0] += 20
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    features, names = Features(rows, labels, []), [str(label) for label in range(classes)]
    head, other = jnp.asarray(head), rows + 0.05 * rng.standard_normal(rows.shape, np.float32)
    before, start = peak_memory_gb(), time.perf_counter()
    found, ranked = base_figures(head, features, names)
    found |= set_figures(head, ranked, features, options.fractions)
    found["cka"] = diagnose.linear_cka(rows, other)
    apart = diagnose.mmd_to_reference(rows[::2], rows[1::2])
    found["p_values"] = [each.p_value for each in apart]
    found |= {"seconds": time.perf_counter() - start, "peak_memory_gb": peak_memory_gb()}
    io.write_json(options.output / "synthetic.json", found)
    print(
        f"{count} images, {size} features, {classes} classes: {found['seconds']:.1f} s, at most "
        f"{found['peak_memory_gb']:.2f} GB in use ({before:.2f} GB after generating them)"
    )


# --- field check ---


def check_field(options: Options) -> tuple[Found, Report]:
    """Run the field check with every model."""
    listed = open_field(options)
    results, answers, entropies, tried = {}, {}, {}, {}
    for model in models_of(options):
        name = model.name
        results[name], answers[name], entropies[name], cells = check_one(options, model, listed)
        tried[name] = report.answer(cells) if cells else ""
    found = field_report(results, listed, answers, entropies, tried, options.trial)
    return {"models": results}, found


def open_field(options: Options) -> data.ImageFolder:
    """The images of the folder; the label is -1 for images without one."""
    root = options.field
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    entries = [*entries_of(root)]
    labelled = any(map(is_folder, entries))
    lone = sorted(
        entry.name
        for entry in entries
        if entry.name.lower().endswith(SUFFIXES) and not is_folder(entry)
    )
    if labelled and lone:
        raise ValueError(
            f"{root}: has images outside the class folders, such as {printable(lone[0])}"
        )
    if not labelled and not lone:
        raise ValueError(f"{root}: folder without images")
    listed = data.image_folder(root) if labelled else list_folders(root, [root], [root.name])
    given = [text.partition("=") for text in data.given_class_names(options.class_names)]
    called = {name: own or name for name, _, own in given}
    if labelled:
        if not called:
            require_meaning(listed.class_names, listed.class_names)
            called = {name: name for name in listed.class_names}
        for name in listed.class_names:
            if name not in called:
                raise ValueError(
                    f"{root / name}: class folder is not one of --class-names, {some([*called])}; "
                    f'use "{name}=…" to give its class name'
                )
        labels = np.array([[*called].index(name) for name in listed.class_names], np.int32)
        listed = listed._replace(labels=labels[listed.labels])
    else:
        listed = listed._replace(labels=np.full(len(listed.files), -1, np.int32))
    if len(called) < 2:
        raise ValueError(f"{root}: --class-names has {len(called)} classes, expected at least two")
    if options.field_labels:
        if labelled:
            raise ValueError(f"{root}: has class folders, omit --field-labels")
        listed = listed._replace(labels=read_labels_of(options.field_labels, listed, [*called]))
    return listed._replace(class_names=tuple(called.values()))


def read_labels_of(path: Path, listed: data.ImageFolder, classes: Sequence[str]) -> np.ndarray:
    """Labels (images,) from a .csv, -1 for images not in it."""
    places = {nfc(str(file.relative_to(listed.root))): n for n, file in enumerate(listed.files)}
    labels = np.full(len(listed.files), -1, np.int32)
    for line, row in read_rows(path, ("image", "class")):
        image, name = nfc(row["image"]).strip(), nfc(row["class"]).strip()
        if image not in places:
            raise ValueError(f"{line} names {image!r}, which is not an image in {listed.root}")
        if name not in classes:
            raise ValueError(
                f"{line} has class {name!r}, which is not one of --class-names, {some(classes)}"
            )
        if labels[places[image]] >= 0:
            raise ValueError(f"{line} names {image!r} again")
        labels[places[image]] = classes.index(name)
    if (labels < 0).all():
        raise ValueError(f"{path}: lists no image")
    return labels


def check_one(
    options: Options, model: Model, listed: data.ImageFolder
) -> tuple[Found, Answers, np.ndarray, list[evaluate.Cell]]:
    """A model's metrics, its answers, entropies in nats on the reference, and the trial's cells."""
    prepare, names = model.clip.preprocessing, ()
    if options.layout == "arrays":  # the reference's labels are not used
        names = tuple(map(str, range(read_labels(options.data).max() + 1)))
    field = data.Named(data.CorruptedOnTheFly(listed, prepare), "field")
    reference = data.open_source(options.layout, options.data, prepare, names)
    sets = {
        "field": (field, streams_of(options, field, ("field",))),
        "reference": (reference, streams_of(options, reference, (data.CLEAN,))),
    }
    labelled = labelled_part(options, listed, sets["field"][1][0])
    if labelled is not None:
        weights = evaluate.fingerprints(field, model.params)["weights"]
        evaluate.check_mgtta_files(options.trial, options.mgtta, weights)
    with error_context(options.field):
        task = task_of(options, model, listed.class_names, "folder")
    head, scale = head_of(model, task), jnp.exp(model.params["logit_scale"])
    found, features, logits = {"preprocessing": preprocessing_of(model)}, {}, {}
    found["classes"] = [*listed.class_names]
    for key, each in sets.items():
        (features[key],) = read(options, model, each)
        logits[key] = scale * logits_of(features[key].rows, head)
        with error_context(f"{model.name} on the {key}"):
            found[key] = space_figures(features[key], logits[key], options.outlier_threshold)
    found["confused"] = confused(logits["field"], listed.class_names)
    found |= label_figures(features["field"], logits["field"])
    answers = image_answers(features["field"], logits["field"], features["reference"].rows)
    entropies = np.asarray(losses.entropy(logits["reference"]))
    found["reference"]["name"] = REFERENCE if options.data == Options.data else options.data
    with error_context(f"{model.name} on {options.field}"):
        rows = (features[key].rows for key in sets)
        apart = diagnose.mmd_to_reference(*rows, seed=options.seed)
    for key, each in zip(sets, apart, strict=True):
        values = {
            "discrepancy": each.squared,
            "p_value": each.p_value,
            "chance": each.null_quantile,
        }
        found[key] |= values
    if "labels" not in found:
        return found, answers, entropies, []
    count = len(labelled.labels)
    size = options.trial_batch or int(np.clip(count // 10, 4, 100))
    cells = try_adapters(options, model, task, labelled, size)
    found |= {"trial_batch": size, "steps": -(-count // size), "trial": []}
    for cell in cells:
        (figures,) = cell["segments"]
        seen, right = evaluate.outcomes(figures)
        tried = {name: cell[name] for name in ("adapter", "skipped_steps")}
        kept = {"optimizer", "learning_rate", "tnt", "mgtta"} & cell["settings"].keys()
        tried["settings"] = {name: cell["settings"][name] for name in sorted(kept)}
        tried |= {name: figures[name] for name in ("top1", "gain", "ece")}
        found["trial"].append(tried | {"interval": interval_of(right[seen])})
    return found, answers, entropies, cells


def labelled_part(
    options: Options, listed: data.ImageFolder, stream: data.Stream
) -> data.ImageFolder | None:
    """The labelled images of a stream; None if there are none."""
    if (listed.labels < 0).all():
        return None
    drawn = np.sort(stream.items[:, 1])
    drawn = drawn[listed.labels[drawn] >= 0]
    if not len(drawn):
        raise ValueError(f"{options.field}: --limit {options.limit} selects no labelled image")
    files = tuple(listed.files[number] for number in drawn)
    return listed._replace(files=files, labels=listed.labels[drawn])


def try_adapters(
    options: Options, model: Model, task: jaxtta.models.Task, listed: data.ImageFolder, size: int
) -> list[evaluate.Cell]:
    """Run every adapter of the trial once over the labelled images, `size` images per step."""
    source = data.Named(data.CorruptedOnTheFly(listed, model.clip.preprocessing), "field")
    streams = streams_of(options, source, ("field",))
    setup = evaluate.AdapterConfig(options.preset, options.tnt, options.mgtta)
    cutting = tuple(filter(evaluate.is_tnt, options.trial))
    canvas = data.canvas_for(source, streams[0].segments[0]) if cutting else None
    batches = data.Batches(source, tuple(streams), size, canvas)
    settings = {"batch_size": size, "limit": options.limit, "preset": options.preset}
    files = "\0".join(str(file.relative_to(listed.root)) for file in listed.files)
    settings["files"] = zlib.crc32(os.fsencode(files))
    results = evaluate.Results(
        options.output / "trial" / model.name.replace("/", "-"),
        settings | evaluate.fingerprints(source, model.params, model.clip, task),
        evaluate.about(model.clip, data=str(options.field), model=model.name),
        {name: evaluate.own_settings(name, setup, None, canvas) for name in options.trial},
    )
    adapters = {
        name: evaluate.make_adapter(name, model.clip, task, setup) for name in options.trial
    }
    running = {"workers": options.workers, "trust_data": options.trust_data}
    return evaluate.run(
        *(adapters, model.params, batches, results),
        setting=report.DATASETS,
        from_originals=cutting,
        **running,
    )


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
