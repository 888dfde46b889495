"""Continual learning experiments with several methods; interrupted runs resume after the last task.

    course = Course(iterations=1000, warmup=100, learning_rate=1e-5)
    bench = Bench(course, model, params, tasks, kept, reference, output, notes={})
    results, failed = teach(bench, ["fine-tuning", "gnsp"], seeds=[1, 2, 3])

Tasks are `jaxtta.data.tasks.TaskData`; each result has the metrics before the first task and after
every task.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxtta import continual, data, metrics, models, tree, views
from jaxtta.continual import VARIANTS, GNSPConfig, ReferenceBatch, TaskBatch, TrainState
from jaxtta.data.memory import InMemory
from jaxtta.data.tasks import TaskData
from jaxtta.evaluate.checkpoint import restore_step, save_step
from jaxtta.evaluate.checks import require_at_least, require_positive
from jaxtta.evaluate.provenance import about, fingerprints, model_settings
from jaxtta.evaluate.results import agree, agree_on_images, digest_of
from jaxtta.io import write_json

Params = models.Params
Row = dict[str, float]
"""The metrics at one time, by name."""
WISE = "wise-ft"
TRAINED_AS = {WISE: "fine-tuning"}
"""Methods that reuse the training of another method."""
CROP = (0.9, 1.0)  # fraction of the area that the training crop keeps
GRAM_BATCH = 16
FIGURES = ("modality gap", "image to text", "text to image")


@dataclasses.dataclass(frozen=True)
class Course:
    """Training settings."""

    iterations: int = 300
    """Training steps per task (paper: 100 to 1000)."""
    warmup: int | None = None
    """Warm-up steps per task (paper: 100). Default: a tenth of the steps."""
    batch_size: int = 64
    """Images per step."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW (paper: 1e-5 to 5e-5 on CLIP)."""
    rho: float = 0.15
    """Fraction of the sum of singular values that is treated as the null space."""
    gram_images: int | None = None
    """Training images per task for its Gram matrices. Default: all, as in the paper."""
    first_task: Literal["same", "all"] = "same"
    """Parameters trained on the first task: the same kernels as for the others, or all except the
    logit scale, as in the reference implementation. --task-zero decides on the projection."""
    task_zero: bool = True
    """Apply the projection for the reference images from the first task on. The reference
    implementation does not project the first task: --no-task-zero."""
    reference_images: int = 1000
    """Number of reference images."""
    reference_batch: int = 64
    """Reference pairs per step."""
    wise_share: float = 0.5
    """Weight of the fine-tuned parameters in wise-ft's average."""
    limit: int | None = None
    """Use at most this many test images of each task."""
    workers: int = 0
    """Processes that decode images; 0 = main process."""
    trust_data: bool = False
    """Take earlier results in the folder without checking that the stored images have not
    changed."""

    @property
    def schedule(self) -> "Schedule":
        """The learning rate schedule of every task."""
        warmup = self.iterations // 10 if self.warmup is None else self.warmup
        return Schedule(self.learning_rate, self.iterations, warmup)


class Schedule(NamedTuple):
    """A task's learning rate schedule; see `continual.task_optimizer`."""

    learning_rate: float
    iterations: int
    warmup: int


def check_course(course: Course) -> None:
    """Validate the settings; messages use the option names."""
    require_positive(learning_rate=(course.learning_rate,))
    require_at_least(
        iterations=(course.iterations, 1),
        warmup=(course.warmup, 0),
        batch_size=(course.batch_size, 1),
        reference_images=(course.reference_images, 2),
        reference_batch=(course.reference_batch, 2),
        gram_images=(course.gram_images, 1),
        limit=(course.limit, 1),
        workers=(course.workers, 0),
    )
    if course.warmup is not None and course.warmup > course.iterations:
        raise ValueError(
            f"--warmup is {course.warmup}, expected at most the {course.iterations} --iterations"
        )
    continual.check_rho(course.rho)
    if not 0 <= course.wise_share <= 1:
        raise ValueError(f"--wise-share is {course.wise_share}, expected 0 to 1")


