r"""How much does adaptation gain on corrupted images?

    python experiments/corruption_sweep.py --output runs/demo

runs zero-shot CLIP, TENT and BATCLIP on 15 corruptions of the bundled images with the bundled demo
model, prints the table and writes `report.html`, `summary.csv`, plots and one JSON file per stream.
Rerunning the command computes only missing results. Images that cannot be read are left out, named
and counted; the exit code is 0 then too, and 1 if a stream has none that can be read. Other images
and models:

    # your own images in folders by class, corrupted on the fly
    python experiments/corruption_sweep.py --data FOLDER --model openai/clip-vit-base-patch16 \
        --preset imagenet-c --output runs/own
    # ImageNet-C's 5,000 images of published tables (docs/published.md has their protocols)
    python experiments/corruption_sweep.py --layout imagenet-c --data IMAGENET-C \
        --ids imagenet-c-5000 --model openai/clip-vit-base-patch16 --preset imagenet-c \
        --batch-size 64 --output runs/imagenet-c-5000
    # all of its images, one stream through all corruptions, three seeds
    python experiments/corruption_sweep.py --layout imagenet-c --data IMAGENET-C \
        --model openai/clip-vit-base-patch16 --preset imagenet-c --batch-size 64 \
        --setting continual --seeds 1 2 3 --checkpoint-every 50 --output runs/imagenet-c
    # CIFAR-10-C's arrays
    python experiments/corruption_sweep.py --layout cifar-c --data CIFAR-10-C --output runs/cifar
    # on two machines: one runs --worker 0/2, the other --worker 1/2; merge their folders
    # and run once more without --worker for the report
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

import jaxtta
from jaxtta import assets, cli, data, evaluate, report
from jaxtta.adapters import TNTConfig
from jaxtta.data import COMMON

LEFT_OUT = (
    *("output", "worker", "workers", "checkpoint_every", "save_predictions", "debug"),
    "trust_data",
    *("adapters", "seeds"),  # select the cells, do not change their content
    *("learning_rate", "choose_learning_rate", "choose_for", "validation"),  # per adapter
    *("tnt", "mgtta", "canvas"),
    "save_examples",
    *("data", "model", "class_names", "ids"),  # fingerprints of the content are compared
)
"""Options that may differ between runs in the same folder."""
CORRUPTED = ("folder", "imagenet", "tfds", "imagenet-c", "cifar-c", "arrays")


@dataclasses.dataclass(frozen=True)
class Options:
    """A sweep of adapters over corruptions."""

    output: Path
    """Folder for the results; created if missing."""
    data: str = str(assets.IMAGES)
    """The images: a folder, or NAME:SPLIT for tensorflow-datasets (default: 2,000 bundled
    CIFAR-10 test images)."""
    layout: str = "folder"
    """Dataset layout: folder (clean images in class folders), imagenet (wnid folders), imagenet-c,
    cifar-c (five severities stacked), arrays (<corruption>.npy and labels.npy), tfds, or the name
    of a natural or cross-dataset set; the error for an unknown name lists all. Images of layout
    folder are turned upright by their EXIF orientation and laid over white; those of the others are
    read as they are stored, as in published results."""
    class_names: tuple[str, ...] = ()
    """Class names for the prompts, in label order, or one file with them: .json (a list, or an
    object from folder name to class name) or text with one name per line. Default: the layout's
    names; required with arrays."""
    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP, SigLIP or supervised ViT checkpoint (default: the demo model)."""
    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    """Adapters to run: zero_shot, tent, batclip, tnt (or tnt-3, with three steps), mgtta, and
    mgtta-sgd and mgtta-adam with other optimisers for the same objective. A learning rate can be
    appended to a name: tent@1e-4."""
    corruptions: tuple[str, ...] = ()
    """Corruptions to run; may include "clean". Default: the 15 ImageNet-C corruptions; "clean" for
    natural shifts (pass it yourself for ImageNet-A, -R and -Sketch with layout imagenet)."""
    severities: tuple[int, ...] = ()
    """Severities, 1 to 5. Default: 5; 1 on the bundled images, where it is about as strong as
    CIFAR-10-C's 5 (the corruptions are designed for 224-pixel images); all five if gradual."""
    setting: Literal["reset_each_shift", "continual", "gradual", "mixed"] = "reset_each_shift"
    """reset_each_shift: the adapter is reset before each corruption. continual: one stream through
    all corruptions. gradual: each rises to severity 5 and falls again. mixed: interleaved."""
    order: Literal["shuffled", "stored", "correlated", "dirichlet"] = "shuffled"
    """Order of the images in a stream. correlated: sorted by class; dirichlet: Dirichlet-imbalanced
    over time."""
    concentration: float = 0.1
    """Concentration of the Dirichlet order; smaller values are closer to sorted by class."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of the order, of corruptions made on the fly and of TNT's views; one run per seed."""
    ids: str | None = None
    """Use these images only, of a text file with one CLASS_FOLDER/FILE a line; "imagenet-c-5000" =
    RobustBench's 5,000 images a corruption, which many published ImageNet-C tables read."""
    limit: int | None = None
    """Use at most this many images, sampled with the seed."""
    templates: tuple[str, ...] = ()
    """Prompt templates; several are averaged. "imagenet" = CLIP's 80 templates. Default: the
    usual one of the layout."""
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    """Optimiser settings of the papers (TENT's paper has two: CIFAR and ImageNet)."""
    learning_rate: float | None = None
    """Use this learning rate instead of the preset: TENT with SGD and momentum, BATCLIP with AdamW,
    MGTTA with the optimiser in the adapter's name."""
    choose_learning_rate: tuple[float, ...] = ()
    """Candidate learning rates; each adapter's is selected on the four validation corruptions."""
    choose_for: tuple[str, ...] = ()
    """Select a learning rate for these adapters only; the others keep the preset."""
    validation: str | None = None
    """Separate images of the same layout for the selection (default: the test images, with their
    labels)."""
    tnt: TNTConfig = dataclasses.field(default_factory=TNTConfig)
    """TNT's settings."""
    mgtta: evaluate.MGTTAConfig = dataclasses.field(default_factory=evaluate.MGTTAConfig)
    """MGTTA's settings. The default files are for the bundled demo model."""
    canvas: int | None = None
    """Size in pixels to which TNT's full-size images are zero-padded; larger images are shrunk
    first. Default: the largest side in a sample of the images, at most 512."""
    save_examples: int = 0
    """Number of images to draw whose prediction TNT fixed or broke."""
    batch_size: int = 100
    """Images per batch."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products."""
    workers: int = 1
    """Processes that decode and corrupt images; 0 = main process."""
    worker: str = "0/1"
    """Index of this machine and number of machines that share the streams, for example 0/4."""
    checkpoint_every: int | None = None
    """Batches between two checkpoints within a stream; interrupted runs resume there."""
    save_predictions: bool = False
    """Save an .npz with per-image predictions for every stream."""
    trust_data: bool = False
    """Take earlier results in the folder without checking that the stored images have not changed
    (by their bytes; from 512 MB on by sizes and times, which a copy may change)."""
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
    running = {
        "workers": options.workers,
        "checkpoint_every": options.checkpoint_every,
        "trust_data": options.trust_data,
    }
    found = evaluate.fingerprints(source, params, model, task)
    evaluate.check_mgtta_files(options.adapters, options.mgtta, found["weights"])
    settings = describe(options, severities, templates) | found
    about = evaluate.about(model, data=options.data, model=options.model)
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
            f"{len(cells)} cells in {options.output}; when all workers have finished, merge their"
        )
        print("folders and run the same command without --worker to write the report")
        return
    examples = []
    if options.save_examples:
        examples = report.find_examples(
            *(cells, cutting[0], batches, options.save_examples, model, params, task),
            evaluate.tnt_config_of(cutting[0], options.tnt),
        )
    images = len(np.unique(streams[0].items[:, 1]))
    title = f"{Path(options.model).name} on {Path(options.data).name}, {options.setting}, "
    title += f"{options.order}, {images} images"
    report.conclude(cells, options.output, title, report.samples_of(batches), examples)


