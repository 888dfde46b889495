r"""Does protecting clean predictions preserve BATCLIP's accuracy on clean images?

    python experiments/protect_batclip.py --output runs/protected
    python experiments/protect_batclip.py --output runs/protected --layout arrays --data FOLDER \
        --class-names airplane automobile bird cat deer dog frog horse ship truck

BATCLIP adapts online to one corruption and is then tested on clean images without a reset, beside
BATCLIP whose updates are orthogonal to the directions that would change the predictions on some
clean images. The images adapted to, the clean test images (--max-images each) and those are
disjoint; labels only measure accuracy.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxtta import adapters, cli, continual, data, evaluate, models, optim, report, tree
from jaxtta.cli.options import DataOptions, ModelOptions, group


@group
class Options:
    """Adapt with and without protection, and measure accuracy on clean images."""

    output: Path  # folder for the results; a run that was stopped goes on where it was
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    corruptions: tuple[str, ...] = ("gaussian_noise", "defocus_blur", "fog")  # adapted to, each
    ranks: tuple[int, ...] = (16, 64, 256)  # numbers of protected directions to compare
    protect_images: int = 256  # clean images from which the directions are computed
    batch_size: int = 100  # images per batch
    learning_rate: float = 1e-3  # of AdamW; 5e-4 is the paper's for ImageNet-C
    seeds: tuple[int, ...] = (1,)  # of the order, the corruptions and the protected images
    workers: int = 1  # threads or processes that read images; 0 for one thread


def main(options: Options) -> None:
    """Adapt, test, and report."""
    layout, size, workers = options.data.layout, options.batch_size, options.workers
    clean, (model, params) = data.Domain(data.CLEAN), options.model.load()
    benchmark = options.data.open(model)
    severity = evaluate.default_severity(layout, options.data.data)
    shifts = [data.Domain(name, severity) for name in options.corruptions]
    templates = options.model.templates_for(layout)
    task = evaluate.task_for(model, data.class_names_of(benchmark), templates)
    context = params, model.prompts(task)
    start, _ = tree.partition(params, tree.normalisation_parameters("both"))
    settings = {name: getattr(options, name) for name in ("learning_rate", "protect_images")}

    def logits(context: Any, adapted: Any, images: jax.Array) -> jax.Array:
        params, prompts = context
        return model(tree.merge(params, adapted), prompts, images).logits

    results = []
    for seed in options.seeds:
        numbers = np.random.default_rng(seed).permutation(len(data.labels_of(benchmark)))
        protected, others = np.split(numbers, [options.protect_images])
        halves = [others[first::2][: options.data.max_images] for first in (0, 1)]
        parts = tuple(np.stack([np.full_like(x, k), x], 1) for k, x in enumerate(halves))
        streams = [data.Stream(shift.corruption, seed, (shift, clean), parts) for shift in shifts]
        shown = (data.stream_of("protected", [clean], protected, seed),)
        read = data.read_ahead(data.Batches(benchmark, shown, size, model.preprocessing), workers)
        images = np.concatenate([batch.images[batch.mask] for batch in read])
        basis = continual.output_gradient_basis(logits, context, start, images, max(options.ranks))
        make = functools.partial(protect, options.learning_rate, basis, len(halves[0]))
        specs = [evaluate.parse_adapter("zero_shot")] + [
            evaluate.AdapterSpec(f"batclip, {rank} directions", "protect", {"rank": rank}, make)
            for rank in (0, *options.ranks)
        ]
        spec = evaluate.Spec(benchmark, streams, task, size, None, "", settings, templates)
        results += evaluate.sweep(spec, specs, model, params, options.output, workers=workers)
    report.write_report(results, options.output, "protected directions; clean is afterwards")


def protect(
    learning_rate: float, basis: Any, images: int, model: models.CLIP, task: models.Task, rank: int
) -> adapters.Adapter:
    """BATCLIP that keeps `rank` directions of a basis, and its state after so many images."""
    directions = jax.tree.map(lambda leaf: leaf[:rank], basis)
    adamw = optax.adamw(learning_rate, weight_decay=1e-2)
    optimizer = optax.chain(adamw, optim.project_out(directions))
    batclip = adapters.batclip(model, task, optimizer=optimizer)

    def step(params: models.Params, state: Any, batch: models.Batch) -> Any:
        after, prediction = batclip.step(params, state, batch)
        return optax.tree.where(batch.index[0] < images, after, state), prediction

    return batclip._replace(step=step)


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
