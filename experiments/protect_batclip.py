r"""Does protecting clean predictions preserve BATCLIP's accuracy on clean images?

    python experiments/protect_batclip.py --output runs/protected
    python experiments/protect_batclip.py --output runs/protected --layout arrays --data FOLDER \
        --class-names airplane automobile bird cat deer dog frog horse ship truck

BATCLIP adapts online to one corruption and is then tested on clean images without a reset. It is
compared with BATCLIP whose updates are projected to be orthogonal to the directions that would
change the predictions on some clean images (`jaxtta.optim.project_out`), for several numbers of
directions. The images adapted to, the clean test images and the protected images are disjoint.
Labels are used only to measure accuracy.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import jaxtta
from jaxtta import assets, cli, continual, data, evaluate, io, metrics, report, tree
from jaxtta.adapters import BATCLIP_PRESETS
from jaxtta.models import Batch
from jaxtta.optim import project_out

Array = jax.Array
LEFT_OUT = (
    *("output", "corruptions", "seeds", "workers", "trust_data", "debug"),
    *("data", "model", "class_names"),  # paths; fingerprints of the content are compared
)
"""Options that do not change the results of a run, or select the runs."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Adapt with and without protection, and measure accuracy on clean images."""

    output: Path
    """Folder for the results; created if missing."""
    layout: str = "folder"
    """Dataset layout, as in corruption_sweep.py."""
    data: str = str(assets.IMAGES)
    """The images, clean and corrupted (default: the bundled images, corrupted on the fly)."""
    class_names: tuple[str, ...] = ()
    """Class names for the prompts, in label order, or one file with them (.json, or text with one
    name per line); required with arrays."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP checkpoint (default: the bundled demo model)."""
    corruptions: tuple[str, ...] = ("gaussian_noise", "defocus_blur", "fog")
    """Corruptions to adapt to; the adapter is reset before each."""
    severity: int | None = None
    """Severity, 1 to 5. Default: 5; 1 on the bundled images; fixed for arrays."""
    ranks: tuple[int, ...] = (16, 64, 256)
    """Numbers of protected directions to compare."""
    protecting: int = 256
    """Clean images from which the directions are computed. One half of the other images is adapted
    to, the other half is the clean test set."""
    batch_size: int = 100
    """Images per batch."""
    learning_rate: float | None = None
    """Use AdamW with this learning rate instead of the preset."""
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    """Optimiser settings of the paper."""
    limit: int | None = None
    """Use at most this many images to adapt to, and as many clean test images."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the order, of corruptions made on the fly and of the choice of protected images."""
    workers: int = 1
    """Processes that decode and corrupt images; 0 = main process."""
    trust_data: bool = False
    """Take earlier results in the folder without checking that the stored images have not
    changed."""
    debug: bool = False
    """Show tracebacks."""


class Row(NamedTuple):
    """Result of one adaptation run.

    Attributes:
        corruption: the corruption adapted to.
        seed: the run's seed.
        rank: number of protected directions; 0 for none, -1 for no adaptation.
        online: accuracy on the corrupted images while adapting.
        clean: accuracy on the clean images afterwards.
    """

    corruption: str
    seed: int
    rank: int
    online: float
    clean: float


def main(options: Options) -> None:
    """Adapt, test, and report."""
    check(options)
    model, params = jaxtta.models.load_clip(options.model)
    if model.feature_shape is None:
        raise ValueError(
            f"{options.model}: is a ResNet, expected a vision transformer, whose LayerNorms are "
            "protected"
        )
    names = cli.class_names_of(options.class_names, options.layout, options.data)
    source = data.open_source(options.layout, options.data, model.preprocessing, names)
    if options.protecting > len(source.labels) - 2:
        raise ValueError(
            f"--protecting is {options.protecting}, expected at least two less than the "
            f"{len(source.labels)} images, so that some are left to adapt to and to test on"
        )
    for corruption in options.corruptions:
        source.check(domain_of(options, corruption))
    templates = data.templates_for(options.layout)
    task = jaxtta.zero_shot_task(model, source.class_names, templates)
    settings = {name: value for name, value in vars(options).items() if name not in LEFT_OUT}
    settings |= evaluate.fingerprints(source, params, model, task)
    settings["severity"] = severity_of(options)
    evaluate.agree(options.output / "settings.json", json.loads(json.dumps(settings)))
    domains = [data.Domain(data.CLEAN), *(domain_of(options, c) for c in options.corruptions)]
    stored = dict.fromkeys(domains) if options.trust_data else data.contents_of(source, domains)
    for domain, content in stored.items():
        evaluate.agree_on_images(options.output / f"images-{domain}.json", content)
    saved = options.output / "rows.json"
    rows = [Row(*row) for row in json.loads(saved.read_text())] if saved.exists() else []
    for seed in options.seeds:
        for corruption in options.corruptions:
            if not any(row[:2] == (corruption, seed) for row in rows):
                rows += measure(options, model, params, task, source, corruption, seed)
                io.write_json(saved, rows)
    about = evaluate.about(model, data=options.data, model=options.model)
    io.write_json(options.output / "about.json", about)
    write_results(options, [row for row in rows if row.seed in options.seeds])


@functools.partial(jax.jit, static_argnums=0)
def forward(
    model: jaxtta.models.CLIP,
    context: tuple[jaxtta.models.Params, jaxtta.models.Prompts],
    adapted: Any,
    images: Array,
) -> Array:
    """Logits of images, with adapted parameters merged in."""
    params, prompts = context
    return model(tree.merge(params, adapted), prompts, images).logits


