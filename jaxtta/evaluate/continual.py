"""Continual learning: train on one task after another; what is learnt, and what is forgotten?

    experiment = Experiment(model, params, tasks, retention, reference, TrainingConfig(), seed=1)
    results = run_sequence(experiment, "gnsp", "runs/mtil")

The results are a data frame with a row per method, seed, step (how many tasks were learnt) and
set: a task, a retention set, or one of `ALIGNMENT`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxtta import continual, data, metrics, models, tree
from jaxtta.continual import VARIANTS, GNSPConfig, Grams, ReferenceBatch, TrainingConfig
from jaxtta.data.tasks import TaskData
from jaxtta.evaluate.checkpoint import restore_checkpoint, save_checkpoint
from jaxtta.evaluate.checks import require_at_least, require_positive
from jaxtta.evaluate.provenance import about, fingerprints, model_settings
from jaxtta.evaluate.results import agree, agree_on_images, digest_of
from jaxtta.io import write_json

Params = models.Params
Texts = Mapping[str, np.ndarray]
"""Class embeddings (classes, projection) by set, from `Experiment.texts`."""
ALIGNMENT = ("modality gap", "image to text", "text to image")
"""Figures of the retention sets together, or of the reference pairs if there are none."""
TRAINED_AS = {"wise-ft": "fine-tuning"}
"""Methods that reuse the training of another method."""
METHODS = (*VARIANTS, *TRAINED_AS)
GRAM_BATCH = 16


def check_training(config: TrainingConfig) -> None:
    """Raise a ValueError for a setting out of range; the message has the option's name."""
    require_positive(learning_rate=(config.learning_rate,))
    least = {"warmup": 0, "workers": 0, "reference_images": 2, "reference_batch": 2}
    least |= dict.fromkeys(("iterations", "batch_size", "gram_images", "max_images"), 1)
    require_at_least(**{name: (getattr(config, name), count) for name, count in least.items()})
    if config.warmup is not None and config.warmup > config.iterations:
        raise ValueError(
            f"--warmup is {config.warmup}, expected at most the {config.iterations} --iterations"
        )
    continual.check_rho(config.rho)
    if not 0 <= config.wise_share <= 1:
        raise ValueError(f"--wise-share is {config.wise_share}, expected 0 to 1")


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """What methods are compared on, with one seed; what they share is computed when first used.

    Attributes:
        model: CLIP with a vision transformer.
        params: its initial parameters.
        tasks: the tasks, in training order.
        retention: sets that are tested but not trained on.
        reference: its test images are the reference images.
        config: the training settings.
        seed: of the order, the crops and the reference.
        stored: digests of the stored images by set; empty where earlier results are trusted.
    """

    model: models.CLIP
    params: Params
    tasks: Sequence[TaskData]
    retention: Sequence[TaskData]
    reference: TaskData
    config: TrainingConfig
    seed: int = 1
    stored: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_training(self.config)
        continual.check_tower(self.model)
        names = [*(task.name for task in (*self.measured, self.reference)), *ALIGNMENT]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name} is used twice, rename the task")
        if len(self.shown) < 2:
            raise ValueError(
                f"the {len(self.drawn)} --reference-images of seed {self.seed} are of one class, "
                "expected two or more; increase their number"
            )

    @property
    def measured(self) -> tuple[TaskData, ...]:
        """Tasks and retention sets."""
        return (*self.tasks, *self.retention)

    @functools.cached_property
    def drawn(self) -> np.ndarray:
        """Indices of the reference images."""
        images = len(self.reference.test.labels)
        return np.random.default_rng(self.seed).permutation(images)[: self.config.reference_images]

    @functools.cached_property
    def shown(self) -> np.ndarray:
        """The classes of the reference images."""
        return np.unique(self.reference.test.labels[self.drawn])

    @functools.cached_property
    def classes(self) -> dict[str, models.Task]:
        """Class prompts by set; of the reference, those of the classes that are shown."""
        shown = [self.reference.test.class_names[label] for label in self.shown]
        names = [*(task.test.class_names for task in self.measured), shown]
        return {
            task.name: models.zero_shot_task(self.model, classes, [task.template])
            for task, classes in zip((*self.measured, self.reference), names, strict=True)
        }

    def texts(self, params: Params) -> Texts:
        """Class embeddings by set."""
        prompts = {name: self.model.prompts(task) for name, task in self.classes.items()}
        return {name: np.asarray(_texts(self.model, params, p)) for name, p in prompts.items()}

    def read(
        self, dataset: data.Dataset, numbers: np.ndarray, desc: str, size: int | None = None
    ) -> Iterator[data.StreamBatch]:
        """Batches of clean images, in this order."""
        clean = data.Domain(data.CLEAN)
        streams = (data.stream_of("clean", [clean], numbers, 0),)
        size, prepare = size or self.config.batch_size, self.model.preprocessing
        batches = data.Batches({clean: dataset}, streams, size, prepare)
        reader = data.read_ahead(batches, self.config.workers)
        bar = tqdm(reader, f"{desc}: compiling", len(batches), unit="batch", leave=False)
        for number, batch in enumerate(bar):
            if number == 1:  # the first was computed with
                bar.set_description(desc)
            yield batch

    def embed(self, params: Params, batches: Iterable[data.StreamBatch]) -> tuple[Any, Any]:
        """Embeddings and labels of the readable images."""
        images, labels = [], []
        for batch in batches:
            images.append(np.asarray(_images(self.model, params, batch.images))[batch.mask])
            labels.append(batch.labels[batch.mask])
        return np.concatenate(images), np.concatenate(labels)

    def grams(
        self, params: Params, dataset: data.Dataset, numbers: np.ndarray, fold: int, desc: str
    ) -> Grams:
        """Gram matrices of images with the training augmentation."""
        key = jax.random.fold_in(jax.random.key(self.seed), fold)
        crops = (
            batch._replace(
                images=continual.random_crops(jax.random.fold_in(key, number), batch.images)
            )
            for number, batch in enumerate(self.read(dataset, numbers, desc, GRAM_BATCH))
        )
        return continual.task_grams(self.model, params, crops)

    @functools.cached_property
    def pairs(self) -> ReferenceBatch:
        """Reference pairs in memory, with the initial model's embeddings."""
        batches = [*self.read(self.reference.test, self.drawn, "reference")]
        teacher, labels = self.embed(self.params, batches)
        labels = np.searchsorted(self.shown, labels)
        images = np.concatenate([batch.images[batch.mask] for batch in batches])
        captions = self.classes[self.reference.name].token_ids[labels, 0]
        texts = self.texts(self.params)[self.reference.name][labels]
        return ReferenceBatch(images, captions, labels, teacher, texts)

    @functools.cached_property
    def before(self) -> dict[str, float]:
        """The figures of the initial model."""
        return evaluate_tasks(self, self.params, self.texts(self.params))


