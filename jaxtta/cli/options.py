"""Groups of options that several commands share; comments at their fields are the help text."""

import dataclasses
import os
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import tyro

from jaxtta import assets, data, evaluate
from jaxtta.adapters import TNTConfig
from jaxtta.data import Benchmark
from jaxtta.models import Params, load

Group = TypeVar("Group")


@typing.dataclass_transform(frozen_default=True)
def group(cls: type[Group]) -> type[Group]:
    """Make a frozen dataclass of options without a prefix, `--model` and not `--model.model`."""

    def default(text: str) -> str:  # empty ones and paths are left out
        return "" if text in ("", "None", "False") or "/" in text else f"(default: {text})"

    for name, kind in cls.__annotations__.items():
        first, *others = *typing.get_args(kind), None
        optional = isinstance(first, type) and type(None) in others
        metavar = first.__name__.upper() if optional else None
        hint = default if name in vars(cls) else None  # else required
        shown = tyro.conf.arg(prefix_name=False, metavar=metavar, help_behavior_hint=hint)
        cls.__annotations__[name] = Annotated[kind, shown]
    return dataclasses.dataclass(frozen=True)(cls)


@group
class ModelOptions:
    """The model and its prompts."""

    model: str = str(assets.MODEL)  # folder or hub id of a CLIP, SigLIP or ViT (default: the demo)
    # prompts with {} for the class, averaged; "imagenet": CLIP's 80, "usual": those of the layout
    templates: tuple[str, ...] = ("usual",)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the matrix products
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    scan_blocks: bool = False  # blocks as one loop: deep models compile faster for TPU
    fused_attention: bool = False  # cuDNN's attention on NVIDIA GPUs, for bfloat16

    def load(self) -> tuple[Any, Params]:
        """The model and its parameters."""
        more: dict[str, Any] = {"scan": self.scan_blocks, "fused_attention": self.fused_attention}
        dtype = jnp.dtype(self.compute_dtype)
        return load(self.model, compute_dtype=dtype, remat=self.remat, **more)

    def templates_for(self, layout: str) -> tuple[str, ...]:
        """The templates in full."""
        named = {"usual": data.templates_for(layout), "imagenet": data.imagenet_templates()}
        return tuple(one for text in self.templates for one in named.get(text, (text,)))


@group
class DataOptions:
    """The images."""

    data: str = str(assets.IMAGES)  # folder, or NAME:SPLIT of tfds (default: bundled CIFAR-10)
    # folder (clean images by class), imagenet, imagenet-c, cifar-c, arrays (<corruption>.npy and
    # labels.npy), arrayrecord (of tpu/data_to_array_record.py), tfds, …; an unknown name lists all.
    # Clean images are corrupted as they are read
    layout: str = "folder"
    class_names: tuple[str, ...] = ()  # for the prompts, in label order, or a .json or .txt of them
    ids: str | None = None  # only images of a file of CLASS_FOLDER/FILE lines, or imagenet-c-5000
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
    seeds: tuple[int, ...] = (1,)  # of order, corruptions and TNT's views; each seed is a run
    batch_size: int = 100  # images per step


@group
class StreamOptions(OrderOptions):
    """The streams of images."""

    corruptions: tuple[str, ...] = ()  # or clean (default: ImageNet-C's 15; clean for shifts)
    severities: tuple[int, ...] = ()  # 1 to 5 (default: 5, but 1 on the small bundled images)
    # reset at each corruption; one stream through all of them; the same with all severities, rising
    # and falling; one stream of all mixed
    setting: Literal["reset_each_shift", "continual", "gradual", "mixed"] = "reset_each_shift"


@group
class AdapterOptions:
    """The methods."""

    # zero_shot, tent, batclip, tnt, mgtta, …, with settings (tent:lr=1e-4, mgtta:optimizer=sgd), a
    # guard (guarded:batclip), or a function of yours, package.module:function
    adapters: tuple[str, ...] = ("zero_shot", "tent", "batclip")
    # optimiser settings of TENT's and BATCLIP's papers
    preset: Literal["cifar10-c", "cifar100-c", "imagenet-c"] = "cifar10-c"
    canvas: int | None = None  # side to which TNT's images are padded or shrunk (default: ≤ 512)
    tnt: TNTConfig = TNTConfig()  # TNT's settings
    mgtta: evaluate.MGTTAConfig = evaluate.MGTTAConfig()  # its files are for the demo model

    @property
    def config(self) -> evaluate.AdapterConfig:
        """The settings of the adapters."""
        return evaluate.AdapterConfig(self.preset, self.tnt, self.mgtta)


@group
class TuneOptions:
    """Learning rates, selected on four corruptions that are never tested."""

    tune_learning_rates: tuple[float, ...] = ()  # candidates; the most accurate one is taken
    tune_adapters: tuple[str, ...] = ()  # only these adapters (default: all with a learning rate)
    validation: str | None = None  # other images of this layout (default: the test images)


@group
class RunOptions:
    """Where the results go, and how they are computed."""

    # folder, or a URL such as gs://BUCKET/runs; a run that was stopped goes on where it was
    output: Path
    # threads that decode files, or processes that corrupt images; 0 for one thread
    workers: int = 1
    devices: int | Literal["all"] = "all"  # how many to use, of this machine's
    # each device has streams of its own, or all share each batch, also those of other hosts that
    # JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID join
    split: evaluate.Split = "streams"
    shard: str = "0/1"  # this machine's part, such as 0/4 to 3/4 on four (default: 0/1, all)
    checkpoint_every: int | None = None  # batches between two checkpoints within a stream
    trust_data: bool = False  # take earlier results without checking that the images are unchanged
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()  # log every result there too
    dry_run: bool = False  # print streams, images, estimated time and memory, without tuning; stop

    @property
    def part(self) -> tuple[int, int]:
        """The shard's number and their count."""
        number, _, count = self.shard.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ValueError(f"--shard is {self.shard!r}, expected i/n with i below n")
        return int(number), int(count)

    def join_hosts(self) -> int:
        """Join other hosts' processes if JAX_NUM_PROCESSES is set, on TPU pods that alone.

        Returns this process's number.
        """
        count, number = (os.environ.get(f"JAX_{key}") for key in ("NUM_PROCESSES", "PROCESS_ID"))
        if count and self.split == "batch":
            if not f"{count}{number or 0}".isdecimal():
                said = f"JAX_NUM_PROCESSES is {count!r} and JAX_PROCESS_ID {number!r}"
                raise ValueError(f"{said}, expected numbers")
            own = int(number) if number else None  # None for what JAX finds itself
            jax.distributed.initialize(num_processes=int(count), process_id=own)
            return jax.process_index()
        return 0

    @property
    def how(self) -> dict[str, Any]:
        """Arguments of `evaluate.sweep`."""
        count = jax.device_count() if self.devices == "all" else self.devices
        names = ("workers", "checkpoint_every", "trust_data", "split")
        return {name: getattr(self, name) for name in names} | {"devices": count}
