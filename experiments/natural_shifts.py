r"""How much does adaptation gain on natural distribution shifts?

    python experiments/natural_shifts.py --limit 200 --tnt.scale 0.5 1 --output runs/natural

runs zero-shot CLIP and TNT on bundled CIFAR-10 images with the bundled demo model, with crops of at
least half an image, since smaller crops of 32 pixels show little. On the usual datasets, with the
settings of TNT's paper:

    python experiments/natural_shifts.py --model openai/clip-vit-base-patch16 \
        --datasets imagenet-a=DATA/imagenet-a imagenet-v2=DATA/imagenet-v2 \
        imagenet-r=DATA/imagenet-r imagenet-sketch=DATA/sketch objectnet=DATA/objectnet \
        --batch-size 16 --tnt.images-per-map 16 --checkpoint-every 20 --output runs/natural
    # the ten cross-dataset sets, in the folders that prompt-learning benchmarks use
    python experiments/natural_shifts.py --model openai/clip-vit-base-patch16 --output runs/cross \
        --datasets caltech101=DATA oxford-pets=DATA stanford-cars=DATA oxford-flowers=DATA \
        food101=DATA fgvc-aircraft=DATA sun397=DATA dtd=DATA eurosat=DATA ucf101=DATA
    # your own images in class folders, under any other name
    python experiments/natural_shifts.py --datasets shop=FOLDER warehouse=FOLDER --output runs/own

Every dataset has its own folder in the output and is computed once: several machines can each run
some datasets, and the same command with all folders present writes the report. TNT adapts to single
images; the other adapters take one step per batch. Images that cannot be read are left out, named
and counted; the exit code is 0 then too, and 1 if a dataset has none that can be read.
"""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import jax.numpy as jnp

import jaxtta
from jaxtta import assets, cli, data, evaluate, report
from jaxtta.adapters import TNTConfig

LAYOUTS = {
    **dict.fromkeys(("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch"), "imagenet"),
    **{name: name for name in ("imagenet-v2", "objectnet", *data.TEMPLATES)},
}
"""Layouts of the known datasets; all others are class folders."""
PHOTO = "a photo of a {}."


@dataclasses.dataclass(frozen=True)
class Options:
    """A sweep of adapters over datasets."""

    output: Path
    """Folder for the results; created if missing."""
    datasets: tuple[str, ...] = ()
    """Datasets as NAME=FOLDER. Known names: imagenet, imagenet-a, -r, -sketch, -v2, objectnet and
    the ten cross-dataset sets (caltech101, oxford-pets, stanford-cars, oxford-flowers, food101,
    fgvc-aircraft, sun397, dtd, eurosat, ucf101); any other name means class folders. Default: the
    bundled CIFAR-10 images."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP, SigLIP or supervised ViT checkpoint (default: the demo model)."""
    adapters: tuple[str, ...] = ("zero_shot", "tnt")
    """Adapters to run: zero_shot, tent, batclip, tnt (or tnt-3, with three steps), mgtta, and
    mgtta-sgd and mgtta-adam with other optimisers for the same objective. A learning rate can be
    appended to a name: tent@1e-4."""
    tnt: TNTConfig = dataclasses.field(default_factory=TNTConfig)
    """TNT's settings."""
    mgtta: evaluate.MGTTAConfig = dataclasses.field(default_factory=evaluate.MGTTAConfig)
    """MGTTA's settings. The default files are for the bundled demo model."""
    canvas: int | None = None
    """Size in pixels to which TNT's full-size images are zero-padded; larger images are shrunk
    first. Default: the largest side in a sample of each dataset, at most 512."""
    save_examples: int = 0
    """Number of images to draw whose prediction TNT fixed or broke."""
    templates: tuple[str, ...] = (PHOTO,)
    """Prompt templates; several are averaged. "usual" = the dataset's usual template, "imagenet" =
    CLIP's 80 templates."""
    order: Literal["shuffled", "stored", "correlated", "dirichlet"] = "shuffled"
    """Order of the images in a stream. correlated: sorted by class; dirichlet: Dirichlet-imbalanced
    over time."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the order and of TNT's views; one run per seed."""
    limit: int | None = None
    """Use at most this many images of each dataset, sampled with the seed."""
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "imagenet-c"
    """Optimiser settings of TENT and BATCLIP from the papers."""
    learning_rate: float | None = None
    """Use this learning rate instead of the preset: TENT with SGD and momentum, BATCLIP with AdamW,
    MGTTA with the optimiser in the adapter's name."""
    batch_size: int = 50
    """Images per batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products."""
    workers: int = 1
    """Processes that decode images; 0 = main process."""
    checkpoint_every: int | None = None
    """Batches between two checkpoints within a dataset; interrupted runs resume there."""
    save_predictions: bool = False
    """Save an .npz with per-image predictions for every dataset."""
    trust_data: bool = False
    """Take earlier results in the folder without checking that the stored images have not changed
    (by their bytes; from 512 MB on by sizes and times, which a copy may change)."""
    debug: bool = False
    """Show tracebacks."""


