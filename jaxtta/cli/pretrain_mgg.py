r"""Train MGTTA's meta gradient generator on a small set of images.

    jaxtta pretrain-mgg --layout arrays --data cifar10-c-severity5/meta_train \
        --class-names airplane automobile bird cat deer dog frog horse ship truck --output runs/mgg
    jaxtta pretrain-mgg --layout imagenet --data IMAGENET/val \
        --model openai/clip-vit-base-patch16 --output runs/mgg-vit

adapts the model to a stream of images under the four corruptions that are in no benchmark, two
images per step, and trains the generator on the loss of the next batch after each update. Training
uses no labels. The epoch is selected by accuracy on validation images with labels, as in the paper,
or by their loss without labels (--select-by loss). Writes `phi.safetensors`, the statistics of
clean images' features in `statistics.safetensors`, `training.json` and curves in `training.png`. A
run that was stopped resumes after the last finished epoch.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

from jaxtta import adapters, data, evaluate, io, metrics, models, optim, tree
from jaxtta.cli.options import DataOptions, ModelOptions, group
from jaxtta.models import Batch
from jaxtta.optim import EpochMetrics

log = logging.getLogger(__name__)


@group
class Training:
    """Meta-training.

    Attributes:
        images: training images; they take the corruptions in turn.
        val_images: validation images for the selection of the epoch, each under all corruptions; 0
            for none.
        select_by: the highest accuracy on the validation images or, without labels, the lowest loss
            there (on the training images if there are no others).
        corruptions: of training and validation images; must not be test corruptions.
        severity: 1 to 5 (default: 5; 1 on the bundled images; fixed for arrays).
        epochs: passes over the training images.
        batch_size: training images per step.
        truncation: updates that a step differentiates through; 1 in the paper.
        learning_rate: of Adam on the generator's weights.
        inner_learning_rate: of the generator's updates during training.
        val_learning_rate: of the generator's updates on the validation images.
        val_batch_size: validation images per step.
        weight: of the discrepancy in the objective.
        hidden: length of each parameter's memory.
        tower: whose normalisation parameters are adapted.
        source_images: images for the source statistics, at most.
        seed: of images, order and initial weights.
    """

    images: int = 128
    val_images: int = 256
    select_by: Literal["accuracy", "loss"] = "accuracy"
    corruptions: tuple[str, ...] = data.IMAGENET_C_EXTRA
    severity: int | None = None
    epochs: int = 40
    batch_size: int = 2
    truncation: int = 1
    learning_rate: float = 1e-2
    inner_learning_rate: float = 1e-4
    val_learning_rate: float = 1e-3
    val_batch_size: int = 64
    weight: float = 0.4
    hidden: int = 8
    tower: Literal["image", "both"] = "image"
    source_images: int = 1000
    seed: int = 0


@group
class Options:
    """Train the meta gradient generator.

    Attributes:
        output: folder for the results.
        model: the model.
        data: the images.
        source: clean images of the same layout for the source statistics (default: --data).
        training: meta-training.
        workers: processes that read images; 0 to read in the main process.
        trust_data: take earlier results without checking that the images are unchanged.
        debug: show tracebacks.
    """

    output: Path
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    source: str | None = None
    training: Training = Training()
    workers: int = 1
    trust_data: bool = False
    debug: bool = False


def run(options: Options) -> None:
    """Train, and keep the weights of the best epoch."""
    check(options)
    given, output = options.training, options.output
    model, params = options.model.load()
    benchmark, clean = options.data.open(model), options.data.open(model, options.source)
    severity = evaluate.default_severity(options.data.layout, options.data.data, given.severity)
    domains = [data.Domain(name, severity) for name in given.corruptions]
    train, val = read_images(options, model, benchmark, domains)
    statistics = gather_statistics(options, model, params, clean)
    templates = options.model.templates_for(options.data.layout)
    task = models.task_for(model, data.class_names_of(benchmark), templates)

    source = clean[data.Domain(data.CLEAN)]
    settings = {
        "training": dataclasses.asdict(given) | {"epochs": None},  # more may follow
        "images": evaluate.fingerprints(benchmark[domains[0]], params, model, task),
        "source": evaluate.fingerprints(source, {})["images"],
    }
    evaluate.agree(output / "settings.json", settings)
    stored = [data.content_of(images) for images in (*map(benchmark.get, domains), source)]
    content = None if options.trust_data else evaluate.digest_of(stored)
    evaluate.agree_on_images(output / "images.json", content)
    about, checkpoints = {"weights": settings["images"]["weights"]}, output / "checkpoints"
    metadata = about | {"images": settings["source"]}
    models.save_statistics(output / "statistics.safetensors", statistics, metadata)

    context = adapters.MGTTAContext(
        models.context_of(model, task, tree.normalisation_parameters(given.tower))(params),
        statistics.mean,
        statistics.std,
    )
    state, train_epoch, judge = prepare(given, model, params, context, val)
    untrained, history, saved = state.phi, [], evaluate.restore_checkpoint(checkpoints, state)
    if saved:
        state, history = saved[1], [EpochMetrics(*epoch) for epoch in saved[2]]
    before = EpochMetrics(None, *judge(untrained, "untrained"))
    rng = np.random.default_rng([given.seed, 1])
    orders = [rng.permutation(len(train)) for _ in range(given.epochs)]
    steps = optim.pretrain(train_epoch, judge, state, train, orders, history)
    with tqdm(steps, "compiling", given.epochs, unit="epoch", initial=len(history)) as bar:
        for state, history in bar:
            if optim.best_epoch(history, given.select_by) == len(history) - 1:
                # Before the checkpoint: a run killed in between repeats this epoch.
                metadata = settings | about | {"epoch": len(history)}
                optim.save_mgg(output / "phi.safetensors", state.phi, metadata)
            evaluate.save_checkpoint(checkpoints, len(history), state, history)
            bar.set_description("training")
            bar.set_postfix_str(described(history[-1]))
    best = optim.best_epoch(history, given.select_by)
    record = {
        "settings": settings,
        "about": evaluate.about(model, data=options.data.data, model=options.model.model),
        "before": before._asdict(),
        "selected_epoch": best + 1,
        "epochs": [epoch._asdict() for epoch in history],
    }
    io.write_json(output / "training.json", record)
    plot(history, before, best).savefig(output / "training.png", dpi=150)
    print(f"before training: {described(before)}")
    selected = f"epoch {best + 1} of {given.epochs}, selected by {given.select_by}"
    print(f"{selected}: {described(history[best])}\nweights: {output / 'phi.safetensors'}")


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    given = options.training
    evaluate.require_distinct(corruptions=given.corruptions)
    counts = ("epochs", "batch_size", "val_batch_size", "truncation", "hidden")
    least = dict.fromkeys(counts, 1) | {"val_images": 0, "source_images": 2}
    least["images"] = 2 * given.batch_size
    evaluate.require_at_least(
        **{name: (getattr(given, name), count) for name, count in least.items()},
        max_images=(options.data.max_images, 1),
        workers=(options.workers, 0),
    )
    rates = ("learning_rate", "inner_learning_rate", "val_learning_rate")
    evaluate.require_positive(**{name: (getattr(given, name),) for name in rates})
    if given.select_by == "accuracy" and not given.val_images:
        raise ValueError("--select-by accuracy needs --val-images; --select-by loss does not")


Streams = list[list[data.StreamBatch]]


def read(
    options: Options, model: Any, benchmark: data.Benchmark, streams: list[data.Stream], size: int
) -> Streams:
    """All batches of each stream."""
    batches = data.Batches(benchmark, tuple(streams), size, model.preprocessing)
    reader = data.read_ahead(batches, options.workers)
    found = list(tqdm(reader, "reading", len(batches), unit="batch"))
    return [[found[number] for number in batches.of(stream)] for stream in range(len(streams))]


def read_images(
    options: Options, model: Any, benchmark: data.Benchmark, domains: list[data.Domain]
) -> tuple[np.ndarray, Streams]:
    """Training images (images, size, size, 3), and validation batches for each corruption."""
    data.select(benchmark, domains)
    given, available = options.training, len(data.labels_of(benchmark))
    wanted = given.images + given.val_images
    if wanted > available:
        raise ValueError(
            f"{options.data.data}: has {available} images, expected at least {wanted} for "
            f"--images {given.images} and --val-images {given.val_images}"
        )
    order = np.random.default_rng(given.seed).permutation(available)[:wanted]
    train, val = order[: given.images], order[given.images :]
    turns = np.arange(given.images) % len(domains)
    stream = data.stream_of("train", domains, train, given.seed, turns)
    ((batch,),) = read(options, model, benchmark, [stream], given.images)
    if not batch.mask.all():
        log.warning("%d training images could not be read", int((~batch.mask).sum()))
    streams = [data.stream_of(str(domain), [domain], val, given.seed) for domain in domains]
    streams = streams if given.val_images else []
    return batch.images[batch.mask], read(options, model, benchmark, streams, given.val_batch_size)


def gather_statistics(
    options: Options, model: Any, params: Any, benchmark: data.Benchmark
) -> models.FeatureStatistics:
    """Statistics of clean images' features."""
    given, clean = options.training, data.Domain(data.CLEAN)
    try:
        data.select(benchmark, [clean])
    except ValueError as error:
        raise ValueError(f"{error}; set --source to clean images") from error
    order = np.random.default_rng(given.seed).permutation(len(data.labels_of(benchmark)))
    stream = data.stream_of("clean", [clean], order[: given.source_images], given.seed)
    (batches,) = read(options, model, benchmark, [stream], given.val_batch_size)
    return models.feature_statistics(model, params, batches)


