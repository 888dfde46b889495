"""Continual learning: train on one task after another; what is learnt, and what is forgotten?

    experiment = Experiment(model, params, tasks, retention, reference, TrainingConfig(), seed=1)
    results = run_sequence(experiment, "gnsp", "runs/mtil")

The results are a data frame with a row per method, seed, step (the number of tasks learnt) and set:
a task, a retention set, or one of `jaxtta.metrics.ALIGNMENT`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from jaxtta import continual, data, metrics, models, tree, views
from jaxtta.continual import VARIANTS, Grams, ReferenceBatch, TaskBatch, TrainingConfig
from jaxtta.evaluate.provenance import about, fingerprints, model_settings
from jaxtta.evaluate.store import agree, agree_on_images
from jaxtta.io import digest_of, restore_checkpoint, save_checkpoint, write_json

Params = models.Params
WISE, WISE_TRAINING = "wise-ft", "fine-tuning"  # measured in the same run


class TaskData(NamedTuple):
    """A task's images."""

    name: str
    template: str
    train: Any  # a dataset; None for images that are only tested
    test: data.Dataset


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: models.CLIP, params: Params, images: jax.Array) -> jax.Array:
    return models.l2_normalize(model.encode_image(params, model.normalize(images)))


@jax.jit
def _crops(key: jax.Array, images: jax.Array | np.ndarray) -> jax.Array:
    """The training augmentation: crops of images (batch, side, side, 3) uint8, in [0, 1]."""
    draw = functools.partial(views.random_boxes, count=1, scale=(0.9, 1.0))
    keys, size = jax.random.split(key, len(images)), jnp.array(images.shape[1:3])
    boxes = jax.tree.map(lambda x: x[:, 0], jax.vmap(draw, (0, None))(keys, size))
    crop = jax.vmap(functools.partial(views.crop_and_resize, out=images.shape[1]))
    return crop(jnp.asarray(images, jnp.float32) / 255, boxes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _step(
    model: Any, method: Any, schedule: Any, state: Any, projectors: Any, key: Any, *inputs: Any
) -> tuple[continual.TrainState, dict[str, jax.Array]]:
    # The projectors are arguments, so that they are not compiled in as constants.
    optimizer = continual.task_optimizer(method, projectors, *schedule)
    params, batch, pairs = inputs
    batch = batch._replace(images=_crops(key, batch.images))
    return continual.train_step(model, method, optimizer)(params, state, batch, pairs)


@dataclasses.dataclass(eq=False)
class Experiment:
    """What methods are compared on, with one seed; what they share is computed when first used."""

    model: models.CLIP  # with a vision transformer
    params: Params  # its initial parameters
    tasks: Sequence[TaskData]  # in training order
    retention: Sequence[TaskData]  # tested but not trained on
    reference: TaskData  # its test images are the reference images
    config: TrainingConfig
    seed: int = 1  # of the order, the crops and the reference
    content: Mapping[str, Any] | None = None  # digests of the images by set; None to trust results

    def __post_init__(self) -> None:
        """Check the names, and draw the reference images."""
        continual.check_tower(self.model)
        sets, images = [*self.tasks, *self.retention, self.reference], self.reference.test
        names = [*(task.name for task in sets), "last", "average", "transfer", *metrics.ALIGNMENT]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the name {twice[0]} is used twice, rename the task")
        order = np.random.default_rng(self.seed).permutation(len(images))
        self.drawn = order[: self.config.reference_images]
        self.shown = np.unique(images.labels[self.drawn])  # their classes
        if len(self.shown) < 2:
            raise ValueError(f"the --reference-images of seed {self.seed} are of one class")
        classes = {task.name: task.test.class_names for task in sets}
        classes[self.reference.name] = tuple(images.class_names[label] for label in self.shown)
        self.classes = {
            task.name: models.zero_shot_task(self.model, classes[task.name], [task.template])
            for task in sets
        }

    def texts(self, params: Params) -> dict[str, Any]:
        """Class embeddings (classes, projection) by set; of the reference, those of `shown`."""
        init = functools.partial(self.model.init_context, params)
        return {name: np.asarray(init(task)) for name, task in self.classes.items()}

    def read(
        self, dataset: data.Dataset, numbers: np.ndarray, desc: str, size: int | None = None
    ) -> Iterable[data.StreamBatch]:
        """Batches of clean images, in this order."""
        clean = data.Domain(data.CLEAN)
        streams = (data.stream_of("clean", [clean], numbers, 0),)
        size, prepare = size or self.config.batch_size, self.model.preprocessing
        batches = data.Batches({clean: dataset}, streams, size, prepare)
        reader = data.read_ahead(batches, self.config.workers)
        return tqdm(reader, desc, len(batches), unit="batch", leave=False)

    def embed(self, params: Params, task: TaskData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embeddings (images, projection), labels and pixels of the readable test images."""
        numbers = np.random.default_rng(0).permutation(len(task.test))[: self.config.max_images]
        if task is self.reference:
            numbers = self.drawn
        found = []
        for batch in self.read(task.test, numbers, f"testing {task.name}"):
            embeddings = np.asarray(_embed(self.model, params, batch.images))
            found.append([x[batch.mask] for x in (embeddings, batch.labels, batch.images)])
        embeddings, labels, images = map(np.concatenate, zip(*found, strict=True))
        if not len(labels):
            raise ValueError(f"testing {task.name}: none of the images could be read")
        if task is self.reference:
            labels = np.searchsorted(self.shown, labels)
        return embeddings, labels, images

    def grams(self, params: Params, number: int) -> Grams:
        """Gram matrices of the task before task `number`, of the reference images before task 0."""
        task, numbers = self.reference, self.drawn
        if number:
            task = self.tasks[number - 1]
            order = np.random.default_rng([self.seed, number - 1, 1]).permutation(len(task.train))
            numbers = order[: self.config.gram_images]
        images = task.train or task.test
        key = jax.random.fold_in(jax.random.key(self.seed), 999 + number)
        batches = self.read(images, numbers, f"{task.name}: Gram matrices", size=16)
        crops = (
            batch._replace(images=_crops(jax.random.fold_in(key, step), batch.images))
            for step, batch in enumerate(batches)
        )
        return continual.task_grams(self.model, params, crops)

    @functools.cached_property
    def pairs(self) -> ReferenceBatch:
        """Reference pairs in memory, with the initial model's embeddings."""
        teacher, labels, images = self.embed(self.params, self.reference)
        texts = self.texts(self.params)[self.reference.name][labels]
        captions = self.classes[self.reference.name].token_ids[labels, 0]
        return ReferenceBatch(images, captions, labels, teacher, texts)

    @functools.cached_property
    def before(self) -> dict[str, float]:
        """The figures of the initial model."""
        return evaluate_tasks(self, self.params)


def train_task(
    experiment: Experiment, params: Params, number: int, name: str, grams: Grams
) -> tuple[Params, Grams]:
    """Train on task `number` with a method of `jaxtta.continual.VARIANTS`.

    Returns the parameters after the task and the sums of Gram matrices of what it was to preserve,
    `grams` of the next call; they are empty before the first task.
    """
    config, model, method = experiment.config, experiment.model, VARIANTS[name]
    seed, task, texts = experiment.seed, experiment.tasks[number], experiment.texts(params)
    if method.projection != "none" and (number or config.task_zero):
        grams = continual.combine_grams(grams, experiment.grams(params, number))
    pairs, trainable, classes = None, continual.gnsp_kernels, texts[task.name]
    if method.uses_pairs:
        captions = texts[experiment.reference.name][experiment.pairs.labels]
        pairs = experiment.pairs._replace(texts=captions)
    if number == 0 and config.first_task == "all":  # the text tower, too
        classes = model.prompts(experiment.classes[task.name])
        trainable = continual.everything_but_logit_scale
        pairs = pairs and pairs._replace(texts=None)
    rng = np.random.default_rng([seed, number])
    key = jax.random.fold_in(jax.random.key(seed), number)
    size, wanted = len(task.train), config.iterations * config.batch_size
    order = np.concatenate([rng.permutation(size) for _ in range(-(-wanted // size))])[:wanted]
    desc = f"{name} seed {seed}: {task.name}"
    trained, _ = tree.partition(params, trainable)
    projectors = continual.null_space_projectors(grams, config.rho) if grams else {}
    optimizer = continual.task_optimizer(method, projectors, *config.schedule)
    state = continual.TrainState(jax.tree.map(jnp.copy, trained), optimizer.init(trained))
    drawn = None
    for step, batch in enumerate(experiment.read(task.train, order, desc)):
        if not batch.mask.any():
            raise ValueError(f"{desc}: none of the images of a batch could be read")
        # Others of the batch stand in for unreadable images.
        others = rng.choice(np.flatnonzero(batch.mask), len(batch.mask))
        rows = np.where(batch.mask, np.arange(len(batch.mask)), others)
        images, labels = jnp.asarray(batch.images[rows]), jnp.asarray(batch.labels[rows])
        if pairs is not None:
            chosen = rng.integers(0, len(pairs.images), config.reference_batch)
            drawn = jax.tree.map(lambda x, chosen=chosen: x[chosen], pairs)
        inputs = jax.random.fold_in(key, step), params, TaskBatch(images, labels, classes), drawn
        state, found = _step(model, method, config.schedule, state, projectors, *inputs)
        if (step % 50 == 0 or step == config.iterations - 1) and not np.isfinite(found["loss"]):
            raise FloatingPointError(f"{desc}: the loss is no longer finite; lower learning_rate")
    return tree.merge(params, state.trained), grams


def evaluate_tasks(experiment: Experiment, params: Params) -> dict[str, float]:
    """Accuracy on every task and retention set; modality gap and retrieval.

    Gap and retrieval are of all retention sets, or of the reference pairs if there are none.
    """
    figures, parts, texts = {}, [], experiment.texts(params)
    for task in (*experiment.tasks, *(experiment.retention or [experiment.reference])):
        images, labels, _ = experiment.embed(params, task)
        if task is not experiment.reference:
            figures[task.name] = float(metrics.top_k(images @ texts[task.name].T, labels).mean())
        if task.train is None:
            parts.append((images, texts[task.name][labels], labels))
    return figures | metrics.image_text_alignment(*map(np.concatenate, zip(*parts, strict=True)))


def run_sequence(
    experiment: Experiment, name: str, output: str | Path, **places: str
) -> pd.DataFrame:
    """Train a method of `VARIANTS` on every task, after the last that a stopped run finished.

    Results go to `<output>/<name>/seed<seed>`, with `places`, such as the model's folder.
    Fine-tuning is measured as wise-ft, too.
    """
    config, first, content = experiment.config, experiment.params, experiment.content
    folder, settings = Path(output) / name / f"seed{experiment.seed}", _settings(experiment, name)
    agree(folder / "settings.json", settings)
    used = None if content is None else digest_of([content[set_] for set_ in settings["data"]])
    agree_on_images(folder / "images.json", used)
    choices = {"same": continual.gnsp_kernels, "all": continual.everything_but_logit_scale}
    changed = choices[config.first_task]
    done, arrays, rows = restore_checkpoint(folder / "checkpoints") or (-1, {}, [])
    arrays = jax.tree.map(jnp.asarray, arrays)
    params = tree.merge(first, arrays.get("changed", {}))
    grams: Any = flatten_dict(arrays.get("grams", {}), sep="/")
    for step in range(done + 1, len(experiment.tasks) + 1):
        if step:
            params, grams = train_task(experiment, params, step - 1, name, grams)
        (start, _), (end, _) = (tree.partition(weights, changed) for weights in (first, params))
        measured = {name: params}
        if name == WISE_TRAINING:
            average = continual.wise_ft(start, end, config.wise_share)
            measured[WISE] = tree.merge(first, average)
        for method, weights in measured.items():
            values = evaluate_tasks(experiment, weights) if step else experiment.before
            where = {"method": method, "seed": experiment.seed, "step": step}
            rows += [where | {"set": set_, "value": value} for set_, value in values.items()]
        save_checkpoint(folder / "checkpoints", step, {"changed": end, "grams": grams}, rows)
    found = {"rows": rows, "settings": settings, "about": about(experiment.model, **places)}
    write_json(folder / "result.json", found)
    return pd.DataFrame(rows)


def _settings(experiment: Experiment, name: str) -> dict[str, Any]:
    """The settings that affect a method's results; unused options are left out."""
    config, method = experiment.config, VARIANTS[name]
    projected = method.projection != "none"
    referred = method.uses_pairs or (projected and config.task_zero) or not experiment.retention
    sets = [*experiment.tasks, *experiment.retention, experiment.reference]
    used = {
        **dict.fromkeys(("rho", "gram_images", "task_zero"), projected),
        "reference_batch": method.uses_pairs,
        "reference_images": referred,
        "wise_share": name == WISE_TRAINING,
        "workers": False,
    }
    training = dataclasses.asdict(config) | {"warmup": config.schedule[2]}
    return {
        "method": name,
        "seed": experiment.seed,
        "model": model_settings(experiment.model),
        "weights": fingerprints(experiment.reference.test, experiment.params)["weights"],
        "tasks": [task.name for task in experiment.tasks],
        "data": {
            task.name: [
                fingerprints(images, {}, task=experiment.classes[task.name])
                for images in (task.train, task.test)
                if images is not None
            ]
            for task in (sets if referred else sets[:-1])
        },
        "training": {option: x for option, x in training.items() if used.get(option, True)},
    }
