r"""CIFAR-10-C's corruptions, at any severity, of CIFAR-10 images that you have.

    python experiments/make_cifar10_c.py --output DATA
    python experiments/make_cifar10_c.py --data cifar-10-batches-py --severity 3 --output DATA

`DATA/test` gets the 15 corruptions and `DATA/meta_train` the four for validation, of other images:
a `<corruption>.npy` each, `clean.npy` and `labels.npy`, which `jaxtta sweep --layout arrays`,
leaderboard.py and guard.py read. `--data` is a folder of class folders, `cifar-10-batches-py` (of
it the test images) or a file in it, an `.npz` file of images, labels and class_names, a `.npy` file
with `labels.npy` beside it, a folder as `DATA/test`, or a prepared folder or NAME:SPLIT of
tensorflow-datasets. Each image has a seed of its own. A run that was stopped goes on.

`--compare` takes another such folder, and the images whose clean pixels both have:

    python experiments/make_cifar10_c.py --data OTHER/test --validation-data OTHER/meta_train \
        --output DATA --compare OTHER --table docs/results/data.csv

Each corruption gets a line: the mean absolute difference in grey levels, the share of equal values,
the PSNR of images that differ; the mean and the standard deviation of an image's difference from
the clean one, and the zero-shot accuracy, of these arrays and of the others; the difference of the
accuracies with its 95 % interval.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxtta import assets, bootstrap, cifar_pickles, cli, data, evaluate, io, models
from jaxtta.cli.options import ModelOptions, group
from jaxtta.corruptions import image_seed
from jaxtta.corruptions_cifar import SIDE, corrupt_all, difference
from jaxtta.data.datasets import prepare

PARTS = {"test": data.IMAGENET_C, "meta_train": data.IMAGENET_C_EXTRA}
CHUNK = 50  # images that a process corrupts at once


@group
class Options:
    """Corrupt CIFAR-10 images, and compare with others."""

    output: Path  # folder; what it has is not made again
    data: Path = assets.IMAGES  # the images (default: the bundled ones)
    validation_data: Path | None = None  # those of meta_train (default: some of the same)
    severity: Literal[1, 2, 3, 4, 5] = 5
    images: int | None = None  # of test, drawn with the seed (default: all that are left)
    validation_images: int | None = None  # (default: 500, or all of --validation-data)
    seed: int = 0
    workers: int = 0  # processes
    compare: Path | None = None  # another folder with test or meta_train
    table: Path | None = None  # of the comparison (default: data.csv in the output)
    model: ModelOptions = ModelOptions()  # for the comparison


def main(options: Options) -> None:
    """Make what is missing, and compare."""
    spawn = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(options.workers or 1, spawn) as pool:
        run = pool.map if options.workers else map
        for part, (dataset, numbers) in choose(options).items():
            make(options, part, dataset, numbers, run)
    print(f"arrays: {options.output}")
    if options.compare:
        table = pd.DataFrame(compared(options, options.compare))
        path = options.table or options.output / "data.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        io.write_text(path, table.to_csv(index=False, float_format="%.5f"))
        print(table.round(3).to_string(index=False), f"table: {path}", sep="\n")


def choose(options: Options) -> dict[str, tuple[data.Dataset, np.ndarray]]:
    """Both parts' images, as a dataset and increasing numbers of its images."""
    rng, test = np.random.default_rng(options.seed), open_images(options.data)
    left, count = rng.permutation(len(test)), options.validation_images
    if options.validation_data:
        other = open_images(options.validation_data)
        held = rng.permutation(len(other))[:count]
    else:
        other, (held, left) = test, np.split(left, [500 if count is None else count])
    chosen = {"test": (test, left[: options.images]), "meta_train": (other, held)}
    for (part, (_, own)), least in zip(chosen.items(), (options.images, count), strict=True):
        if len(own) < (least or 1):
            raise ValueError(f"{len(own)} images are left for {part}, expected {least or 'some'}")
    return {part: (dataset, np.sort(own)) for part, (dataset, own) in chosen.items()}


def open_images(path: Path) -> data.Dataset:
    """Open CIFAR-10 images of any layout."""
    names = data.CIFAR10_CLASSES
    batch = path / "test_batch" if (path / "test_batch").is_file() else path
    if batch.is_file() and batch.suffix != ".npz":
        arrays = batch.suffix == ".npy"
        read = (path, data.arrays.read_labels(path.parent)) if arrays else None
        dataset = data.ArrayDataset(*(read or cifar_pickles.read_batch(batch)), names, str(batch))
        dataset.check()
    elif (path / "labels.npy").is_file():
        dataset = data.open_dataset("arrays", path, names)
    else:
        stored = (path / "dataset_info.json").is_file() or (":" in path.name and not path.exists())
        dataset = data.open_dataset("tfds" if stored else "folder", path)
    if dataset.class_names != names:
        raise ValueError(f"{path}: classes are {dataset.class_names[:10]}, expected {names}")
    return dataset


