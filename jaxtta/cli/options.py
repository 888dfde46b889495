"""Groups of options that several commands share.

    @group
    class Options:
        run: RunOptions
        model: ModelOptions = ModelOptions()

A group's name is its title in the help text and no part of its options: `--model`, not
`--model.model`.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax.numpy as jnp
import tyro

from jaxtta import assets, data, evaluate
from jaxtta.adapters import TNTConfig
from jaxtta.data import Benchmark
from jaxtta.models import Params, load

Group = TypeVar("Group")


@typing.dataclass_transform(frozen_default=True)
def group(cls: type[Group]) -> type[Group]:
    """Make a frozen dataclass of options without a prefix; "Attributes:" is their help text."""

    def default(text: str) -> str:  # empty ones and paths are left out
        return "" if text in ("", "None", "False") or "/" in text else f"(default: {text})"

    for name, kind in cls.__annotations__.items():
        first, *others = *typing.get_args(kind), None
        metavar = first.__name__.upper() if type(None) in others else None
        hint = default if name in vars(cls) else None  # else required
        shown = tyro.conf.arg(prefix_name=False, metavar=metavar, help_behavior_hint=hint)
        cls.__annotations__[name] = Annotated[kind, shown]
    return dataclasses.dataclass(frozen=True)(cls)


@group
class ModelOptions:
    """The model and its prompts.

    Attributes:
        model: folder or hub id of a CLIP, SigLIP or supervised ViT (default: the demo model).
        templates: prompts with {} for the class, averaged; "imagenet" are CLIP's 80, "usual" those
            of the layout.
        compute_dtype: dtype of the matrix products.
    """

    model: str = str(assets.MODEL)
    templates: tuple[str, ...] = ("usual",)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def load(self) -> tuple[Any, Params]:
        """The model and its parameters."""
        return load(self.model, compute_dtype=jnp.dtype(self.compute_dtype))

    def templates_for(self, layout: str) -> tuple[str, ...]:
        """The templates in full."""
        named = {"usual": data.templates_for(layout), "imagenet": data.imagenet_templates()}
        return tuple(one for text in self.templates for one in named.get(text, (text,)))


@group
class DataOptions:
    """The images.

    Attributes:
        data: a folder, or NAME:SPLIT of tensorflow-datasets (default: bundled CIFAR-10 images).
        layout: folder (clean images by class), imagenet, imagenet-c, cifar-c, arrays
            (<corruption>.npy and labels.npy), tfds, …; an unknown name lists all. Clean images are
            corrupted as they are read.
        class_names: for the prompts, in label order, or a .json or .txt file of them.
        ids: use only the images of a list: a file with a CLASS_FOLDER/FILE a line, or
            imagenet-c-5000, RobustBench's.
        max_images: use at most so many images, sampled with the seed.
    """

    data: str = str(assets.IMAGES)
    layout: str = "folder"
    class_names: tuple[str, ...] = ()
    ids: str | None = None
    max_images: int | None = None

    def open(self, model: Any, root: str | None = None) -> Benchmark:
        """The images by domain; `root` is another folder of the same layout."""
        root = root or self.data
        found = data.open_benchmark(self.layout, root, model.preprocessing, self.class_names)
        return data.listed_subset(found, self.ids) if self.ids else found


@group
class OrderOptions:
    """The order in which an adapter sees the images.

    Attributes:
        order: correlated is sorted by class; in dirichlet, classes come in waves.
        concentration: of the Dirichlet order; smaller is closer to sorted by class.
        seeds: of the order, of corruptions and of TNT's views; each seed is a run.
        batch_size: images per step.
    """

    order: Literal["shuffled", "stored", "correlated", "dirichlet"] = "shuffled"
    concentration: float = 0.1
    seeds: tuple[int, ...] = (1,)
    batch_size: int = 100

    def streams(self, limit: int | None, *arguments: Any) -> list[data.Stream]:
        """The streams of all seeds, of at most `limit` images; `arguments` of `make_streams`."""
        evaluate.require_distinct(seeds=self.seeds)
        sizes = {"batch_size": (self.batch_size, 1), "max_images": (limit, 1)}
        evaluate.require_at_least(seeds=(min(self.seeds), 0), **sizes)
        named = {"order": self.order, "limit": limit, "concentration": self.concentration}
        made = [data.make_streams(*arguments, seed=seed, **named) for seed in self.seeds]
        return [stream for streams in made for stream in streams]

    def settings(self, limit: int | None) -> dict[str, Any]:
        """What identifies the order in a result."""
        used = {"concentration": self.concentration} if self.order == "dirichlet" else {}
        return {"order": self.order, "max_images": limit, **used}


@group
class StreamOptions(OrderOptions):
    """The streams of images.

    Attributes:
        corruptions: may include clean (default: ImageNet-C's 15; clean for natural shifts).
        severities: 1 to 5 (default: 5; 1 on the bundled images, which are small).
        setting: reset at each corruption; one stream through all of them; the same with a severity
            that rises and falls; one stream of all mixed.
    """

    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = ()
    setting: Literal["reset_each_shift", "continual", "gradual", "mixed"] = "reset_each_shift"


@group
class AdapterOptions:
    """The methods.

    Attributes:
        adapters: zero_shot, tent, batclip, tnt or mgtta, with settings (tent:lr=1e-4,
            tnt:steps=3, mgtta:optimizer=sgd), or a function of yours, package.module:function.
        preset: optimiser settings of TENT's and BATCLIP's papers.
        tnt: TNT's settings.
        mgtta: MGTTA's settings; the default files are for the bundled demo model.
        canvas: side to which TNT's full-size images are padded or shrunk (default: at most 512).
    """

    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    tnt: TNTConfig = TNTConfig()
    mgtta: evaluate.MGTTAConfig = evaluate.MGTTAConfig()
    canvas: int | None = None

    @property
    def config(self) -> evaluate.AdapterConfig:
        """The settings of the adapters."""
        return evaluate.AdapterConfig(self.preset, self.tnt, self.mgtta)


@group
class TuneOptions:
    """Learning rates, selected on four corruptions that are never tested.

    Attributes:
        tune_learning_rates: candidates; each adapter gets the one of the highest accuracy.
        tune_adapters: select for these adapters only (default: all with a learning rate).
        validation: other images of the same layout to select on (default: the test images).
    """

    tune_learning_rates: tuple[float, ...] = ()
    tune_adapters: tuple[str, ...] = ()
    validation: str | None = None


@group
class RunOptions:
    """Where the results go, and how they are computed.

    Attributes:
        output: folder for the results; a run that was stopped goes on where it was.
        workers: processes that read images; 0 to read in the main process.
        shard: this machine's part, such as 0/4 to 3/4 on four machines (default: 0/1, all).
        checkpoint_every: batches between two checkpoints within a stream.
        trust_data: take earlier results without checking that the images are unchanged.
        log: log every result there too.
        dry_run: print streams, images and an estimate of time and memory, and stop.
        debug: show tracebacks.
    """

    output: Path
    workers: int = 1
    shard: str = "0/1"
    checkpoint_every: int | None = None
    trust_data: bool = False
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    dry_run: bool = False
    debug: bool = False

    @property
    def part(self) -> tuple[int, int]:
        """The shard's number and their count."""
        number, slash, count = self.shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(f"--shard is {self.shard!r}, expected i/n with i below n")
        return int(number), int(count)

    @property
    def how(self) -> dict[str, Any]:
        """Arguments of `evaluate.sweep`."""
        every = self.checkpoint_every
        evaluate.require_at_least(workers=(self.workers, 0), checkpoint_every=(every, 1))
        return {"workers": self.workers, "checkpoint_every": every, "trust_data": self.trust_data}
