r"""Measure how much adapters gain on corrupted images.

    jaxtta sweep --output runs/demo

runs zero-shot CLIP, TENT and BATCLIP on 15 corruptions of the bundled images with the bundled demo
model. It prints a table and writes `report.html`, `summary.csv`, `classes.csv`, plots, and for each
adapter, stream and seed a file with a row per image. Images that cannot be read are left out, named
and counted.

    # your own images in folders by class
    jaxtta sweep --data FOLDER --model openai/clip-vit-base-patch16 --output runs/own
    # one stream through all corruptions, three seeds
    jaxtta sweep --setting continual --seeds 1 2 3 --checkpoint-every 50 --output runs/continual
    # your own method: make(model, task) in mymodule.py
    jaxtta sweep --adapters zero_shot mymodule:make --output runs/mine
"""

import dataclasses
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtta import data, evaluate, report
from jaxtta.cli import options as groups

CORRUPTED = ("folder", "imagenet", "tfds", "imagenet-c", "cifar-c", "arrays", "arrayrecord")
"""Layouts whose corruptions are ImageNet-C's by default; the others are shifts by themselves."""
Part = tuple[evaluate.Spec, Sequence[str], Path, dict[str, Any]]
"""What to run on, the adapters, the folder for results, and what to keep with these."""


@groups.group
class Options:
    """A sweep of adapters over corruptions."""

    run: groups.RunOptions
    model: groups.ModelOptions = groups.ModelOptions()
    data: groups.DataOptions = groups.DataOptions()
    streams: groups.StreamOptions = groups.StreamOptions()
    adapters: groups.AdapterOptions = groups.AdapterOptions()
    tune: groups.TuneOptions = groups.TuneOptions()
    save_examples: int = 0  # number of images to draw whose prediction TNT fixed or broke


def run(options: Options) -> None:
    """Run the sweep and report."""
    given, source, shard = options.streams, options.data, options.run.part
    if options.tune.tune_learning_rates and {*given.corruptions} & {*data.IMAGENET_C_EXTRA}:
        raise ValueError("corruptions that select learning rates cannot be tested too")
    if given.setting == "gradual" and given.severities:
        raise ValueError("--setting gradual has fixed severities, omit --severities")
    tuned = options.tune
    if (tuned.tune_adapters or tuned.validation) and not tuned.tune_learning_rates:
        raise ValueError("--tune-adapters and --validation need --tune-learning-rates")
    check_adapters(options)
    loaded = options.model.load()
    benchmark = source.open(loaded[0])
    shown = given.corruptions or (data.IMAGENET_C if source.layout in CORRUPTED else (data.CLEAN,))
    spec = spec_of(options, source, loaded[0], benchmark, given.setting, shown)
    about = evaluate.about(loaded[0], data=source.data, model=options.model.model)
    adapters = tune(options, loaded, benchmark, about)
    title = f"{Path(options.model.model).name} on {Path(source.data).name}, {given.setting}, "
    title += f"{given.order}, {len(np.unique(spec.streams[0].items[:, 1]))} images"
    measure(options, loaded, [(spec, adapters, options.run.output, about)], title, shard)


def spec_of(
    options: Any,
    source: groups.DataOptions,
    model: Any,
    benchmark: data.Benchmark,
    setting: str,
    corruptions: Sequence[str],
) -> evaluate.Spec:
    """What to run on; the setting of natural shifts is "datasets"."""
    given, labels, limit = options.streams, data.labels_of(benchmark), source.max_images
    settings = {"order": given.order, "max_images": limit}
    if given.order == "dirichlet":
        settings["concentration"] = given.concentration
    if setting == "datasets":
        shown = ("reset_each_shift", corruptions, (0,), labels)
    else:
        usual = evaluate.default_severity(source.layout, source.data)
        shown = (setting, corruptions, given.severities or (usual,), labels)
        settings["layout"] = source.layout
    how = {"order": given.order, "limit": limit, "concentration": given.concentration}
    streams = [each for seed in given.seeds for each in data.make_streams(*shown, seed=seed, **how)]
    data.select(benchmark, [domain for stream in streams for domain in stream.segments])
    templates = options.model.templates_for(source.layout)
    task = evaluate.task_for(model, data.class_names_of(benchmark), templates)
    how = (given.batch_size, options.adapters.canvas, setting, settings, templates)
    return evaluate.Spec(benchmark, streams, task, *how)


