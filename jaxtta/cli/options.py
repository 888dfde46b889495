"""Groups of options that several commands share; the comment of a field is its help text.

@group
class Options:
    run: RunOptions  # its title in the help text, but no part of the options: --output
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
    """Make a frozen dataclass of options without a prefix; comments or "Attributes:" explain."""

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
    """The model and its prompts."""

    # folder or hub id of a CLIP, SigLIP or supervised ViT (default: the demo model)
    model: str = str(assets.MODEL)
    # prompts with {} for the class, averaged; "imagenet": CLIP's 80, "usual": those of the layout
    templates: tuple[str, ...] = ("usual",)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the matrix products

    def load(self) -> tuple[Any, Params]:
        """The model and its parameters."""
        return load(self.model, compute_dtype=jnp.dtype(self.compute_dtype))

    def templates_for(self, layout: str) -> tuple[str, ...]:
        """The templates in full."""
        named = {"usual": data.templates_for(layout), "imagenet": data.imagenet_templates()}
        return tuple(one for text in self.templates for one in named.get(text, (text,)))


@group
class DataOptions:
    """The images."""

    # a folder, or NAME:SPLIT of tensorflow-datasets (default: bundled CIFAR-10 images)
    data: str = str(assets.IMAGES)
    # folder (clean images by class), imagenet, imagenet-c, cifar-c, arrays (<corruption>.npy and
    # labels.npy), tfds, …; an unknown name lists all. Clean images are corrupted as they are read
    layout: str = "folder"
    class_names: tuple[str, ...] = ()  # for the prompts, in label order, or a .json or .txt of them
    # only the images of a list: a file with a CLASS_FOLDER/FILE a line, or imagenet-c-5000,
    # RobustBench's
    ids: str | None = None
    max_images: int | None = None  # use at most so many images, sampled with the seed

    def open(self, model: Any, root: str | None = None) -> Benchmark:
        """The images by domain; `root` is another folder of the same layout."""
        root = root or self.data
        found = data.open_benchmark(self.layout, root, model.preprocessing, self.class_names)
        return data.listed_subset(found, self.ids) if self.ids else found


@group
class OrderOptions:
    """The order in which an adapter sees the images."""

    # correlated is sorted by class; in dirichlet, classes come in waves
    order: Literal["shuffled", "stored", "correlated", "dirichlet"] = "shuffled"
    concentration: float = 0.1  # of the Dirichlet order; smaller is closer to sorted by class
    # of the order, of corruptions and of TNT's views; each seed is a run
    seeds: tuple[int, ...] = (1,)
    batch_size: int = 100  # images per step


@group
class StreamOptions(OrderOptions):
    """The streams of images."""

    # may include clean (default: ImageNet-C's 15; clean for natural shifts)
    corruptions: tuple[str, ...] = ()
    # 1 to 5 (default: 5; 1 on the bundled images, which are small; all in the setting gradual)
    severities: tuple[int, ...] = ()
    # reset at each corruption; one stream through all of them; the same with a severity that rises
    # and falls; one stream of all mixed
    setting: Literal["reset_each_shift", "continual", "gradual", "mixed"] = "reset_each_shift"


@group
class AdapterOptions:
    """The methods."""

    # zero_shot, tent, batclip, tnt or mgtta, with settings (tent:lr=1e-4, tnt:steps=3,
    # mgtta:optimizer=sgd), or a function of yours, package.module:function
    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    # optimiser settings of TENT's and BATCLIP's papers
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    tnt: TNTConfig = TNTConfig()
    # MGTTA's settings; the default files are for the bundled demo model
    mgtta: evaluate.MGTTAConfig = evaluate.MGTTAConfig()
    canvas: int | None = (
        None  # side to which TNT's images are padded or shrunk (default: up to 512)
    )

    @property
    def config(self) -> evaluate.AdapterConfig:
        """The settings of the adapters."""
        return evaluate.AdapterConfig(self.preset, self.tnt, self.mgtta)


@group
class TuneOptions:
    """Learning rates, selected on four corruptions that are never tested."""

    # candidates; each adapter gets the one of the highest accuracy
    tune_learning_rates: tuple[float, ...] = ()
    # select for these adapters only (default: all with a learning rate)
    tune_adapters: tuple[str, ...] = ()
    # other images of the same layout to select on (default: the test images)
    validation: str | None = None


@group
class RunOptions:
    """Where the results go, and how they are computed."""

    output: Path  # folder for the results; a run that was stopped goes on where it was
    workers: int = 1  # processes that read images; 0 to read in the main process
    shard: str = "0/1"  # this machine's part, such as 0/4 to 3/4 on four (default: 0/1, all)
    checkpoint_every: int | None = None  # batches between two checkpoints within a stream
    trust_data: bool = False  # take earlier results without checking that the images are unchanged
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()  # log every result there too
    # print streams, images and an estimate of time and memory, without tuning and earlier results
    dry_run: bool = False
    debug: bool = False  # show tracebacks

    @property
    def part(self) -> tuple[int, int]:
        """The shard's number and their count."""
        number, _, count = self.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(f"--shard is {self.shard!r}, expected i/n with i below n")
        return int(number), int(count)

    @property
    def how(self) -> dict[str, Any]:
        """Arguments of `evaluate.sweep`."""
        names = ("workers", "checkpoint_every", "trust_data")
        return {name: getattr(self, name) for name in names}
