r"""Diagnose CLIP models, or check a folder of your own images.

    jaxtta diagnose --output runs/diagnosis

measures the bundled demo model's features, and its accuracy on the bundled images and on four
corruptions of them; prints tables and writes report.html, result.json and plots. Two models side by
side, on ImageNet and natural distribution shifts:

    jaxtta diagnose --models openai/clip-vit-base-patch16 FOLDER --output runs/two \
        --layout imagenet --data IMAGENET/val --corruptions --reference-points published \
        --shifted imagenet-v2=imagenet-v2=IMAGENET-V2 imagenet-r=imagenet=IMAGENET-R

A folder of your own images is compared with --data. If some have labels, by class folders or in a
file, adapters are tried on them:

    jaxtta diagnose --target TEXTILES --class-names "global=a large defect" "nominal=no defect" \
        --output runs/textiles
    jaxtta diagnose --target FOLDER --class-names cat dog --target-labels FEW.csv --output runs/few

images.csv has a model's answers to them: file, class, confidence, entropy in nats, and distance of
the features from the tenth nearest reference image. Unreadable images are left out and named.
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from jaxtta import assets, data, diagnose, evaluate, models
from jaxtta.cli import options as groups
from jaxtta.data.arrays import read_labels
from jaxtta.data.baselines import read_reference_points
from jaxtta.data.folders import class_folders
from jaxtta.data.target import target_folder
from jaxtta.io import error_context
from jaxtta.report.diagnosis import Checked, write_check, write_diagnosis
from jaxtta.report.summary import summarise


@groups.group
class TargetOptions:
    """A check of your own images, with --data as the reference.

    Attributes:
        target: folder of images, in class folders or without labels; --class-names has its classes
            then, or FOLDER=NAME where a class folder has another name.
        target_labels: labels of some images without class folders: a .csv with columns image (path
            in the folder) and class.
        try_adapters: tried on the labelled images, as --adapters of jaxtta sweep; tnt is slow: half
            a minute per image for ViT-B/16 on two CPU cores.
        try_batch: images per step (default: a tenth of the labelled images, from 4 to 100).
        preset: optimiser settings of TENT's and BATCLIP's papers.
    """

    target: Path | None = None
    target_labels: Path | None = None
    try_adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    try_batch: int | None = None
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"


@groups.group
class ShiftOptions:
    """The shifted sets, and the models that effective robustness is measured against.

    Attributes:
        corruptions: corruptions of the base set, may be empty; "imagenet-c" are its 15.
        severity: 1 to 5 (default: 5; 1 on the bundled images; fixed for arrays).
        shifted: other sets as NAME=LAYOUT=FOLDER, with heads of their own class names; those of
            layout folder or arrays have --class-names too.
        references: at least two of --models that are not robust; a line is fitted to them.
        reference_points: accuracies of such models instead, in (0, 1), as a JSON list of objects or
            a table (CSV) with base and shifted; or "published", for ImageNet and --shifted sets
            named imagenet-v2, -r, -sketch or -a.
    """

    corruptions: tuple[str, ...] = ("gaussian_noise", "defocus_blur", "fog", "jpeg_compression")
    severity: int | None = None
    shifted: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    reference_points: str | None = None


@groups.group
class RunOptions:
    """How it is computed.

    Attributes:
        batch_size: images encoded at a time.
        seed: of images, corruptions, permutations and the order in which adapters see images.
        workers: processes that read images; 0 to read in the main process.
        trust_data: take an earlier run's adapters without checking that the images are unchanged.
        debug: show tracebacks.
    """

    batch_size: int = 100
    seed: int = 1
    workers: int = 1
    trust_data: bool = False
    debug: bool = False


@groups.group
class Options:
    """The models.

    Attributes:
        output: folder for the results.
        models: folders or hub ids of CLIP models (default: the bundled demo model).
        templates: prompts with {} for the class, averaged; "imagenet" are CLIP's 80, "usual" those
            of the layout.
    """

    output: Path
    models: tuple[str, ...] = (str(assets.MODEL),)
    templates: tuple[str, ...] = ("usual",)
    data: groups.DataOptions = groups.DataOptions()
    target: TargetOptions = TargetOptions()
    shifts: ShiftOptions = ShiftOptions()
    metrics: tyro.conf.OmitArgPrefixes[diagnose.Settings] = diagnose.Settings()
    run: RunOptions = RunOptions()

    def check(self) -> None:
        """Raise a ValueError for invalid options."""
        shifts, target, how = self.shifts, self.target, self.run
        self.metrics.check()
        lists = {"class_names": self.data.class_names, "templates": self.templates}
        lists |= {"corruptions": shifts.corruptions, "references": shifts.references}
        given = {name: values for name, values in lists.items() if values}
        evaluate.require_distinct(models=self.models, try_adapters=target.try_adapters, **given)
        least = {"batch_size": (how.batch_size, 1), "workers": (how.workers, 0)}
        least |= {"try_batch": (target.try_batch, 1), "seed": (how.seed, 0)}
        fewest = 4 if target.target else 2  # the reference is halved
        evaluate.require_at_least(max_images=(self.data.max_images, fewest), **least)
        if self.data.layout == "arrays" and shifts.severity:
            raise ValueError("--layout arrays has a fixed severity, omit --severity")
        if odd := sorted(set(shifts.references) - set(self.models)):
            raise ValueError(f"--references has {odd[0]!r}, which is not one of --models")
        if shifts.references and (len(shifts.references) < 2 or shifts.reference_points):
            raise ValueError("--references needs at least two models, and no --reference-points")
        if target.target_labels and not target.target:
            raise ValueError("--target-labels needs --target")
        if "zero_shot" not in [evaluate.parse_adapter(each).text for each in target.try_adapters]:
            raise ValueError("--try-adapters needs zero_shot, the baseline for gains")


class Model(NamedTuple):
    """A loaded model, its name in the report, and what its images go through."""

    name: str
    clip: models.CLIP
    params: models.Params
    prepared: str


def run(options: Options) -> None:
    """Diagnose models, or check target images."""
    options.check()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(dataclasses.asdict(options), default=str))
    made = {"settings": settings, "about": evaluate.about(data=options.data.data)}
    root, checks, found, features = options.target.target, {}, {}, {}
    points, names = () if root else points_of(options), names_of(options.models)
    given = options.data.class_names, options.target.target_labels
    images = target_folder(root, *given) if root else None
    try:
        for model in models_of(options):
            name = model.name
            if images:
                checks[name] = check_one(options, model, images)
                continue
            sets = labelled_sets(options, model)
            one = diagnose.diagnose_model(name, sets, options.metrics, model.prepared)
            found[name], features[name] = one
    finally:  # the results of the others are written too if a model fails
        if root and images and checks:
            title = f"Check of {root.resolve().name}"
            write_check(options.output, title, checks, images, images.paths, made)
        if found:
            references = [names[x] for x in options.shifts.references if names[x] in found]
            robustness = diagnose.measure_robustness(found, points, references)
            whole = diagnose.Diagnosis(found, diagnose.compare_models(found, features), robustness)
            write_diagnosis(options.output, whole, options.metrics.fractions, made)


def names_of(given: Sequence[str]) -> dict[str, str]:
    """Each model's name in the report: its folder's, unless two have the same."""
    names = [Path(each).name for each in given]
    return {each: each if names.count(Path(each).name) > 1 else Path(each).name for each in given}


def models_of(options: Options) -> Iterator[Model]:
    """Load the models one after another."""
    for given, name in names_of(options.models).items():
        clip, params = models.load_clip(given)
        with error_context(f"{name}: --outlier-threshold"):
            nothing = np.zeros((1, clip.projection))
            diagnose.outlier_stats(nothing, threshold=options.metrics.outlier_threshold)
        tqdm.write(f"compiling the image tower of {name} …", file=sys.stderr)
        prepared = models.describe_preprocessing(clip).removeprefix("preprocessing: ")
        yield Model(name, clip, params, prepared)


def batches_of(
    options: Options, model: Model, images: data.Benchmark, names: Sequence[str], severity: int = 0
) -> data.Batches:
    """A stream for each corruption or name, all of the same images."""
    drawn = {"seed": options.run.seed, "limit": options.data.max_images}
    labels = data.labels_of(images)
    streams = data.make_streams("reset_each_shift", names, (severity,), labels, **drawn)
    data.select(images, [stream.segments[0] for stream in streams])
    preprocessing = model.clip.preprocessing
    return data.Batches(images, tuple(streams), options.run.batch_size, preprocessing)


def read(
    options: Options, model: Model, batches: data.Batches
) -> Iterator[tuple[str, diagnose.FeatureSet]]:
    """Yield the name and features of one stream after another."""
    reader = data.read_ahead(batches, options.run.workers)
    for number, stream in enumerate(batches.streams):
        count, place = len(batches.of(number)), f"{model.name} on {stream.name}"
        own = tqdm(itertools.islice(reader, count), place, count, leave=False, unit="batch")
        name_of = functools.partial(data.name_of, batches.benchmark[stream.segments[0]])
        with error_context(place):
            features = diagnose.read_features(model.clip, model.params, own, name_of)
        yield stream.name, features
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
        name, _, place = text.partition("=")
        layout, _, root = place.partition("=")
        if not (name and root) or name in taken:
            raise ValueError(f"--shifted has {text!r}, expected NAME=LAYOUT=FOLDER, a new name")
        taken.add(name)
        names = names_for(options, layout, root)
        with error_context(f"--shifted {name}"):
            images = {data.Domain(name): data.open_dataset(layout, root, names)}
        sets.append((layout, batches_of(options, model, images, [name])))
    for layout, batches in sets:
        names = data.class_names_of(batches.benchmark)
        with error_context(f"{model.name} on {batches.streams[0].name}"):
            texts = groups.ModelOptions(templates=options.templates).templates_for(layout)
            task = models.zero_shot_task(model.clip, names, texts)
        head = diagnose.head_of(model.clip, model.params, task)
        for name, features in read(options, model, batches):
            yield diagnose.LabelledSet(name, head, names, features)


def names_for(options: Options, layout: str, root: str) -> tuple[str, ...]:
    """Class names for a shifted set from the options; empty for the layout's names."""
    own = options.data
    if not own.class_names or layout not in ("folder", "arrays"):
        return ()
    by_folder = Path(own.class_names[0]).suffix == ".json"
    same = layout == own.layout == "folder" and not by_folder
    if odd := sorted({*folders_of(root)} ^ {*folders_of(own.data)}) if same else []:
        raise ValueError(
            f"{root}: its class folders are not those of {own.data}, {diagnose.truncate(odd)} "
            "being in one of them, so --class-names must be a .json by folder name"
        )
    return own.class_names


