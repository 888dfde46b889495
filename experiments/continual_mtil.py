r"""Teach a model one task after another: what does it learn, and what does it keep?

    python experiments/continual_mtil.py --output runs/continual

teaches the embedded model the defects of textiles, then scikit-learn's digits, then the digits'
negatives turned by 90°, and measures after each task what is left of CIFAR-10: on the five classes
whose pictures it is shown to remember, and on the five others. Plain fine-tuning and GNSP in one
table. The eleven MTIL sets in
their published order, from the folders that prompt-learning benchmarks use (CIFAR-100 and MNIST
from tensorflow-datasets), with ImageNet pictures as reference:

    python experiments/continual_mtil.py --model openai/clip-vit-base-patch16 --data DATA \
        --tasks order-1 --reference imagenet=IMAGENET/train --output runs/mtil \
        --methods fine-tuning gnsp gnsp-after --first-task all

A task of your own is NAME=FOLDER, with FOLDER/train/<class>/… and FOLDER/test/<class>/…. A killed
run goes on after the last task that it finished.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

import jaxtta
from jaxtta import assets, continual, data, metrics, sweep, tree, views
from jaxtta.clip.preprocess import Preprocessing
from jaxtta.continual import METHODS, Examples, Pairs, TrainState

ORDERS = {
    "order-1": (
        *("fgvc-aircraft", "caltech101", "cifar100", "dtd", "eurosat", "oxford-flowers"),
        *("food101", "mnist", "oxford-pets", "stanford-cars", "sun397"),
    ),
    "order-2": (
        *("stanford-cars", "food101", "mnist", "oxford-pets", "oxford-flowers", "sun397"),
        *("fgvc-aircraft", "caltech101", "dtd", "eurosat", "cifar100"),
    ),
}
"""The two published orders of the MTIL benchmark."""
FROM_TFDS = ("cifar100", "mnist")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WISE = "wise-ft"
TRAINED_AS = {WISE: "fine-tuning"}
"""Methods that measure what another one trains."""
CROP = (0.9, 1.0)  # share of the area that the training augmentation keeps
GRAM_BATCH = 16


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
    """LAYOUT=FOLDER with pictures to measure on what is kept: those of the reference classes and
    those of the others apart. Default: none, but embedded ones beside the embedded reference."""
    reference_pictures: int = 1000
    """How many of them."""
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
    batch_size: int = 64
    """Pictures a step."""
    learning_rate: float = 5e-5
    """The highest of AdamW (published: 1e-5 to 5e-5 on CLIP)."""
    rho: float = 0.15
    """Share of the singular values' sum that the projection gives up."""
    gram_pictures: int = 2000
    """Training pictures a task that its Gram matrices are gathered from."""
    wise_share: float = 0.5
    """Share of the fine-tuned weights in wise-ft's average."""
    limit: int | None = None
    """Use only so many test pictures of each task."""
    seeds: tuple[int, ...] = (1,)
    """Of order, crops and reference; each is a run of its own."""
    workers: int = 1
    """Processes that decode pictures; 0 does it in this one."""
    debug: bool = False
    """Show tracebacks."""


class TaskData(NamedTuple):
    """A task.

    Attributes:
        name: what to call it.
        template: of its prompts.
        train: its training pictures; None for what is only measured.
        test: its test pictures.
    """

    name: str
    template: str
    train: data.Source | None
    test: data.Source


