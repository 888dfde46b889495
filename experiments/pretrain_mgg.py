r"""Train MGTTA's meta gradient generator on a small set of images.

    python experiments/pretrain_mgg.py --layout arrays --data cifar10-c-severity5/meta_train \
        --class-names airplane automobile bird cat deer dog frog horse ship truck --output runs/mgg
    python experiments/pretrain_mgg.py --layout imagenet --data IMAGENET/val --source IMAGENET/val \
        --model openai/clip-vit-base-patch16 --output runs/mgg-vit

adapts the model to a stream of images under the four validation corruptions (none of which is in a
benchmark), two images per step, and trains the generator on the loss of the next batch after each
update. Training uses no labels. The checkpoint is selected by accuracy on held-out images with
labels, as in the paper, or by their loss without labels (--choose loss). Writes
`phi.safetensors`, the statistics of clean images' features in `statistics.safetensors`,
`training.json` and curves in `training.png`. An interrupted run resumes at the last finished
epoch.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxtta
from jaxtta import assets, cli, data, evaluate, io, metrics, optim, tree
from jaxtta.adapters import MGTTAContext
from jaxtta.data import VALIDATION
from jaxtta.models import Batch

log = logging.getLogger(__name__)
Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """Train the meta gradient generator."""

    output: Path
    """Folder for the results; created if missing."""
    data: str = str(assets.IMAGES)
    """The images: a folder, or NAME:SPLIT for tensorflow-datasets (default: the bundled images)."""
    layout: str = "folder"
    """Dataset layout, as in corruption_sweep.py."""
    class_names: tuple[str, ...] = ()
    """Class names for the prompts, in label order, or one file with them (.json, or text with one
    name per line); required with arrays."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP or supervised ViT checkpoint (default: the bundled demo model)."""
    source: str | None = None
    """Clean images of the same layout for the source statistics. Default: those of --data."""
    source_images: int = 1000
    """Maximum number of images for the source statistics."""
    corruptions: tuple[str, ...] = VALIDATION
    """Corruptions of the training images; must not be test corruptions."""
    severity: int | None = None
    """Severity, 1 to 5. Default: 5; 1 on the bundled images; fixed for arrays."""
    images: int = 128
    """Number of training images; they take the corruptions in turn."""
    held_out: int = 256
    """Held-out images for checkpoint selection, each under all corruptions; 0 for none."""
    choose: Literal["accuracy", "loss"] = "accuracy"
    """Criterion for checkpoint selection: the highest accuracy on the held-out images or, without
    labels, the lowest loss there (on the training images if none are held out)."""
    epochs: int = 40
    """Passes over the training images."""
    batch: int = 2
    """Training images per step."""
    truncation: int = 1
    """Number of updates that a step differentiates through; 1 in the paper."""
    learning_rate: float = 1e-2
    """Learning rate of Adam on the generator's weights."""
    inner_learning_rate: float = 1e-4
    """Learning rate of the generator's updates during training."""
    test_learning_rate: float = 1e-3
    """Learning rate of the generator's updates on the held-out images."""
    test_batch: int = 64
    """Held-out images per batch."""
    weight: float = 0.4
    """Weight of the discrepancy in the objective."""
    hidden: int = 8
    """Hidden size: length of each parameter's memory."""
    tower: Literal["image", "both"] = "image"
    """Tower whose normalisation parameters are adapted."""
    seed: int = 0
    """Random seed of images, order and initial weights."""
    workers: int = 1
    """Processes that prefetch batches; 0 = main process."""
    trust_data: bool = False
    """Take earlier results in the folder without checking that the stored images have not
    changed."""
    debug: bool = False
    """Show tracebacks."""


class History(NamedTuple):
    """Metrics of each epoch; unknown values are None.

    Attributes:
        loss: mean over the training batches.
        held_out_loss: mean over the held-out batches.
        accuracy: top-1 on the held-out images.
    """

    loss: list[float]
    held_out_loss: list[float | None]
    accuracy: list[float | None]