def setup_of(options: Options) -> evaluate.AdapterConfig:
    """The adapters' settings."""
    return evaluate.AdapterConfig(options.preset, options.tnt, options.mgtta)


def check(options: Options) -> tuple[int, int]:
    """Raise a ValueError for invalid options; return this worker's index and count."""
    evaluate.check_adapters(options.adapters)
    evaluate.require_distinct(adapters=options.adapters, seeds=options.seeds)
    for name in ("corruptions", "severities"):
        if getattr(options, name):
            evaluate.require_distinct(**{name: getattr(options, name)})
    evaluate.require_at_least(
        seeds=(min(options.seeds), 0),
        batch_size=(options.batch_size, 1),
        workers=(options.workers, 0),
        checkpoint_every=(options.checkpoint_every, 1),
        canvas=(options.canvas, 1),
        save_examples=(options.save_examples, 0),
    )
    evaluate.require_positive(
        learning_rate=(options.learning_rate,), choose_learning_rate=options.choose_learning_rate
    )
    for name in options.choose_for:
        if not (
            evaluate.has_rate(name) and name in options.adapters and options.choose_learning_rate
        ):
            raise ValueError(
                f"--choose-for {name} needs --choose-learning-rate and an adapter of that name "
                "with a learning rate"
            )
    if options.learning_rate and options.choose_learning_rate:
        raise ValueError("--learning-rate and --choose-learning-rate exclude each other")
    if options.severities and (options.setting == "gradual" or options.layout == "arrays"):
        what = "--setting gradual" if options.setting == "gradual" else "--layout arrays"
        raise ValueError(f"{what} has fixed severities, omit --severities")
    if options.choose_learning_rate and set(options.corruptions) & set(data.VALIDATION):
        raise ValueError(
            "the validation corruptions select learning rates and cannot be tested too"
        )
    if options.save_examples:
        report.check_examples(options.adapters, options.tnt)
    number, slash, count = options.worker.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--worker is {options.worker!r}, expected i/n with i below n")
    if options.choose_learning_rate and int(count) > 1:
        raise ValueError("--choose-learning-rate runs on one machine, omit --worker")
    return int(number), int(count)