class Arrays(NamedTuple):
    """Pictures that are in memory.

    Attributes:
        images: (pictures, height, width, 3) uint8.
        labels: (pictures,) int32.
        class_names: names of the classes.
        what: what to call them in a message.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    what: str

    def open(self, number: int) -> Image.Image:
        """One picture."""
        return Image.fromarray(self.images[number])

    def name(self, number: int) -> str:
        """What to call a picture in a message."""
        return f"{self.what} {number}"


def main(options: Options) -> None:
    """Run every method and report."""
    check(options)
    model, params = jaxtta.clip.load(options.model)
    tasks = [open_task(name, options, model) for name in task_names(options)]
    for task in tasks:
        if len(task.test.class_names) < 2:
            raise ValueError(f"the task {task.name} has one class, expected at least two")
    kept, reference = open_reference(options, model)
    results = []
    for seed in options.seeds:
        pairs = draw_pairs(options, model, params, reference, seed)
        for method in dict.fromkeys(TRAINED_AS.get(name, name) for name in options.methods):
            results += Trainer(options, model, params, method, seed, pairs).run(
                tasks, [*tasks, *kept]
            )
    results = [found for name in options.methods for found in results if found["method"] == name]
    report(options, [task.name for task in tasks], [task.name for task in kept], results)


def check(options: Options) -> None:
    """Raise a ValueError for options that cannot be meant."""
    sweep.check_choices(tasks=options.tasks, methods=options.methods, seeds=options.seeds)
    sweep.check_rates(learning_rate=(options.learning_rate,))
    sweep.check_limits(
        iterations=(options.iterations, 1),
        batch_size=(options.batch_size, 1),
        reference_pictures=(options.reference_pictures, 2),
        reference_batch=(options.reference_batch, 2),
        gram_pictures=(options.gram_pictures, GRAM_BATCH),
        limit=(options.limit, 1),
        workers=(options.workers, 0),
    )
    for name in options.methods:
        if name not in (*METHODS, WISE):
            known = ", ".join((*METHODS, WISE))
            raise ValueError(f"unknown method {name!r}, expected one of {known}")
    if not 0 < options.rho < 1:
        raise ValueError(f"--rho is {options.rho}, expected between 0 and 1")
    if not 0 <= options.wise_share <= 1:
        raise ValueError(f"--wise-share is {options.wise_share}, expected 0 to 1")


# --- pictures ---


def task_names(options: Options) -> list[str]:
    """The tasks one by one."""
    return [name for given in options.tasks for name in ORDERS.get(given, (given,))]


def open_task(name: str, options: Options, model: jaxtta.clip.CLIP) -> TaskData:
    """Open a task's training and test pictures."""
    prepare = model.preprocessing
    if name in ("digits", "turned-digits"):
        template = "a photo of the digit {}."
        return TaskData(name, template, *digits(prepare, turned=name == "turned-digits"))
    if name == "textile":
        return TaskData(name, "a photo of a textile with {}.", *textile(prepare))
    if name in ORDERS["order-1"]:
        if options.data is None and name not in FROM_TFDS:
            raise ValueError(f"{name} needs --data, the folder above the MTIL sets")
        layout, root = ("tfds", name) if name in FROM_TFDS else (name, options.data)
        both = (data.open_source(layout, root, prepare, split=s) for s in ("train", "test"))
        return TaskData(name, data.templates_for(name)[0], *both)
    own, equals, root = name.partition("=")
    if not equals:
        known = ", ".join((*ORDERS, *ORDERS["order-1"], "digits", "turned-digits", "textile"))
        raise ValueError(f"unknown task {name!r}, expected NAME=FOLDER or one of {known}")
    both = (data.open_source("folder", Path(root) / s, prepare) for s in ("train", "test"))
    return TaskData(own, "a photo of a {}.", *both)