def check_methods(methods: Sequence[str]) -> None:
    """Raise a ValueError for an unknown method."""
    for name in methods:
        if name not in (*VARIANTS, WISE):
            known = ", ".join((*VARIANTS, WISE))
            raise ValueError(f"unknown method {name!r}, expected one of {known}")


def teach(
    bench: "Bench", methods: Sequence[str], seeds: Sequence[int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Train every method with every seed on all tasks; existing results are reused.

    Args:
        bench: the model, the tasks and the training settings.
        methods: names from `jaxtta.continual.VARIANTS`, or wise-ft.
        seeds: random seeds of order, crops and reference.

    Returns:
        The results of each method and seed, as in its result.json, in the order of the methods;
        and a message for each that failed.

    Raises:
        ValueError: for invalid settings.
    """
    check_methods(methods)
    for seed in seeds:
        bench.draw(seed)  # check all seeds before training
    results, failed = [], []
    for seed in seeds:
        start = Start(bench, seed)
        for method in dict.fromkeys(TRAINED_AS.get(name, name) for name in methods):
            try:
                results += Trainer(bench, start, method).run()
            except FloatingPointError as error:
                failed.append(str(error))
    return [found for name in methods for found in results if found["method"] == name], failed


# --- images ---


def read(
    source: data.Source, numbers: np.ndarray, size: int, workers: int, doing: str
) -> Iterator[data.StreamBatch]:
    """Batches of clean images, in this order; cached in memory where possible."""
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
    """Batches of clean images, in this order."""
    one = data.stream_of("clean", [data.Domain(data.CLEAN)], numbers, 0)
    batches = data.Batches(source, (one,), size)
    reader = data.read_ahead(batches, workers)
    yield from tqdm(reader, total=len(batches), desc=doing, unit="batch", leave=False)


@functools.partial(jax.jit, static_argnums=0)
def encode(model: models.CLIP, params: Params, images: jax.Array) -> jax.Array:
    """Embeddings of images, of unit norm."""
    return models.l2_normalize(model.encode_image(params, model.normalize(images)))


@functools.partial(jax.jit, static_argnums=0)
def encode_texts(model: models.CLIP, params: Params, prompts: models.Prompts) -> jax.Array:
    """Embeddings of prompts, of unit norm."""
    return model.class_embeddings(params, prompts)


# --- training ---


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def step(
    model: models.CLIP,
    method: GNSPConfig,
    schedule: Schedule,
    params: Params,
    projectors: dict[str, Any],
    state: TrainState,
    key: jax.Array,
    examples: TaskBatch,
    pairs: ReferenceBatch | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of training, on a crop of each image."""
    # The projectors are arguments, so that they are not compiled in as constants.
    optimizer = continual.task_optimizer(method, projectors, *schedule)
    examples = examples._replace(images=crop(key, examples.images))
    return continual.train_step(model, method, optimizer)(params, state, examples, pairs)


@jax.jit
def crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """The training augmentation: a random crop of each image; float in [0, 1]."""
    side = images.shape[1]
    images = images.astype(jnp.float32) / 255

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        box = views.random_boxes(key, jnp.array(image.shape[:2]), 1, CROP)
        return views.crop_and_resize(image, jax.tree.map(lambda x: x[0], box), side)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


class Bench:
    """Shared by all runs: the initial model, the tasks and the metrics."""

    def __init__(
        self,
        course: Course,
        model: models.CLIP,
        params: Params,
        tasks: Sequence[TaskData],
        kept: Sequence[TaskData],
        reference: TaskData,
        output: Path,
        notes: Mapping[str, Any],
    ) -> None:
        """Validate the settings; nothing is computed yet.

        Args:
            course: the training settings.
            model: the model.
            params: its initial parameters.
            tasks: the tasks, in training order.
            kept: the retention sets, tested but not trained on.
            reference: its `test` images are the reference images.
            output: folder for the results.
            notes: additional information for the results.

        Raises:
            ValueError: for invalid settings, or an image tower that is not a transformer.
        """
        check_course(course)
        continual.check_tower(model)
        names = [*(task.name for task in (*tasks, *kept)), *FIGURES]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name} is used twice, rename the task")
        self.course, self.model, self.first = course, model, params
        self.tasks, self.kept, self.reference = tasks, kept, reference
        self.output, self.notes = output, notes
        self.weights = fingerprints(reference.test, params)["weights"]
        self.model_settings = model_settings(model)
        # For the initial text tower and the most recent one.
        self.embeddings = [(params["text_model"], {}), (None, {})]
        self.known: dict[str, str] = {}  # fingerprints of tasks
        self.stored: dict[str, list[str | None]] = {}  # and digests of their images

    def draw(self, seed: int) -> np.ndarray:
        """Indices of a seed's reference images; a ValueError if they are of one class."""
        labels = self.reference.test.labels
        numbers = np.random.default_rng(seed).permutation(len(labels))
        numbers = numbers[: self.course.reference_images]
        if len(np.unique(labels[numbers])) < 2:
            raise ValueError(
                f"the {len(numbers)} --reference-images of seed {seed} are of one class, "
                "expected two or more; increase their number"
            )
        return numbers

    def task_of(self, task: TaskData) -> models.Task:
        """The task of its class names."""
        return models.zero_shot_task(self.model, task.test.class_names, [task.template])

    def prompts(self, task: TaskData) -> models.Prompts:
        """A task's packed prompts."""
        return self.model.prompts(self.task_of(task))

    def fingerprint(self, task: TaskData) -> str:
        """What identifies a task's labels and prompts, independent of file locations."""
        if task.name not in self.known:
            parts = [task.name, task.template]
            for source in (task.train, task.test):
                if source is not None:
                    found = fingerprints(source, {}, task=self.task_of(task))
                    digest = digest_of([*found.values()])[:16]
                    parts.append(f"{found['images']}, digest {digest}")
            self.known[task.name] = "; ".join(parts)
        return self.known[task.name]

    def content(self, task: TaskData) -> list[str | None]:
        """Digests of a task's stored images."""
        if task.name not in self.stored:
            domain = data.Domain(data.CLEAN)
            sources = [source for source in (task.train, task.test) if source is not None]
            found = [data.contents_of(source, [domain])[domain] for source in sources]
            self.stored[task.name] = found
        return self.stored[task.name]

    def classes(self, params: Params, task: TaskData) -> jax.Array:
        """Embeddings of a task's classes, cached while the text tower is the same."""
        if all(tower is not params["text_model"] for tower, _ in self.embeddings):
            self.embeddings[1] = params["text_model"], {}
        (known,) = (found for tower, found in self.embeddings if tower is params["text_model"])
        if task.name not in known:
            known[task.name] = encode_texts(self.model, params, self.prompts(task))
        return known[task.name]

    def gather(
        self, params: Params, source: data.Source, numbers: np.ndarray, key: jax.Array, doing: str
    ) -> continual.Grams:
        """Gram matrices of images with the training augmentation."""

        def batches() -> Iterator[data.StreamBatch]:
            reader = read(source, numbers, GRAM_BATCH, self.course.workers, doing)
            for turn, batch in enumerate(reader):
                images = crop(jax.random.fold_in(key, turn), batch.images)
                yield batch._replace(images=images)

        return continual.task_grams(self.model, params, batches())

    def measure(self, params: Params, start: "Start") -> Row:
        """Accuracy on every task; modality gap and retrieval on retention sets or pairs."""
        row, shown, course = {}, [], self.course
        for task in (*self.tasks, *self.kept):
            classes = np.asarray(self.classes(params, task))
            numbers = np.random.default_rng(0).permutation(len(task.test.labels))[: course.limit]
            images, labels = [], []
            doing = f"testing {task.name}"
            for batch in read(task.test, numbers, course.batch_size, course.workers, doing):
                found = np.asarray(encode(self.model, params, batch.images))
                images.append(found[batch.mask])
                labels.append(batch.labels[batch.mask])
            images, labels = np.concatenate(images), np.concatenate(labels)
            row[task.name] = float(metrics.top_k(images @ classes.T, labels).mean())
            if task.train is None:
                shown.append((images, classes[labels], labels))
        if not shown:
            pairs, size = start.pairs, course.batch_size
            parts = (pairs.images[i : i + size] for i in range(0, len(pairs.images), size))
            images = np.concatenate([encode(self.model, params, part) for part in parts])
            shown.append((images, start.texts(params), pairs.labels))
        return row | alignment(*(np.concatenate(parts) for parts in zip(*shown, strict=True)))


def alignment(images: np.ndarray, texts: np.ndarray, labels: np.ndarray) -> Row:
    """Modality gap and retrieval metrics.

    Args:
        images: (images, projection), of unit norm.
        texts: (images, projection), of unit norm, the same for the same label.
        labels: (images,) integers.

    Returns:
        The modality gap, and the fraction of images and of distinct captions whose nearest caption
        or image is a match.
    """
    _, first, place = np.unique(labels, return_index=True, return_inverse=True)
    similarities, matches = images @ texts[first].T, place[:, None] == np.arange(len(first))
    found = (
        metrics.modality_gap(jnp.asarray(images), jnp.asarray(texts)),
        metrics.retrieval_recall(jnp.asarray(similarities), jnp.asarray(matches)),
        metrics.retrieval_recall(jnp.asarray(similarities.T), jnp.asarray(matches.T)),
    )
    return dict(zip(FIGURES, map(float, found), strict=True))


class Start:
    """Data that all methods of one seed share; each part is computed on first use."""

    def __init__(self, bench: Bench, seed: int) -> None:
        """Draw the reference images."""
        self.bench, self.seed, self.numbers = bench, seed, bench.draw(seed)

    @functools.cached_property
    def pairs(self) -> ReferenceBatch:
        """Reference pairs in memory, with the initial model's embeddings."""
        bench, course = self.bench, self.bench.course
        source, template = bench.reference.test, bench.reference.template
        images, labels, teacher = [], [], []
        reader = read(source, self.numbers, course.batch_size, course.workers, "reference")
        for batch in reader:
            found = np.asarray(encode(bench.model, bench.first, batch.images))
            for parts, array in ((images, batch.images), (labels, batch.labels), (teacher, found)):
                parts.append(array[batch.mask])
        used, place = np.unique(np.concatenate(labels), return_inverse=True)
        names = [source.class_names[label] for label in used]
        task = models.zero_shot_task(bench.model, names, [template])
        prompts = bench.model.prompts(task)
        texts = np.asarray(encode_texts(bench.model, bench.first, prompts))[place]
        self.prompts, captions = prompts, task.token_ids[place, 0]
        return ReferenceBatch(
            np.concatenate(images), captions, place, np.concatenate(teacher), texts
        )

    def texts(self, params: Params) -> np.ndarray:
        """Embeddings of the pairs' captions."""
        bench, pairs = self.bench, self.pairs
        if params["text_model"] is bench.first["text_model"]:
            return np.asarray(pairs.teacher_texts)
        return np.asarray(encode_texts(bench.model, params, self.prompts))[pairs.labels]

    @functools.cached_property
    def grams(self) -> continual.Grams:
        """Gram matrices of the reference images, task zero."""
        key = jax.random.fold_in(jax.random.key(self.seed), 999)
        doing = f"seed {self.seed}: Gram matrices of the reference"
        bench = self.bench
        return bench.gather(bench.first, bench.reference.test, self.numbers, key, doing)

    @functools.cached_property
    def row(self) -> Row:
        """The metrics before the first task."""
        return self.bench.measure(self.bench.first, self)


class Trainer:
    """One method with one seed, trained on all tasks."""

    def __init__(self, bench: Bench, start: Start, name: str) -> None:
        """Prepare the run; nothing is computed yet."""
        self.bench, self.start, self.name, self.method = bench, start, name, VARIANTS[name]
        self.course, self.seed = bench.course, start.seed
        self.folder = bench.output / name / f"seed{self.seed}"
        everything = self.course.first_task == "all"
        self.changed = (
            continual.everything_but_logit_scale if everything else continual.gnsp_kernels
        )

    @property
    def projects(self) -> bool:
        """Whether the method needs Gram matrices."""
        return self.method.projection != "none"

    def settings(self) -> dict[str, Any]:
        """The settings that affect this run, as JSON; unused options are omitted."""
        bench, course = self.bench, self.course
        used = ["iterations", "warmup", "batch_size", "learning_rate", "first_task", "limit"]
        if self.projects:
            used += ["rho", "gram_images", "task_zero"]
        if self.method.uses_pairs:
            used.append("reference_batch")
        if self.name == TRAINED_AS[WISE]:
            used.append("wise_share")  # wise-ft is measured in the same run
        found = {"method": self.name, "seed": self.seed, "weights": bench.weights}
        found["model_settings"] = bench.model_settings
        if self.method.uses_pairs or (self.projects and course.task_zero) or not bench.kept:
            used.append("reference_images")
            found["reference"] = bench.fingerprint(bench.reference)
        found["tasks"] = [bench.fingerprint(task) for task in bench.tasks]
        found["kept"] = [bench.fingerprint(task) for task in bench.kept]
        found |= {name: getattr(course, name) for name in used}
        return found | {"warmup": course.schedule.warmup}

    def content(self, settings: Mapping[str, Any]) -> str | None:
        """A digest of the images that the run uses; None if they are trusted."""
        bench = self.bench
        if self.course.trust_data:
            return None
        used = [*bench.tasks, *bench.kept, *([bench.reference] if "reference" in settings else [])]
        return digest_of([bench.content(task) for task in used])

    def run(self) -> list[dict[str, Any]]:
        """Train on every task; return the metrics before the first and after each, by method."""
        settings, tasks = self.settings(), self.bench.tasks
        agree(self.folder / "settings.json", settings)
        agree_on_images(self.folder / "images.json", self.content(settings))
        params, grams, rows = self.restore()
        if not rows:
            if self.projects and self.course.task_zero:
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

    def result(self, method: str, rows: list[Row], settings: dict[str, Any]) -> dict[str, Any]:
        """Write a method's results."""
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
            "about": about(self.bench.model, **self.bench.notes),
        }
        write_json(self.bench.output / method / f"seed{self.seed}" / "result.json", found)
        return found

    def train(self, params: Params, grams: continual.Grams, task: TaskData, number: int) -> Params:
        """Fine-tune on one task."""
        if task.train is None:
            raise ValueError(f"{task.name} has no training images")
        course, bench, method = self.course, self.bench, self.method
        everything = course.first_task == "all" and number == 0
        chosen = continual.everything_but_logit_scale if everything else continual.gnsp_kernels
        trained, _ = tree.partition(params, chosen)
        projectors = continual.null_space_projectors(grams, course.rho) if grams else {}
        classes = bench.prompts(task) if everything else bench.classes(params, task)
        pairs = None
        if method.uses_pairs:
            texts = None if everything else self.start.texts(params)
            pairs = self.start.pairs._replace(texts=texts)
        optimizer = continual.task_optimizer(method, projectors, *course.schedule)
        state = TrainState(jax.tree.map(jnp.copy, trained), optimizer.init(trained))
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        rng = np.random.default_rng([self.seed, number])
        numbers = shuffled(rng, len(task.train.labels), course.iterations * course.batch_size)
        doing = f"{self.name} seed {self.seed}: {task.name}"
        reader = read(task.train, numbers, course.batch_size, course.workers, doing)
        figures: dict[str, Any] = {}
        for turn, batch in enumerate(reader):
            images, labels = map(jnp.asarray, usable(batch, rng, doing))
            few = None
            if pairs is not None:
                rows = rng.integers(0, len(pairs.images), course.reference_batch)
                few = jax.tree.map(lambda x, rows=rows: x[rows], pairs)
            state, figures = step(
                *(bench.model, method, course.schedule, params, projectors, state),
                jax.random.fold_in(key, turn),
                TaskBatch(images, labels, classes),
                few,
            )
            if turn % 50 == 0 and not np.isfinite(figures["loss"]):
                break
        if not np.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"{doing}: the loss is no longer finite; try a lower --learning-rate and another "
                "--output"
            )
        return tree.merge(params, state.trained)

    def gather(
        self, params: Params, grams: continual.Grams, task: TaskData, number: int
    ) -> continual.Grams:
        """Add the Gram matrices of the latest task to the earlier ones."""
        if not self.projects or task.train is None:
            return {}
        rng = np.random.default_rng([self.seed, number, 1])
        numbers = rng.permutation(len(task.train.labels))[: self.course.gram_images]
        key = jax.random.fold_in(jax.random.key(self.seed), 1000 + number)
        doing = f"{self.name} seed {self.seed}: Gram matrices of {task.name}"
        found = self.bench.gather(params, task.train, numbers, key, doing)
        return continual.combine_grams(grams, found)

    def measure(self, params: Params) -> dict[str, Row]:
        """Metrics of every method that uses these weights."""
        rows = {self.name: self.bench.measure(params, self.start)}
        if self.name == TRAINED_AS[WISE]:
            first = self.bench.first
            ends = tree.partition(first, self.changed)[0], tree.partition(params, self.changed)[0]
            averaged = continual.wise_ft(*ends, self.course.wise_share)
            rows[WISE] = self.bench.measure(tree.merge(first, averaged), self.start)
        return rows

    def save(self, params: Params, grams: continual.Grams, rows: list[dict[str, Row]]) -> None:
        """Save a checkpoint after a task."""
        changed, _ = tree.partition(params, self.changed)
        numbered = {str(n): gram for n, gram in enumerate(grams.values())}
        note = {"rows": rows, "grams": list(grams)}
        arrays = {"changed": changed, "grams": numbered}
        save_step(self.folder / "checkpoints", len(rows), arrays, note)

    def restore(self) -> tuple[Params, continual.Grams, list[dict[str, Row]]]:
        """Restore a checkpoint: parameters, sums of Gram matrices, and metrics."""
        saved = restore_step(self.folder / "checkpoints")
        if saved is None:
            return self.bench.first, {}, []
        _, arrays, note = saved
        grams = arrays.get("grams") or {}
        named = {name: jnp.asarray(grams[str(n)]) for n, name in enumerate(note["grams"])}
        changed = jax.tree.map(jnp.asarray, arrays["changed"])
        return tree.merge(self.bench.first, changed), named, note["rows"]


def shuffled(rng: np.random.Generator, count: int, wanted: int) -> np.ndarray:
    """Concatenate shuffled epochs of indices."""
    return np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]


def usable(
    batch: data.StreamBatch, rng: np.random.Generator, doing: str
) -> tuple[np.ndarray, np.ndarray]:
    """Replace a batch's unreadable images with others from the batch."""
    good = np.flatnonzero(batch.mask)
    if not len(good):
        raise ValueError(f"{doing}: none of the images of a batch could be read")
    rows = np.where(batch.mask, np.arange(len(batch.mask)), rng.choice(good, len(batch.mask)))
    return batch.images[rows], batch.labels[rows]
