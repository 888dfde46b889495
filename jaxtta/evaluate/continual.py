"""Continual learning: train on one task after another; what is learnt, and what is forgotten?

    experiment = Experiment(model, params, tasks, retention, reference, TrainingConfig(), seed=1)
    results = run_sequence(experiment, "gnsp", "runs/mtil")

The results are a data frame with a row per method, seed, step (the number of tasks learnt) and set:
a task, a retention set, or one of `jaxtta.metrics.ALIGNMENT`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from jaxtta import continual, data, metrics, models, tree
from jaxtta.continual import VARIANTS, Grams, ReferenceBatch, TrainingConfig, random_crops
from jaxtta.data.tasks import TaskData
from jaxtta.evaluate.provenance import about, fingerprints, model_settings
from jaxtta.evaluate.store import agree, agree_on_images
from jaxtta.io import digest_of, restore_checkpoint, save_checkpoint, write_json

Params = models.Params
WISE, WISE_TRAINING = "wise-ft", "fine-tuning"
"""WiSE-FT averages the weights before and after fine-tuning, and is measured in the same run."""
TABLE_COLUMNS = ("last", "average", "transfer", *metrics.ALIGNMENT)
"""No task can have the name of one of these."""
GRAM_BATCH = 16

_embed_classes = jax.jit(models.CLIP.class_embeddings, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: models.CLIP, params: Params, images: jax.Array) -> jax.Array:
    return models.l2_normalize(model.encode_image(params, model.normalize(images)))


@dataclasses.dataclass(eq=False)
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
        content: digest of the stored images of each set, by name; None to trust earlier results.
    """

    model: models.CLIP
    params: Params
    tasks: Sequence[TaskData]
    retention: Sequence[TaskData]
    reference: TaskData
    config: TrainingConfig
    seed: int = 1
    content: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Validate the settings, and draw the reference images."""
        continual.check_tower(self.model)
        sets, images = [*self.tasks, *self.retention, self.reference], self.reference.test
        names = [*(task.name for task in sets), *TABLE_COLUMNS]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name} is used twice, rename the task")
        for task in self.tasks:
            if task.train is None:
                raise ValueError(f"{task.name} has no training images")
        order = np.random.default_rng(self.seed).permutation(len(images))
        self.drawn = order[: self.config.reference_images]
        self.shown = np.unique(images.labels[self.drawn])  # their classes
        if len(self.shown) < 2:
            raise ValueError(
                f"the {len(self.drawn)} --reference-images of seed {self.seed} are of one class, "
                "expected two or more; increase their number"
            )
        classes = [*(task.test.class_names for task in sets[:-1])]
        classes.append(tuple(images.class_names[label] for label in self.shown))
        self.classes = {
            task.name: models.zero_shot_task(self.model, names, [task.template])
            for task, names in zip(sets, classes, strict=True)
        }

    def texts(self, params: Params) -> dict[str, np.ndarray]:
        """Class embeddings (classes, projection) by set; of the reference, those of `shown`."""
        prompts = {name: self.model.prompts(task) for name, task in self.classes.items()}
        return {n: np.asarray(_embed_classes(self.model, params, p)) for n, p in prompts.items()}

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

    def embed(
        self, params: Params, dataset: data.Dataset, numbers: np.ndarray, desc: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embeddings (images, projection), labels and pixels of the images that can be read."""
        found = []
        for batch in self.read(dataset, numbers, desc):
            embeddings = np.asarray(_embed(self.model, params, batch.images))
            found.append([x[batch.mask] for x in (embeddings, batch.labels, batch.images)])
        embeddings, labels, images = map(np.concatenate, zip(*found, strict=True))
        if not len(labels):
            raise ValueError(f"{desc}: none of the images could be read")
        return embeddings, labels, images

    def grams(
        self, params: Params, dataset: data.Dataset, numbers: np.ndarray, step: int, desc: str
    ) -> Grams:
        """Gram matrices of images with the training augmentation, before task `step`."""
        desc += ": Gram matrices"
        key = jax.random.fold_in(jax.random.key(self.seed), 999 + step)
        crops = (
            batch._replace(images=random_crops(jax.random.fold_in(key, number), batch.images))
            for number, batch in enumerate(self.read(dataset, numbers, desc, GRAM_BATCH))
        )
        return continual.task_grams(self.model, params, crops)

    @functools.cached_property
    def reference_grams(self) -> Grams:
        """Gram matrices of the reference images."""
        images, desc = self.reference.test, f"reference of seed {self.seed}"
        return self.grams(self.params, images, self.drawn, 0, desc)

    @functools.cached_property
    def pairs(self) -> ReferenceBatch:
        """Reference pairs in memory, with the initial model's embeddings."""
        images, name = self.reference.test, self.reference.name
        teacher, labels, images = self.embed(self.params, images, self.drawn, "reference")
        labels, texts = np.searchsorted(self.shown, labels), self.texts(self.params)[name]
        captions = self.classes[name].token_ids[labels, 0]
        return ReferenceBatch(images, captions, labels, teacher, texts[labels])

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

    Raises:
        FloatingPointError: if the loss is no longer finite.
        ValueError: if no image of a batch could be read.
    """
    config, model, method = experiment.config, experiment.model, VARIANTS[name]
    seed, task, texts = experiment.seed, experiment.tasks[number], experiment.texts(params)
    if method.projection != "none" and number:
        earlier = experiment.tasks[number - 1]
        images: Any = earlier.train
        numbers = np.random.default_rng([seed, number - 1, 1]).permutation(len(images))
        desc, numbers = f"{name} seed {seed}: {earlier.name}", numbers[: config.gram_images]
        found = experiment.grams(params, images, numbers, number, desc)
        grams = continual.combine_grams(grams, found)
    elif method.projection != "none" and config.task_zero:
        grams = experiment.reference_grams
    pairs, trainable = None, continual.gnsp_kernels
    classes: Any = texts[task.name]
    if method.uses_pairs:
        captions = texts[experiment.reference.name][experiment.pairs.labels]
        pairs = experiment.pairs._replace(texts=captions)
    if number == 0 and config.first_task == "all":  # the text tower, too
        classes = model.prompts(experiment.classes[task.name])
        trainable = continual.everything_but_logit_scale
        pairs = pairs and pairs._replace(texts=None)
    rng = np.random.default_rng([seed, number])
    images, wanted = task.train, config.iterations * config.batch_size
    epochs = [rng.permutation(len(images)) for _ in range(-(-wanted // len(images)))]
    desc = f"{name} seed {seed}: {task.name}"
    batches = experiment.read(images, np.concatenate(epochs)[:wanted], desc)
    key = jax.random.fold_in(jax.random.key(seed), number)
    inputs = model, config, method, params, trainable, batches, classes, pairs, grams
    try:
        return continual.train(*inputs, rng=rng, key=key), grams
    except FloatingPointError as error:
        raise FloatingPointError(f"{desc}: {error}, and another --output") from error
    except ValueError as error:
        raise ValueError(f"{desc}: {error}") from error


def evaluate_tasks(experiment: Experiment, params: Params) -> dict[str, float]:
    """Accuracy on every task and retention set; modality gap and retrieval.

    Gap and retrieval are of all retention sets, or of the reference pairs if there are none.
    """
    figures, parts, texts = {}, [], experiment.texts(params)
    for task in (*experiment.tasks, *experiment.retention):
        numbers = np.random.default_rng(0).permutation(len(task.test))
        numbers, desc = numbers[: experiment.config.max_images], f"testing {task.name}"
        images, labels, _ = experiment.embed(params, task.test, numbers, desc)
        figures[task.name] = float(metrics.top_k(images @ texts[task.name].T, labels).mean())
        if task.train is None:
            parts.append((images, texts[task.name][labels], labels))
    if not parts:
        reference, desc = experiment.reference, "testing the reference"
        images, labels, _ = experiment.embed(params, reference.test, experiment.drawn, desc)
        labels = np.searchsorted(experiment.shown, labels)
        parts.append((images, texts[reference.name][labels], labels))
    return figures | metrics.image_text_alignment(*map(np.concatenate, zip(*parts, strict=True)))


def run_sequence(
    experiment: Experiment, name: str, output: str | Path, **places: str
) -> pd.DataFrame:
    """Train a method on every task; a run that was stopped resumes after the last finished task.

    Args:
        experiment: what it is trained and measured on.
        name: a key of `jaxtta.continual.VARIANTS`; fine-tuning is measured as wise-ft, too.
        output: folder of all methods; this one writes to `<name>/seed<seed>`.
        **places: for the result file, such as the model's folder.

    Returns:
        Columns method, seed, step, set and value.

    Raises:
        FloatingPointError: if the loss is no longer finite.
        ValueError: if the folder has results with other settings or of other images.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown method {name!r}, expected one of {', '.join(VARIANTS)}")
    config, first, content = experiment.config, experiment.params, experiment.content
    folder, settings = Path(output) / name / f"seed{experiment.seed}", _settings(experiment, name)
    agree(folder / "settings.json", settings)
    used = None if content is None else digest_of([content[set_] for set_ in settings["data"]])
    agree_on_images(folder / "images.json", used)
    changed = continual.gnsp_kernels
    if config.first_task == "all":
        changed = continual.everything_but_logit_scale
    params, rows, done = first, [], -1
    grams: Any = {}
    if saved := restore_checkpoint(folder / "checkpoints"):
        done, arrays, rows = saved
        arrays = jax.tree.map(jnp.asarray, arrays)
        params = tree.merge(first, arrays["changed"])
        grams = flatten_dict(arrays.get("grams", {}), sep="/")
    for step in range(done + 1, len(experiment.tasks) + 1):
        if step:
            params, grams = train_task(experiment, params, step - 1, name, grams)
        measured = {name: params}
        if name == WISE_TRAINING:
            start, end = (tree.partition(weights, changed)[0] for weights in (first, params))
            average = continual.wise_ft(start, end, config.wise_share)
            measured[WISE] = tree.merge(first, average)
        for method, weights in measured.items():
            values = evaluate_tasks(experiment, weights) if step else experiment.before
            where = {"method": method, "seed": experiment.seed, "step": step}
            rows += [where | {"set": set_, "value": value} for set_, value in values.items()]
        kept = {"changed": tree.partition(params, changed)[0], "grams": grams}
        save_checkpoint(folder / "checkpoints", step, kept, rows)
    found = {"rows": rows, "settings": settings, "about": about(experiment.model, **places)}
    write_json(folder / "result.json", found)
    return pd.DataFrame(rows)


def _settings(experiment: Experiment, name: str) -> dict[str, Any]:
    """The settings that affect a method's results; unused options are left out."""
    config, method = experiment.config, VARIANTS[name]
    training = dataclasses.asdict(config) | {"warmup": config.schedule[2]}
    used, unused = [*experiment.tasks, *experiment.retention], ["workers"]
    if method.projection == "none":
        unused += ["rho", "gram_images", "task_zero"]
    if not method.uses_pairs:
        unused.append("reference_batch")
        if experiment.retention and (method.projection == "none" or not config.task_zero):
            unused.append("reference_images")
    if "reference_images" not in unused:
        used.append(experiment.reference)
    if name != WISE_TRAINING:
        unused.append("wise_share")
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
            for task in used
        },
        "training": {option: x for option, x in training.items() if option not in unused},
    }
