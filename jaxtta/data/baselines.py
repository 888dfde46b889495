"""Published accuracies of standard models, the baseline for effective robustness."""

import json
from collections.abc import Sequence
from pathlib import Path

from jaxtta.data.class_names import read_table
from jaxtta.io import read_rows, read_text


def reference_points(shifted: Sequence[str]) -> list[tuple[float, float]]:
    """Top-1 accuracy on ImageNet, and mean accuracy on shifted sets, of supervised classifiers.

    The sets are some of imagenet-v2, -r, -sketch and -a; of -r and -a only their 200 classes are
    predicted. Models with a mean of 0 are omitted: ResNet-50 on ImageNet-A alone, whose images were
    selected to be misclassified by it.

    References:
        Published by timm, https://github.com/huggingface/pytorch-image-models, in `results`; the
        table lists the files.
    """
    models = read_table("reference-points")["models"].values()
    known = [name for name in next(iter(models)) if name != "imagenet"]
    unknown = [name for name in shifted if name not in known]
    if unknown or not shifted:
        what = f"{unknown[0]!r} has no published reference points" if unknown else "no shifted sets"
        raise ValueError(f"{what}, expected some of {', '.join(known)}")
    means = (sum(one[name] for name in shifted) / len(shifted) for one in models)
    return [(one["imagenet"], mean) for one, mean in zip(models, means, strict=True) if mean > 0]


def read_reference_points(path: Path) -> list[tuple[float, float]]:
    """Base and shifted accuracy of each model in a .json list of objects or a .csv."""
    try:
        if path.suffix == ".json":
            rows = json.loads(read_text(path))
        else:
            rows = [row for _, row in read_rows(path, ("base", "shifted"))]
        return [(float(row["base"]), float(row["shifted"])) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected base and shifted of each model ({error!r})") from error
