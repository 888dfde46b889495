"""Groups of options that several commands share.

    @dataclasses.dataclass(frozen=True)
    class Options:
        run: RunOptions
        model: ModelOptions = ModelOptions()

A group's name is its title in the help text and no part of its options: `--model`, not
`--model.model`.
"""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax.numpy as jnp
import tyro

from jaxtta import assets, data, evaluate
from jaxtta.adapters import TNTConfig
from jaxtta.data.folders import class_folders
from jaxtta.models import Classifier, Params, load

Group = TypeVar("Group")


@typing.dataclass_transform(frozen_default=True)
def group(cls: type[Group]) -> type[Group]:
    """Make a frozen dataclass, a group of options without a prefix."""
    bare = tyro.conf.arg(prefix_name=False)
    cls.__annotations__ = {name: Annotated[x, bare] for name, x in cls.__annotations__.items()}
    return dataclasses.dataclass(frozen=True)(cls)


@group
class ModelOptions:
    """The model and its prompts."""

    model: str = str(assets.MODEL)
    """Folder or hub id of a CLIP, SigLIP or supervised ViT (default: the bundled demo model)."""
    templates: tuple[str, ...] = ()
    """Prompt templates with {} for the class; several are averaged. "imagenet" = CLIP's 80,
    "usual" = those of the layout (default)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the matrix products."""

    def load(self) -> tuple[Any, Params]:
        """The model and its parameters."""
        return load(self.model, compute_dtype=jnp.dtype(self.compute_dtype))

    def templates_for(self, layout: str) -> tuple[str, ...]:
        """The templates in full; `layout` has usual ones."""
        usual = data.templates_for(layout)
        named = {"usual": usual, "imagenet": data.imagenet_templates()}
        found = [text for given in self.templates for text in named.get(given, (given,))]
        return tuple(found) or tuple(usual)


@group
class DataOptions:
    """The images."""

    data: str = str(assets.IMAGES)
    """Folder or file of images, or NAME:SPLIT for tensorflow-datasets (default: 2,000 bundled
    CIFAR-10 test images)."""
    layout: str = "folder"
    """folder (clean images by class), imagenet, imagenet-c, cifar-c, arrays (<corruption>.npy and
    labels.npy), tfds, or the name of another dataset; an unknown name lists all. Clean images are
    corrupted on the fly."""
    class_names: tuple[str, ...] = ()
    """Names for the prompts, in label order, or one .json or .txt file with them (default: those
    of the layout; arrays have none)."""
    ids: str | None = None
    """Use the images of this list only: a file with a CLASS_FOLDER/FILE a line, or imagenet-c-5000
    (RobustBench's)."""
    max_images: int | None = None
    """Use at most so many images, sampled with the seed."""

    def open(self, model: Classifier, root: str | None = None) -> "data.Benchmark":
        """The images by domain; `root` is another folder of the same layout."""
        root = root or self.data
        names = class_names_of(self.class_names, self.layout, root)
        found = data.open_benchmark(self.layout, root, model.preprocessing, names)
        return data.listed_subset(found, self.ids) if self.ids else found


@group
class StreamOptions:
    """The order in which an adapter sees the images."""

    corruptions: tuple[str, ...] = ()
    """Corruptions, or clean (default: the 15 of ImageNet-C; clean for natural shifts)."""
    severities: tuple[int, ...] = ()
    """1 to 5 (default: 5; 1 on the bundled 32-pixel images; all if gradual)."""
    setting: Literal["reset_each_shift", "continual", "gradual", "mixed"] = "reset_each_shift"
    """Reset the adapter at each corruption; one stream through all; through all, severity rising
    and falling; all interleaved."""
    order: Literal["shuffled", "stored", "correlated", "dirichlet"] = "shuffled"
    """correlated: sorted by class. dirichlet: classes come in waves."""
    concentration: float = 0.1
    """Of the Dirichlet order; smaller is closer to sorted by class."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of order, corruptions and views; one run each."""
    batch_size: int = 100
    """Images per step."""

    def check(self) -> None:
        """Raise a ValueError for invalid options."""
        evaluate.require_distinct(seeds=self.seeds)
        for name in ("corruptions", "severities"):
            if getattr(self, name):
                evaluate.require_distinct(**{name: getattr(self, name)})
        evaluate.require_at_least(seeds=(min(self.seeds), 0), batch_size=(self.batch_size, 1))


@group
class AdapterOptions:
    """The methods."""

    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    """zero_shot, tent, batclip, tnt or mgtta, with settings (tent:lr=1e-4, tnt:steps=3,
    mgtta:optimizer=sgd), or your function package.module:function."""
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    """Optimiser settings of TENT's and BATCLIP's papers."""
    tnt: TNTConfig = TNTConfig()
    """TNT's settings."""
    mgtta: evaluate.MGTTAConfig = evaluate.MGTTAConfig()
    """MGTTA's settings; the default files are for the bundled demo model."""
    canvas: int | None = None
    """Side in pixels to which TNT's full-size images are padded or shrunk (default: the longest
    side in a sample, at most 512)."""

    @property
    def config(self) -> evaluate.AdapterConfig:
        """The settings of the adapters."""
        return evaluate.AdapterConfig(self.preset, self.tnt, self.mgtta)


@group
class TuneOptions:
    """Learning rates, selected on four corruptions that are never tested."""

    tune_learning_rates: tuple[float, ...] = ()
    """Candidates; each adapter gets the one of the highest accuracy."""
    tune_adapters: tuple[str, ...] = ()
    """Select for these adapters only (default: all with a learning rate)."""
    validation: str | None = None
    """Other images of the same layout to select on (default: the test images, with their
    labels)."""


@group
class RunOptions:
    """Where results go and how they are computed."""

    output: Path
    """Folder for the results; a run that was stopped goes on from there."""
    workers: int = 1
    """Processes that read images; 0 = main process."""
    shard: str = "0/1"
    """Part of the streams for this machine, such as 0/4; put the folders together afterwards."""
    checkpoint_every: int | None = None
    """Batches between two checkpoints within a stream."""
    trust_data: bool = False
    """Do not check that the images of earlier results are unchanged."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Log each result there too."""
    dry_run: bool = False
    """Print streams, images and an estimate of time and memory; compute no results."""
    debug: bool = False
    """Show tracebacks."""

    def check(self) -> tuple[int, int]:
        """Raise a ValueError for invalid options; return the shard's number and their count."""
        evaluate.require_at_least(
            workers=(self.workers, 0), checkpoint_every=(self.checkpoint_every, 1)
        )
        number, slash, count = self.shard.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(f"--shard is {self.shard!r}, expected i/n with i below n")
        return int(number), int(count)


def class_names_of(given: Sequence[str], layout: str, root: str) -> tuple[str, ...]:
    """The class names of an option, or of its file; empty for the layout's own."""
    folders = class_folders(root) if given and layout == "folder" and Path(root).is_dir() else ()
    return data.given_class_names(given, [folder.name for folder in folders])