def main(options: Options) -> None:
    """Train and keep the weights of the best epoch."""
    check(options)
    model, params = jaxtta.load(options.model)
    source = open_source(options, options.data, model)
    task = evaluate.task_for(model, source.class_names, data.templates_for(options.layout))
    train, held_out = read_images(options, source)
    clean = open_clean(options, source, model)
    statistics = gather_statistics(options, clean, model, params)
    trainable = tree.normalisation_parameters(options.tower)
    classes = jaxtta.models.context_of(model, task, trainable)(params)
    context = MGTTAContext(classes, statistics.mean, statistics.std)
    run = Run(options, model, params, context)
    settings = describe(options, source, clean, evaluate.fingerprints(source, params, model, task))
    evaluate.agree(options.output / "settings.json", settings)
    content = None if options.trust_data else content_of(options, source, clean)
    evaluate.agree_on_images(options.output / "images.json", content)
    weights = {"weights": settings["found"]["weights"]}
    with io.atomic_write(options.output / "statistics.safetensors") as temporary:
        jaxtta.models.save_statistics(temporary, statistics, weights | settings["found_source"])

    state, history, done = restore(options.output, run.start())
    rng = np.random.default_rng([options.seed, 1])
    orders = [rng.permutation(len(train)) for _ in range(options.epochs)]
    before = run.judge(run.untrained, held_out, "untrained")
    with tqdm(range(done, options.epochs), initial=done, total=options.epochs, unit="epoch") as bar:
        for epoch in bar:
            state, losses = run.epoch(state, train[orders[epoch]])
            if not np.isfinite(losses).all():
                raise FloatingPointError(
                    f"the loss is no longer finite in epoch {epoch + 1}; try a lower "
                    "--inner-learning-rate"
                )
            judged = run.judge(state.phi, held_out, f"epoch {epoch + 1}")
            for figures, value in zip(history, (float(losses.mean()), *judged), strict=True):
                figures.append(value)
            if best_epoch(options, history) == epoch:
                # Before the checkpoint: a run killed in between repeats this epoch.
                about = settings | weights | {"epoch": epoch + 1}
                with io.atomic_write(options.output / "phi.safetensors") as temporary:
                    optim.save_mgg(temporary, state.phi, about)
            save(options.output, state, history, epoch + 1)
            bar.set_postfix_str(said(losses.mean(), *judged))
    best = best_epoch(options, history)
    record = {
        "settings": settings,
        "about": evaluate.about(model, data=options.data, model=options.model),
        "before": before,
        "chosen_epoch": best + 1,
        "chosen_by": options.choose,
        **history._asdict(),
    }
    io.write_json(options.output / "training.json", record)
    plot(options.output / "training.png", history, before, best)
    print(f"before training: {said(None, *before)}")
    figures = (history.loss[best], history.held_out_loss[best], history.accuracy[best])
    print(f"epoch {best + 1} of {options.epochs}, chosen by {options.choose}: {said(*figures)}")
    print(f"weights: {options.output / 'phi.safetensors'}")


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    evaluate.require_distinct(corruptions=options.corruptions)
    evaluate.require_at_least(
        images=(options.images, 2 * options.batch),
        held_out=(options.held_out, 0),
        source_images=(options.source_images, 2),
        epochs=(options.epochs, 1),
        batch=(options.batch, 1),
        test_batch=(options.test_batch, 1),
        truncation=(options.truncation, 1),
        hidden=(options.hidden, 1),
        workers=(options.workers, 0),
    )
    evaluate.require_positive(
        learning_rate=(options.learning_rate,),
        inner_learning_rate=(options.inner_learning_rate,),
        test_learning_rate=(options.test_learning_rate,),
    )
    if options.choose == "accuracy" and not options.held_out:
        raise ValueError("--choose accuracy needs --held-out images; --choose loss does not")


# --- images ---


def read_images(
    options: Options, source: data.Source
) -> tuple[np.ndarray, list[list[data.StreamBatch]]]:
    """Training images (images, size, size, 3), and held-out batches for each corruption."""
    severity = evaluate.default_severity(options.layout, options.data, options.severity)
    domains = [data.Domain(name, severity) for name in options.corruptions]
    for domain in domains:
        source.check(domain)
    wanted = options.images + options.held_out
    if wanted > len(source.labels):
        raise ValueError(
            f"{options.data}: has {len(source.labels)} images, expected at least {wanted} for "
            f"--images {options.images} and --held-out {options.held_out}"
        )
    order = np.random.default_rng(options.seed).permutation(len(source.labels))
    turns = np.arange(options.images) % len(domains)
    # As one stream, to use the same reading code as the other scripts.
    train = data.stream_of("train", domains, order[: options.images], options.seed, turns)
    others = order[options.images : wanted]
    tests = [data.stream_of(str(domain), [domain], others, options.seed) for domain in domains]
    (read,) = read_all([train], source, options.images, options.workers)
    if not read[0].mask.all():
        log.warning("%d training images could not be read", int((~read[0].mask).sum()))
    images = read[0].images[read[0].mask]
    if not options.held_out:
        return images, []
    return images, read_all(tests, source, options.test_batch, options.workers)


