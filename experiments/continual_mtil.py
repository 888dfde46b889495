r"""Teach a model one task after another: what does it learn, and what does it keep?

    python experiments/continual_mtil.py --output runs/continual

teaches the embedded model the defects of textiles, then scikit-learn's digits, then the digits'
negatives turned by 90°, and measures after each task what is left of CIFAR-10: on the five classes
whose pictures it is shown to remember, and on the five others. Plain fine-tuning and GNSP in one
table. All methods, three seeds, and all of CIFAR-10:

    python experiments/continual_mtil.py --output runs/cifar10 --seeds 1 2 3 \
        --reference folder=CIFAR10/train --kept folder=CIFAR10/test --reference-classes 5 \
        --methods fine-tuning distillation projection-before projection-after gnsp gnsp-after \
        wise-ft

With --validate, and another --output, the same on pictures that are not tested: there ρ, rate and
iterations are chosen. The eleven MTIL sets in their published order and with the published
settings, from the folders that prompt-learning benchmarks use (CIFAR-100 and MNIST from
tensorflow-datasets), with ImageNet pictures as reference:

    python experiments/continual_mtil.py --model openai/clip-vit-base-patch16 --data DATA \
        --tasks order-1 --reference imagenet=IMAGENET/train --output runs/mtil \
        --methods fine-tuning gnsp gnsp-after --first-task all --no-task-zero \
        --iterations 1000 --warmup 100 --learning-rate 1e-5

A task of your own is NAME=FOLDER, with FOLDER/train/<class>/… and FOLDER/test/<class>/…. A killed
run goes on after the last task that it finished.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxtta
from jaxtta import assets, continual, data, metrics, sweep, tree, views
from jaxtta.clip.preprocess import Preprocessing
from jaxtta.continual import METHODS, Examples, Method, Pairs, TrainState
from jaxtta.data.memory import InMemory, Part, every, shape_of
from jaxtta.data.tasks import ORDERS, TaskData, open_task
from jaxtta.sweep.results import digest_of

Params = jaxtta.clip.Params
WISE = "wise-ft"
TRAINED_AS = {WISE: "fine-tuning"}
"""Methods that measure what another one trains."""
CROP = (0.9, 1.0)  # share of the area that the training augmentation keeps
GRAM_BATCH = 16
TUNING = 5  # one in so many training and kept pictures is for --validate
MEMORY = 2e9  # bytes of pictures that are kept once they were read
FIGURES = ("modality gap", "image to text", "text to image")


@dataclasses.dataclass(frozen=True)
class Options:
    """Teach one task after another."""

    output: Path
    """Folder for the results; made if it is missing."""
    tasks: tuple[str, ...] = ("textile", "digits", "turned-digits")
    """In this order: order-1 or order-2 (the MTIL sets), their names, textile, digits,
    turned-digits, or NAME=FOLDER."""
    data: str | None = None
    """The folder above the MTIL sets."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP checkpoint (default: the embedded one)."""
    methods: tuple[str, ...] = ("fine-tuning", "gnsp")
    """fine-tuning, distillation (and alignment), projection-before, projection-after (of the
    optimiser), gnsp, gnsp-after, wise-ft (fine-tuning, its weights averaged with the first)."""
    reference: str | None = None
    """LAYOUT=FOLDER with pictures that stand for what is to be kept, each with "a photo of a
    {class}."; or captions=FOLDER, with a captions.csv of columns file and caption. Default:
    embedded pictures of five of CIFAR-10's classes."""
    reference_classes: int | None = None
    """Take them from the first so many classes. Default: all, but five on the embedded ones."""
    kept: str | None = None
    """LAYOUT=FOLDER or captions=FOLDER with other pictures, to measure on what is kept; if their
    classes are the reference's, apart for those it was taken from and for the others. A fifth of
    them is for --validate alone. Modality gap and retrieval are measured on them, without them on
    the reference. Default: none, but embedded ones beside the embedded reference."""
    reference_pictures: int = 1000
    """How many of the reference."""
    reference_batch: int = 64
    """Pairs a step."""
    first_task: Literal["same", "all"] = "same"
    """What the first task trains: the same kernels as the others, or all but the logit scale, as in
    the published code. Whether it is projected is --task-zero's business."""
    task_zero: bool = True
    """Protect the reference pictures' inputs from the first task on. As published, the first task
    is not projected: --no-task-zero."""
    iterations: int = 300
    """Steps a task (published: 100 to 1000)."""
    warmup: int | None = None
    """How many of them the learning rate rises (published: 100). Default: a tenth."""
    batch_size: int = 64
    """Pictures a step."""
    learning_rate: float = 5e-5
    """The highest of AdamW (published: 1e-5 to 5e-5 on CLIP)."""
    rho: float = 0.15
    """Share of the singular values' sum that the projection gives up."""
    gram_pictures: int | None = None
    """Training pictures a task that its Gram matrices are gathered from. Default: all, as
    published."""
    wise_share: float = 0.5
    """Share of the fine-tuned weights in wise-ft's average."""
    validate: bool = False
    """Measure on a fifth of each task's training pictures, which is not trained on then, and on the
    kept pictures that are never tested, so that settings can be chosen."""
    limit: int | None = None
    """Use only so many test pictures of each task."""
    seeds: tuple[int, ...] = (1,)
    """Of order, crops and reference; each is a run of its own."""
    workers: int = 1
    """Processes that decode pictures; 0 does it in this one."""
    debug: bool = False
    """Show tracebacks."""


