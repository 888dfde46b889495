r"""How much does adaptation gain on corrupted images?

    python experiments/corruption_sweep.py --output runs/demo

runs zero-shot CLIP, TENT and BATCLIP on 15 corruptions of the embedded images with the embedded
model, prints the table and leaves `report.html`, `summary.csv`, plots and one JSON file a stream.
The same command again computes only what is missing. Other images and models:

    # your own images in folders by class, corrupted on the fly
    python experiments/corruption_sweep.py --data FOLDER --model openai/clip-vit-base-patch16 \
        --preset imagenet-c --output runs/own
    # ImageNet-C, one stream through all corruptions, three seeds
    python experiments/corruption_sweep.py --layout imagenet-c --data IMAGENET-C \
        --model openai/clip-vit-base-patch16 --preset imagenet-c --batch-size 64 \
        --setting continual --seeds 1 2 3 --checkpoint-every 50 --output runs/imagenet-c
    # CIFAR-10-C's arrays
    python experiments/corruption_sweep.py --layout cifar-c --data CIFAR-10-C --output runs/cifar
    # on two machines: one runs --worker 0/2, the other --worker 1/2; copy their folders together
    # and run once more without --worker for the report
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

import jaxtta
from jaxtta import assets, cli, data, evaluate, report
from jaxtta.adapters import TNTConfig
from jaxtta.data import COMMON

LEFT_OUT = (
    *("output", "worker", "workers", "checkpoint_every", "save_predictions", "debug"),
    *("adapters", "seeds"),  # which cells there are, not what is in them
    *("learning_rate", "choose_learning_rate", "choose_for", "validation"),  # an adapter's own
    *("tnt", "mgtta", "canvas"),
    "save_examples",
    *("data", "model", "class_names"),  # places; what was found there is compared
)
"""Options that another run may give otherwise and go on in the same folder."""
CORRUPTED = ("folder", "imagenet", "tfds", "imagenet-c", "cifar-c", "arrays")


@dataclasses.dataclass(frozen=True)
class Options:
    """A sweep of adapters over corruptions."""

    output: Path
    """Folder for the results; made if it is missing."""
    data: str = str(assets.IMAGES)
    """The images: a folder, or NAME:SPLIT for tensorflow-datasets (default: 2,000 embedded
    CIFAR-10 test images)."""
    layout: str = "folder"
    """How they lie there: folder (clean images in folders by class), imagenet (by wnid),
    imagenet-c, cifar-c (five severities stacked), arrays (<corruption>.npy and labels.npy), tfds,
    or one of the natural sets; an unknown name lists them all."""
    class_names: tuple[str, ...] = ()
    """Names for the prompts, in the labels' order, or one file that holds them: .json (a list, or
    an object from folder name to class name) or text with a name a line. Default: the layout's
    own; needed with arrays."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP checkpoint (default: the embedded one)."""
    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    """Which adapters to run: zero_shot, tent, batclip, tnt (or tnt-3, with three steps), mgtta, and
    mgtta-sgd and mgtta-adam with other optimisers for the same objective. A learning rate may stand
    behind a name, as tent@1e-4."""
    corruptions: tuple[str, ...] = ()
    """Which corruptions to run; "clean" is one too. Default: the 15 usual ones, but clean for sets
    that are a shift by themselves (give it for ImageNet-A, -R and -Sketch with layout imagenet)."""
    severities: tuple[int, ...] = ()
    """Each 1 to 5. Default: 5, but 1 on the embedded images, where it looks about as strong as
    CIFAR-10-C's 5 (the corruptions are made for 224-pixel photographs), and all five if gradual."""
    setting: Literal["reset_each_shift", "continual", "gradual", "mixed"] = "reset_each_shift"
    """reset_each_shift: the adapter starts anew at each corruption. continual: one stream through
    all of them. gradual: each rises to severity 5 and falls again. mixed: interleaved."""
    order: Literal["shuffled", "stored", "correlated", "dirichlet"] = "shuffled"
    """Of the images in a stream. correlated: sorted by class; dirichlet: unevenly so."""
    concentration: float = 0.1
    """Of the Dirichlet order; the smaller, the nearer to sorted by class."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the order, of corruptions made on the fly and of TNT's views; each is a run of its
    own."""
    limit: int | None = None
    """Use only so many images, drawn by the seed."""
    templates: tuple[str, ...] = ()
    """Prompt templates; several are averaged. "imagenet" stands for CLIP's 80. Default: the
    layout's usual one."""
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    """Published optimiser settings (TENT has two of its own: CIFAR and ImageNet)."""
    learning_rate: float | None = None
    """In place of the published ones: TENT with SGD and momentum, BATCLIP with AdamW, MGTTA's with
    the optimisers that their names say."""
    choose_learning_rate: tuple[float, ...] = ()
    """Choose each adapter's learning rate among these on the four validation corruptions first."""
    choose_for: tuple[str, ...] = ()
    """For these adapters alone; the others keep the preset's optimiser."""
    validation: str | None = None
    """Other images of the same layout to choose on (default: the same images, with their
    labels)."""
    tnt: TNTConfig = dataclasses.field(default_factory=TNTConfig)
    """TNT's settings."""
    mgtta: evaluate.MGTTA = dataclasses.field(default_factory=evaluate.MGTTA)
    """MGTTA's settings. The files' defaults are for the embedded model."""
    canvas: int | None = None
    """Side of the canvas that TNT's originals lie on; larger ones are shrunk to fit, and views are
    cut from what is left. Default: what a sample of the images needs, up to 512."""
    save_examples: int = 0
    """Draw what TNT's noise did to so many images that it set right or spoilt."""
    batch_size: int = 100
    """Images a batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products."""
    workers: int = 1
    """Processes that decode and corrupt images; 0 does it in this one."""
    worker: str = "0/1"
    """This machine's number and how many share the streams, for example 0/4."""
    checkpoint_every: int | None = None
    """Batches between two checkpoints inside a stream; a killed run goes on at the last one."""
    save_predictions: bool = False
    """Keep an .npz of every stream, image by image."""
    debug: bool = False
    """Show tracebacks."""