def digits(prepare: Preprocessing, turned: bool) -> tuple[data.Source, data.Source]:
    """scikit-learn's digits, three quarters to train on; or their negatives, turned by 90°."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    grey = (loaded.images * 255 / 16).round().astype(np.uint8)
    if turned:
        grey = np.rot90(255 - grey, axes=(1, 2))
    images = np.repeat(grey[..., None], 3, axis=-1)
    return split(Arrays(images, loaded.target.astype(np.int32), DIGITS, "digit"), prepare)


def textile(prepare: Preprocessing) -> tuple[data.Source, data.Source]:
    """Simulated textile pictures with a global, a local or no defect."""
    import conformal_clip_data

    listed = data.image_folder(conformal_clip_data.textile_simulated_root())
    names = {"global": "a large defect", "local": "a small defect", "nominal": "no defect"}
    listed = listed._replace(class_names=tuple(names[name] for name in listed.class_names))
    return split(listed, prepare)


def split(pictures: Any, prepare: Preprocessing) -> tuple[data.Source, data.Source]:
    """Every fourth picture of a class to test on, the others to train on."""
    order = np.argsort(pictures.labels, kind="stable")
    place = np.empty(len(order), int)  # of a picture within its class
    for label in np.unique(pictures.labels):
        members = order[pictures.labels[order] == label]
        place[members] = np.arange(len(members))
    tested = place % 4 == 0
    return tuple(
        data.CorruptedOnTheFly(Chosen(pictures, np.flatnonzero(mask)), prepare)
        for mask in (~tested, tested)
    )


class Chosen:
    """Some of a set's pictures, with all of its classes."""

    def __init__(self, pictures: Any, numbers: np.ndarray) -> None:
        """Choose pictures by their numbers."""
        self.pictures, self.numbers = pictures, numbers
        self.labels = pictures.labels[numbers]
        self.class_names = tuple(pictures.class_names)

    def open(self, number: int) -> Image.Image:
        """One picture."""
        return self.pictures.open(int(self.numbers[number]))

    def name(self, number: int) -> str:
        """What to call a picture in a message."""
        return self.pictures.name(int(self.numbers[number]))


def open_reference(options: Options, model: jaxtta.clip.CLIP) -> tuple[list[TaskData], TaskData]:
    """What is measured without being taught, and the pictures that stand for what is to be kept."""
    prepare, count = model.preprocessing, options.reference_classes
    template = "a photo of a {}."
    if options.reference is None:
        count = count or 5
        reference, kept = split(data.image_folder(assets.PICTURES), prepare)
    else:
        reference = open_layout("--reference", options.reference, prepare)
        if options.reference.startswith("captions="):
            template = "{}"
        kept = open_layout("--kept", options.kept, prepare) if options.kept else None
    names = reference.class_names
    count = count or len(names)
    if not 1 < count <= len(names):
        raise ValueError(f"--reference-classes is {count}, expected 2 to {len(names)}")
    inside = TaskData("reference", template, None, with_labels(reference, range(count)))
    if kept is None:
        return [], inside
    if kept.class_names != names:
        raise ValueError("--kept has other classes than --reference")
    parts = {"kept-inside": range(count), "kept-outside": range(count, len(names))}
    measured = [
        TaskData(name, template, None, with_labels(kept, labels))
        for name, labels in parts.items()
        if labels
    ]
    return measured, inside


def open_layout(option: str, text: str, prepare: Preprocessing) -> data.Source:
    """Open LAYOUT=FOLDER."""
    layout, equals, root = text.partition("=")
    if not equals:
        raise ValueError(f"{option} is {text!r}, expected LAYOUT=FOLDER, as folder=DATA/train")
    if layout == "captions":
        return data.CorruptedOnTheFly(data.captioned_folder(root), prepare)
    return data.open_source(layout, root, prepare)


def with_labels(source: data.Source, labels: Sequence[int]) -> data.Source:
    """The pictures of some classes."""
    numbers = np.flatnonzero(np.isin(source.labels, list(labels)))
    return data.CorruptedOnTheFly(Chosen(source.pictures, numbers), source.preprocess)


def read(
    options: Options, source: data.Source, numbers: np.ndarray, size: int, doing: str
) -> Iterator[data.StreamBatch]:
    """Batches of pictures, in this order."""
    clean = [data.Domain(data.CLEAN)]
    stream = data.stream_of("clean", clean, np.zeros(len(numbers), int), numbers, 0)
    batches = data.Batches(source, (stream,), size)
    reader = data.read_ahead(batches, options.workers)
    return iter(tqdm(reader, total=len(batches), desc=doing, unit="batch", leave=False))