def main(options: Options) -> None:
    """Run every method and report."""
    check(options)
    model, params = jaxtta.clip.load(options.model)
    tasks = open_tasks(options, model)
    kept, reference = open_reference(options, model)
    names = [task.name for task in (*tasks, *kept)]
    for name in names:
        if [*names, *FIGURES].count(name) > 1:
            raise ValueError(f"two things are called {name}, give the task another name")
    *both, reference = in_memory([*tasks, *kept, reference])
    bench = Bench(options, model, params, both[: len(tasks)], both[len(tasks) :], reference)
    results, failed = [], []
    for seed in options.seeds:
        start = Start(bench, seed)
        for method in dict.fromkeys(TRAINED_AS.get(name, name) for name in options.methods):
            try:
                results += Trainer(bench, start, method).run()
            except FloatingPointError as error:
                failed.append(str(error))
    results = [found for name in options.methods for found in results if found["method"] == name]
    if results:
        report(options, names[: len(tasks)], names[len(tasks) :], results)
    if failed:
        raise FloatingPointError("; ".join(failed))


def check(options: Options) -> None:
    """Raise a ValueError for options that cannot be meant."""
    sweep.check_choices(tasks=options.tasks, methods=options.methods, seeds=options.seeds)
    sweep.check_rates(learning_rate=(options.learning_rate,))
    sweep.check_limits(
        iterations=(options.iterations, 1),
        warmup=(options.warmup, 0),
        batch_size=(options.batch_size, 1),
        reference_pictures=(options.reference_pictures, 2),
        reference_batch=(options.reference_batch, 2),
        gram_pictures=(options.gram_pictures, 1),
        limit=(options.limit, 1),
        workers=(options.workers, 0),
    )
    for name in options.methods:
        if name not in (*METHODS, WISE):
            known = ", ".join((*METHODS, WISE))
            raise ValueError(f"unknown method {name!r}, expected one of {known}")
    if options.warmup is not None and options.warmup > options.iterations:
        raise ValueError(
            f"--warmup is {options.warmup}, expected at most the {options.iterations} --iterations"
        )
    continual.check_rho(options.rho)
    if not 0 <= options.wise_share <= 1:
        raise ValueError(f"--wise-share is {options.wise_share}, expected 0 to 1")


# --- pictures ---


def task_names(options: Options) -> list[str]:
    """The tasks one by one."""
    return [name for given in options.tasks for name in ORDERS.get(given, (given,))]


