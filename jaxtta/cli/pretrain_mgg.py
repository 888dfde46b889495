r"""Train MGTTA's meta gradient generator on a small set of images.

    jaxtta pretrain-mgg --layout arrays --data cifar10-c-severity5/meta_train --output runs/phi \
        --class-names airplane automobile bird cat deer dog frog horse ship truck

adapts the model to a stream of images under the four corruptions that are in no benchmark, and
trains the generator, without labels, on the loss of the next batch after each update. The epoch is
selected by accuracy on labelled validation images, as in the paper, or by their loss. Writes
`phi.safetensors`, `statistics.safetensors` and `training.json`; a stopped run resumes.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import pandas as pd
from tqdm import tqdm

from jaxtta import adapters, data, evaluate, io, metrics, models, optim, tree
from jaxtta.cli.options import DataOptions, ModelOptions, group
from jaxtta.data import IMAGENET_C_EXTRA
from jaxtta.optim import EpochMetrics


@group
class Options:
    """Train the meta gradient generator."""

    output: Path  # folder for the results, or its URL (gs://, s3://)
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    source: str | None = None  # clean images for the source statistics (default: --data)
    source_images: int = 1000  # at most so many images for the source statistics
    images: int = 128  # training images; they take the corruptions in turn
    val_images: int = 256  # validation images, each under all corruptions; 0 for none
    select_by: Literal["accuracy", "loss"] = "accuracy"  # on the validation images, if any
    corruptions: tuple[str, ...] = IMAGENET_C_EXTRA  # must not be test corruptions
    severity: int | None = None  # 1 to 5 (default: 5; 1 on the bundled images; fixed for arrays)
    epochs: int = 40  # passes over the training images
    batch: int = 2  # training images per step
    truncation: int = 1  # updates that a step differentiates through; 1 in the paper
    learning_rate: float = 1e-2  # of Adam on the generator's weights
    inner_learning_rate: float = 1e-4  # of the generator's updates during training
    test_learning_rate: float = 1e-3  # of the generator's updates on the validation images
    test_batch: int = 64  # validation images per step
    weight: float = 0.4  # of the discrepancy in the objective
    hidden: int = 8  # length of each parameter's memory
    tower: Literal["image", "both"] = "image"  # whose normalisation parameters are adapted
    seed: int = 0  # of images, order and initial weights
    # threads that decode files, or processes that corrupt images; 0 for one thread
    workers: int = 1
    trust_data: bool = False  # take earlier results without checking that images are unchanged


IDENTITY = (
    *("images", "val_images", "source_images", "select_by", "corruptions", "tower"),
    *("batch", "truncation", "test_batch", "weight", "hidden", "seed"),
    *("learning_rate", "inner_learning_rate", "test_learning_rate"),
)
"""Options that affect the result; of the others the content is compared. Epochs may be added."""


def run(options: Options) -> None:
    """Train, and keep the weights of the best epoch."""
    evaluate.require_distinct(corruptions=options.corruptions)
    least = dict.fromkeys(("epochs", "batch", "test_batch", "truncation", "hidden"), 1)
    rates = ("learning_rate", "inner_learning_rate", "test_learning_rate")
    least |= dict.fromkeys(rates, 0) | {
        "val_images": int(options.select_by == "accuracy"),
        "images": 2 * options.batch,
    }
    evaluate.require_at_least(**{name: (getattr(options, name), n) for name, n in least.items()})
    output, checkpoints = options.output, options.output / "checkpoints"
    model, params = options.model.load()
    given, source = options.data, options.source
    benchmark = given.open(model)
    if source and given.layout == "imagenet-c" and not Path(source, data.CLEAN).is_dir():
        given = dataclasses.replace(given, layout="imagenet")  # folders by wnid, too
    clean = given.open(model, source)
    severity = evaluate.default_severity(options.data.layout, options.data.data, options.severity)
    domains = [data.Domain(name, severity) for name in options.corruptions]
    train, val, shown = read_images(options, model, benchmark, domains, clean)
    statistics = models.feature_statistics(model, params, shown)
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

    trainable = tree.normalisation_parameters(options.tower)
    how = (trainable, options.weight, options.test_learning_rate)
    loss_of, adapter_of, frozen = adapters.mgtta_training(model, task, params, statistics, *how)
    untrained = optim.init_meta_gradient_generator(jax.random.key(options.seed), options.hidden)
    adapted, optimizer = tree.partition(params, trainable)[0], optax.adam(options.learning_rate)
    state = optim.init_meta_training(untrained, adapted, optimizer)
    sizes = options.inner_learning_rate, options.batch, options.truncation
    train_epoch = optim.make_train_epoch(loss_of, frozen, optimizer, *sizes)
    judge = optim.make_judge(adapter_of, frozen, metrics.top_k, val)
    before, history = EpochMetrics(None, *judge(state.phi, "untrained")), []
    if saved := evaluate.restore_checkpoint(checkpoints, state):
        state, history = saved[1], [EpochMetrics(*epoch) for epoch in saved[2]]
    rng = np.random.default_rng([options.seed, 1])
    orders = [rng.permutation(len(train)) for _ in range(options.epochs)]
    steps = optim.pretrain(train_epoch, judge, state, train, orders, history)
    with tqdm(steps, "training", options.epochs, unit="epoch", initial=len(history)) as bar:
        for state, history in bar:
            if optim.best_epoch(history, options.select_by) == len(history) - 1:
                # Before the checkpoint: a run killed in between repeats this epoch.
                metadata = settings | weights | {"epoch": len(history)}
                optim.save_mgg(output / "phi.safetensors", state.phi, metadata)
            evaluate.save_checkpoint(checkpoints, len(history), state, history)
            bar.set_postfix(history[-1]._asdict())
    best = optim.best_epoch(history, options.select_by)
    record = {
        "settings": settings,
        "about": evaluate.about(model, data=options.data.data, model=options.model.model),
        "before": before._asdict(),
        "selected_epoch": best + 1,
        "epochs": [epoch._asdict() for epoch in history],
    }
    io.write_json(output / "training.json", record)
    print(f"{output} has the weights of epoch {best + 1}, selected by {options.select_by}")
    print(
        pd.DataFrame([before, history[best]], ["untrained", f"epoch {best + 1}"]).to_string(
            na_rep="–"
        )
    )


def read_images(
    options: Options, model: Any, benchmark: data.Benchmark, domains: list, clean: data.Benchmark
) -> tuple[np.ndarray, list[list[tuple[models.Batch, np.ndarray]]], list[data.StreamBatch]]:
    """Training images, batches and labels of validation images, and batches of clean images."""
    seed, clean_domain, count = options.seed, data.Domain(data.CLEAN), options.images
    data.select(benchmark, domains)
    data.select(clean, [clean_domain])
    order = np.random.default_rng(seed).permutation(len(data.labels_of(benchmark)))
    order, wanted = order[: options.data.max_images], count + options.val_images
    if wanted > len(order):
        raise ValueError(f"{len(order)} images are fewer than --images and --val-images, {wanted}")

    def read(benchmark: data.Benchmark, *streams: data.Stream) -> list[list[data.StreamBatch]]:
        batches = data.Batches(benchmark, streams, options.test_batch, model.preprocessing)
        reader = data.read_ahead(batches, options.workers)
        found = list(tqdm(reader, "reading", len(batches), unit="batch"))
        return [[found[number] for number in batches.of(n)] for n in range(len(streams))]

    turns, others = np.arange(count) % len(domains), order[count:wanted]
    streams = [data.stream_of("train", domains, order[:count], seed, turns)]
    streams += [data.stream_of(str(each), [each], others, seed) for each in domains if len(others)]
    train, *val = read(benchmark, *streams)
    images = np.concatenate([batch.images[batch.mask] for batch in train])
    if len(images) < count:
        print(f"{count - len(images)} training images could not be read", file=sys.stderr)
    if len(images) < 2 * options.batch:
        raise ValueError(f"{len(images)} training images can be read, fewer than two batches")
    order = np.random.default_rng(seed).permutation(len(data.labels_of(clean)))
    stream = data.stream_of("clean", [clean_domain], order[: options.source_images], seed)
    pairs = [[(models.Batch(b.images, b.mask, b.index), b.labels) for b in part] for part in val]
    return images, pairs, read(clean, stream)[0]
