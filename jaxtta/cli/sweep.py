r"""Measure how much adapters gain on corrupted images.

    jaxtta sweep --output runs/demo

runs zero-shot CLIP, TENT and BATCLIP on 15 corruptions of the bundled images with the bundled demo
model. It prints a table and writes `report.html`, `summary.csv`, `classes.csv`, plots, and for each
adapter, stream and seed a file with a row per image. Images that cannot be read are left out, named
and counted; the exit code is 0 then too, and 1 if a stream has none that can be read.

    # your own images in folders by class
    jaxtta sweep --data FOLDER --model openai/clip-vit-base-patch16 --output runs/own
    # one stream through all corruptions, three seeds
    jaxtta sweep --setting continual --seeds 1 2 3 --checkpoint-every 50 --output runs/continual
    # your own method: make(model, task) in mymodule.py
    jaxtta sweep --adapters zero_shot mymodule:make --output runs/mine
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtta import data, evaluate, report
from jaxtta.cli import options as groups
from jaxtta.cli.estimate import estimate

CORRUPTED = ("folder", "imagenet", "tfds", "imagenet-c", "cifar-c", "arrays")
"""Layouts whose corruptions are ImageNet-C's by default; the others are shifts by themselves."""


@groups.group
class Options:
    """A sweep of adapters over corruptions.

    Attributes:
        save_examples: number of images to draw whose prediction TNT fixed or broke.
    """

    run: groups.RunOptions
    model: groups.ModelOptions = groups.ModelOptions()
    data: groups.DataOptions = groups.DataOptions()
    streams: groups.StreamOptions = groups.StreamOptions()
    adapters: groups.AdapterOptions = groups.AdapterOptions()
    tune: groups.TuneOptions = groups.TuneOptions()
    save_examples: int = 0


def run(options: Options) -> None:
    """Run the sweep and report."""
    check(options)
    loaded, given = options.model.load(), options.streams
    benchmark = options.data.open(loaded[0])
    usual = data.IMAGENET_C if options.data.layout in CORRUPTED else (data.CLEAN,)
    spec = spec_of(options, loaded[0], benchmark, given.setting, given.corruptions or usual)
    about = evaluate.about(loaded[0], data=options.data.data, model=options.model.model)
    adapters = tune(options, loaded, benchmark, about)
    folder, shard = options.run.output, options.run.part
    inputs = (spec, adapters, loaded, folder, about, options.save_examples)
    results, samples, examples = measure(options, *inputs, shard)
    if options.run.dry_run:
        return
    if shard[1] > 1:
        say_shard(options.run, len(results))
    else:
        images = len(np.unique(spec.streams[0].items[:, 1]))
        title = f"{Path(options.model.model).name} on {Path(options.data.data).name}, "
        title += f"{given.setting}, {given.order}, {images} images"
        report.write_report(results, folder, title, samples, examples)


def check_adapters(options: Any) -> None:
    """Raise a ValueError for invalid adapters; also of natural shifts."""
    given = options.adapters
    evaluate.require_distinct(adapters=given.adapters)
    evaluate.require_at_least(canvas=(given.canvas, 1), save_examples=(options.save_examples, 0))
    specs = [evaluate.parse_adapter(text) for text in given.adapters]
    if options.save_examples:
        report.check_examples(specs, given.config)


def check(options: Options) -> None:
    """Raise a ValueError for invalid options."""
    check_adapters(options)
    given, rates = options.streams, options.tune.tune_learning_rates
    for name in ("corruptions", "severities"):
        if getattr(given, name):
            evaluate.require_distinct(**{name: getattr(given, name)})
    if given.severities and (given.setting == "gradual" or options.data.layout == "arrays"):
        what = "--setting gradual" if given.setting == "gradual" else "--layout arrays"
        raise ValueError(f"{what} has fixed severities, omit --severities")
    adapters, tuned = options.adapters.adapters, options.tune.tune_adapters
    for name in tuned:
        if not rates or name not in adapters:
            raise ValueError(f"--tune-adapters {name} needs --tune-learning-rates and this adapter")
    tuned = (tuned or tuple(filter(evaluate.has_rate, adapters))) if rates else ()
    if rates and not tuned:
        raise ValueError("--tune-learning-rates: no adapter has a learning rate to select")
    for name in (evaluate.with_rate(each, rate) for each in tuned for rate in rates):
        evaluate.parse_adapter(name)
        if name in adapters:
            raise ValueError(f"--tune-learning-rates tries {name}, omit it from --adapters")
    if rates and set(given.corruptions) & set(data.IMAGENET_C_EXTRA):
        raise ValueError("corruptions that select learning rates cannot be tested too")
    if rates and options.run.part[1] > 1:
        raise ValueError("--tune-learning-rates runs on one machine, omit --shard")