def open_tasks(options: Options, model: jaxtta.clip.CLIP) -> list[TaskData]:
    """Open the tasks; with --validate, test on a part of what they are trained on otherwise."""
    tasks = [open_task(name, options.data, model.preprocessing) for name in task_names(options)]
    if not options.validate:
        return tasks
    masks = [every(task.train.labels, TUNING) for task in tasks]
    return [
        task._replace(
            train=Part(task.train, np.flatnonzero(~mask)),
            test=Part(task.train, np.flatnonzero(mask)),
        )
        for task, mask in zip(tasks, masks, strict=True)
    ]


def open_reference(options: Options, model: jaxtta.clip.CLIP) -> tuple[list[TaskData], TaskData]:
    """What is measured without being taught, and the pictures that stand for what is to be kept."""
    prepare, embedded = model.preprocessing, options.reference is None
    given = f"folder={assets.PICTURES}" if embedded else options.reference
    source, template = open_layout("--reference", given, prepare)
    names, labels = source.class_names, source.labels
    count = options.reference_classes or (5 if embedded else len(names))
    if not 1 < count <= len(names):
        raise ValueError(f"--reference-classes is {count}, expected 2 to {len(names)}")
    shown, kept = labels < count, None
    if options.kept:
        kept, kept_template = open_layout("--kept", options.kept, prepare)
    elif embedded:  # a quarter of the reference's classes, and the others whole
        measured = every(labels, 4) | ~shown
        shown = ~measured
        kept, kept_template = Part(source, np.flatnonzero(measured)), template
    reference = TaskData("reference", template, None, Part(source, np.flatnonzero(shown)))
    if kept is None:
        return [], reference
    kept = Part(kept, np.flatnonzero(every(kept.labels, TUNING) == options.validate))
    masks = {"kept": kept.labels >= 0}
    if tuple(kept.class_names) == tuple(names):
        masks = {"kept-inside": kept.labels < count, "kept-outside": kept.labels >= count}
    return [
        TaskData(name, kept_template, None, Part(kept, np.flatnonzero(mask)))
        for name, mask in masks.items()
        if mask.any()
    ], reference


def open_layout(option: str, text: str, prepare: Preprocessing) -> tuple[data.Source, str]:
    """Open LAYOUT=FOLDER; the pictures and the template of their captions."""
    layout, equals, root = text.partition("=")
    if not equals:
        raise ValueError(f"{option} is {text!r}, expected LAYOUT=FOLDER, as folder=DATA/train")
    if layout == "captions":
        return data.CorruptedOnTheFly(data.captioned_folder(root), prepare), "{}"
    return data.open_source(layout, root, prepare), "a photo of a {}."


def in_memory(tasks: Sequence[TaskData]) -> list[TaskData]:
    """Keep what is read of the tasks' pictures, as far as there is room for all of a source."""
    left, found = MEMORY, []
    for task in tasks:
        sources = {}
        for which in ("train", "test"):
            source = getattr(task, which)
            size = np.inf if source is None else np.prod(shape_of(source), dtype=float)
            if size <= left:
                left -= size
                sources[which] = InMemory(source)
        found.append(task._replace(**sources))
    return found


def read(
    options: Options, source: data.Source, numbers: np.ndarray, size: int, doing: str
) -> Iterator[data.StreamBatch]:
    """Batches of clean pictures, in this order; what can be is kept in memory."""
    workers = options.workers
    if isinstance(source, InMemory):
        missing = source.missing(numbers)
        if len(missing):
            for batch in stream(source.source, missing, size, workers, f"{doing}: reading"):
                source.keep(batch)
        workers = 0
    yield from stream(source, numbers, size, workers, doing)


def stream(
    source: data.Source, numbers: np.ndarray, size: int, workers: int, doing: str
) -> Iterator[data.StreamBatch]:
    """Batches of clean pictures, in this order."""
    one = data.stream_of("clean", [data.Domain(data.CLEAN)], numbers, 0)
    batches = data.Batches(source, (one,), size)
    reader = data.read_ahead(batches, workers)
    yield from tqdm(reader, total=len(batches), desc=doing, unit="batch", leave=False)


# --- training ---


@functools.partial(jax.jit, static_argnums=0)
def encode(model: jaxtta.clip.CLIP, params: Params, images: jax.Array) -> jax.Array:
    """Embeddings of pictures, of unit norm."""
    return jaxtta.clip.unit(model.encode_image(params, model.normalize(images)))


