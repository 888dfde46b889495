r"""Measure how much adapters gain on natural distribution shifts.

    jaxtta shifts --max-images 200 --tnt.scale 0.5 1 --output runs/natural

runs zero-shot CLIP and TNT on bundled CIFAR-10 images with the bundled demo model, with crops of at
least half an image, since smaller crops of 32 pixels show little. Your own images in class folders,
beside a known dataset (docs/published.md has the usual ones):

    jaxtta shifts --datasets shop=FOLDER imagenet-a=DATA/imagenet-a --output runs/own

Every dataset has its own folder in the output and is computed once: with --shard each machine runs
some of them, and the same command with all folders present writes the report.
"""

import re
from pathlib import Path

from jaxtta import assets, data, evaluate, report
from jaxtta.cli import options as groups
from jaxtta.cli.sweep import check_adapters, measure, say_shard

LAYOUTS = {
    **dict.fromkeys(("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch"), "imagenet"),
    **{name: name for name in ("imagenet-v2", "objectnet", *data.CROSS_DATASETS)},
}
"""Layouts of the known datasets; all others are class folders."""


@groups.group
class Options:
    """A sweep of adapters over datasets.

    Attributes:
        datasets: NAME=FOLDER of imagenet, imagenet-a, -r, -sketch, -v2, objectnet, the ten
            cross-dataset sets, or any other name for class folders (default: the bundled images).
        max_images: use at most so many images of each dataset, sampled with the seed.
        save_examples: number of images to draw whose prediction TNT fixed or broke.
    """

    run: groups.RunOptions
    model: groups.ModelOptions = groups.ModelOptions(templates=("a photo of a {}.",))
    datasets: tuple[str, ...] = ()
    max_images: int | None = None
    streams: groups.OrderOptions = groups.OrderOptions(batch_size=50)
    adapters: groups.AdapterOptions = groups.AdapterOptions(("zero_shot", "tnt"), "imagenet-c")
    save_examples: int = 0


def run(options: Options) -> None:
    """Run every dataset and report."""
    check_adapters(options)
    places, (number, count) = folders_of(options.datasets), options.run.part
    model, params = options.model.load()
    layouts = {name: LAYOUTS.get(name, "folder") for name in [*places][number::count]}
    datasets = {name: data.open_dataset(kind, places[name]) for name, kind in layouts.items()}
    results, samples, examples = [], {}, []
    for place, (name, dataset) in enumerate(datasets.items()):
        print(f"{name}: {len(dataset)} images, {len(dataset.class_names)} classes")
        limit, templates = options.max_images, options.model.templates_for(layouts[name])
        spec = evaluate.Spec(
            {data.Domain(name): dataset},
            options.streams.streams(limit, "reset_each_shift", (name,), (0,), dataset.labels),
            evaluate.task_for(model, dataset.class_names, templates),
            options.streams.batch_size,
            options.adapters.canvas,
            "datasets",
            options.streams.settings(limit),
            templates,
        )
        about = evaluate.about(model, data=places[name], model=options.model.model)
        wanted = -(-(options.save_examples - len(examples)) // (len(datasets) - place))
        inputs = (spec, options.adapters.adapters, (model, params), options.run.output / name)
        found = measure(options, *inputs, about, wanted)
        results, samples, examples = results + found[0], samples | found[1], examples + found[2]
    if options.run.dry_run:
        return
    if count > 1:
        say_shard(options.run, len(results))
    else:
        title = f"{Path(options.model.model).name} on {', '.join(places)}"
        report.write_report(results, options.run.output, title, samples, examples)


def folders_of(given: tuple[str, ...]) -> dict[str, str]:
    """The datasets' folders by name."""
    places: dict[str, str] = {}
    for text in given:
        name, equals, root = text.partition("=")
        if not (equals and root and re.fullmatch(r"\w[\w.-]*", name)) or name == data.CLEAN:
            raise ValueError(
                f"--datasets has {text!r}, expected NAME=FOLDER, such as imagenet-a=DATA/imagenet-a"
            )
        if name in places:
            raise ValueError(f"--datasets names {name} twice")
        places[name] = root
    return places or {"cifar10": str(assets.IMAGES)}