def spec_of(
    options: Options, model: Any, benchmark: data.Benchmark, setting: str, corruptions: Any
) -> evaluate.Spec:
    """What to run on."""
    usual = evaluate.default_severity(options.data.layout, options.data.data)
    severities = (1, 2, 3, 4, 5) if setting == "gradual" else options.streams.severities or (usual,)
    labels, limit = data.labels_of(benchmark), options.data.max_images
    streams = options.streams.streams(limit, setting, corruptions, severities, labels)
    data.select(benchmark, dict.fromkeys(x for stream in streams for x in stream.segments))
    templates = options.model.templates_for(options.data.layout)
    return evaluate.Spec(
        benchmark,
        streams,
        evaluate.task_for(model, data.class_names_of(benchmark), templates),
        options.streams.batch_size,
        options.adapters.canvas,
        setting,
        {"layout": options.data.layout, **options.streams.settings(limit)},
        templates,
    )


def tune(options: Options, loaded: Any, benchmark: data.Benchmark, about: dict) -> list[str]:
    """The adapters, with the learning rates that are selected for them."""
    adapters, rates = list(options.adapters.adapters), options.tune.tune_learning_rates
    if rates and options.run.dry_run:
        print("not estimated: learning rates are selected first")
    if not rates or options.run.dry_run:
        return adapters
    if options.tune.validation:
        benchmark = options.data.open(loaded[0], options.tune.validation)
    spec = spec_of(options, loaded[0], benchmark, "reset_each_shift", data.IMAGENET_C_EXTRA)
    named = {"config": options.adapters.config, **options.run.how}
    inputs: Any = (rates, spec, *loaded, options.run.output / "validation")
    whose = "separate images" if options.tune.validation else "the test images"
    for text in options.tune.tune_adapters or [*filter(evaluate.has_rate, adapters)]:
        choice = evaluate.tune_learning_rate(text, *inputs, **named)
        choice = choice._replace(chosen_on=f"{choice.chosen_on}; {whose}, with their labels")
        top1 = {f"{rate:g}": f"{100 * top1:.2f} %" for rate, top1 in choice.accuracies.items()}
        said = ", ".join(f"{rate}: {value}" for rate, value in top1.items())
        print(f"{text}: learning rate {choice.rate:g}, chosen on {choice.chosen_on} ({said})")
        about.setdefault("chosen", {})[text] = choice._asdict() | {"accuracies": top1}
        adapters[adapters.index(text)] = evaluate.with_rate(text, choice.rate)
    return adapters


def say_shard(run: groups.RunOptions, count: int) -> None:
    """Say what this shard has, and how the report is made; also of natural shifts."""
    print(f"shard {run.shard}: {count or 'no'} results in {run.output}; when all shards are done,")
    print("put their folders together and run the same command without --shard for the report")


def measure(
    options: Any,
    spec: evaluate.Spec,
    adapters: Sequence[str],
    loaded: tuple[Any, Any],
    folder: Path,
    about: dict[str, Any],
    wanted: int,
    shard: tuple[int, int] = (0, 1),
) -> tuple[list[evaluate.Predictions], dict[str, np.ndarray], list[report.Example]]:
    """Run adapters, or estimate what that takes; also for natural shifts.

    Returns the results, an image of each domain, and as many of TNT's examples as are `wanted`.
    """
    specs, config = [evaluate.parse_adapter(text) for text in adapters], options.adapters.config
    if options.run.dry_run:
        estimate(options, spec, specs, loaded, folder, shard)
        return [], {}, []
    log = None
    if options.run.log:
        log = evaluate.loggers(options.run.log, folder, dataclasses.asdict(options))
    named = {"config": config, "shard": shard, "log": log, "about": about}
    results = evaluate.sweep(spec, adapters, *loaded, folder, **named, **options.run.how)
    batches, examples = spec.batches(loaded[0], specs), []
    if wanted:
        tnt = next(each for each in specs if each.name == "tnt")
        inputs: Any = (batches, wanted, *loaded, spec.task, evaluate.tnt_config_of(tnt, config))
        examples = report.find_examples(results, tnt.text, *inputs)
    return results, report.samples_of(batches), examples