def draw_pairs(
    options: Options,
    model: jaxtta.clip.CLIP,
    params: jaxtta.clip.Params,
    reference: TaskData,
    seed: int,
) -> Pairs:
    """Reference pairs in memory, and what the initial model makes of them."""
    rng, source = np.random.default_rng(seed), reference.test
    numbers = rng.permutation(len(source.labels))[: options.reference_pictures]
    batches = list(read(options, source, numbers, options.batch_size, "reference"))
    mask = np.concatenate([batch.mask for batch in batches])
    images, labels = (
        np.concatenate([getattr(batch, name) for batch in batches])[mask]
        for name in ("images", "labels")
    )
    task = jaxtta.clip.zero_shot_task(model, source.class_names, [reference.template])
    encode = jax.jit(lambda p, x: jaxtta.clip.unit(model.encode_image(p, model.normalize(x))))
    size = options.batch_size
    teacher = [encode(params, images[i : i + size]) for i in range(0, len(images), size)]
    texts = jax.jit(model.class_embeddings)(params, model.prompts(task))
    captions = jnp.asarray(task.token_ids[:, 0])[labels]
    return Pairs(images, captions, labels, jnp.concatenate(teacher), texts[labels])


# --- training ---


class Trainer:
    """One method with one seed, through all tasks."""

    def __init__(
        self,
        options: Options,
        model: jaxtta.clip.CLIP,
        params: jaxtta.clip.Params,
        name: str,
        seed: int,
        pairs: Pairs,
    ) -> None:
        """Prepare; nothing is computed yet."""
        self.options, self.model, self.first, self.pairs = options, model, params, pairs
        self.name, self.seed = name, seed
        self.method = dataclasses.replace(METHODS[name], rho=options.rho)
        self.folder = options.output / name / f"seed{seed}"
        self.class_embeddings = jax.jit(model.class_embeddings)
        self.predict = jax.jit(lambda p, c, x: model.forward(p, c, x).logits.argmax(-1))
        self.encode = jax.jit(
            lambda p, x: jaxtta.clip.unit(model.encode_image(p, model.normalize(x)))
        )
        self.encode_texts = jax.jit(lambda p, ids: jaxtta.clip.unit(model.encode_text(p, ids)))

        @functools.partial(jax.jit, donate_argnums=2)
        def step(
            params: Any,
            projectors: dict[str, Any],
            state: TrainState,
            key: jax.Array,
            images: Any,
            labels: Any,
            classes: Any,
            pairs: Pairs,
        ) -> tuple[TrainState, dict[str, jax.Array]]:
            # The projectors are arguments, lest the program holds them as constants.
            update = continual.train_step(model, self.method, self.optimizer(projectors))
            return update(params, state, Examples(crop(key, images), labels, classes), pairs)

        self.step = step

    def optimizer(self, projectors: dict[str, Any]) -> optax.GradientTransformation:
        """A task's optimiser."""
        options = self.options
        return continual.task_optimizer(
            self.method, projectors, options.learning_rate, options.iterations
        )

    def encode_captions(self, params: jaxtta.clip.Params) -> jax.Array:
        """The reference captions' embeddings, of unit norm."""
        return self.encode_texts(params, jnp.asarray(self.pairs.captions))

    def run(self, tasks: Sequence[TaskData], measured: Sequence[TaskData]) -> list[dict[str, Any]]:
        """Train on every task; what was measured before the first and after each, by method."""
        names = [task.name for task in tasks]
        left_out = ("output", "methods", "seeds", "workers", "debug")
        settings = dataclasses.asdict(self.options) | {"method": self.name, "seed": self.seed}
        settings = {name: value for name, value in settings.items() if name not in left_out}
        settings = json.loads(json.dumps(settings))
        sweep.agree(self.folder / "settings.json", settings)
        params, grams, rows = self.restore()
        if not rows:
            if self.options.task_zero and self.method.projection != "none":
                images = self.pairs.images
                size = len(images) // GRAM_BATCH * GRAM_BATCH
                parts = images[:size].reshape(-1, GRAM_BATCH, *images.shape[1:])
                grams = continual.task_grams(self.model, params, parts)
            rows = [self.measure_all(params, measured)]
            self.save(params, grams, rows)
        for number, task in enumerate(tasks[len(rows) - 1 :], len(rows) - 1):
            params = self.train(params, grams, task, number)
            if self.method.projection != "none":
                grams = continual.combine_grams(grams, self.gather(params, task, number))
            rows.append(self.measure_all(params, measured))
            self.save(params, grams, rows)
        return [self.result(name, [row[name] for row in rows], names, settings) for name in rows[0]]

    def result(
        self,
        method: str,
        rows: list[dict[str, float]],
        names: list[str],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """Write what came of a method."""
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

    def classes(self, params: jaxtta.clip.Params, task: TaskData) -> tuple[Any, Any]:
        """A task's packed prompts, and their embeddings now."""
        names = task.test.class_names
        prompts = self.model.prompts(jaxtta.clip.zero_shot_task(self.model, names, [task.template]))
        return prompts, self.class_embeddings(params, prompts)

    def train(
        self, params: jaxtta.clip.Params, grams: continual.Grams, task: TaskData, number: int
    ) -> jaxtta.clip.Params:
        """Fine-tune on one task."""
        options = self.options
        everything = options.first_task == "all" and number == 0
        chosen = continual.all_but_logit_scale if everything else continual.gnsp_kernels
        trained, _ = tree.partition(params, chosen)
        projectors = continual.null_space_projectors(grams, options.rho) if grams else {}
        prompts, embeddings = self.classes(params, task)
        classes = prompts if everything else embeddings
        pairs = jax.tree.map(np.asarray, self.pairs)
        if not everything:
            pairs = pairs._replace(texts=np.asarray(self.encode_captions(params)))
        optimizer = self.optimizer(projectors)
        state = TrainState(jax.tree.map(jnp.copy, trained), optimizer.init(trained))
        key, rng = jax.random.key(self.seed), np.random.default_rng([self.seed, number])
        numbers = shuffled(rng, len(task.train.labels), options.iterations * options.batch_size)
        doing = f"{self.name} seed {self.seed}: {task.name}"
        for turn, batch in enumerate(read(options, task.train, numbers, options.batch_size, doing)):
            rows = rng.integers(0, len(pairs.images), options.reference_batch)
            few = jax.tree.map(lambda x, rows=rows: x[rows], pairs)
            images, labels = usable(batch, rng)
            turn_key = jax.random.fold_in(jax.random.fold_in(key, number), turn)
            state, figures = self.step(
                *(params, projectors, state, turn_key, images, labels, classes, few)
            )
            if turn % 50 == 0 and not np.isfinite(figures["loss"]):
                break
        if not np.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"{doing}: the loss is no longer finite; try a lower --learning-rate"
            )
        return tree.merge(params, state.trained)

    def gather(self, params: jaxtta.clip.Params, task: TaskData, number: int) -> continual.Grams:
        """Gram matrices of a task that was just learnt, with the training augmentation."""
        rng = np.random.default_rng([self.seed, number, 1])
        numbers = rng.permutation(len(task.train.labels))[: self.options.gram_pictures]
        key, cut = jax.random.fold_in(jax.random.key(self.seed), 1000 + number), jax.jit(crop)
        doing = f"{self.name} seed {self.seed}: Gram matrices of {task.name}"

        def batches() -> Iterator[data.StreamBatch]:
            reader = read(self.options, task.train, numbers, GRAM_BATCH, doing)
            for turn, batch in enumerate(reader):
                images = cut(jax.random.fold_in(key, turn), batch.images)
                yield batch._replace(images=images)

        return continual.task_grams(self.model, params, batches())

    def measure_all(
        self, params: jaxtta.clip.Params, measured: Sequence[TaskData]
    ) -> dict[str, dict[str, float]]:
        """Figures of every method that these weights serve."""
        rows = {self.name: self.measure(params, measured)}
        if self.name == TRAINED_AS[WISE]:
            averaged = continual.average_weights(self.first, params, self.options.wise_share)
            rows[WISE] = self.measure(averaged, measured)
        return rows

    def measure(self, params: jaxtta.clip.Params, measured: Sequence[TaskData]) -> dict[str, float]:
        """Accuracy on every task, modality gap and retrieval on the reference pairs."""
        row = {}
        for task in measured:
            _, classes = self.classes(params, task)
            numbers = np.random.default_rng(0).permutation(len(task.test.labels))
            right = []
            for batch in read(
                self.options,
                task.test,
                numbers[: self.options.limit],
                self.options.batch_size,
                f"testing {task.name}",
            ):
                answers = np.asarray(self.predict(params, classes, batch.images))
                right.append((answers == batch.labels)[batch.mask])
            row[task.name] = float(np.concatenate(right).mean())
        pairs, size = self.pairs, self.options.batch_size
        images = jnp.concatenate(
            [
                self.encode(params, pairs.images[i : i + size])
                for i in range(0, len(pairs.images), size)
            ]
        )
        texts = self.encode_captions(params)
        matches = pairs.labels[:, None] == pairs.labels
        similarities = images @ texts.T
        row["modality gap"] = float(metrics.modality_gap(images, texts))
        row["image to text"] = float(metrics.retrieval_recall(similarities, matches))
        row["text to image"] = float(metrics.retrieval_recall(similarities.T, matches))
        return row

    def save(
        self, params: jaxtta.clip.Params, grams: continual.Grams, rows: list[dict[str, float]]
    ) -> None:
        """Save where this run stands, after a task."""
        numbered = {str(n): gram for n, gram in enumerate(grams.values())}
        arrays = {"params": params, "grams": numbered}
        note = {"rows": rows, "grams": list(grams)}
        sweep.save_step(self.folder / "checkpoints", len(rows), arrays, note)

    def restore(self) -> tuple[jaxtta.clip.Params, continual.Grams, list[dict[str, float]]]:
        """Where this run stands: parameters, sums of Gram matrices, what was measured."""
        saved = sweep.restore_step(self.folder / "checkpoints")
        if saved is None:
            return self.first, {}, []
        _, arrays, note = saved
        grams = arrays.get("grams") or {}
        named = {name: jnp.asarray(grams[str(n)]) for n, name in enumerate(note["grams"])}
        return jax.tree.map(jnp.asarray, arrays["params"]), named, note["rows"]


def crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """The training augmentation: a random crop of most of each picture; float in [0, 1]."""
    side = images.shape[1]
    images = images.astype(jnp.float32) / 255

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        box = views.random_boxes(key, jnp.array(image.shape[:2]), 1, CROP)
        return views.crop_and_resize(image, jax.tree.map(lambda x: x[0], box), side)

    return jax.vmap(one)(jax.random.split(key, len(images)), images)


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
    print(f"accuracy in % after the last task, mean over {len(options.seeds)} seeds\n\n{text}\n")
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

    The kept share is (method − fine-tuning) / (start − fine-tuning), where fine-tuning is there.
    """
    groups = by_method(results)
    seeds = range(len(next(iter(groups.values()))))
    start = [results[seed]["rows"][0] for seed in seeds]
    ends = {name: [run["rows"][-1] for run in runs] for name, runs in groups.items()}
    worst = ends.get("fine-tuning")
    figures = ["modality gap", "image to text", "text to image"]
    head = ["method", *tasks, "mean of tasks", *kept]
    head += [f"share of {name}" for name in kept if worst] + ["transfer"] * (len(tasks) > 1)
    lines = [[*head, *figures]]
    for method, rows in {"before": start, **ends}.items():
        columns = [[row[name] for row in rows] for name in tasks]
        columns += [np.mean(columns, 0), *([row[name] for row in rows] for name in kept)]
        cells = [spread(column) for column in columns]
        for name in kept if worst else ():
            first, own, low = (np.mean([row[name] for row in r]) for r in (start, rows, worst))
            cells.append(f"{(own - low) / (first - low):.2f}" if first != low else "–")
        if len(tasks) > 1:
            runs = groups.get(method)
            cells.append(spread([run["transfer"] for run in runs]) if runs else "–")
        cells.append(f"{np.mean([row['modality gap'] for row in rows]):.3f}")
        cells += [spread([row[name] for row in rows]) for name in figures[1:]]
        lines.append([method, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


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