def main(options: Options) -> None:
    """Run the sweep and report."""
    worker = check(options)
    model, params = jaxtta.load(options.model, compute_dtype=jnp.dtype(options.compute_dtype))
    source = open_source(options, options.data, model)
    severities = choose_severities(options)
    if not options.corruptions:
        usual = COMMON if options.layout in CORRUPTED else (data.CLEAN,)
        options = dataclasses.replace(options, corruptions=usual)
    streams = lay_out(options, source, options.setting, options.corruptions, severities)
    for domain in dict.fromkeys(domain for stream in streams for domain in stream.segments):
        source.check(domain)
    templates = options.templates or data.templates_for(options.layout)
    if templates == ("imagenet",):
        templates = data.imagenet_templates()
    task = evaluate.task_for(model, source.class_names, templates)

    setup = setup_of(options)
    running = {"workers": options.workers, "checkpoint_every": options.checkpoint_every}
    found = evaluate.fingerprints(source, params)
    evaluate.check_files(options.adapters, options.mgtta, found["weights"])
    settings = describe(options, severities, templates) | found
    about = evaluate.about(data=options.data, model=options.model)
    rates = {
        name: options.learning_rate if evaluate.has_rate(name) else None
        for name in options.adapters
    }
    chosen = {}
    if options.choose_learning_rate:
        for name in options.choose_for or filter(evaluate.has_rate, options.adapters):
            chosen[name] = choose(name, options, model, params, task, settings, **running)
            rates[name] = chosen[name].rate
    adapters = {
        name: evaluate.make_adapter(name, model, task, setup, rates[name])
        for name in options.adapters
    }
    cutting = tuple(filter(evaluate.is_tnt, options.adapters))
    canvas = (
        (options.canvas or data.canvas_for(source, streams[0].segments[0])) if cutting else None
    )
    batches = data.Batches(source, tuple(streams), options.batch_size, canvas)
    own = {
        name: evaluate.own_settings(name, setup, rates[name], canvas) for name in options.adapters
    }
    told = {"chosen": {name: choice._asdict() for name, choice in chosen.items()}}
    cells = evaluate.run(
        adapters,
        params,
        batches,
        evaluate.Results(options.output, settings, about | told, own),
        setting=options.setting,
        from_originals=cutting,
        worker=worker,
        save_predictions=options.save_predictions,
        **running,
    )
    if worker[1] > 1:
        print(
            f"{len(cells)} cells in {options.output}; once all workers are done, the same command"
        )
        print("without --worker on their folders put together makes the report")
        return
    examples = []
    if options.save_examples:
        examples = report.find_examples(
            *(cells, cutting[0], batches, options.save_examples, model, params, task),
            evaluate.tuning_of(cutting[0], options.tnt),
        )
    images = len(np.unique(streams[0].items[:, 1]))
    title = f"{Path(options.model).name} on {Path(options.data).name}, {options.setting}, "
    title += f"{options.order}, {images} images"
    report.conclude(cells, options.output, title, report.samples_of(batches), examples)


def setup_of(options: Options) -> evaluate.Setup:
    """What adapters are made with."""
    return evaluate.Setup(options.preset, options.tnt, options.mgtta)


