"""Published accuracies of models that are not robust: what others are measured from."""

from collections.abc import Sequence

from jaxtta.data.class_names import read_table

BASE = "imagenet"


def reference_points(shifted: Sequence[str]) -> list[tuple[float, float]]:
    """Accuracies of classifiers that were trained on ImageNet alone, by plain supervision.

    Args:
        shifted: which sets to take the mean of: imagenet-v2, imagenet-r, imagenet-sketch,
            imagenet-a.

    Returns:
        Of each model its top-1 accuracy on ImageNet, and its mean one on these sets, both in
        (0, 1), for `jaxtta.diagnose.fit_baseline`. ImageNet-R and -A are answered among their own
        200 classes. A model whose mean is 0 is left out: ResNet-50 on ImageNet-A alone, whose
        images were chosen so that it fails.

    Raises:
        ValueError: if a set is not among them, or there is none.

    References:
        Published by timm, https://github.com/huggingface/pytorch-image-models, in `results`; the
        table names the files.
    """
    models = read_table("reference-points.json")["models"].values()
    known = [name for name in next(iter(models)) if name != BASE]
    for name in shifted:
        if name not in known:
            raise ValueError(
                f"{name!r} has no published reference points, expected {', '.join(known)}"
            )
    if not shifted:
        raise ValueError(f"there are no shifted sets, expected some of {', '.join(known)}")
    points = [(one[BASE], sum(one[name] for name in shifted) / len(shifted)) for one in models]
    return [(base, mean) for base, mean in points if mean > 0]
