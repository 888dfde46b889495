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
from jaxtta.continual import VARIANTS, Grams, ReferenceBatch, TrainingConfig
from jaxtta.data.tasks import TaskData
from jaxtta.evaluate.checkpoint import restore_checkpoint, save_checkpoint
from jaxtta.evaluate.provenance import about, fingerprints, model_settings
from jaxtta.evaluate.store import agree, agree_on_images
from jaxtta.io import write_json

Params = models.Params
Texts = Mapping[str, np.ndarray]
"""Class embeddings (classes, projection) by set."""
WISE, WISE_TRAINING = "wise-ft", "fine-tuning"
"""WiSE-FT averages the weights before and after fine-tuning, and is measured in the same run."""
GRAM_BATCH = 16


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
        content: digest of the stored images; None to trust earlier results.
        drawn: indices of the reference images of this seed.
        shown: the classes of these images.
        classes: class prompts of every set; of the reference, those of the classes shown.
    """

    model: models.CLIP
    params: Params
    tasks: Sequence[TaskData]
    retention: Sequence[TaskData]
    reference: TaskData
    config: TrainingConfig
    seed: int = 1
    content: str | None = None

    def __post_init__(self) -> None:
        """Validate the settings, and draw the reference images."""
        continual.check_tower(self.model)
        sets, images = [*self.tasks, *self.retention, self.reference], self.reference.test
        names = [*(task.name for task in sets), *metrics.ALIGNMENT]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name} is used twice, rename the task")
        order = np.random.default_rng(self.seed).permutation(len(images.labels))
        self.drawn = order[: self.config.reference_images]
        self.shown = np.unique(images.labels[self.drawn])
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

    def texts(self, params: Params) -> Texts:
        """Class embeddings by set."""
        prompts = {name: self.model.prompts(task) for name, task in self.classes.items()}
        embed = functools.partial(continual.embed_classes, self.model, params)
        return {name: np.asarray(embed(packed)) for name, packed in prompts.items()}

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

    @functools.cached_property
    def pairs(self) -> ReferenceBatch:
        """Reference pairs in memory, with the initial model's embeddings."""
        batches = [*self.read(self.reference.test, self.drawn, "reference")]
        teacher, labels = continual.embed_images(self.model, self.params, batches)
        labels, name = np.searchsorted(self.shown, labels), self.reference.name
        images = np.concatenate([batch.images[batch.mask] for batch in batches])
        captions, texts = self.classes[name].token_ids[labels, 0], self.texts(self.params)[name]
        return ReferenceBatch(images, captions, labels, teacher, texts[labels])

    @functools.cached_property
    def before(self) -> dict[str, float]:
        """The figures of the initial model."""
        return evaluate_tasks(self, self.params, self.texts(self.params))


