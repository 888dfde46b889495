r"""Diagnose CLIP models, or check a folder of your own images.

    jaxtta diagnose --output runs/diagnosis

diagnoses the bundled demo model on bundled images and four corruptions of them. Two models on
ImageNet and natural distribution shifts, beside published accuracies:

    jaxtta diagnose --models openai/clip-vit-base-patch16 FOLDER --output runs/two \
        --layout imagenet --data IMAGENET/val --corruptions --reference-points published \
        --shifted imagenet-v2=imagenet-v2=IMAGENET-V2 imagenet-r=imagenet=IMAGENET-R

Your own images, compared with --data; adapters are tried on those that have labels:

    jaxtta diagnose --target TEXTILES --class-names "global=a large defect" "nominal=no defect" \
        --output runs/textiles
    jaxtta diagnose --target FOLDER --class-names cat dog --target-labels FEW.csv --output runs/few
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jaxtta import assets, data, diagnose, evaluate, models, report
from jaxtta.cli import options as groups
from jaxtta.data import folders, layouts
from jaxtta.data.arrays import read_labels
from jaxtta.data.class_names import read_table
from jaxtta.io import error_context, nfc, read_rows, read_text
from jaxtta.report.diagnosis import Checked, write_check, write_diagnosis


@groups.group
class TargetOptions:
    """A check of your own images, with --data as the reference.

    Attributes:
        target: folder of images; --class-names has its classes, or FOLDER=NAME.
        target_labels: labels of some images: a .csv with columns image (path) and class.
        try_adapters: tried on the labelled images, as --adapters of jaxtta sweep; tnt is slow.
        try_batch: images per step (default: a tenth of the labelled images, from 4 to 100).
    """

    target: Path | None = None
    target_labels: Path | None = None
    try_adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    try_batch: int | None = None


@groups.group
class ShiftOptions:
    """The shifted sets, and the models that effective robustness is measured against.

    Attributes:
        corruptions: corruptions of the base set, may be empty; "imagenet-c" are its 15.
        severity: 1 to 5 (default: 5; 1 on the bundled images; fixed for arrays).
        shifted: other sets as NAME=LAYOUT=FOLDER, with heads of their own class names; arrays have
            those of --class-names, and so has layout folder from a .json by folder name.
        references: at least two of --models that are not robust; a line is fitted to them.
        reference_points: accuracies of such models instead, in (0, 1): a .csv with base and
            shifted, or "published" for ImageNet with imagenet-v2, -r, -sketch and -a.
    """

    corruptions: tuple[str, ...] = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")
    severity: int | None = None
    shifted: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    reference_points: str | None = None


@groups.group
class Options:
    """The models, and how they are run.

    Attributes:
        output: folder for the results, or its URL (gs://, s3://).
        models: folders or hub ids of CLIP models (default: the bundled demo model).
        templates: prompts as those of jaxtta sweep.
        batch_size: images encoded at a time.
        seed: of images, corruptions, permutations and the order in which adapters see images.
        workers: threads that decode files, or processes that corrupt images; 0 for one thread.
    """

    output: Path
    models: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["--model"])] = (str(assets.MODEL),)
    templates: tuple[str, ...] = ("usual",)
    batch_size: int = 100
    seed: int = 1
    workers: int = 1
    data: groups.DataOptions = groups.DataOptions()
    target: TargetOptions = TargetOptions()
    shifts: ShiftOptions = ShiftOptions()
    metrics: tyro.conf.OmitArgPrefixes[diagnose.Settings] = diagnose.Settings()


class Model(NamedTuple):
    """A loaded model, its name in the report, and what its images go through."""

    name: str
    clip: models.CLIP
    params: models.Params
    prepared: str


def run(options: Options) -> None:
    """Diagnose models, or check target images."""
    options.metrics.check()
    root, references = options.target.target, options.shifts.references
    adapters = [evaluate.parse_adapter(each).text for each in options.target.try_adapters]
    evaluate.require_distinct(models=options.models, try_adapters=adapters)
    evaluate.require_at_least(batch_size=(options.batch_size, 1), workers=(options.workers, 0))
    names = [Path(each).name for each in options.models]
    names = names if len({*names}) == len(names) else options.models
    named = dict(zip(options.models, names, strict=True))
    if {*references} - {*named} or (references and options.shifts.reference_points):
        raise ValueError("--references takes some of --models, and no --reference-points")
    if len({*references}) == 1 or (options.target.target_labels and not root):
        raise ValueError("--references needs two models or more, --target-labels a --target")
    points = () if root else points_of(options)
    table, names_given = options.target.target_labels, options.data.class_names
    images = target_folder(root, names_given, table) if root else None
    settings = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    made = {"settings": settings, "about": evaluate.about(data=options.data.data)}
    options.output.mkdir(parents=True, exist_ok=True)
    found, features = {}, {}
    try:
        for given, name in named.items():
            clip, params = models.load_clip(given)
            prepared = models.describe_preprocessing(clip).removeprefix("preprocessing: ")
            model = Model(name, clip, params, prepared)
            nothing = np.zeros((1, clip.projection))  # raises for an odd threshold
            diagnose.outlier_stats(nothing, threshold=options.metrics.outlier_threshold)
            if images:
                folder = options.output / (name.replace("/", "-") if len(named) > 1 else "")
                folder.mkdir(parents=True, exist_ok=True)
                write_check(folder, name, check_one(options, model, images, folder), images, made)
                continue
            sets = labelled_sets(options, model)
            one = diagnose.diagnose_model(name, sets, options.metrics, prepared)
            found[name], features[name] = one
    finally:  # the results of the others are written too if a model fails
        if found:
            known = [named[each] for each in references if named[each] in found]
            robustness = diagnose.measure_robustness(found, points, known)
            whole = diagnose.Diagnosis(found, diagnose.compare_models(found, features), robustness)
            write_diagnosis(options.output, whole, options.metrics.fractions, made)


def batches_of(
    options: Options, model: Model, images: data.Benchmark, names: Sequence[str], severity: int = 0
) -> data.Batches:
    """A stream for each corruption or name, all of the same images."""
    drawn = {"seed": options.seed, "limit": options.data.max_images}
    labels = data.labels_of(images)
    streams = data.make_streams("reset_each_shift", names, (severity,), labels, **drawn)
    data.select(images, [stream.segments[0] for stream in streams])
    return data.Batches(images, tuple(streams), options.batch_size, model.clip.preprocessing)


def read(options: Options, model: Model, batches: data.Batches) -> Iterator[diagnose.FeatureSet]:
    """Yield the features of one stream after another."""
    reader = data.read_ahead(batches, options.workers)
    for number, stream in enumerate(batches.streams):
        count, place = len(batches.of(number)), f"{model.name} on {stream.name}"
        own = tqdm(itertools.islice(reader, count), place, count, leave=False, unit="batch")
        name_of = functools.partial(data.name_of, batches.benchmark[stream.segments[0]])
        with error_context(place):
            yield diagnose.read_features(model.clip, model.params, own, name_of)
    next(reader, None)  # ends the reader processes


def labelled_sets(options: Options, model: Model) -> Iterator[diagnose.LabelledSet]:
    """The base set with its corruptions, then the other shifted sets."""
    layout, chosen = options.data.layout, options.shifts.corruptions
    severity = evaluate.default_severity(layout, options.data.data, options.shifts.severity)
    chosen = data.IMAGENET_C if chosen == ("imagenet-c",) else chosen
    domains = [*dict.fromkeys((data.CLEAN, *chosen))]
    base = batches_of(options, model, options.data.open(model.clip), domains, severity)
    sets, taken = [(layout, base)], {stream.name for stream in base.streams}
    for text in options.shifts.shifted:
        name, layout, root = (*text.split("=", 2), "", "")[:3]
        if not root or name in taken:
            raise ValueError(f"--shifted has {text!r}, expected NAME=LAYOUT=FOLDER, a new name")
        taken.add(name)
        names = options.data.class_names if layout in ("folder", "arrays") else ()
        if layout == "folder" and names and Path(names[0]).suffix != ".json":
            raise ValueError(f"--shifted {name}: --class-names must be a .json by folder name")
        opened = {data.Domain(name): data.open_dataset(layout, root, names)}
        sets.append((layout, batches_of(options, model, opened, [name])))
    for layout, batches in sets:
        names = data.class_names_of(batches.benchmark)
        templates = groups.ModelOptions(templates=options.templates).templates_for(layout)
        task = models.zero_shot_task(model.clip, names, templates)
        head = diagnose.head_of(model.clip, model.params, task)
        for stream, found in zip(batches.streams, read(options, model, batches), strict=True):
            yield diagnose.LabelledSet(stream.name, head, names, found)


def points_of(options: Options) -> Sequence[tuple[float, float]]:
    """Base and shifted accuracies of the reference models, if given; the published are timm's."""
    given, shifts = options.shifts.reference_points, options.shifts
    if given != "published":
        rows = read_rows(given, ("base", "shifted")) if given else ()
        with error_context(given):
            points = [(float(row["base"]), float(row["shifted"])) for _, row in rows]
            if given:
                diagnose.fit_baseline(*np.reshape(points, (-1, 2)).T)  # raises if there is no line
        return points
    accuracies = [*read_table("reference-points")["models"].values()]
    names = [text.partition("=")[0] for text in shifts.shifted]
    odd = {*names} - {*accuracies[0]}
    if options.data.layout != "imagenet" or shifts.corruptions or not names or odd:
        known = f"no --corruptions, and --shifted of {', '.join([*accuracies[0]][1:])}"
        raise ValueError(f"--reference-points published needs --layout imagenet, {known}")
    means = [(one["imagenet"], np.mean([one[name] for name in names])) for one in accuracies]
    return [(base, float(mean)) for base, mean in means if mean > 0]  # or it has no logit


def target_folder(
    root: Path, class_names: Sequence[str], table: Path | None = None
) -> data.ImageFolder:
    """List the target images, of which all, some or none have labels; the others' label is -1."""
    flat = not folders.folders_in(root)
    listed = folders.list_folders(root, [root], [""]) if flat else data.image_folder(root)
    paths = [*map(nfc, listed.paths)]
    given = [text.partition("=") for text in data.given_class_names(class_names)]
    if not flat and not given:
        given = [(folder, "", "") for folder in layouts.own_or_given(listed.class_names)]
    names = {folder: name or folder for folder, _, name in given}
    if not 2 <= len({*names.values()}) == len(given):
        raise ValueError(f"{root}: --class-names needs two or more classes, all different")
    own = [listed.class_names[label] for label in listed.labels]  # "" in a flat folder
    classes = dict(zip(paths, own, strict=True))
    for line, image, name in label_rows(table) if table else ():
        if classes.get(image) != "":
            raise ValueError(f"{line}: {image!r} is no image in {root}, or has a label already")
        classes[image] = name
    places = {name: label for given in (names.values(), names) for label, name in enumerate(given)}
    if odd := {*classes.values()} - {*places, ""}:
        known = ", ".join(names)
        raise ValueError(f"{root}: class {min(odd)!r} is not one of --class-names, {known}")
    labels = np.asarray([places.get(classes[path], -1) for path in paths], np.int32)
    return dataclasses.replace(listed, labels=labels, class_names=tuple(names.values()))


def label_rows(table: Path) -> Iterator[tuple[str, str, str]]:
    """Lines of a table of labels: place, image and class; its columns may be file and label too."""
    head = [name.strip('"\r ') for name in re.split("[,;\t]", read_text(table).partition("\n")[0])]
    columns = ("file", "label") if {"file", "label"} <= {*head} else ("image", "class")
    for line, row in read_rows(table, columns):
        image, name = (nfc(text).strip() for text in row.values())
        yield line, image, name


def check_one(options: Options, model: Model, images: data.ImageFolder, folder: Path) -> Checked:
    """A model's check of images, its answers, and a trial of adapters if some have labels."""
    target, root, classes = options.target, options.data.data, ()
    if options.data.layout == "folder" and Path(root).is_dir():  # any names, they are not used
        classes = tuple(folder.name for folder in folders.class_folders(root))
    elif options.data.layout == "arrays":
        classes = tuple(map(str, range(read_labels(root).max() + 1)))
    opened = dataclasses.replace(options.data, class_names=classes).open(model.clip)
    reference = batches_of(options, model, opened, [data.CLEAN])
    batches = batches_of(options, model, {data.Domain("target"): images}, ["target"])
    templates = groups.ModelOptions(templates=options.templates).templates_for("folder")
    task = models.zero_shot_task(model.clip, images.class_names, templates)
    head = diagnose.head_of(model.clip, model.params, task)
    (own,), (other,) = (read(options, model, each) for each in (batches, reference))
    chosen = {"outlier_threshold": options.metrics.outlier_threshold, "seed": options.seed}
    chosen["scale"] = jnp.exp(model.params["logit_scale"])
    check, answers = diagnose.check_target(own, other, head, images.class_names, **chosen)
    name = "CIFAR-10's bundled test images" if root == str(assets.IMAGES) else root
    check = dataclasses.replace(check, reference_name=name, preprocessing=model.prepared)
    drawn = np.sort(batches.streams[0].items[:, 1])
    labelled = data.Subset(images, drawn[images.labels[drawn] >= 0])
    if not len(labelled):
        return check, answers, None
    size = target.try_batch or int(np.clip(len(labelled) // 10, 4, 100))
    trial = batches_of(options, model, {data.Domain("target"): labelled}, ["target"])
    limits = {"max_images": options.data.max_images}
    spec = evaluate.Spec(trial.benchmark, trial.streams, task, size, None, "datasets", limits)
    inputs = (spec, target.try_adapters, model.clip, model.params, folder / "trial")
    return check, answers, report.summarise(evaluate.sweep(*inputs, workers=options.workers))