def folders_of(root: str) -> Sequence[str]:
    """Names of a folder's class folders, or of the classes in a file of images."""
    if Path(root).is_dir():
        return [folder.name for folder in class_folders(root)]
    return data.open_dataset("folder", root).class_names


def points_of(options: Options) -> Sequence[tuple[float, float]]:
    """Base and shifted accuracies of the reference models, if given."""
    given, shifts = options.shifts.reference_points, options.shifts
    if given is None:
        return ()
    published = given == "published"
    with error_context(f"--reference-points {given}"):
        if published and (options.data.layout != "imagenet" or shifts.corruptions):
            raise ValueError("needs --layout imagenet and empty --corruptions")
        names = [text.partition("=")[0] for text in shifts.shifted]
        points = data.reference_points(names) if published else read_reference_points(Path(given))
        diagnose.fit_baseline(*np.reshape(points, (-1, 2)).T)
    return points


def check_one(options: Options, model: Model, images: data.ImageFolder) -> Checked:
    """A model's check of images, its answers, and a trial of adapters if some have labels."""
    target, root, classes = options.target, options.data.data, 0
    if options.data.layout == "arrays":
        classes = read_labels(root).max() + 1
    elif options.data.layout == "folder":
        classes = len(folders_of(root))
    numbers = tuple(map(str, range(classes)))  # the reference's classes are not used
    opened = dataclasses.replace(options.data, class_names=numbers).open(model.clip)
    reference = batches_of(options, model, opened, [data.CLEAN])
    batches = batches_of(options, model, {data.Domain("target"): images}, ["target"])
    drawn = np.sort(batches.streams[0].items[:, 1])
    labelled = data.Subset(images, drawn[images.labels[drawn] >= 0])
    if not len(labelled) and (images.labels >= 0).any():
        limit = options.data.max_images
        raise ValueError(f"{target.target}: --max-images {limit} selects no labelled image")
    with error_context(target.target):
        texts = groups.ModelOptions(templates=options.templates).templates_for("folder")
        task = models.zero_shot_task(model.clip, images.class_names, texts)
    head = diagnose.head_of(model.clip, model.params, task)
    ((_, own),), ((_, other),) = (read(options, model, each) for each in (batches, reference))
    chosen = {"outlier_threshold": options.metrics.outlier_threshold, "seed": options.run.seed}
    chosen["scale"] = jnp.exp(model.params["logit_scale"])
    with error_context(model.name):
        check, answers = diagnose.check_target(own, other, head, images.class_names, **chosen)
    name = "CIFAR-10's bundled test images" if root == str(assets.IMAGES) else root
    check = dataclasses.replace(check, reference_name=name, preprocessing=model.prepared)
    if not len(labelled):
        return check, answers, None
    size = target.try_batch or int(np.clip(len(labelled) // 10, 4, 100))
    trial = batches_of(options, model, {data.Domain("target"): labelled}, ["target"])
    limits = {"max_images": options.data.max_images}
    spec = evaluate.Spec(trial.benchmark, trial.streams, task, size, None, "datasets", limits)
    folder = options.output / "trial" / model.name.replace("/", "-")
    how = {"workers": options.run.workers, "trust_data": options.run.trust_data}
    how["config"] = evaluate.AdapterConfig(target.preset)
    how["about"] = evaluate.about(model.clip, data=str(target.target), model=model.name)
    results = evaluate.sweep(spec, target.try_adapters, model.clip, model.params, folder, **how)
    return check, answers, summarise(results)