def open_source(options: Options, root: str, model: jaxtta.Classifier) -> data.Source:
    """Open the images of the options."""
    names = cli.class_names_of(options.class_names, options.layout, root)
    source = data.open_source(options.layout, root, model.preprocessing, names)
    return data.listed_part(source, options.ids) if options.ids else source


def choose_severities(options: Options) -> tuple[int, ...]:
    """The given severities, or the default for the data."""
    if options.setting == "gradual":
        return (1, 2, 3, 4, 5)
    return options.severities or (evaluate.default_severity(options.layout, options.data),)


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
    **running: Any,
) -> evaluate.Choice:
    """Select an adapter's learning rate on the validation corruptions and print it."""
    source = open_source(options, options.validation or options.data, model)
    severities = choose_severities(dataclasses.replace(options, setting="reset_each_shift"))
    streams = lay_out(options, source, "reset_each_shift", data.VALIDATION, severities)
    for stream in streams:
        source.check(stream.segments[0])
    own = {
        tried: evaluate.own_settings(tried, setup_of(options))
        for tried in evaluate.rate_names(name, options.choose_learning_rate)
    }
    choice = evaluate.choose_learning_rate(
        name,
        lambda rate: evaluate.make_adapter(name, model, task, setup_of(options), rate),
        options.choose_learning_rate,
        params,
        data.Batches(source, tuple(streams), options.batch_size),
        evaluate.Results(
            options.output / "validation",
            settings
            | evaluate.fingerprints(source, params, model, task)
            | {"setting": "reset_each_shift"},
            evaluate.about(model, data=options.data, model=options.model),
            own,
        ),
        **running,
    )
    whose = "separate images" if options.validation else "the test images"
    choice = choice._replace(chosen_on=f"{choice.chosen_on}; {whose}, with their labels")
    figures = ", ".join(f"{rate:g}: {100 * top1:.2f} %" for rate, top1 in choice.accuracies.items())
    print(f"{name}: learning rate {choice.rate:g}, chosen on {choice.chosen_on} ({figures})")
    return choice


def describe(options: Options, severities: tuple[int, ...], templates: tuple[str, ...]) -> dict:
    """The settings that affect the results, for the result files."""
    left_out = set(LEFT_OUT)
    if options.setting == "reset_each_shift":
        left_out |= {"corruptions", "severities"}  # one stream each
    settings = dataclasses.asdict(options) | {"templates": templates, "severities": severities}
    return {name: value for name, value in settings.items() if name not in left_out}


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