def check(options: Options) -> tuple[int, int]:
    """Raise a ValueError for options that cannot be meant; return the worker's share."""
    evaluate.check_adapters(options.adapters)
    evaluate.check_choices(adapters=options.adapters, seeds=options.seeds)
    for name in ("corruptions", "severities"):
        if getattr(options, name):
            evaluate.check_choices(**{name: getattr(options, name)})
    evaluate.check_limits(
        seeds=(min(options.seeds), 0),
        batch_size=(options.batch_size, 1),
        workers=(options.workers, 0),
        checkpoint_every=(options.checkpoint_every, 1),
        canvas=(options.canvas, 1),
        save_examples=(options.save_examples, 0),
    )
    evaluate.check_rates(
        learning_rate=(options.learning_rate,), choose_learning_rate=options.choose_learning_rate
    )
    for name in options.choose_for:
        if not (
            evaluate.has_rate(name) and name in options.adapters and options.choose_learning_rate
        ):
            raise ValueError(
                f"--choose-for {name} needs --choose-learning-rate, and an adapter of that name "
                "with a learning rate"
            )
    if options.learning_rate and options.choose_learning_rate:
        raise ValueError("--learning-rate and --choose-learning-rate exclude each other")
    if options.severities and (options.setting == "gradual" or options.layout == "arrays"):
        what = "--setting gradual" if options.setting == "gradual" else "--layout arrays"
        raise ValueError(f"{what} has severities of its own, leave --severities out")
    if options.choose_learning_rate and set(options.corruptions) & set(data.VALIDATION):
        raise ValueError(
            "a learning rate chosen on the validation corruptions is not tested on them"
        )
    if options.save_examples:
        report.check_examples(options.adapters, options.tnt)
    number, slash, count = options.worker.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--worker is {options.worker!r}, expected i/n with i below n, as 0/2")
    if options.choose_learning_rate and int(count) > 1:
        raise ValueError("--choose-learning-rate is for one machine, leave --worker out")
    return int(number), int(count)


def open_source(options: Options, root: str, model: jaxtta.Classifier) -> data.Source:
    """Open the images that the options name."""
    names, folders = options.class_names, ()
    if len(names) == 1 and options.layout == "folder":  # a file of them, maybe by folder
        folders = data.image_folder(root).class_names
    names = data.given_class_names(names, folders)
    return data.open_source(options.layout, root, model.preprocessing, names)


def choose_severities(options: Options) -> tuple[int, ...]:
    """The severities asked for, or what suits the data."""
    if options.setting == "gradual":
        return (1, 2, 3, 4, 5)
    return options.severities or (evaluate.severity_of(options.layout, options.data),)


def lay_out(
    options: Options,
    source: data.Source,
    setting: str,
    corruptions: tuple[str, ...],
    severities: tuple[int, ...],
) -> list[data.Stream]:
    """The streams of all seeds."""
    return [
        stream
        for seed in options.seeds
        for stream in data.make_streams(
            setting,
            corruptions,
            severities,
            source.labels,
            order=options.order,
            seed=seed,
            limit=options.limit,
            concentration=options.concentration,
        )
    ]


def choose(
    name: str,
    options: Options,
    model: jaxtta.Classifier,
    params: jaxtta.models.Params,
    task: jaxtta.models.Task | None,
    settings: dict,
    **running: int | None,
) -> evaluate.Choice:
    """Choose an adapter's learning rate on the validation corruptions, and say so."""
    source = open_source(options, options.validation or options.data, model)
    severities = choose_severities(dataclasses.replace(options, setting="reset_each_shift"))
    streams = lay_out(options, source, "reset_each_shift", data.VALIDATION, severities)
    for stream in streams:
        source.check(stream.segments[0])
    choice = evaluate.choose_learning_rate(
        name,
        lambda rate: evaluate.make_adapter(name, model, task, setup_of(options), rate),
        options.choose_learning_rate,
        params,
        data.Batches(source, tuple(streams), options.batch_size),
        evaluate.Results(
            options.output / "validation",
            settings | evaluate.fingerprints(source, params) | {"setting": "reset_each_shift"},
            evaluate.about(data=options.data, model=options.model),
        ),
        **running,
    )
    whose = "other images" if options.validation else "the images that are tested"
    choice = choice._replace(chosen_on=f"{choice.chosen_on}; {whose}, with their labels")
    figures = ", ".join(f"{rate:g}: {100 * top1:.2f} %" for rate, top1 in choice.accuracies.items())
    print(f"{name}: learning rate {choice.rate:g}, chosen on {choice.chosen_on} ({figures})")
    return choice


def describe(options: Options, severities: tuple[int, ...], templates: tuple[str, ...]) -> dict:
    """The settings that decide every figure, for the result files."""
    left_out = set(LEFT_OUT)
    if options.setting == "reset_each_shift":
        left_out |= {"corruptions", "severities"}  # each is a stream of its own
    settings = dataclasses.asdict(options) | {"templates": templates, "severities": severities}
    return {name: value for name, value in settings.items() if name not in left_out}


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