@functools.partial(jax.jit, static_argnums=0)
def _images(model: models.CLIP, params: Params, images: jax.Array) -> jax.Array:
    """Embeddings of images, of unit norm."""
    return models.l2_normalize(model.encode_image(params, model.normalize(images)))


_texts = jax.jit(models.CLIP.class_embeddings, static_argnums=0)


def train_task(
    experiment: Experiment, params: Params, number: int, name: str, texts: Texts, grams: Grams
) -> Params:
    """Train on one task.

    Args:
        experiment: the tasks and the training settings.
        params: the parameters before the task.
        number: index of the task.
        name: the method's, a key of `jaxtta.continual.VARIANTS`.
        texts: class embeddings by set with these parameters.
        grams: Gram matrices of what is to be preserved; empty for no projection.

    Returns:
        The parameters after the task.

    Raises:
        FloatingPointError: if the loss is no longer finite.
        ValueError: if there are no images to train on.
    """
    config, model, task = experiment.config, experiment.model, experiment.tasks[number]
    if task.train is None:
        raise ValueError(f"{task.name} has no training images")
    classes, pairs = texts[task.name], None
    if VARIANTS[name].uses_pairs:
        pairs = experiment.pairs
        pairs = pairs._replace(texts=texts[experiment.reference.name][pairs.labels])
    trains_text = number == 0 and config.first_task == "all"
    if trains_text:
        classes = model.prompts(experiment.classes[task.name])
        pairs = pairs and pairs._replace(texts=None)
    rng = np.random.default_rng([experiment.seed, number])
    wanted = config.iterations * config.batch_size
    epochs = -(-wanted // len(task.train.labels))
    numbers = np.concatenate([rng.permutation(len(task.train.labels)) for _ in range(epochs)])
    desc = f"{name} seed {experiment.seed}: {task.name}"
    batches = experiment.read(task.train, numbers[:wanted], desc)
    key = jax.random.fold_in(jax.random.key(experiment.seed), number)
    try:
        return continual.train(
            *(model, params, batches, classes, config, VARIANTS[name]),
            trainable=continual.everything_but_logit_scale if trains_text else continual.gnsp_kernels,
            grams=grams,
            pairs=pairs,
            rng=rng,
            key=key,
        )
    except FloatingPointError as error:
        advice = "try a lower --learning-rate and another --output"
        raise FloatingPointError(f"{desc}: {error}; {advice}") from error


def evaluate_tasks(experiment: Experiment, params: Params, texts: Texts) -> dict[str, float]:
    """Accuracy on every task and retention set, modality gap and retrieval.

    Args:
        experiment: the sets.
        params: the parameters.
        texts: class embeddings by set with these parameters.

    Returns:
        Accuracies by set, and the figures of `ALIGNMENT`.
    """
    figures, embedded = {}, []
    for task in experiment.measured:
        numbers = np.random.default_rng(0).permutation(len(task.test.labels))
        numbers = numbers[: experiment.config.max_images]
        batches = experiment.read(task.test, numbers, f"testing {task.name}")
        images, labels = experiment.embed(params, batches)
        figures[task.name] = float(metrics.top_k(images @ texts[task.name].T, labels).mean())
        if task.train is None:
            embedded.append((images, texts[task.name][labels], labels))
    if not embedded:
        pairs, size = experiment.pairs, experiment.config.batch_size
        parts = (pairs.images[i : i + size] for i in range(0, len(pairs.images), size))
        images = np.concatenate([_images(experiment.model, params, part) for part in parts])
        embedded.append((images, texts[experiment.reference.name][pairs.labels], pairs.labels))
    return figures | alignment(*(np.concatenate(parts) for parts in zip(*embedded, strict=True)))


def alignment(images: np.ndarray, texts: np.ndarray, labels: np.ndarray) -> dict[str, float]:
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
        metrics.retrieval_recall(similarities, matches),
        metrics.retrieval_recall(similarities.T, matches.T),
    )
    return dict(zip(ALIGNMENT, map(float, found), strict=True))


