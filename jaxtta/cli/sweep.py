r"""Measure how much adapters gain on corrupted images.

    jaxtta sweep --output runs/demo

runs zero-shot CLIP, TENT and BATCLIP on 15 corruptions of the bundled images with the bundled demo
model. It prints a table and writes `report.html`, `summary.csv`, `classes.csv`, plots, and for each
adapter, stream and seed a file with a row per image. The same command again computes only what is
missing. Images that cannot be read are left out, named and counted; the exit code is 0 then too,
and 1 if a stream has none that can be read. Other images and models:

    # your own images in folders by class, corrupted as they are read
    jaxtta sweep --data FOLDER --model openai/clip-vit-base-patch16 --preset imagenet-c \
        --output runs/own
    # ImageNet-C's 5,000 images of published tables (docs/published.md has their protocols)
    jaxtta sweep --layout imagenet-c --data IMAGENET-C --ids imagenet-c-5000 --preset imagenet-c \
        --model openai/clip-vit-base-patch16 --batch-size 64 --output runs/imagenet-c-5000
    # one stream through all corruptions, three seeds
    jaxtta sweep --setting continual --seeds 1 2 3 --checkpoint-every 50 --output runs/continual
    # your own method: make(model, task) in mymodule.py
    jaxtta sweep --adapters zero_shot mymodule:make --output runs/mine
    # on two machines: one runs --shard 0/2, the other --shard 1/2; put their folders together and
    # run once more without --shard for the report
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta import data, evaluate, report
from jaxtta.cli.estimate import estimate
from jaxtta.cli.options import (
    AdapterOptions,
    DataOptions,
    ModelOptions,
    RunOptions,
    StreamOptions,
    TuneOptions,
    group,
)

CORRUPTED = ("folder", "imagenet", "tfds", "imagenet-c", "cifar-c", "arrays")
"""Layouts whose corruptions are ImageNet-C's by default; the others are shifts by themselves."""


@group
class Options:
    """A sweep of adapters over corruptions.

    Attributes:
        run: where the results go.
        model: the model.
        data: the images.
        streams: their order.
        adapters: the methods.
        tune: learning rates.
        save_examples: number of images to draw whose prediction TNT fixed or broke.
    """

    run: RunOptions
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    streams: StreamOptions = StreamOptions()
    adapters: AdapterOptions = AdapterOptions()
    tune: TuneOptions = TuneOptions()
    save_examples: int = 0


def run(options: Options) -> None:
    """Run the sweep and report."""
    check(options)
    loaded = options.model.load()
    given = options.streams
    usual = data.IMAGENET_C if options.data.layout in CORRUPTED else (data.CLEAN,)
    benchmark = options.data.open(loaded[0])
    spec = spec_of(options, loaded[0], benchmark, given.setting, given.corruptions or usual)
    about = evaluate.about(loaded[0], data=options.data.data, model=options.model.model)
    adapters = tune(options, loaded, benchmark, about)
    measured = measure(options, spec, adapters, loaded, options.run.output, about, options.run.part)
    if options.run.dry_run:
        return
    if options.run.part[1] > 1:
        print(f"{len(measured[0])} results in {options.run.output}; when all shards are done, put")
        print("their folders together and run the same command without --shard for the report")
        return
    images = len(np.unique(spec.streams[0].items[:, 1]))
    places = f"{Path(options.model.model).name} on {Path(options.data.data).name}"
    title = f"{places}, {given.setting}, {given.order}, {images} images"
    report.write_report(measured[0], options.run.output, title, *measured[1:])


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    options.adapters.check(options.save_examples)
    given, rates = options.streams, options.tune.tune_learning_rates
    evaluate.require_distinct(seeds=given.seeds)
    for name in ("corruptions", "severities"):
        if getattr(given, name):
            evaluate.require_distinct(**{name: getattr(given, name)})
    evaluate.require_at_least(
        seeds=(min(given.seeds), 0),
        batch_size=(given.batch_size, 1),
        max_images=(options.data.max_images, 1),
    )
    evaluate.require_positive(tune_learning_rates=rates)
    for name in options.tune.tune_adapters:
        if not rates or name not in options.adapters.adapters:
            raise ValueError(f"--tune-adapters {name} needs --tune-learning-rates and this adapter")
    if given.severities and (given.setting == "gradual" or options.data.layout == "arrays"):
        what = "--setting gradual" if given.setting == "gradual" else "--layout arrays"
        raise ValueError(f"{what} has fixed severities, omit --severities")
    if rates and set(given.corruptions) & set(data.IMAGENET_C_EXTRA):
        raise ValueError("corruptions that select learning rates cannot be tested too")
    if rates and options.run.part[1] > 1:
        raise ValueError("--tune-learning-rates runs on one machine, omit --shard")


