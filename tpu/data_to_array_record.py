r"""Pack the images of ImageNet-C into a few large files.

    python tpu/data_to_array_record.py --data IMAGENET-C --output RECORDS
    jaxtta sweep --layout arrayrecord --data RECORDS --output runs/imagenet-c

A bucket or a network disk serves a few large files much faster than millions of small ones. Each
corruption and severity becomes a tensorflow-datasets folder of ArrayRecord shards. The image files'
bytes are stored as they are, so that results are those of the folder. A run that was stopped goes
on where it was.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from jaxtta import cli, data
from jaxtta.io import atomic_write, digest_files, read_json, write_json


@dataclasses.dataclass(frozen=True)
class Options:
    """Pack image files."""

    data: Path  # folder with the images
    output: Path  # folder for the shards
    layout: str = "imagenet-c"  # of the images, as for jaxtta sweep
    corruptions: tuple[str, ...] = ()  # default: all that are there; clean is one
    severities: tuple[int, ...] = ()  # default: all that are there
    images_per_shard: int = 10_000  # images in one file


def main(options: Options) -> None:
    """Write what is not written yet."""
    benchmark = domains_of(options)
    first = next(iter(benchmark.values()))
    listed = {
        "class_names": [*first.class_names],
        "labels": first.labels.tolist(),
        "files": [*first.paths],
        "images_per_shard": options.images_per_shard,
    }
    if not (known := options.output / "images.json").exists():
        write_json(known, listed)
    if read_json(known) != listed:
        raise ValueError(f"{known}: is of other images or shards; choose another --output")
    with tqdm(total=len(benchmark) * len(first), unit="image", disable=None) as bar:
        for place, (domain, images) in enumerate(benchmark.items()):
            bar.set_description(str(domain))
            folder = options.output / domain.corruption / str(domain.severity or "")
            if not (folder / "dataset_info.json").exists():  # written last
                write_domain(images, folder, options.images_per_shard, bar)
            bar.update(len(first) * (1 + place) - bar.n)
    print(f"{len(benchmark)} x {len(first)} images are in {options.output}")


def domains_of(options: Options) -> dict[data.Domain, data.ImageFolder]:
    """The domains that are asked for and stored as files."""
    if options.images_per_shard < 1:
        raise ValueError(f"--images-per-shard is {options.images_per_shard}, expected at least 1")
    anything: Any = None  # to make corrupted images with: only stored ones are packed
    opened = data.open_benchmark(options.layout, options.data, anything)
    stored = {domain: x for domain, x in opened.items() if isinstance(x, data.ImageFolder)}
    if not all(images.raw and not images.border for images in stored.values()) or not stored:
        raise ValueError(
            f"--layout {options.layout}: its images are not files that are read as they are "
            "stored, as those of imagenet-c and imagenet are"
        )
    for name, given, there in (
        ("--corruptions", options.corruptions, {domain.corruption for domain in stored}),
        ("--severities", options.severities, {domain.severity for domain in stored}),
    ):
        if odd := sorted({*given} - there):
            raise ValueError(f"{name} has {odd[0]!r}, {options.data} has {sorted(there)}")
    chosen = {
        domain: images
        for domain, images in stored.items()
        if domain.corruption in (options.corruptions or (domain.corruption,))
        and domain.severity in (options.severities or (domain.severity,))
    }
    if not chosen:
        raise ValueError(f"{options.data}: has none of these corruptions at these severities")
    data.select(chosen, chosen)
    return chosen


def write_domain(images: data.ImageFolder, folder: Path, size: int, bar: tqdm) -> None:
    """Write the shards that are missing, then what tensorflow-datasets needs to read them."""
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=label_names(images)),
            "file": tfds.features.Text(),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(images), size)
    files = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name="images", split="test", filetype_suffix="array_record"
    )
    shards = [Path(path) for path in files.sharded_filepaths(len(starts))]
    for shard, start in zip(shards, starts, strict=True):
        if shard.exists():
            continue
        with atomic_write(shard) as temporary:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")
            for path, label in zip(
                images.paths[start : start + size], images.labels[start : start + size], strict=True
            ):
                content = io.BytesIO((images.root / path).read_bytes())
                example = {"image": content, "label": int(label), "file": path}
                writer.write(features.serialize_example(example))
                bar.update()
            writer.close()
    lengths = [min(size, len(images) - start) for start in starts]
    digest = digest_files(shards, read_up_to=2**63)  # of their bytes: copies have other times
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name="test",
                shard_lengths=lengths,
                num_bytes=sum(shard.stat().st_size for shard in shards),
                filename_template=files,
            )
        ],
        filename_template=files,
        check_data=False,
        supervised_keys=("image", "label"),
        description=f"Image files, unchanged. The shards' digest: {digest}.",
    )


def label_names(images: data.ImageFolder) -> list[str]:
    """The class folders' names, such as wnids; the classes' own where images lie otherwise."""
    tops = (path.split("/")[0] for path in images.paths)
    pairs = {*zip(images.labels.tolist(), tops, strict=True)}
    folders = [name for _, name in sorted(pairs)]
    one_each = len(pairs) == len(images.class_names) == len({*folders})
    return folders if one_each else [*images.class_names]


if __name__ == "__main__":
    cli.run_script(Options, main, __doc__)