@functools.partial(jax.jit, static_argnums=0)
def encode_texts(
    model: jaxtta.clip.CLIP, params: Params, prompts: jaxtta.clip.Prompts
) -> jax.Array:
    """Embeddings of prompts, of unit norm."""
    return model.class_embeddings(params, prompts)


class Schedule(NamedTuple):
    """Of a task's learning rate; see `continual.task_optimizer`."""

    learning_rate: float
    iterations: int
    warmup: int


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def step(
    model: jaxtta.clip.CLIP,
    method: Method,
    schedule: Schedule,
    params: Params,
    projectors: dict[str, Any],
    state: TrainState,
    key: jax.Array,
    examples: Examples,
    pairs: Pairs | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of training, on a crop of each picture."""
    # The projectors are arguments, lest the program holds them as constants.
    optimizer = continual.task_optimizer(method, projectors, *schedule)
    examples = examples._replace(images=crop(key, examples.images))
    return continual.train_step(model, method, optimizer)(params, state, examples, pairs)


@jax.jit
def crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """The training augmentation: a random crop of most of each picture; float in [0, 1]."""
    side = images.shape[1]
    images = images.astype(jnp.float32) / 255

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        box = views.random_boxes(key, jnp.array(image.shape[:2]), 1, CROP)
        return views.crop_and_resize(image, jax.tree.map(lambda x: x[0], box), side)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


class Bench:
    """What all runs share: the model as it begins, the tasks, and how they are measured."""

    def __init__(
        self,
        options: Options,
        model: jaxtta.clip.CLIP,
        params: Params,
        tasks: Sequence[TaskData],
        kept: Sequence[TaskData],
        reference: TaskData,
    ) -> None:
        """Prepare; nothing is computed yet."""
        self.options, self.model, self.first = options, model, params
        self.tasks, self.kept, self.reference = tasks, kept, reference
        self.weights = sweep.fingerprints(reference.test, params)["weights"]
        # Of the first text tower, and of the one that was last asked for.
        self.embeddings = [(params["text_model"], {}), (None, {})]

    def prompts(self, task: TaskData) -> jaxtta.clip.Prompts:
        """A task's packed prompts."""
        names = task.test.class_names
        task = jaxtta.clip.zero_shot_task(self.model, names, [task.template])
        return self.model.prompts(task)

    def classes(self, params: Params, task: TaskData) -> jax.Array:
        """Embeddings of a task's classes, computed once as long as the text tower is the same."""
        if all(tower is not params["text_model"] for tower, _ in self.embeddings):
            self.embeddings[1] = params["text_model"], {}
        (known,) = (found for tower, found in self.embeddings if tower is params["text_model"])
        if task.name not in known:
            known[task.name] = encode_texts(self.model, params, self.prompts(task))
        return known[task.name]

    def gather(
        self, params: Params, source: data.Source, numbers: np.ndarray, key: jax.Array, doing: str
    ) -> continual.Grams:
        """Gram matrices of pictures, with the training augmentation."""

        def batches() -> Iterator[data.StreamBatch]:
            for turn, batch in enumerate(read(self.options, source, numbers, GRAM_BATCH, doing)):
                images = crop(jax.random.fold_in(key, turn), batch.images)
                yield batch._replace(images=images)

        return continual.task_grams(self.model, params, batches())

    def measure(self, params: Params, start: "Start") -> dict[str, float]:
        """Accuracy on every task; modality gap and retrieval on what is kept, or on the pairs."""
        row, shown, options = {}, [], self.options
        for task in (*self.tasks, *self.kept):
            classes = np.asarray(self.classes(params, task))
            numbers = np.random.default_rng(0).permutation(len(task.test.labels))[: options.limit]
            images, labels = [], []
            doing = f"testing {task.name}"
            for batch in read(options, task.test, numbers, options.batch_size, doing):
                found = np.asarray(encode(self.model, params, batch.images))
                images.append(found[batch.mask])
                labels.append(batch.labels[batch.mask])
            images, labels = np.concatenate(images), np.concatenate(labels)
            row[task.name] = float(((images @ classes.T).argmax(-1) == labels).mean())
            if task.train is None:
                shown.append((images, classes[labels], labels))
        if not shown:
            pairs, size = start.pairs, options.batch_size
            parts = (pairs.images[i : i + size] for i in range(0, len(pairs.images), size))
            images = np.concatenate([encode(self.model, params, part) for part in parts])
            shown.append((images, start.texts(params), pairs.labels))
        return row | alignment(*(np.concatenate(parts) for parts in zip(*shown, strict=True)))


def alignment(images: np.ndarray, texts: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How pictures and captions lie to each other.

    Args:
        images: (pictures, projection), of unit norm.
        texts: (pictures, projection), of unit norm, the same for the same label.
        labels: (pictures,) integers.

    Returns:
        The modality gap, and the share of pictures and of different captions whose nearest caption
        or picture fits.
    """
    _, first, place = np.unique(labels, return_index=True, return_inverse=True)
    similarities, matches = images @ texts[first].T, place[:, None] == np.arange(len(first))
    found = (
        metrics.modality_gap(images, texts),
        metrics.retrieval_recall(similarities, matches),
        metrics.retrieval_recall(similarities.T, matches.T),
    )
    return dict(zip(FIGURES, map(float, found), strict=True))


class Start:
    """Where all methods of one seed begin; each part is computed once, when it is first needed."""

    def __init__(self, bench: Bench, seed: int) -> None:
        """Draw the reference pictures."""
        self.bench, self.seed = bench, seed
        numbers = np.random.default_rng(seed).permutation(len(bench.reference.test.labels))
        self.numbers = numbers[: bench.options.reference_pictures]

    @functools.cached_property
    def pairs(self) -> Pairs:
        """Reference pairs in memory, and what the initial model makes of them."""
        bench, size = self.bench, self.bench.options.batch_size
        source, template = bench.reference.test, bench.reference.template
        images, labels, teacher = [], [], []
        for batch in read(bench.options, source, self.numbers, size, "reference"):
            found = np.asarray(encode(bench.model, bench.first, batch.images))
            for parts, array in ((images, batch.images), (labels, batch.labels), (teacher, found)):
                parts.append(array[batch.mask])
        used, place = np.unique(np.concatenate(labels), return_inverse=True)
        names = [source.class_names[label] for label in used]
        task = jaxtta.clip.zero_shot_task(bench.model, names, [template])
        prompts = bench.model.prompts(task)
        texts = np.asarray(encode_texts(bench.model, bench.first, prompts))[place]
        self.prompts, captions = prompts, task.token_ids[place, 0]
        return Pairs(np.concatenate(images), captions, place, np.concatenate(teacher), texts)

    def texts(self, params: Params) -> np.ndarray:
        """Embeddings of the pairs' captions."""
        bench, pairs = self.bench, self.pairs
        if params["text_model"] is bench.first["text_model"]:
            return pairs.teacher_texts
        return np.asarray(encode_texts(bench.model, params, self.prompts))[pairs.labels]

    @functools.cached_property
    def grams(self) -> continual.Grams:
        """Gram matrices of the reference pictures, task zero."""
        key = jax.random.fold_in(jax.random.key(self.seed), 999)
        doing = f"seed {self.seed}: Gram matrices of the reference"
        bench = self.bench
        return bench.gather(bench.first, bench.reference.test, self.numbers, key, doing)

    @functools.cached_property
    def row(self) -> dict[str, float]:
        """What is measured before the first task."""
        return self.bench.measure(self.bench.first, self)


class Trainer:
    """One method with one seed, through all tasks."""

    def __init__(self, bench: Bench, start: Start, name: str) -> None:
        """Prepare; nothing is computed yet."""
        self.bench, self.start, self.name, self.method = bench, start, name, METHODS[name]
        self.options, self.seed = bench.options, start.seed
        self.folder = self.options.output / name / f"seed{self.seed}"
        everything = self.options.first_task == "all"
        self.changed = continual.all_but_logit_scale if everything else continual.gnsp_kernels

    @property
    def projects(self) -> bool:
        """Whether the method needs Gram matrices."""
        return self.method.projection != "none"

    def settings(self) -> dict[str, Any]:
        """What decides this run's figures, as JSON has it; what it does not use is not in it."""
        bench, options = self.bench, self.options
        used = ["iterations", "warmup", "batch_size", "learning_rate", "first_task", "limit"]
        used.append("validate")
        if self.projects:
            used += ["rho", "gram_pictures", "task_zero"]
        if self.method.uses_pairs:
            used.append("reference_batch")
        if self.name == TRAINED_AS[WISE]:
            used.append("wise_share")  # its figures are found on the way
        found = {"method": self.name, "seed": self.seed, "weights": bench.weights}
        if self.method.uses_pairs or (self.projects and options.task_zero) or not bench.kept:
            used.append("reference_pictures")
            found["reference"] = fingerprint(bench.reference)
        found["tasks"] = [fingerprint(task) for task in bench.tasks]
        found["kept"] = [fingerprint(task) for task in bench.kept]
        found |= {name: getattr(options, name) for name in used}
        return found | {"warmup": self.schedule.warmup}

    @property
    def schedule(self) -> Schedule:
        """Of the learning rate."""
        options = self.options
        warmup = options.iterations // 10 if options.warmup is None else options.warmup
        return Schedule(options.learning_rate, options.iterations, warmup)

    def run(self) -> list[dict[str, Any]]:
        """Train on every task; what was measured before the first and after each, by method."""
        settings, tasks = self.settings(), self.bench.tasks
        sweep.agree(self.folder / "settings.json", settings)
        params, grams, rows = self.restore()
        if not rows:
            if self.projects and self.options.task_zero:
                grams = self.start.grams
            names = [self.name, *(name for name, base in TRAINED_AS.items() if base == self.name)]
            rows = [dict.fromkeys(names, self.start.row)]
            self.save(params, grams, rows)
        for number, task in enumerate(tasks[len(rows) - 1 :], len(rows) - 1):
            params = self.train(params, grams, task, number)
            rows.append(self.measure(params))
            grams = self.gather(params, grams, task, number) if task is not tasks[-1] else {}
            self.save(params, grams, rows)
        return [self.result(name, [row[name] for row in rows], settings) for name in rows[0]]

    def result(
        self, method: str, rows: list[dict[str, float]], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Write what came of a method."""
        names = [task.name for task in self.bench.tasks]
        matrix = np.array([[row[name] for name in names] for row in rows[1:]])
        found = {
            "method": method,
            "seed": self.seed,
            "tasks": names,
            "rows": rows,
            "transfer": metrics.transfer(matrix) if len(names) > 1 else None,
            "last": metrics.last(matrix),
            "average": metrics.average(matrix),
            "settings": settings,
            "about": sweep.about(model=self.options.model),
        }
        path = self.options.output / method / f"seed{self.seed}" / "result.json"
        sweep.write_json(path, found)
        return found

    def train(self, params: Params, grams: continual.Grams, task: TaskData, number: int) -> Params:
        """Fine-tune on one task."""
        options, bench, method = self.options, self.bench, self.method
        everything = options.first_task == "all" and number == 0
        chosen = continual.all_but_logit_scale if everything else continual.gnsp_kernels
        trained, _ = tree.partition(params, chosen)
        projectors = continual.null_space_projectors(grams, options.rho) if grams else {}
        classes = bench.prompts(task) if everything else bench.classes(params, task)
        pairs = None
        if method.uses_pairs:
            texts = None if everything else self.start.texts(params)
            pairs = self.start.pairs._replace(texts=texts)
        optimizer = continual.task_optimizer(method, projectors, *self.schedule)
        state = TrainState(jax.tree.map(jnp.copy, trained), optimizer.init(trained))
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        rng = np.random.default_rng([self.seed, number])
        numbers = shuffled(rng, len(task.train.labels), options.iterations * options.batch_size)
        doing = f"{self.name} seed {self.seed}: {task.name}"
        for turn, batch in enumerate(read(options, task.train, numbers, options.batch_size, doing)):
            images, labels = usable(batch, rng)
            few = None
            if pairs is not None:
                rows = rng.integers(0, len(pairs.images), options.reference_batch)
                few = jax.tree.map(lambda x, rows=rows: x[rows], pairs)
            state, figures = step(
                *(bench.model, method, self.schedule, params, projectors, state),
                jax.random.fold_in(key, turn),
                Examples(images, labels, classes),
                few,
            )
            if turn % 50 == 0 and not np.isfinite(figures["loss"]):
                break
        if not np.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"{doing}: the loss is no longer finite; try a lower --learning-rate"
            )
        return tree.merge(params, state.trained)

    def gather(
        self, params: Params, grams: continual.Grams, task: TaskData, number: int
    ) -> continual.Grams:
        """Add the Gram matrices of a task that was just learnt to those before it."""
        if not self.projects:
            return {}
        rng = np.random.default_rng([self.seed, number, 1])
        numbers = rng.permutation(len(task.train.labels))[: self.options.gram_pictures]
        key = jax.random.fold_in(jax.random.key(self.seed), 1000 + number)
        doing = f"{self.name} seed {self.seed}: Gram matrices of {task.name}"
        found = self.bench.gather(params, task.train, numbers, key, doing)
        return continual.combine_grams(grams, found)

    def measure(self, params: Params) -> dict[str, dict[str, float]]:
        """Figures of every method that these weights serve."""
        rows = {self.name: self.bench.measure(params, self.start)}
        if self.name == TRAINED_AS[WISE]:
            first = self.bench.first
            ends = (tree.partition(weights, self.changed)[0] for weights in (first, params))
            averaged = continual.average_weights(*ends, self.options.wise_share)
            rows[WISE] = self.bench.measure(tree.merge(first, averaged), self.start)
        return rows

    def save(
        self, params: Params, grams: continual.Grams, rows: list[dict[str, dict[str, float]]]
    ) -> None:
        """Save where this run stands, after a task."""
        changed, _ = tree.partition(params, self.changed)
        numbered = {str(n): gram for n, gram in enumerate(grams.values())}
        note = {"rows": rows, "grams": list(grams)}
        arrays = {"changed": changed, "grams": numbered}
        sweep.save_step(self.folder / "checkpoints", len(rows), arrays, note)

    def restore(self) -> tuple[Params, continual.Grams, list[dict[str, dict[str, float]]]]:
        """Where this run stands: parameters, sums of Gram matrices, what was measured."""
        saved = sweep.restore_step(self.folder / "checkpoints")
        if saved is None:
            return self.bench.first, {}, []
        _, arrays, note = saved
        grams = arrays.get("grams") or {}
        named = {name: jnp.asarray(grams[str(n)]) for n, name in enumerate(note["grams"])}
        changed = jax.tree.map(jnp.asarray, arrays["changed"])
        return tree.merge(self.bench.first, changed), named, note["rows"]


def fingerprint(task: TaskData) -> str:
    """What is found in a task, wherever its files lie."""
    parts = [task.name, task.template]
    for source in (task.train, task.test):
        if source is not None:
            names = digest_of(list(source.class_names))[:8]
            parts.append(f"{sweep.fingerprints(source, {})['pictures']}, names {names}")
    return "; ".join(parts)


def shuffled(rng: np.random.Generator, count: int, wanted: int) -> np.ndarray:
    """Numbers below count in random order, again and again, as many as wanted."""
    return np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]


def usable(batch: data.StreamBatch, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A batch whose unreadable pictures are replaced by others of it."""
    good = np.flatnonzero(batch.mask)
    if not len(good):
        raise ValueError("none of a batch's training pictures could be read")
    rows = np.where(batch.mask, np.arange(len(batch.mask)), rng.choice(good, len(batch.mask)))
    return batch.images[rows], batch.labels[rows]


# --- report ---


def report(
    options: Options, tasks: list[str], kept: list[str], results: list[dict[str, Any]]
) -> None:
    """Print the table, and draw what became of every task."""
    text = table(tasks, kept, results)
    (options.output / "table.txt").write_text(text + "\n")
    where = " on pictures to choose settings by" if options.validate else ""
    seeds = len({run["seed"] for run in results})
    print(f"accuracy in %{where} after the last task, mean over {seeds} seeds\n\n{text}\n")
    heat_maps(tasks, kept, results).savefig(options.output / "matrix.png", dpi=150)
    curves(tasks, kept, results).savefig(options.output / "curves.png", dpi=150)
    print(f"results: {options.output}")


def by_method(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of the seeds of each method."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    return groups


def table(tasks: list[str], kept: list[str], results: list[dict[str, Any]]) -> str:
    """Methods by tasks and by what was to be kept, after the last task.

    "last" is the mean of the tasks, "average" their mean over all steps. The kept share is
    (method − fine-tuning) / (start − fine-tuning), where fine-tuning is there.
    """
    groups = by_method(results)
    ends = {name: {run["seed"]: run["rows"][-1] for run in runs} for name, runs in groups.items()}
    start = {run["seed"]: run["rows"][0] for run in results}
    worst = ends.get("fine-tuning")
    whole = ["average", *(["transfer"] if len(tasks) > 1 else [])]
    head = ["method", *tasks, "last", *whole, *kept]
    lines = [[*head, *(f"share of {name}" for name in kept if worst), *FIGURES]]
    for method, found in {"before": start, **ends}.items():
        rows, runs = list(found.values()), groups.get(method)
        columns = [[row[name] for row in rows] for name in tasks]
        cells = [spread(column) for column in (*columns, np.mean(columns, 0))]
        cells += [spread([run[name] for run in runs]) if runs else "–" for name in whole]
        cells += [spread([row[name] for row in rows]) for name in kept]
        cells += [kept_share(name, start, found, worst) for name in kept if worst]
        cells.append(f"{np.mean([row['modality gap'] for row in rows]):.3f}")
        cells += [spread([row[name] for row in rows]) for name in FIGURES[1:]]
        lines.append([method, *cells])
    return "\n".join(sweep.aligned(lines))


def kept_share(name: str, start: dict[int, Any], own: dict[int, Any], worst: dict[int, Any]) -> str:
    """How much of what fine-tuning loses a method keeps, over the seeds that both have."""
    seeds = own.keys() & worst.keys()
    if not seeds:
        return "–"
    first, mine, low = (np.mean([rows[s][name] for s in seeds]) for rows in (start, own, worst))
    return f"{(mine - low) / (first - low):.2f}" if first != low else "–"


def spread(values: Sequence[float]) -> str:
    """Mean in per cent, and the standard deviation over seeds."""
    mean = f"{100 * np.mean(values):.2f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.2f}" if len(values) > 1 else mean


def heat_maps(tasks: list[str], kept: list[str], results: list[dict[str, Any]]) -> Figure:
    """Accuracy on every task before the first and after each, a map a method."""
    groups, columns = by_method(results), [*tasks, *kept]
    size = (1.6 + 0.75 * len(columns)) * len(groups), 1.6 + 0.45 * (len(tasks) + 1)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (method, runs) in zip(grid, groups.items(), strict=True):
        matrix = 100 * np.mean(
            [[[row[name] for name in columns] for row in run["rows"]] for run in runs], 0
        )
        axes.imshow(matrix, vmin=0, vmax=100, cmap="cividis", aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            colour = "white" if value < 55 else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_title(method, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(tasks) + 1), ["before", *tasks], fontsize=8)
    grid[0].set_ylabel("after")
    return figure


def curves(tasks: list[str], kept: list[str], results: list[dict[str, Any]]) -> Figure:
    """What was to be kept, and the modality gap, over the tasks."""
    names = [*(kept or tasks[:1]), "modality gap"]
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(grid, names, strict=True):
        scale = 1 if name == "modality gap" else 100
        for method, runs in by_method(results).items():
            mean = scale * np.mean([[row[name] for row in run["rows"]] for run in runs], 0)
            axes.plot(range(len(mean)), mean, marker=".", label=method)
        axes.set_title(f"{name}{'' if scale == 1 else ' (%)'}", fontsize=10)
        axes.set_xticks(range(len(tasks) + 1), ["before", *tasks], rotation=40, ha="right")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    sweep.run_script(Options, main, __doc__)
