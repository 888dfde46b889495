r"""Measure how much adapters gain on natural distribution shifts.

    jaxtta shifts --max-images 200 --tnt.scale 0.5 1 --output runs/natural

runs zero-shot CLIP and TNT on bundled CIFAR-10 images with the bundled demo model. Your own images
in class folders, beside a known dataset (docs/papers/tnt.md has the usual ones):

    jaxtta shifts --datasets shop=FOLDER imagenet-a=DATA/imagenet-a --output runs/shop

Every dataset has its own folder in the output and is computed once: with --shard each machine runs
some of them, and the same command with all folders present writes the report.
"""

import re
from pathlib import Path

from jaxtta import assets, data, evaluate
from jaxtta.cli import options as groups
from jaxtta.cli.sweep import check_adapters, measure, spec_of

LAYOUTS = {
    **dict.fromkeys(("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch"), "imagenet"),
    **{name: name for name in ("imagenet-v2", "objectnet", *data.CROSS_DATASETS)},
}
"""Layouts of the known datasets; all others are class folders."""


@groups.group
class Options:
    """A sweep of adapters over datasets."""

    run: groups.RunOptions
    model: groups.ModelOptions = groups.ModelOptions(templates=("a photo of a {}.",))
    # NAME=FOLDER of imagenet, imagenet-a, -r, -sketch, -v2, objectnet, the ten cross-dataset sets,
    # or any other name for class folders (default: the bundled images)
    datasets: tuple[str, ...] = ()
    max_images: int | None = None  # at most so many of each dataset, sampled with the seed
    streams: groups.OrderOptions = groups.OrderOptions(batch_size=50)
    adapters: groups.AdapterOptions = groups.AdapterOptions(("zero_shot", "tnt"), "imagenet-c")
    save_examples: int = 0  # number of images to draw whose prediction TNT fixed or broke


def run(options: Options) -> None:
    """Run every dataset and report."""
    given = options.datasets or (f"cifar10={assets.IMAGES}",)
    places = {name: root for name, _, root in (text.partition("=") for text in given)}
    named = all(root and re.fullmatch(r"\w[\w.-]*", name) for name, root in places.items())
    if not named or len(places) < len(given) or data.CLEAN in places:
        raise ValueError(f"--datasets has {' '.join(given)}, expected NAME=FOLDER, each name once")
    check_adapters(options)
    model, params = options.model.load()
    parts, (number, count) = [], options.run.part
    for name in [*places][number::count]:
        layout = LAYOUTS.get(name, "folder")
        dataset = data.open_dataset(layout, places[name])
        print(f"{name}: {len(dataset)} images, {len(dataset.class_names)} classes")
        source = groups.DataOptions(places[name], layout, max_images=options.max_images)
        spec = spec_of(options, source, model, {data.Domain(name): dataset}, "datasets", (name,))
        about = evaluate.about(model, data=places[name], model=options.model.model)
        parts.append((spec, options.adapters.adapters, options.run.output / name, about))
    title = f"{Path(options.model.model).name} on {', '.join(places)}"
    measure(options, (model, params), parts, title)