def run_sequence(
    experiment: Experiment, name: str, output: str | Path, **places: str
) -> pd.DataFrame:
    """Train a method on every task; an interrupted run resumes after the last finished task.

    Args:
        experiment: the tasks, the model and the settings.
        name: a key of `jaxtta.continual.VARIANTS`; fine-tuning is measured as wise-ft, too.
        output: folder of all methods; this one writes to `<name>/seed<seed>`.
        **places: further information for the result file, such as the model's folder.

    Returns:
        Columns method, seed, step, set and value.

    Raises:
        FloatingPointError: if the loss is no longer finite.
        ValueError: if the folder has results with other settings or of other images.
    """
    config, tasks, first = experiment.config, experiment.tasks, experiment.params
    everything, projects = config.first_task == "all", VARIANTS[name].projection != "none"
    changed = continual.everything_but_logit_scale if everything else continual.gnsp_kernels
    averaged = [other for other, trained_as in TRAINED_AS.items() if trained_as == name]
    folder = Path(output) / name / f"seed{experiment.seed}"
    settings = describe(experiment, name)
    agree(folder / "settings.json", settings)
    stored = [experiment.stored[task] for task in settings["data"]] if experiment.stored else None
    agree_on_images(folder / "images.json", stored and digest_of(stored))

    params, grams, rows = first, {}, []
    if saved := restore_checkpoint(folder / "checkpoints"):
        _, arrays, rows = saved
        params = tree.merge(first, arrays["changed"])
        grams = flatten_dict(arrays.get("grams", {}), sep="/")
    remaining = range(max((row["step"] for row in rows), default=-1) + 1, len(tasks) + 1)
    texts = experiment.texts(params) if remaining else {}
    for step in remaining:
        if step == 0:
            figures = dict.fromkeys([name, *averaged], experiment.before)
            if projects and config.task_zero:
                dataset, numbers = experiment.reference.test, experiment.drawn
                grams = experiment.grams(params, dataset, numbers, 999, "reference")
        else:
            params = train_task(experiment, params, step - 1, name, texts, grams)
            texts = experiment.texts(params)
            figures = {name: evaluate_tasks(experiment, params, texts)}
            for other in averaged:
                ends = (tree.partition(tower, changed)[0] for tower in (first, params))
                mean = tree.merge(first, continual.wise_ft(*ends, config.wise_share))
                figures[other] = evaluate_tasks(experiment, mean, experiment.texts(mean))
            grams = (
                add_grams(experiment, params, step - 1, grams, name)
                if projects and step < len(tasks)
                else {}
            )
        rows += [
            {"method": method, "seed": experiment.seed, "step": step, "set": where, "value": value}
            for method, found in figures.items()
            for where, value in found.items()
        ]
        arrays = {"changed": tree.partition(params, changed)[0]}
        arrays["grams"] = unflatten_dict(grams, sep="/")
        save_checkpoint(folder / "checkpoints", step, arrays, rows)
    found = {"rows": rows, "settings": settings, "about": about(experiment.model, **places)}
    write_json(folder / "result.json", found)
    return pd.DataFrame(rows)