def read_all(
    streams: list[data.Stream], source: data.Source, size: int, workers: int
) -> list[list[data.StreamBatch]]:
    """All batches of each stream."""
    batches = data.Batches(source, tuple(streams), size)
    reader = data.read_ahead(batches, workers)
    read = list(tqdm(reader, total=len(batches), desc="reading", unit="batch"))
    return [[read[number] for number in batches.of(stream)] for stream in range(len(streams))]


def open_source(options: Options, root: str, model: jaxtta.Classifier) -> data.Source:
    """Open images in the layout of the options."""
    names = cli.class_names_of(options.class_names, options.layout, root)
    return data.open_source(options.layout, root, model.preprocessing, names)


def open_clean(options: Options, source: data.Source, model: jaxtta.Classifier) -> data.Source:
    """Open the clean images for the source statistics."""
    if options.source is not None:
        source = open_source(options, options.source, model)
    try:
        source.check(data.Domain(data.CLEAN))
    except ValueError as error:
        raise ValueError(f"{error}; set --source to clean images") from error
    return source


def gather_statistics(
    options: Options,
    source: data.Source,
    model: jaxtta.Classifier,
    params: jaxtta.models.Params,
) -> jaxtta.models.FeatureStatistics:
    """Statistics of clean images' features."""
    clean = data.Domain(data.CLEAN)
    order = np.random.default_rng(options.seed).permutation(len(source.labels))
    images = order[: options.source_images]
    stream = data.stream_of("clean", [clean], images, options.seed)
    (batches,) = read_all([stream], source, options.test_batch, options.workers)
    return jaxtta.models.feature_statistics(model, params, batches)


# --- training ---