def train_task(
    experiment: Experiment, params: Params, number: int, name: str, texts: Texts, grams: Grams
) -> tuple[Params, Grams]:
    """Train on one task.

    Args:
        experiment: the tasks and the training settings.
        params: the parameters before the task.
        number: index of the task.
        name: of the method, a key of `jaxtta.continual.VARIANTS`.
        texts: class embeddings by set with these parameters.
        grams: sums of Gram matrices, as the previous call returned them.

    Returns:
        The parameters after the task, and the sums of what it was to preserve.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    config, model, method = experiment.config, experiment.model, VARIANTS[name]
    seed, task = experiment.seed, experiment.tasks[number]
    if task.train is None:
        raise ValueError(f"{task.name} has no training images")
    if method.projection != "none" and (number or config.task_zero):
        earlier = experiment.tasks[number - 1] if number else experiment.reference
        images, numbers = earlier.test, experiment.drawn
        if number and earlier.train is not None:
            rng, images = np.random.default_rng([seed, number - 1, 1]), earlier.train
            numbers = rng.permutation(len(images.labels))[: config.gram_images]
        desc = f"{name} seed {seed}: Gram matrices of {earlier.name}"
        batches = experiment.read(images, numbers, desc, GRAM_BATCH)
        key = jax.random.fold_in(jax.random.key(seed), 999 + number)
        found = continual.augmented_grams(model, params, batches, key)
        grams = continual.combine_grams(grams, found)
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
    images, wanted = len(task.train.labels), config.iterations * config.batch_size
    epochs = [rng.permutation(images) for _ in range(-(-wanted // images))]
    desc = f"{name} seed {seed}: {task.name}"
    batches = experiment.read(task.train, np.concatenate(epochs)[:wanted], desc)
    key = jax.random.fold_in(jax.random.key(seed), number)
    inputs = model, config, method, params, trainable, batches, classes, pairs, grams
    try:
        return continual.train(*inputs, rng=rng, key=key), grams
    except FloatingPointError as error:
        advice = "try a lower --learning-rate and another --output"
        raise FloatingPointError(f"{desc}: {error}; {advice}") from error


def evaluate_tasks(experiment: Experiment, params: Params, texts: Texts) -> dict[str, float]:
    """Accuracy on every task and retention set; modality gap and retrieval.

    Args:
        experiment: the sets.
        params: the parameters.
        texts: class embeddings by set with these parameters.

    Returns:
        Figures by set. Gap and retrieval are of all retention sets, or of the reference pairs.
    """
    figures, parts, config = {}, [], experiment.config
    for task in (*experiment.tasks, *experiment.retention):
        numbers = np.random.default_rng(0).permutation(len(task.test.labels))[: config.max_images]
        batches = experiment.read(task.test, numbers, f"testing {task.name}")
        images, labels = continual.embed_images(experiment.model, params, batches)
        figures[task.name] = float(metrics.top_k(images @ texts[task.name].T, labels).mean())
        if task.train is None:
            parts.append((images, texts[task.name][labels], labels))
    if not parts:
        numbers = experiment.drawn
        batches = experiment.read(experiment.reference.test, numbers, "testing the reference")
        images, labels = continual.embed_images(experiment.model, params, batches)
        labels = np.searchsorted(experiment.shown, labels)
        parts.append((images, texts[experiment.reference.name][labels], labels))
    return figures | metrics.image_text_alignment(*map(np.concatenate, zip(*parts, strict=True)))


def run_sequence(experiment: Experiment, name: str, output: Path, **places: str) -> pd.DataFrame:
    """Train a method on every task; a run that was stopped resumes after the last finished task.

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
    config, first, seed = experiment.config, experiment.params, experiment.seed
    folder, settings = output / name / f"seed{seed}", _settings(experiment, name)
    agree(folder / "settings.json", settings)
    agree_on_images(folder / "images.json", experiment.content)
    changed = continual.gnsp_kernels
    if config.first_task == "all":
        changed = continual.everything_but_logit_scale
    params, grams, rows, done = first, {}, [], -1
    if saved := restore_checkpoint(folder / "checkpoints"):
        done, arrays, rows = saved
        params = tree.merge(first, arrays["changed"])
        stored = flatten_dict(arrays.get("grams", {}), sep="/")
        grams = {path: jnp.asarray(gram) for path, gram in stored.items()}
    for step in range(done + 1, len(experiment.tasks) + 1):
        if step:
            texts = experiment.texts(params)
            params, grams = train_task(experiment, params, step - 1, name, texts, grams)
        measured = {name: params}
        if name == WISE_TRAINING:
            start, end = (tree.partition(weights, changed)[0] for weights in (first, params))
            average = continual.wise_ft(start, end, config.wise_share)
            measured[WISE] = tree.merge(first, average)
        for method, weights in measured.items():
            values = experiment.before
            if step:
                values = evaluate_tasks(experiment, weights, experiment.texts(weights))
            where = {"method": method, "seed": seed, "step": step}
            rows += [where | {"set": set_, "value": value} for set_, value in values.items()]
        kept = {"changed": tree.partition(params, changed)[0], "grams": grams}
        save_checkpoint(folder / "checkpoints", step, kept, rows)
    found = {"rows": rows, "settings": settings, "about": about(experiment.model, **places)}
    write_json(folder / "result.json", found)
    return pd.DataFrame(rows)


def _settings(experiment: Experiment, name: str) -> dict[str, Any]:
    """The settings that affect a method's results; unused options are left out."""
    config, method = experiment.config, VARIANTS[name]
    projects, uses_pairs = method.projection != "none", method.uses_pairs
    uses_reference = uses_pairs or (projects and config.task_zero) or not experiment.retention
    reference = [experiment.reference] if uses_reference else []
    used = {
        **dict.fromkeys(("rho", "gram_images", "task_zero"), projects),
        **{"reference_images": uses_reference, "reference_batch": uses_pairs},
        **{"wise_share": name == WISE_TRAINING, "workers": False},
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
            for task in (*experiment.tasks, *experiment.retention, *reference)
        },
        "training": {option: x for option, x in training.items() if used.get(option, True)},
    }
