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
from jaxtta.data import IMAGENET_C_EXTRA
from jaxtta.models import Batch
from jaxtta.optim import EpochMetrics

log = logging.getLogger(__name__)


@group
class Options:
    """Train the meta gradient generator.

    Attributes:
        output: folder for the results.
        model: the model.
        data: the images.
        source: clean images of the same layout for the source statistics (default: --data); for
            imagenet-c, folders by wnid, such as ImageNet's val.
        source_images: at most so many images for the source statistics.
        images: training images; they take the corruptions in turn.
        val_images: validation images for the selection of the epoch, each under all corruptions; 0
            for none.
        select_by: the highest accuracy on the validation images or, without labels, the lowest loss
            there (on the training images if there are no others).
        corruptions: of training and validation images; must not be test corruptions.
        severity: 1 to 5 (default: 5; 1 on the bundled images; fixed for arrays).
        epochs: passes over the training images.
        batch: training images per step.
        truncation: updates that a step differentiates through; 1 in the paper.
        learning_rate: of Adam on the generator's weights.
        inner_learning_rate: of the generator's updates during training.
        test_learning_rate: of the generator's updates on the validation images.
        test_batch: validation images per step.
        weight: of the discrepancy in the objective.
        hidden: length of each parameter's memory.
        tower: whose normalisation parameters are adapted.
        seed: of images, order and initial weights.
        workers: processes that read images; 0 to read in the main process.
        trust_data: take earlier results without checking that the images are unchanged.
        debug: show tracebacks.
    """

    output: Path
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    source: str | None = None
    source_images: int = 1000
    images: int = 128
    val_images: int = 256
    select_by: Literal["accuracy", "loss"] = "accuracy"
    corruptions: tuple[str, ...] = IMAGENET_C_EXTRA
    severity: int | None = None
    epochs: int = 40
    batch: int = 2
    truncation: int = 1
    learning_rate: float = 1e-2
    inner_learning_rate: float = 1e-4
    test_learning_rate: float = 1e-3
    test_batch: int = 64
    weight: float = 0.4
    hidden: int = 8
    tower: Literal["image", "both"] = "image"
    seed: int = 0
    workers: int = 1
    trust_data: bool = False
    debug: bool = False


IDENTITY = (
    *("images", "val_images", "source_images", "select_by", "corruptions", "tower"),
    *("batch", "truncation", "test_batch", "weight", "hidden", "seed"),
    *("learning_rate", "inner_learning_rate", "test_learning_rate"),
)
"""Options that affect the result; of the others the content is compared. Epochs may be added."""


def run(options: Options) -> None:
    """Train, and keep the weights of the best epoch."""
    check(options)
    output, checkpoints = options.output, options.output / "checkpoints"
    model, params = options.model.load()
    benchmark, clean = options.data.open(model), open_source(options, model)
    severity = evaluate.default_severity(options.data.layout, options.data.data, options.severity)
    domains = [data.Domain(name, severity) for name in options.corruptions]
    train, val, source = read_images(options, model, benchmark, domains, clean)
    statistics = models.feature_statistics(model, params, source)
    templates = options.model.templates_for(options.data.layout)
    task = models.task_for(model, data.class_names_of(benchmark), templates)

    images = *(benchmark[domain] for domain in domains), clean[data.Domain(data.CLEAN)]
    found = evaluate.fingerprints(images[0], params, model, task)
    of_source = evaluate.fingerprints(images[-1], {})["images"]
    training = {name: getattr(options, name) for name in IDENTITY} | {"severity": severity}
    settings = {"training": training, "images": found, "source": of_source}
    evaluate.agree(output / "settings.json", settings)
    content = None if options.trust_data else evaluate.digest_of([*map(data.content_of, images)])
    evaluate.agree_on_images(output / "images.json", content)
    weights = {"weights": found["weights"]}
    path = output / "statistics.safetensors"
    models.save_statistics(path, statistics, weights | {"images": of_source})

    state, train_epoch, judge = prepare(options, model, params, task, statistics, val)
    untrained, history = state.phi, []
    if saved := evaluate.restore_checkpoint(checkpoints, state):
        state, history = saved[1], [EpochMetrics(*epoch) for epoch in saved[2]]
    before = EpochMetrics(None, *judge(untrained, "untrained"))
    rng = np.random.default_rng([options.seed, 1])
    orders = [rng.permutation(len(train)) for _ in range(options.epochs)]
    steps = optim.pretrain(train_epoch, judge, state, train, orders, history)
    with tqdm(steps, "compiling", options.epochs, unit="epoch", initial=len(history)) as bar:
        for state, history in bar:
            if optim.best_epoch(history, options.select_by) == len(history) - 1:
                # Before the checkpoint: a run killed in between repeats this epoch.
                metadata = settings | weights | {"epoch": len(history)}
                optim.save_mgg(output / "phi.safetensors", state.phi, metadata)
            evaluate.save_checkpoint(checkpoints, len(history), state, history)
            bar.set_description("training")
            bar.set_postfix_str(described(history[-1]))
    best = optim.best_epoch(history, options.select_by)
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
    selected = f"epoch {best + 1} of {len(history)}, selected by {options.select_by}"
    print(f"{selected}: {described(history[best])}\nweights: {output / 'phi.safetensors'}")


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    counts = ("epochs", "batch", "test_batch", "truncation", "hidden")
    least = dict.fromkeys(counts, 1) | {"val_images": 0, "source_images": 2, "workers": 0}
    least["images"] = 2 * options.batch
    evaluate.require_distinct(corruptions=options.corruptions)
    evaluate.require_at_least(
        **{name: (getattr(options, name), count) for name, count in least.items()},
        max_images=(options.data.max_images, 1),
    )
    rates = ("learning_rate", "inner_learning_rate", "test_learning_rate")
    evaluate.require_at_least(**{name: (getattr(options, name), 0) for name in rates})
    if options.select_by == "accuracy" and not options.val_images:
        raise ValueError("--select-by accuracy needs --val-images; --select-by loss does not")