class Run:
    """The jitted functions of a run and its initial weights."""

    def __init__(
        self,
        options: Options,
        model: jaxtta.Classifier,
        params: jaxtta.models.Params,
        context: MGTTAContext,
    ) -> None:
        """Prepare the functions; only the initial weights are computed."""
        self.options, self.params, self.context = options, params, context
        objective = jaxtta.adapters.mgtta_objective(model, options.weight)
        trainable = tree.normalisation_parameters(options.tower)
        self.first, _ = tree.partition(params, trainable)
        self.optimizer = optax.adam(options.learning_rate)
        self.untrained = optim.init_meta_gradient_generator(
            jax.random.key(options.seed), options.hidden
        )

        def loss_of(frozen: tuple[Any, Any]) -> Callable[[Any, Array], Array]:
            params, context = frozen  # arguments, so that they are not compiled in as constants

            def loss(adapted: Any, images: Array) -> Array:
                batch = Batch(images, jnp.ones(len(images), bool), jnp.arange(len(images)))
                return objective(tree.merge(params, adapted), context, batch)[0]

            return loss

        rate = options.inner_learning_rate
        self._begin = jax.jit(lambda f, *rest: optim.begin_epoch(loss_of(f), rate)(*rest))
        self._step = jax.jit(
            lambda f, *rest: optim.meta_step(loss_of(f), self.optimizer, rate)(*rest)
        )

        def adapter_of(phi: optim.MGGParams, context: MGTTAContext) -> jaxtta.Adapter:
            generator = optim.meta_gradient_generator(phi, options.test_learning_rate)
            return jaxtta.adapters.online(objective, lambda _: context, trainable, generator)

        self._init = jax.jit(lambda f, phi: adapter_of(phi, f[1]).init(f[0]))
        self._predict = jax.jit(lambda f, phi, *rest: adapter_of(phi, f[1]).step(f[0], *rest))

    def start(self) -> optim.MetaState:
        """The state before the first epoch."""
        return optim.init_meta_training(self.untrained, self.first, self.optimizer)

    def epoch(self, state: optim.MetaState, images: np.ndarray) -> tuple[optim.MetaState, Any]:
        """Train for one epoch; return the new state and the batch losses."""
        frozen, size = (self.params, self.context), self.options.batch
        batches = images[: len(images) // size * size].reshape(-1, size, *images.shape[1:])
        state, loss = self._begin(frozen, state, batches[0])
        losses = [loss[None]]
        for window in windows(batches[1:], self.options.truncation):
            state, found = self._step(frozen, state, window)
            losses.append(found)
        return state, np.concatenate(losses)

    def judge(
        self, phi: optim.MGGParams, held_out: list[list[data.StreamBatch]], name: str
    ) -> tuple[float | None, float | None]:
        """Mean loss and accuracy when adapting with these weights, reset before each corruption."""
        if not held_out:
            return None, None
        frozen = (self.params, self.context)
        losses, counts, right = [], [], []
        for batches in tqdm(held_out, desc=name, unit="corruption", leave=False):
            state = self._init(frozen, phi)
            for read in batches:
                batch = Batch(read.images, read.mask, read.index)
                state, prediction = self._predict(frozen, phi, state, batch)
                if prediction.metrics["skipped"]:
                    raise FloatingPointError(
                        f"{name}: a loss or an update on held-out images is not finite"
                    )
                losses.append(float(prediction.metrics["loss"]))
                answers = metrics.top_k(prediction.logits, read.labels)
                right.append(np.asarray(answers)[read.mask])
                counts.append(len(right[-1]))
        return float(np.average(losses, weights=counts)), float(np.concatenate(right).mean())


def windows(batches: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Split batches into windows; the last one may be smaller."""
    for first in range(0, len(batches), size):
        yield batches[first : first + size]


def best_epoch(options: Options, history: History) -> int:
    """Index of the selected epoch; the first one in case of ties."""
    if options.choose == "accuracy":
        return int(np.argmax(history.accuracy))
    losses = history.held_out_loss if options.held_out else history.loss
    return int(np.argmin(losses))


# --- files ---


def describe(options: Options, source: data.Source, clean: data.Source, found: dict) -> dict:
    """The settings that affect the result."""
    settings = dataclasses.asdict(options)
    # Paths, whose content is compared, and what changes no result.
    for name in ("output", "data", "model", "class_names", "source", "epochs"):
        del settings[name]
    for name in ("workers", "trust_data", "debug"):
        del settings[name]
    settings["found"] = found
    settings["found_source"] = {"images": evaluate.fingerprints(clean, {})["images"]}
    return json.loads(json.dumps(settings))


def content_of(options: Options, source: data.Source, clean: data.Source) -> str:
    """A digest of the stored images."""
    severity = evaluate.default_severity(options.layout, options.data, options.severity)
    domains = [data.Domain(name, severity) for name in options.corruptions]
    stored = [*data.contents_of(source, domains).values()]
    stored += data.contents_of(clean, [data.Domain(data.CLEAN)]).values()
    return evaluate.digest_of(stored)


def save(folder: Path, state: optim.MetaState, history: History, epochs: int) -> None:
    """Save a checkpoint after this many epochs."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    evaluate.save_step(folder / "checkpoints", epochs, leaves, history._asdict())


def restore(folder: Path, state: optim.MetaState) -> tuple[optim.MetaState, History, int]:
    """Restore a checkpoint: state, history and number of finished epochs."""
    saved = evaluate.restore_step(folder / "checkpoints")
    if saved is None:
        return state, History([], [], []), 0
    epochs, leaves, history = saved
    restored = [jnp.asarray(leaves[str(number)]) for number in range(len(leaves))]
    return jax.tree.unflatten(jax.tree.structure(state), restored), History(**history), epochs


def said(loss: float | None, held_out_loss: float | None, accuracy: float | None) -> str:
    """Format metrics as text."""
    parts = [
        f"loss {loss:.4f}" if loss is not None else "",
        f"held-out loss {held_out_loss:.4f}" if held_out_loss is not None else "",
        f"accuracy {100 * accuracy:.2f} %" if accuracy is not None else "",
    ]
    return ", ".join(filter(None, parts)) or "no held-out images"


def plot(
    path: Path, history: History, before: tuple[float | None, float | None], best: int
) -> None:
    """Draw losses and held-out accuracy over the epochs, and mark the selected epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = np.arange(1, len(history.loss) + 1)
    left.plot(epochs, history.loss, marker=".", label="training images")
    if before[0] is not None:
        held_out = [before[0], *history.held_out_loss]
        left.plot([0, *epochs], held_out, marker=".", label="held-out images")
        accuracy = 100 * np.array([before[1], *history.accuracy])
        right.plot([0, *epochs], accuracy, marker=".", color="#009E73")
    left.set(xlabel="epoch (0: untrained)", ylabel="loss")
    right.set(xlabel="epoch (0: untrained)", ylabel="held-out accuracy (%)")
    for axes in (left, right):
        axes.axvline(best + 1, color="0.5", linestyle=":", label="kept")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
