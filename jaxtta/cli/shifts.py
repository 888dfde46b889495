r"""Measure how much adapters gain on natural distribution shifts.

    jaxtta shifts --max-images 200 --tnt.scale 0.5 1 --output runs/natural

runs zero-shot CLIP and TNT on bundled CIFAR-10 images with the bundled demo model, with crops of at
least half an image, since smaller crops of 32 pixels show little. On the usual datasets, with the
settings of TNT's paper:

    jaxtta shifts --model openai/clip-vit-base-patch16 --datasets imagenet-a=DATA/imagenet-a \
        imagenet-v2=DATA/imagenet-v2 imagenet-r=DATA/imagenet-r imagenet-sketch=DATA/sketch \
        objectnet=DATA/objectnet --batch-size 16 --tnt.images-per-map 16 --checkpoint-every 20 \
        --output runs/natural
    # the ten cross-dataset sets, in the folders that prompt-learning benchmarks use
    jaxtta shifts --model openai/clip-vit-base-patch16 --output runs/cross \
        --datasets caltech101=DATA oxford-pets=DATA stanford-cars=DATA oxford-flowers=DATA \
        food101=DATA fgvc-aircraft=DATA sun397=DATA dtd=DATA eurosat=DATA ucf101=DATA
    # your own images in class folders, under any other name
    jaxtta shifts --datasets shop=FOLDER warehouse=FOLDER --output runs/own

Every dataset has its own folder in the output and is computed once: with --shard each machine runs
some of the datasets, and the same command with all folders present writes the report. TNT adapts to
single images; the other adapters take one step per batch. Images that cannot be read are left out,
named and counted; the exit code is 0 then too, and 1 if a dataset has none that can be read.
"""

import re
from pathlib import Path
from typing import Literal

from jaxtta import assets, data, evaluate, report
from jaxtta.cli.options import AdapterOptions, ModelOptions, RunOptions, group
from jaxtta.cli.sweep import measure

LAYOUTS = {
    **dict.fromkeys(("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch"), "imagenet"),
    **{name: name for name in ("imagenet-v2", "objectnet", *data.TEMPLATES)},
}
"""Layouts of the known datasets; all others are class folders."""


@group
class Options:
    """A sweep of adapters over datasets.

    Attributes:
        run: where the results go.
        model: the model.
        adapters: the methods.
        datasets: NAME=FOLDER of imagenet, imagenet-a, -r, -sketch, -v2, objectnet, the ten
            cross-dataset sets, or any other name for class folders (default: the bundled images).
        order: of the images; correlated is sorted by class, dirichlet has classes come in waves.
        seeds: of the order and of TNT's views; each seed is a run.
        max_images: use at most so many images of each dataset, sampled with the seed.
        batch_size: images per step.
        save_examples: number of images to draw whose prediction TNT fixed or broke.
    """

    run: RunOptions
    model: ModelOptions = ModelOptions(templates=("a photo of a {}.",))
    adapters: AdapterOptions = AdapterOptions(("zero_shot", "tnt"), "imagenet-c")
    datasets: tuple[str, ...] = ()
    order: Literal["shuffled", "stored", "correlated", "dirichlet"] = "shuffled"
    seeds: tuple[int, ...] = (1,)
    max_images: int | None = None
    batch_size: int = 50
    save_examples: int = 0


def run(options: Options) -> None:
    """Run every dataset and report."""
    places = check(options)
    model, params = options.model.load()
    number, count = options.run.part
    places = dict([*places.items()][number::count])
    found = {
        name: data.open_dataset(LAYOUTS.get(name, "folder"), root) for name, root in places.items()
    }
    results, samples, examples = [], {}, []
    for place, (name, dataset) in enumerate(found.items()):
        print(f"{name}: {len(dataset)} images, {len(dataset.class_names)} classes")
        templates = options.model.templates_for(LAYOUTS.get(name, "folder"))
        task = evaluate.task_for(model, dataset.class_names, templates)
        streams = [
            stream
            for seed in options.seeds
            for stream in data.make_streams(
                *("reset_each_shift", (name,), (0,), dataset.labels),
                order=options.order,
                seed=seed,
                limit=options.max_images,
            )
        ]
        spec = evaluate.Spec(
            *({data.Domain(name): dataset}, streams, task, options.batch_size),
            *(options.adapters.canvas, "datasets"),
            {"order": options.order, "max_images": options.max_images},
            templates,
        )
        wanted = -(-(options.save_examples - len(examples)) // (len(found) - place))
        about = evaluate.about(model, data=places[name], model=options.model.model)
        adapters, folder = list(options.adapters.adapters), options.run.output / name
        measured = measure(options, spec, adapters, (model, params), folder, about, wanted=wanted)
        results += measured[0]
        samples |= measured[1]
        examples += measured[2]
    if results and count == 1:
        title = f"{Path(options.model.model).name} on {', '.join(places)}"
        report.write_report(results, options.run.output, title, samples, examples)


def check(options: Options) -> dict[str, str]:
    """Raise a ValueError for invalid options; return each dataset's folder."""
    options.adapters.check(options.save_examples)
    evaluate.require_distinct(seeds=options.seeds, templates=options.model.templates)
    evaluate.require_at_least(
        seeds=(min(options.seeds), 0),
        batch_size=(options.batch_size, 1),
        max_images=(options.max_images, 1),
    )
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
