r"""Does protecting clean predictions preserve BATCLIP's accuracy on clean images?

    python experiments/protect_batclip.py --output runs/protected
    python experiments/protect_batclip.py --output runs/protected --layout arrays --data FOLDER \
        --class-names airplane automobile bird cat deer dog frog horse ship truck

BATCLIP adapts online to one corruption and is then tested on clean images without a reset. It is
compared with BATCLIP whose updates are projected to be orthogonal to the directions that would
change the predictions on some clean images (`jaxtta.optim.project_out`), for several numbers of
directions. The images adapted to, the clean test images (--max-images each) and the
protected images are disjoint. Labels are used only to measure accuracy.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure

from jaxtta import adapters, cli, continual, data, evaluate, io, models, optim, tree
from jaxtta.cli.options import DataOptions, ModelOptions, group

CLEAN = data.Domain(data.CLEAN)


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
    workers: int = 1  # processes that decode and corrupt images; 0 for none
    debug: bool = False  # show tracebacks


def main(options: Options) -> None:
    """Adapt, test, and report."""
    given, size, kept = options.data, options.batch_size, options.protect_images
    chosen = {name: getattr(options, name) for name in ("corruptions", "ranks", "seeds")}
    evaluate.require_distinct(**chosen)
    least = {"protect_images": (kept, 1), "batch_size": (size, 1), "workers": (options.workers, 0)}
    least |= {"ranks": (min(options.ranks), 1), "seeds": (min(options.seeds), 0)}
    evaluate.require_at_least(max_images=(given.max_images, 1), **least)
    if max(options.ranks) > kept:
        raise ValueError(f"--ranks has {max(options.ranks)}, above the {kept} --protect-images")
    model, params = options.model.load()
    if model.feature_shape is None:
        raise ValueError(f"{options.model.model}: is a ResNet, expected a vision transformer")
    benchmark = given.open(model)
    count = len(data.labels_of(benchmark))
    if kept > count - 2:
        raise ValueError(f"--protect-images is {kept}, expected at most {count - 2} of {count}")
    severity = evaluate.default_severity(given.layout, given.data)
    shifts = [data.Domain(name, severity) for name in options.corruptions]
    data.select(benchmark, [CLEAN, *shifts])
    templates = options.model.templates_for(given.layout)
    task = evaluate.task_for(model, data.class_names_of(benchmark), templates)
    start, _ = tree.partition(params, tree.normalisation_parameters("both"))
    settings = {name: getattr(options, name) for name in ("learning_rate", "protect_images")}

    def logits(context: Any, adapted: Any, images: jax.Array) -> jax.Array:
        params, prompts = context
        return model(tree.merge(params, adapted), prompts, images).logits

    rows = []
    for seed in options.seeds:
        numbers = np.random.default_rng(seed).permutation(count)
        protected, others = np.split(numbers, [kept])
        halves = [others[first::2][: given.max_images] for first in (0, 1)]
        parts = tuple(np.stack([np.full_like(x, k), x], 1) for k, x in enumerate(halves))
        streams = [data.Stream(shift.corruption, seed, (shift, CLEAN), parts) for shift in shifts]
        shown = (data.stream_of("protected", [CLEAN], protected, seed),)
        batches = data.Batches(benchmark, shown, size, model.preprocessing)
        read = [batch.images[batch.mask] for batch in data.read_ahead(batches, options.workers)]
        context, images = (params, model.prompts(task)), np.concatenate(read)
        basis = continual.output_gradient_basis(logits, context, start, images, max(options.ranks))

        protect = protection(options.learning_rate, basis, math.ceil(len(halves[0]) / size))
        specs = [evaluate.parse_adapter("zero_shot")] + [
            evaluate.AdapterSpec(f"batclip, {rank} directions", "protect", {"rank": rank}, protect)
            for rank in (0, *options.ranks)
        ]
        spec = evaluate.Spec(benchmark, streams, task, size, None, "", settings, templates)
        workers, output = options.workers, options.output
        for found in evaluate.sweep(spec, specs, model, params, output, workers=workers):
            shares = (found.segment(k).query("seen").top1.mean() for k in (0, 1))
            rows.append((found.adapter, found.stream, seed, *shares))
    columns = ["adapter", "corruption", "seed", "adapting", "clean after"]
    write_results(options.output, pd.DataFrame(rows, columns=columns))


def protection(learning_rate: float, basis: Any, steps: int) -> Callable[..., adapters.Adapter]:
    """Make BATCLIP that keeps `rank` directions of a basis, and its state after so many steps."""

    def protect(model: models.CLIP, task: models.Task, rank: int) -> adapters.Adapter:
        optimizer = optax.adamw(learning_rate, weight_decay=1e-2)
        if rank:
            directions = jax.tree.map(lambda leaf: leaf[:rank], basis)
            optimizer = optax.chain(optimizer, optim.project_out(directions))
        batclip = adapters.batclip(model, task, optimizer=optimizer)

        def init(params: models.Params, key: Any = None) -> Any:
            return jnp.zeros((), jnp.int32), batclip.init(params, key)

        def step(params: models.Params, state: Any, batch: models.Batch) -> Any:
            count, before = state
            after, prediction = batclip.step(params, before, batch)
            return (count + 1, optax.tree.where(count < steps, after, before)), prediction

        return adapters.Adapter(init, step)

    return protect


def write_results(output: Path, rows: pd.DataFrame) -> None:
    """Print, write and draw each adapter's accuracy on the corruptions and on clean images."""
    columns = ["adapting", "clean after"]
    table = 100 * rows.groupby(["adapter", "corruption"], sort=False)[columns].mean()
    means = table.groupby("adapter", sort=False).mean()
    parts = table.unstack(sort=False), means.add_prefix("mean ")
    text = "\n\n".join(part.to_string(float_format="{:.2f}".format) for part in parts)
    io.write_text(output / "table.txt", text + "\n")
    axes = Figure(figsize=(5.6, 4.2), layout="constrained").subplots()
    for name, mean in means.iterrows():
        axes.plot(*mean, "o", label=name)
    axes.set_xlabel("accuracy on the corruption, while adapting (%)")
    axes.set_ylabel("accuracy on clean images, afterwards (%)")
    axes.legend(frameon=False)
    axes.figure.savefig(output / "clean.png", dpi=150)
    print(f"accuracy in %, mean over {rows.seed.nunique()} seeds\n\n{text}\n\nresults: {output}")


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
