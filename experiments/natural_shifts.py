r"""How much does adaptation gain on datasets that are a shift by themselves?

    python experiments/natural_shifts.py --limit 200 --tnt.scale 0.5 1 --output runs/natural

runs zero-shot CLIP and TNT on embedded CIFAR-10 images with the embedded model, with crops of at
least half an image, as less of 32 pixels shows little. On the sets of the literature, with TNT's
published settings:

    python experiments/natural_shifts.py --model openai/clip-vit-base-patch16 \
        --datasets imagenet-a=DATA/imagenet-an imagenet-v2=DATA/imagenet-v2 \
        imagenet-r=DATA/imagenet-r imagenet-sketch=DATA/sketch objectnet=DATA/objectnet \
        --batch-size 16 --tnt.images-per-map 16 --checkpoint-every 20 --output runs/natural
    # the ten cross-dataset sets, in the folders that prompt-learning benchmarks use
    python experiments/natural_shifts.py --model openai/clip-vit-base-patch16 --output runs/cross \
        --datasets caltech101=DATA oxford-pets=DATA stanford-cars=DATA oxford-flowers=DATA \
        food101=DATA fgvc-aircraft=DATA sun397=DATA dtd=DATA eurosat=DATA ucf101=DATA
    # your own images in folders by class, under any other name
    python experiments/natural_shifts.py --datasets shop=FOLDER warehouse=FOLDER --output runs/own

Every dataset has a folder of its own in the output, and is computed once: machines may take some
datasets each, and whoever has all folders makes the report with the same command. A batch is a step
of the other adapters; TNT takes each image for itself.
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
"""How the known datasets lie; all others are folders by class."""
PHOTO = "a photo of a {}."


@dataclasses.dataclass(frozen=True)
class Options:
    """A sweep of adapters over datasets."""

    output: Path
    """Folder for the results; made if it is missing."""
    datasets: tuple[str, ...] = ()
    """NAME=FOLDER each. Known names: imagenet, imagenet-a, -r, -sketch, -v2, objectnet and the ten
    cross-dataset sets (caltech101, oxford-pets, stanford-cars, oxford-flowers, food101,
    fgvc-aircraft, sun397, dtd, eurosat, ucf101); any other name is for folders by class. Default:
    the embedded CIFAR-10 images."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP checkpoint (default: the embedded one)."""
    adapters: tuple[str, ...] = ("zero_shot", "tnt")
    """Which adapters to run: zero_shot, tent, batclip, tnt (or tnt-3, with three steps), mgtta, and
    mgtta-sgd and mgtta-adam with other optimisers for the same objective. A learning rate may stand
    behind a name, as tent@1e-4."""
    tnt: TNTConfig = dataclasses.field(default_factory=TNTConfig)
    """TNT's settings."""
    mgtta: evaluate.MGTTA = dataclasses.field(default_factory=evaluate.MGTTA)
    """MGTTA's settings. The files' defaults are for the embedded model."""
    canvas: int | None = None
    """Side of the canvas that TNT's originals lie on; larger ones are shrunk to fit, and views are
    cut from what is left. Default: what a sample of each dataset needs, up to 512."""
    save_examples: int = 0
    """Draw what TNT's noise did to so many images that it set right or spoilt."""
    templates: tuple[str, ...] = (PHOTO,)
    """Prompt templates; several are averaged. "usual" stands for each dataset's own, "imagenet" for
    CLIP's 80."""
    order: Literal["shuffled", "stored", "correlated", "dirichlet"] = "shuffled"
    """Of the images in a stream. correlated: sorted by class; dirichlet: unevenly so."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the order and of TNT's views; each is a run of its own."""
    limit: int | None = None
    """Use only so many images of each dataset, drawn by the seed."""
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "imagenet-c"
    """Published optimiser settings of TENT and BATCLIP."""
    learning_rate: float | None = None
    """In place of the published ones: TENT with SGD and momentum, BATCLIP with AdamW, MGTTA's with
    the optimisers that their names say."""
    batch_size: int = 50
    """Images a batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products."""
    workers: int = 1
    """Processes that decode images; 0 does it in this one."""
    checkpoint_every: int | None = None
    """Batches between two checkpoints inside a dataset; a killed run goes on at the last one."""
    save_predictions: bool = False
    """Keep an .npz of every dataset, image by image."""
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
    """Raise a ValueError for options that cannot be meant; return each dataset's folder."""
    evaluate.check_adapters(options.adapters)
    evaluate.check_choices(
        adapters=options.adapters, seeds=options.seeds, templates=options.templates
    )
    evaluate.check_limits(
        seeds=(min(options.seeds), 0),
        batch_size=(options.batch_size, 1),
        workers=(options.workers, 0),
        checkpoint_every=(options.checkpoint_every, 1),
        canvas=(options.canvas, 1),
        save_examples=(options.save_examples, 0),
    )
    evaluate.check_rates(learning_rate=(options.learning_rate,))
    if options.save_examples:
        report.check_examples(options.adapters, options.tnt)
    places: dict[str, str] = {}
    for text in options.datasets:
        name, equals, root = text.partition("=")
        if not (equals and root and re.fullmatch(r"\w[\w.-]*", name)) or name == data.CLEAN:
            raise ValueError(
                f"--datasets has {text!r}, expected NAME=FOLDER, as imagenet-a=DATA/imagenet-a"
            )
        if name in places:
            raise ValueError(f"--datasets names {name} twice")
        places[name] = root
    return places or {"cifar10": str(assets.IMAGES)}


def open_dataset(name: str, root: str, model: jaxtta.models.CLIP) -> data.Source:
    """Open a dataset; its images are a domain that is called by its name."""
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
    """Run all adapters on one dataset: its cells, a sample, and some examples."""
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
    setup = evaluate.Setup(options.preset, options.tnt, options.mgtta)
    rates = {
        adapter: options.learning_rate if evaluate.has_rate(adapter) else None
        for adapter in options.adapters
    }
    found = evaluate.fingerprints(source, params)
    evaluate.check_files(options.adapters, options.mgtta, found["weights"])
    results = evaluate.Results(
        options.output / name,
        settings | {"templates": templates} | found,
        evaluate.about(data=root, model=options.model),
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
    )
    examples = []
    if wanted:
        examples = report.find_examples(
            *(cells, cutting[0], batches, wanted, model, params, task),
            evaluate.tuning_of(cutting[0], options.tnt),
        )
    return cells, report.samples_of(batches), examples


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