def open_source(options: Options, model: Any) -> data.Benchmark:
    """Open the images for the source statistics."""
    images, source = options.data, options.source
    if source and images.layout == "imagenet-c" and not (Path(source) / data.CLEAN).is_dir():
        images = dataclasses.replace(images, layout="imagenet")
    return images.open(model, source)


def read_images(
    options: Options,
    model: Any,
    benchmark: data.Benchmark,
    domains: list[data.Domain],
    clean: data.Benchmark,
) -> tuple[np.ndarray, list[list[tuple[Batch, np.ndarray]]], list[data.StreamBatch]]:
    """Training images, batches and labels of validation images, and batches of clean images."""
    seed, clean_domain = options.seed, data.Domain(data.CLEAN)
    data.select(benchmark, domains)
    try:
        data.select(clean, [clean_domain])
    except ValueError as error:
        raise ValueError(f"{error}; set --source to clean images") from error
    order = np.random.default_rng(seed).permutation(len(data.labels_of(benchmark)))
    order, wanted = order[: options.data.max_images], options.images + options.val_images
    if wanted > len(order):
        raise ValueError(
            f"{options.data.data}: has {len(order)} images, expected at least {wanted} for "
            f"--images {options.images} and --val-images {options.val_images}"
        )

    def read(benchmark: data.Benchmark, *streams: data.Stream) -> list[list[data.StreamBatch]]:
        batches = data.Batches(benchmark, streams, options.test_batch, model.preprocessing)
        reader = data.read_ahead(batches, options.workers)
        found = list(tqdm(reader, "reading", len(batches), unit="batch"))
        return [[found[number] for number in batches.of(n)] for n in range(len(streams))]

    turns, others = np.arange(options.images) % len(domains), order[options.images : wanted]
    streams = [data.stream_of("train", domains, order[: options.images], seed, turns)]
    streams += [data.stream_of(str(each), [each], others, seed) for each in domains if len(others)]
    train, *val = read(benchmark, *streams)
    images = np.concatenate([batch.images[batch.mask] for batch in train])
    if len(images) < options.images:
        log.warning("%d training images could not be read", options.images - len(images))
    if len(images) < 2 * options.batch:
        raise ValueError(
            f"{options.data.data}: {len(images)} training images can be read, expected at least "
            f"two batches of --batch {options.batch}"
        )
    if not all(any(batch.mask.any() for batch in part) for part in val):
        raise ValueError(f"{options.data.data}: none of the validation images can be read")
    order = np.random.default_rng(seed).permutation(len(data.labels_of(clean)))
    stream = data.stream_of("clean", [clean_domain], order[: options.source_images], seed)
    [source] = read(clean, stream)
    pairs = [[(Batch(b.images, b.mask, b.index), b.labels) for b in part] for part in val]
    return images, pairs, source


def prepare(
    options: Options,
    model: Any,
    params: models.Params,
    task: Any,
    statistics: models.FeatureStatistics,
    val: list,
) -> tuple[optim.MetaState, Any, Any]:
    """The state before training, what trains for an epoch, and what measures weights."""
    objective = adapters.mgtta_objective(model, options.weight)
    trainable = tree.normalisation_parameters(options.tower)
    classes = models.context_of(model, task, trainable)(params)
    frozen = params, adapters.MGTTAContext(classes, statistics.mean, statistics.std)

    def loss_of(frozen: Any, adapted: Any, images: jax.Array) -> jax.Array:
        params, context = frozen
        batch = Batch(images, jnp.ones(len(images), bool), jnp.arange(len(images)))
        return objective(tree.merge(params, adapted), context, batch)[0]

    def adapter_of(frozen: Any, phi: optim.MGGParams) -> adapters.Adapter:
        generator = optim.meta_gradient_generator(phi, options.test_learning_rate)
        return adapters.online(objective, lambda _: frozen[1], trainable, generator)

    adapted, _ = tree.partition(params, trainable)
    untrained = optim.init_meta_gradient_generator(jax.random.key(options.seed), options.hidden)
    optimizer, rate = optax.adam(options.learning_rate), options.inner_learning_rate
    state = optim.init_meta_training(untrained, adapted, optimizer)
    sizes = options.batch, options.truncation
    train_epoch = optim.make_train_epoch(loss_of, frozen, optimizer, rate, *sizes)
    return state, train_epoch, optim.make_judge(adapter_of, frozen, metrics.top_k, val)


def described(epoch: EpochMetrics) -> str:
    """Metrics as text."""
    texts = {
        "loss {:.4f}": epoch.loss,
        "validation loss {:.4f}": epoch.val_loss,
        "accuracy {:.2f} %": epoch.accuracy and 100 * epoch.accuracy,
    }
    found = [text.format(value) for text, value in texts.items() if value is not None]
    return ", ".join(found) or "no validation images"


def plot(history: Sequence[EpochMetrics], before: EpochMetrics, best: int) -> Figure:
    """Losses and validation accuracy over the epochs, with the selected epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    rows = np.array([before, *history], float)  # missing values are NaN
    left, right = figure.subplots(1, 2)
    left.plot(rows[:, :2], marker=".", label=["training images", "validation images"])
    right.plot(100 * rows[:, 2], marker=".", color="#009E73")
    for axes, name in ((left, "loss"), (right, "validation accuracy (%)")):
        axes.axvline(best + 1, color="0.5", linestyle=":", label="selected")
        axes.set(xlabel="epoch (0: untrained)", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    return figure