def main(options: Options) -> None:
    """Run every dataset and report."""
    places = check(options)
    model, params = jaxtta.load(options.model, compute_dtype=jnp.dtype(options.compute_dtype))
    sources = {name: open_dataset(name, root, model) for name, root in places.items()}
    cells, samples, examples = [], {}, []
    for number, (name, source) in enumerate(sources.items()):
        print(f"{name}: {len(source.labels)} images, {len(source.class_names)} classes")
        wanted = -(-(options.save_examples - len(examples)) // (len(sources) - number))
        found = run_dataset(options, name, places[name], source, model, params, wanted)
        cells += found[0]
        samples |= found[1]
        examples += found[2]
    title = f"{Path(options.model).name} on {', '.join(places)}"
    report.conclude(cells, options.output, title, samples, examples)


def check(options: Options) -> dict[str, str]:
    """Raise a ValueError for invalid options; return each dataset's folder."""
    evaluate.check_adapters(options.adapters)
    evaluate.require_distinct(
        adapters=options.adapters, seeds=options.seeds, templates=options.templates
    )
    evaluate.require_at_least(
        seeds=(min(options.seeds), 0),
        batch_size=(options.batch_size, 1),
        workers=(options.workers, 0),
        checkpoint_every=(options.checkpoint_every, 1),
        canvas=(options.canvas, 1),
        save_examples=(options.save_examples, 0),
    )
    evaluate.require_positive(learning_rate=(options.learning_rate,))
    if options.save_examples:
        report.check_examples(options.adapters, options.tnt)
    places: dict[str, str] = {}
    for text in options.datasets:
        name, equals, root = text.partition("=")
        if not (equals and root and re.fullmatch(r"\w[\w.-]*", name)) or name == data.CLEAN:
            raise ValueError(
                f"--datasets has {text!r}, expected NAME=FOLDER, such as imagenet-a=DATA/imagenet-a"
            )
        if name in places:
            raise ValueError(f"--datasets names {name} twice")
        places[name] = root
    return places or {"cifar10": str(assets.IMAGES)}


def open_dataset(name: str, root: str, model: jaxtta.Classifier) -> data.Source:
    """Open a dataset; its images form one domain, named after it."""
    return data.Named(
        data.open_source(LAYOUTS.get(name, "folder"), root, model.preprocessing), name
    )


def run_dataset(
    options: Options,
    name: str,
    root: str,
    source: data.Source,
    model: jaxtta.models.CLIP,
    params: jaxtta.models.Params,
    wanted: int,
) -> tuple[list[evaluate.Cell], dict, list[report.Example]]:
    """Run all adapters on one dataset; return its cells, a sample image and some examples."""
    templates = tuple(
        template
        for given in options.templates
        for template in {
            "usual": data.templates_for(LAYOUTS.get(name, "folder")),
            "imagenet": data.imagenet_templates(),
        }.get(given, (given,))
    )
    task = evaluate.task_for(model, source.class_names, templates)
    streams = tuple(
        stream
        for seed in options.seeds
        for stream in data.make_streams(
            *("reset_each_shift", (name,), (0,), source.labels),
            order=options.order,
            seed=seed,
            limit=options.limit,
        )
    )
    cutting = tuple(filter(evaluate.is_tnt, options.adapters))
    canvas = (
        (options.canvas or data.canvas_for(source, streams[0].segments[0])) if cutting else None
    )
    batches = data.Batches(source, streams, options.batch_size, canvas)
    settings = {
        name: getattr(options, name)
        for name in ("batch_size", "compute_dtype", "order", "limit", "preset")
    }
    setup = evaluate.AdapterConfig(options.preset, options.tnt, options.mgtta)
    rates = {
        adapter: options.learning_rate if evaluate.has_rate(adapter) else None
        for adapter in options.adapters
    }
    found = evaluate.fingerprints(source, params, model, task)
    evaluate.check_mgtta_files(options.adapters, options.mgtta, found["weights"])
    results = evaluate.Results(
        options.output / name,
        settings | {"templates": templates} | found,
        evaluate.about(model, data=root, model=options.model),
        {a: evaluate.own_settings(a, setup, rates[a], canvas) for a in options.adapters},
    )
    cells = evaluate.run(
        {a: evaluate.make_adapter(a, model, task, setup, rates[a]) for a in options.adapters},
        params,
        batches,
        results,
        setting=report.DATASETS,
        from_originals=cutting,
        workers=options.workers,
        checkpoint_every=options.checkpoint_every,
        save_predictions=options.save_predictions,
        trust_data=options.trust_data,
    )
    examples = []
    if wanted:
        examples = report.find_examples(
            *(cells, cutting[0], batches, wanted, model, params, task),
            evaluate.tnt_config_of(cutting[0], options.tnt),
        )
    return cells, report.samples_of(batches), examples


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