def add_grams(
    experiment: Experiment, params: Params, number: int, grams: Grams, name: str
) -> Grams:
    """Add the Gram matrices of the task just learnt to the earlier ones."""
    dataset, seed = experiment.tasks[number].train, experiment.seed
    numbers = np.random.default_rng([seed, number, 1]).permutation(len(dataset.labels))
    numbers = numbers[: experiment.config.gram_images]
    desc = f"{name} seed {seed}: Gram matrices of {experiment.tasks[number].name}"
    found = experiment.grams(params, dataset, numbers, 1000 + number, desc)
    return continual.combine_grams(grams, found)


def describe(experiment: Experiment, name: str) -> dict[str, Any]:
    """The settings that affect a method's results; those of unused options are left out."""
    config, method = experiment.config, VARIANTS[name]
    projects = method.projection != "none"
    used = ["iterations", "batch_size", "learning_rate", "first_task", "max_images"]
    used += ["rho", "gram_images", "task_zero"] if projects else []
    used += ["reference_batch"] if method.uses_pairs else []
    used += ["wise_share"] if name in TRAINED_AS.values() else []  # measured in the same run
    sets = [*experiment.measured]
    if method.uses_pairs or (projects and config.task_zero) or not experiment.retention:
        used.append("reference_images")
        sets.append(experiment.reference)
    data = {
        task.name: [
            fingerprints(dataset, {}, task=experiment.classes[task.name])
            for dataset in (task.train, task.test)
            if dataset is not None
        ]
        for task in sets
    }
    training = {option: getattr(config, option) for option in used}
    return {
        "method": name, "seed": experiment.seed, "tasks": [task.name for task in experiment.tasks],
        "model": model_settings(experiment.model),
        "weights": fingerprints(experiment.reference.test, experiment.params)["weights"],
        "data": ..., "training": training | {"warmup": config.schedule[2]},
    }