def make(
    options: Options, part: str, dataset: data.Dataset, numbers: np.ndarray, run: Callable[..., Any]
) -> None:
    """Make those arrays of one part that are not there; a ValueError if the folder has others."""
    folder, images = options.output / part, [dataset[number] for number in numbers.tolist()]
    for number, image in zip(numbers.tolist(), images, strict=True):
        if image.shape != (SIDE, SIDE, 3):
            name = data.name_of(dataset, number)
            raise ValueError(f"{name}: is {image.shape}, CIFAR-10's images are {(SIDE, SIDE, 3)}")
    arrays = {data.CLEAN: np.stack(images), "labels": dataset.labels[numbers].astype(np.uint8)}
    settings = {"severity": options.severity, "seed": options.seed}
    settings |= {"images": io.digest_of([numbers, *arrays.values()])}
    about, others = folder / "made.json", any(folder.glob("*.npy"))
    found = io.read_json(about) if about.is_file() else {} if others else settings
    if found != settings:
        raise ValueError(f"{folder}: has arrays of other images or settings, choose another folder")
    io.write_json(about, settings)
    for name in (*arrays, *PARTS[part]):
        path, shape = folder / f"{name}.npy", arrays.get(name, arrays[data.CLEAN]).shape
        if is_whole(path, shape):
            continue
        if name not in arrays:
            seeds = [image_seed(options.seed, name, options.severity, n) for n in numbers.tolist()]
            starts = range(0, len(seeds), CHUNK)
            cut = [[x[n : n + CHUNK] for n in starts] for x in (arrays[data.CLEAN], seeds)]
            done = run(partial(corrupt_all, name=name, severity=options.severity), *cut)
            bar = tqdm(done, f"{part} {name}", len(starts), disable=None, leave=False)
        with io.atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, arrays[name] if name in arrays else np.concatenate([*bar]))


def is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file has an array of this shape."""
    try:
        return path.is_file() and np.load(path, "r").shape == shape
    except (ValueError, EOFError):
        return False


def compared(options: Options, other: Path) -> Iterator[dict[str, Any]]:
    """A line for each corruption that both folders have."""
    answer, common = zero_shot(options.model), 0
    for part, names in PARTS.items():
        places = options.output / part, other / part
        if not (places[1] / "clean.npy").is_file():
            continue
        clean, theirs = (np.load(place / "clean.npy") for place in places)
        rows = {image.tobytes(): number for number, image in enumerate(theirs)}
        known = np.asarray([rows.get(image.tobytes(), -1) for image in clean])
        here, labels = known >= 0, data.arrays.read_labels(places[0])[known >= 0]
        common += len(labels)
        for name in [x for x in names if len(labels) and (places[1] / f"{x}.npy").is_file()]:
            one, two = (np.load(place / f"{name}.npy") for place in places)
            if two.shape != theirs.shape:
                raise ValueError(
                    f"{places[1]}: {name}.npy is {two.shape}, clean.npy {theirs.shape}"
                )
            one, two = one[here], two[known[here]]
            answers = [answer(one)]
            answers += answers if np.array_equal(one, two) else [answer(two)]
            right = np.stack([x == labels for x in answers], 1)
            means = bootstrap.bootstrap(right, np.ones_like(right))
            low, high = bootstrap.interval(means[:, 0] - means[:, 1]) or (np.nan, np.nan)
            line = {"part": part, "corruption": name, "severity": options.severity}
            line |= {"images": len(labels), **difference(clean[here], one, two)}
            line |= dict(zip(("top1", "top1_other"), right.mean(0), strict=True))
            yield line | {"gain": line["top1"] - line["top1_other"], "low": low, "high": high}
    if not common:
        raise ValueError(f"{other}: has no image with the clean pixels of one in {options.output}")


def zero_shot(options: ModelOptions, size: int = 100) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images (images, 32, 32, 3) to classes (images,)."""
    model, params = options.load()
    task = evaluate.task_for(model, data.CIFAR10_CLASSES, options.templates_for("arrays"))
    adapter = evaluate.make_adapter(evaluate.parse_adapter("zero_shot"), model, task)
    state, step = adapter.init(params), jax.jit(adapter.step)

    def answer(images: np.ndarray) -> np.ndarray:
        read = np.stack([prepare(image, model.preprocessing) for image in images])
        parts = (read[start : start + size] for start in range(0, len(read), size))
        found = [step(params, state, models.Batch.padded(x, size))[1].logits for x in parts]
        return np.concatenate(found).argmax(-1)[: len(images)]

    return answer


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
