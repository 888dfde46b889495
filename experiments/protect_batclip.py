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

import functools
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from matplotlib.figure import Figure

from jaxtta import adapters, cli, continual, data, evaluate, io, models, optim, tree
from jaxtta.cli.options import DataOptions, ModelOptions, group


@group
class Options:
    """Adapt with and without protection, and measure accuracy on clean images."""

    output: Path  # folder for the results; a run that was stopped goes on where it was
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    corruptions: tuple[str, ...] = ("gaussian_noise", "defocus_blur", "fog")  # adapted to, each
    severity: int | None = None  # 1 to 5; default: 5, or 1 on the bundled images
    ranks: tuple[int, ...] = (16, 64, 256)  # numbers of protected directions to compare
    protect_images: int = 256  # clean images from which the directions are computed
    batch_size: int = 100  # images per batch
    learning_rate: float | None = None  # use AdamW with this rate instead of the preset
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"  # the paper's settings
    seeds: tuple[int, ...] = (1,)  # of the order, the corruptions and the protected images
    workers: int = 1  # processes that decode and corrupt images; 0 for none
    trust_data: bool = False  # take earlier results without checking the images
    debug: bool = False  # show tracebacks


def main(options: Options) -> None:
    """Adapt, test, and report."""
    given, size, kept = options.data, options.batch_size, options.protect_images
    evaluate.require_distinct(
        corruptions=options.corruptions, ranks=options.ranks, seeds=options.seeds
    )
    evaluate.require_positive(learning_rate=(options.learning_rate,))
    least = {"protect_images": (kept, 1), "batch_size": (size, 1), "workers": (options.workers, 0)}
    least |= {"ranks": (min(options.ranks), 1), "seeds": (min(options.seeds), 0)}
    least |= {"severity": (options.severity, 1), "max_images": (given.max_images, 1)}
    evaluate.require_at_least(**least)
    if options.severity is not None and given.layout == "arrays":
        raise ValueError("--layout arrays has a fixed severity, omit --severity")
    if max(options.ranks) > kept:
        raise ValueError(f"--ranks has {max(options.ranks)}, above the {kept} --protect-images")
    model, params = options.model.load()
    if model.feature_shape is None:
        raise ValueError(f"{options.model.model}: is a ResNet, expected a vision transformer")
    benchmark, clean = given.open(model), data.Domain(data.CLEAN)
    count = len(data.labels_of(benchmark))
    if kept > count - 2:
        raise ValueError(f"--protect-images is {kept}, expected at most {count - 2} of {count}")
    severity = evaluate.default_severity(given.layout, given.data, options.severity)
    data.select(benchmark, [clean, *(data.Domain(name, severity) for name in options.corruptions)])
    templates = options.model.templates_for(given.layout)
    task = evaluate.task_for(model, data.class_names_of(benchmark), templates)
    start, _ = tree.partition(params, tree.normalisation_parameters("both"))
    context, logits = (params, model.prompts(task)), functools.partial(forward, model)
    settings = {name: getattr(options, name) for name in ("preset", "learning_rate")}
    settings |= {"layout": given.layout, "protect_images": kept}
    rows = []
    for seed in options.seeds:
        numbers = np.random.default_rng(seed).permutation(count)
        protected, others = np.split(numbers, [kept])
        halves = [others[first::2][: given.max_images] for first in (0, 1)]
        parts = tuple(np.stack([np.full_like(x, k), x], 1) for k, x in enumerate(halves))
        streams = [
            data.Stream(name, seed, (data.Domain(name, severity), clean), parts)
            for name in options.corruptions
        ]
        shown = (data.stream_of("protected", [clean], protected, seed),)
        batches = data.Batches(benchmark, shown, size, model.preprocessing)
        read = [batch.images[batch.mask] for batch in data.read_ahead(batches, options.workers)]
        images = np.concatenate(read)
        basis = continual.output_gradient_basis(logits, context, start, images, max(options.ranks))

        steps = math.ceil(len(halves[0]) / size)
        protect = functools.partial(protected_batclip, options, basis, steps)
        functools.update_wrapper(protect, protected_batclip)  # its source identifies results
        specs = [evaluate.parse_adapter("zero_shot")] + [
            evaluate.AdapterSpec(f"batclip, {rank} directions", "protect", {"rank": rank}, protect)
            for rank in (0, *options.ranks)
        ]
        spec = evaluate.Spec(benchmark, streams, task, size, None, "", settings, templates)
        how = {"workers": options.workers, "trust_data": options.trust_data}
        for found in evaluate.sweep(spec, specs, model, params, options.output, **how):
            shares = (found.segment(k).query("seen").top1.mean() for k in (0, 1))
            rows.append((found.adapter, found.stream, seed, *shares))
    columns = ["adapter", "corruption", "seed", "adapting", "clean after"]
    write_results(options.output, pd.DataFrame(rows, columns=columns))


@functools.partial(jax.jit, static_argnums=0)
def forward(model: models.CLIP, context: tuple, adapted: Any, images: jax.Array) -> jax.Array:
    """Logits of images, with adapted parameters merged in."""
    params, prompts = context
    return model(tree.merge(params, adapted), prompts, images).logits


def protected_batclip(
    options: Options, basis: Any, steps: int, model: models.CLIP, task: models.Task, rank: int
) -> adapters.Adapter:
    """BATCLIP that keeps `rank` directions of the basis, and its state after so many steps."""
    optimizer = adapters.BATCLIP_PRESETS[options.preset].optimizer()
    if options.learning_rate:
        optimizer = optax.adamw(options.learning_rate, weight_decay=1e-2)
    if rank:
        directions = jax.tree.map(lambda leaf: leaf[:rank], basis)
        optimizer = optax.chain(optimizer, optim.project_out(directions))
    return freeze_after(adapters.batclip(model, task, optimizer=optimizer), steps)


def freeze_after(adapter: adapters.Adapter, steps: int) -> adapters.Adapter:
    """Keep an adapter's state after so many steps."""

    def init(params: models.Params, key: Any = None) -> Any:
        return jnp.zeros((), jnp.int32), adapter.init(params, key)

    def step(params: models.Params, state: Any, batch: models.Batch) -> Any:
        count, before = state
        after, prediction = adapter.step(params, before, batch)
        kept = jax.tree.map(lambda new, old: jnp.where(count < steps, new, old), after, before)
        return (count + 1, kept), prediction

    return adapters.Adapter(init, step)


def write_results(output: Path, rows: pd.DataFrame) -> None:
    """Print, write and draw each adapter's accuracy on the corruptions and on clean images."""
    columns = ["adapting", "clean after"]
    table = 100 * rows.groupby(["adapter", "corruption"], sort=False)[columns].mean()
    means = table.groupby("adapter", sort=False).mean()
    parts = table.unstack(sort=False), means.add_prefix("mean ")
    text = "\n\n".join(part.to_string(float_format="{:.2f}".format) for part in parts)
    io.write_text(output / "table.txt", text + "\n")
    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, mean in means.iterrows():
        axes.plot(*mean, "o", label=name)
    axes.plot(*means.iloc[1:].to_numpy().T, color="grey", linewidth=0.8, zorder=0)
    axes.set_xlabel("accuracy on the corruption, while adapting (%)")
    axes.set_ylabel("accuracy on clean images, afterwards (%)")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(output / "clean.png", dpi=150)
    print(f"accuracy in %, mean over {rows.seed.nunique()} seeds\n\n{text}\n\nresults: {output}")


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