def prepare(
    given: Training, model: Any, params: Any, context: adapters.MGTTAContext, val: Streams
) -> tuple[optim.MetaState, Any, Any]:
    """The state before training, what trains for an epoch, and what judges the weights."""
    objective = adapters.mgtta_objective(model, given.weight)
    trainable = tree.normalisation_parameters(given.tower)
    frozen = params, context

    def loss_of(frozen: Any, adapted: Any, images: jax.Array) -> jax.Array:
        params, context = frozen
        batch = Batch(images, jnp.ones(len(images), bool), jnp.arange(len(images)))
        return objective(tree.merge(params, adapted), context, batch)[0]

    def adapter_of(phi: optim.MGGParams, context: adapters.MGTTAContext) -> adapters.Adapter:
        generator = optim.meta_gradient_generator(phi, given.val_learning_rate)
        return adapters.online(objective, lambda _: context, trainable, generator)

    @jax.jit
    def init(frozen: Any, phi: optim.MGGParams) -> Any:
        return adapter_of(phi, frozen[1]).init(frozen[0])

    @jax.jit
    def step(frozen: Any, phi: optim.MGGParams, state: Any, batch: Batch, labels: Any) -> Any:
        state, prediction = adapter_of(phi, frozen[1]).step(frozen[0], state, batch)
        correct = metrics.top_k(prediction.logits, labels)
        return state, (prediction.metrics["loss"], correct, prediction.metrics["skipped"])

    def judge(phi: optim.MGGParams, name: str) -> tuple[float | None, float | None]:
        def predict(state: Any, read: data.StreamBatch) -> Any:
            return step(frozen, phi, state, Batch(read.images, read.mask, read.index), read.labels)

        bar = tqdm(val, name, unit="corruption", leave=False)
        return optim.judge(lambda: init(frozen, phi), predict, bar, name) if val else (None, None)

    first, _ = tree.partition(params, trainable)
    untrained = optim.init_meta_gradient_generator(jax.random.key(given.seed), given.hidden)
    optimizer, rate = optax.adam(given.learning_rate), given.inner_learning_rate
    state = optim.init_meta_training(untrained, first, optimizer)
    sizes = given.batch_size, given.truncation
    return state, optim.make_train_epoch(loss_of, frozen, optimizer, rate, *sizes), judge


def described(epoch: EpochMetrics) -> str:
    """Metrics as text."""
    parts = [
        "" if epoch.loss is None else f"loss {epoch.loss:.4f}",
        "" if epoch.val_loss is None else f"validation loss {epoch.val_loss:.4f}",
        "" if epoch.accuracy is None else f"accuracy {100 * epoch.accuracy:.2f} %",
    ]
    return ", ".join(filter(None, parts)) or "no validation images"


def plot(history: Sequence[EpochMetrics], before: EpochMetrics, best: int) -> Figure:
    """Losses and validation accuracy over the epochs, with the selected epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = np.array([before, *history], float)  # missing values are NaN
    left.plot(rows[:, 0], marker=".", label="training images")
    if before.accuracy is not None:
        left.plot(rows[:, 1], marker=".", label="validation images")
        right.plot(100 * rows[:, 2], marker=".", color="#009E73")
    left.set(xlabel="epoch (0: untrained)", ylabel="loss")
    right.set(xlabel="epoch (0: untrained)", ylabel="validation accuracy (%)")
    for axes in (left, right):
        axes.axvline(best + 1, color="0.5", linestyle=":", label="selected")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    return figure