def spec_of(
    options: Options, model: Any, benchmark: data.Benchmark, setting: str, corruptions: Any
) -> evaluate.Spec:
    """What the sweep runs on."""
    given = options.streams
    severities = given.severities or (
        evaluate.default_severity(options.data.layout, options.data.data),
    )
    if setting == "gradual":
        severities = (1, 2, 3, 4, 5)
    streams = [
        stream
        for seed in given.seeds
        for stream in data.make_streams(
            *(setting, corruptions, severities, data.labels_of(benchmark)),
            order=given.order,
            seed=seed,
            limit=options.data.max_images,
            concentration=given.concentration,
        )
    ]
    templates = options.model.templates_for(options.data.layout)
    task = evaluate.task_for(model, data.class_names_of(benchmark), templates)
    settings = {
        "layout": options.data.layout,
        "order": given.order,
        "concentration": given.concentration,
        "max_images": options.data.max_images,
    }
    canvas = options.adapters.canvas
    return evaluate.Spec(
        benchmark, streams, task, given.batch_size, canvas, setting, settings, templates
    )


def tune(options: Options, loaded: Any, benchmark: data.Benchmark, about: dict) -> list[str]:
    """The adapters, with the learning rates that were selected for them."""
    adapters, rates = list(options.adapters.adapters), options.tune.tune_learning_rates
    if not rates:
        return adapters
    if options.tune.validation:
        benchmark = options.data.open(loaded[0], options.tune.validation)
    spec = spec_of(options, loaded[0], benchmark, "reset_each_shift", data.IMAGENET_C_EXTRA)
    folder = options.run.output / "validation"
    for text in options.tune.tune_adapters or [*filter(evaluate.has_rate, adapters)]:
        if options.run.dry_run:
            print(f"{text}: a learning rate is selected first")
            tried = [evaluate.with_rate(text, rate) for rate in rates]
            measure(options, spec, tried, loaded, folder, about)
            continue
        choice = evaluate.tune_learning_rate(
            *(text, rates, spec, *loaded, folder), config=options.adapters.config, **options.run.how
        )
        whose = "separate images" if options.tune.validation else "the test images"
        choice = choice._replace(chosen_on=f"{choice.chosen_on}; {whose}, with their labels")
        tops = ", ".join(
            f"{rate:g}: {100 * top1:.2f} %" for rate, top1 in choice.accuracies.items()
        )
        print(f"{text}: learning rate {choice.rate:g}, chosen on {choice.chosen_on} ({tops})")
        about.setdefault("chosen", {})[text] = choice._asdict()
        adapters[adapters.index(text)] = evaluate.with_rate(text, choice.rate)
    return adapters


def measure(
    options: Any,
    spec: evaluate.Spec,
    adapters: list[str],
    loaded: Any,
    folder: Path,
    about: dict,
    shard: tuple[int, int] = (0, 1),
    wanted: int = 0,
) -> tuple[list[evaluate.Predictions], dict[str, np.ndarray], list[report.Example]]:
    """Run the adapters, or estimate what that takes.

    Args:
        options: of a sweep or of natural shifts.
        spec: what to run on.
        adapters: their names.
        loaded: the model and its parameters.
        folder: for the results.
        about: what to keep with them.
        shard: this machine's number and the number of machines.
        wanted: how many examples to draw.

    Returns:
        The results, an image of each domain, and examples of TNT.
    """
    if options.run.dry_run:
        estimate(
            spec, adapters, *loaded, options.adapters.config, folder, options.run.workers, shard
        )
        return [], {}, []
    logged = dataclasses.asdict(options)
    log = evaluate.loggers(options.run.log, folder, logged) if options.run.log else None
    results = evaluate.sweep(
        *(spec, adapters, *loaded, folder),
        config=options.adapters.config,
        shard=shard,
        log=log,
        about=about,
        **options.run.how,
    )
    specs = [evaluate.parse_adapter(text) for text in adapters]
    batches, examples = spec.batches(loaded[0], specs), []
    if wanted:
        tnt = next(each for each in specs if each.name == "tnt")
        config = evaluate.tnt_config_of(tnt, options.adapters.config)
        examples = report.find_examples(
            *(results, tnt.text, batches, wanted, *loaded, spec.task, config)
        )
    return results, report.samples_of(batches), examples