def tune(options: Options, loaded: Any, benchmark: data.Benchmark, about: dict) -> list[str]:
    """The adapters, with the learning rates that are selected for them."""
    given, adapters = options.tune, list(options.adapters.adapters)
    if not given.tune_learning_rates or options.run.dry_run:
        return adapters
    tuned = given.tune_adapters or [*filter(evaluate.has_rate, adapters)]
    if not tuned:
        raise ValueError("--tune-learning-rates: none of --adapters has a learning rate to select")
    if odd := sorted(set(tuned) - set(adapters)):
        raise ValueError(f"--tune-adapters has {odd[0]!r}, which is not one of --adapters")
    if given.validation:
        benchmark = options.data.open(loaded[0], given.validation)
    shown = (benchmark, "reset_each_shift", data.IMAGENET_C_EXTRA)
    spec = spec_of(options, options.data, loaded[0], *shown)
    whose = "separate images" if given.validation else "the test images"
    named = {"config": options.adapters.config, **options.run.how}
    inputs: Any = (given.tune_learning_rates, spec, *loaded, options.run.output / "validation")
    for text in tuned:
        choice = evaluate.tune_learning_rate(text, *inputs, **named)
        choice = choice._replace(chosen_on=f"{choice.chosen_on}; {whose}, with their labels")
        top1 = {f"{rate:g}": f"{100 * top1:.2f} %" for rate, top1 in choice.accuracies.items()}
        print(f"{text}: learning rate {choice.rate:g}, chosen on {choice.chosen_on} ({top1})")
        about.setdefault("chosen", {})[text] = choice._asdict() | {"accuracies": top1}
        adapters[adapters.index(text)] = evaluate.with_rate(text, choice.rate)
    return adapters


def check_adapters(options: Any) -> None:
    """Raise a ValueError for adapters that a run would refuse at its end; also of shifts."""
    given = options.adapters
    specs = [evaluate.parse_adapter(text) for text in given.adapters]
    if options.save_examples:
        report.check_examples(specs, given.config)


def measure(options: Any, loaded: Any, parts: list[Part], title: str, shard: Any = (0, 1)) -> None:
    """Run adapters and report, or estimate what that takes; also for natural shifts."""
    how, results, samples, examples = options.run, [], {}, []
    config, (_, count), first = options.adapters.config, how.part, jax.process_index() == 0
    for place, (spec, adapters, folder, about) in enumerate(parts):
        specs = [evaluate.parse_adapter(text) for text in adapters]
        if how.dry_run:
            estimate(options, loaded, spec, specs, range(shard[0], len(spec.streams), shard[1]))
            continue
        logged = how.log if first else ()
        log = evaluate.loggers(logged, folder, dataclasses.asdict(options)) if logged else None
        named: Any = {"config": config, "shard": shard, "about": about, **how.how}
        found = evaluate.sweep(spec, adapters, *loaded, folder=folder, log=log, **named)
        batches = spec.batches(loaded[0], specs)
        if wanted := -(-(options.save_examples - len(examples)) // (len(parts) - place)):
            tnt = next(each for each in specs if each.name == "tnt")
            inputs: Any = (batches, wanted, *loaded, spec.task, evaluate.tnt_config_of(tnt, config))
            examples += report.find_examples(found, tnt.text, *inputs)
        results, samples = results + found, samples | report.samples_of(batches)
    if count > 1 and not how.dry_run:
        print(f"shard {how.shard}: {len(results) or 'no'} results in {how.output}; when all shards")
        print("are done, and their results are in one folder, run it again without --shard")
    elif first and not how.dry_run:
        report.write_report(results, how.output, title, samples, examples)


def estimate(options: Any, loaded: Any, spec: evaluate.Spec, adapters: Any, share: range) -> None:
    """Print streams, images and steps; estimate time and memory from one step each."""
    (model, params), counts = loaded, []
    batches = spec.batches(model, adapters)
    for number in share:
        stream, steps = spec.streams[number], len(batches.of(number))
        shape = f"{len(stream.items)} images, {steps} steps of {spec.batch_size}"
        print(f"{stream.name}, seed {stream.seed}: {shape}")
        counts.append(steps)
    how = options.run
    devices = evaluate.require_devices(how.how["devices"], how.split, spec.batch_size)
    on = evaluate.place(params, devices, how.split, len(counts))
    groups = (counts[start : start + on.streams] for start in range(0, len(counts), on.streams))
    count, beside = sum(map(max, groups)), f" on {devices} devices" if devices > 1 else ""
    batches[0]  # the first imports what it needs
    start = time.perf_counter()
    batch: Any = batches[min(1, len(batches) - 1)]  # a stream's last batch may be small
    reading = (time.perf_counter() - start) * sum(counts) / max(how.workers, 1)
    _, placed = on.batch([batch] * on.streams)
    total = peak = 0.0
    for each in adapters:
        adapter = evaluate.make_adapter(each, model, spec.task, options.adapters.config)
        state, inputs = on.states([adapter.init(params)]), evaluate.inputs_of(placed, each)
        step = on.compile(adapter, state, inputs)
        for _ in range(2):  # the first call loads the program
            start = time.perf_counter()
            state, prediction = step(on.params, state, inputs)
            jax.block_until_ready(prediction)
        seconds, sizes = time.perf_counter() - start, step.memory_analysis()
        used = (sizes.temp_size_in_bytes + sizes.argument_size_in_bytes) / 1e9 if sizes else 0
        total, peak = total + seconds * count, max(peak, used)
        print(f"{each.text}: {count} steps of {seconds:.2g} s{beside}, {used:.2g} GB")
    took = timedelta(seconds=round(max(reading, total)))
    print(f"estimate without compilation: {took}, {peak:.2g} GB")