def measure(
    options: Options,
    model: jaxtta.models.CLIP,
    params: jaxtta.models.Params,
    task: jaxtta.models.Task,
    source: data.Source,
    corruption: str,
    seed: int,
) -> list[Row]:
    """Adapt to a corruption without and with protection."""
    numbers = np.random.default_rng(seed).permutation(len(source.labels))
    shown, others = np.split(numbers, [options.protecting])
    clean = read(options, source, data.CLEAN, others[1::2][: options.limit], seed)
    stream = read(options, source, corruption, others[::2][: options.limit], seed)
    context, logits = (params, model.prompts(task)), functools.partial(forward, model)

    def accuracy(adapted: Any, batches: list[data.StreamBatch]) -> float:
        return share(answered(logits(context, adapted, batch.images), batch) for batch in batches)

    start, _ = tree.partition(params, tree.normalisation_parameters("both"))
    batches = read(options, source, data.CLEAN, shown, seed)
    images = np.concatenate([batch.images[batch.mask] for batch in batches])
    basis = continual.output_gradient_basis(logits, context, start, images, max(options.ranks))
    rows = [Row(corruption, seed, -1, accuracy(start, stream), accuracy(start, clean))]
    for rank in (0, *options.ranks):
        optimizer = BATCLIP_PRESETS[options.preset].optimizer()
        if options.learning_rate:
            optimizer = optax.adamw(options.learning_rate, weight_decay=1e-2)
        if rank:
            kept = jax.tree.map(lambda x, rank=rank: x[:rank], basis)
            optimizer = optax.chain(optimizer, project_out(kept))
        adapter = jaxtta.adapters.batclip(model, task, optimizer=optimizer)
        state, step, right = adapter.init(params), jax.jit(adapter.step, donate_argnums=1), []
        doing = f"{corruption}, {rank} directions"
        bar = tqdm(stream, desc=f"{doing}: compiling batclip", leave=False)
        for batch in bar:
            state, prediction = step(params, state, Batch(batch.images, batch.mask, batch.index))
            right.append(answered(prediction.logits, batch))
            if len(right) == 1:
                bar.unpause()  # the time to compile says nothing of the time left
                bar.set_description(doing)
        rows.append(Row(corruption, seed, rank, share(right), accuracy(state.adapted, clean)))
    return rows


def read(
    options: Options, source: data.Source, corruption: str, numbers: np.ndarray, seed: int
) -> list[data.StreamBatch]:
    """Batches of images under a corruption, in this order."""
    stream = data.stream_of(corruption, [domain_of(options, corruption)], numbers, seed)
    batches = data.Batches(source, (stream,), options.batch_size)
    reader = data.read_ahead(batches, options.workers)
    return list(tqdm(reader, total=len(batches), desc=f"reading {corruption}", leave=False))


def domain_of(options: Options, corruption: str) -> data.Domain:
    """The domain of a corruption at the given severity."""
    return data.Domain(corruption, 0 if corruption == data.CLEAN else severity_of(options))


def severity_of(options: Options) -> int:
    """The given severity, or the default for the data."""
    return evaluate.default_severity(options.layout, options.data, options.severity)


def answered(logits: Array, batch: data.StreamBatch) -> np.ndarray:
    """Whether each readable image is classified correctly."""
    return np.asarray(metrics.top_k(logits, batch.labels))[batch.mask]


def share(right: Iterable[np.ndarray]) -> float:
    """Fraction of all images."""
    return float(np.concatenate(list(right)).mean())


def write_results(options: Options, rows: list[Row]) -> None:
    """Print and draw each adapter's accuracy on the corruptions and on clean images."""
    ranks = [-1, 0, *options.ranks]
    names = ["zero-shot", "BATCLIP", *(f"{rank} directions" for rank in options.ranks)]
    lines = [["adapter", *(f"{c} / clean after" for c in options.corruptions), "mean"]]
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    means = []
    for rank, name in zip(ranks, names, strict=True):
        pairs = np.array(
            [
                np.mean([row[3:] for row in rows if (row.corruption, row.rank) == (c, rank)], 0)
                for c in options.corruptions
            ]
        )
        means.append(100 * pairs.mean(0))
        cells = ["{:.2f} / {:.2f}".format(*pair) for pair in [*(100 * pairs), means[-1]]]
        lines.append([name, *cells])
        axes.plot(*means[-1], "o", label=name)
    axes.plot(*np.transpose(means[1:]), color="grey", linewidth=0.8, zorder=0)
    axes.set_xlabel("accuracy on the corruption, while adapting (%)")
    axes.set_ylabel("accuracy on clean images, afterwards (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    text = "\n".join(report.aligned(lines))
    io.write_text(options.output / "table.txt", text + "\n")
    figure.savefig(options.output / "clean.png", dpi=150)
    print(f"accuracy in %, mean over {len(options.seeds)} seeds\n\n{text}\n")
    print(f"results: {options.output}")


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    evaluate.require_distinct(
        corruptions=options.corruptions, ranks=options.ranks, seeds=options.seeds
    )
    evaluate.require_positive(learning_rate=(options.learning_rate,))
    evaluate.require_at_least(
        seeds=(min(options.seeds), 0),
        batch_size=(options.batch_size, 1),
        protecting=(options.protecting, 1),
        ranks=(min(options.ranks), 1),
        severity=(options.severity, 1),
        limit=(options.limit, 1),
        workers=(options.workers, 0),
    )
    if options.severity is not None and options.layout == "arrays":
        raise ValueError("--layout arrays has a fixed severity, omit --severity")
    if max(options.ranks) > options.protecting:
        raise ValueError(
            f"--ranks has {max(options.ranks)}, expected at most the --protecting "
            f"{options.protecting} images"
        )


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
