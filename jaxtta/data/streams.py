"""Streams of images with distribution shifts, in padded batches.

    streams = make_streams("continual", ("fog", "snow"), (5,), labels, order="shuffled", seed=1)
    for batch in read_ahead(Batches(benchmark, streams, 64, model.preprocessing), workers=2):
        ...

The settings have their usual names in the literature. The order of the images in a stream is a
separate option and can be combined with any setting.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtta.corruptions import CLEAN
from jaxtta.data.datasets import Domain

SETTINGS = ("reset_each_shift", "continual", "gradual", "mixed")
ORDERS = ("shuffled", "stored", "correlated", "dirichlet")


class Stream(NamedTuple):
    """One sequence of images; an adapter is reset at its beginning only.

    A part has the segment's index and the image's index in the dataset, (images, 2). No batch
    crosses the boundary between two parts.
    """

    name: str  # unique among the streams of one seed
    seed: int  # of the order and of corruptions made on the fly
    segments: tuple[Domain, ...]  # reported separately; a domain may occur twice
    parts: tuple[np.ndarray, ...]

    @property
    def items(self) -> np.ndarray:
        """Segment and image indices of the whole stream, (images, 2)."""
        return np.concatenate(self.parts)


def make_streams(
    setting: str,
    corruptions: Sequence[str],
    severities: Sequence[int],
    labels: np.ndarray,
    *,
    order: str = "shuffled",
    seed: int = 1,
    limit: int | None = None,
    concentration: float = 0.1,
) -> list[Stream]:
    """Make the streams of one seed.

    Args:
        setting: `reset_each_shift`, one stream per domain; `continual`, one stream through all
            corruptions at one severity; `gradual`, one stream that takes every corruption from
            severity 1 to 5 and back; `mixed`, one stream of all corruptions interleaved.
        corruptions: their names, in order.
        severities: those to include; (0,) for data with a fixed one. Gradual needs 1 to 5.
        labels: (images,) the benchmark's labels.
        order: `shuffled`, `stored`, `correlated` (sorted by class) or `dirichlet` (each class
            split by a Dirichlet sample over as many time slots as classes).
        seed: of the order, and of corruptions made on the fly.
        limit: use at most this many images: the first in stored order, otherwise a sample.
        concentration: of the Dirichlet order; smaller values are closer to sorted by class.

    References:
        Yuan et al. 2023 (Dirichlet order), https://arxiv.org/abs/2303.13899
    """
    for what, value, known in (("setting", setting, SETTINGS), ("order", order, ORDERS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}, expected one of {', '.join(known)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected at least 1")
    if not concentration > 0:
        raise ValueError(f"concentration is {concentration}, expected a positive number")
    first = "stored" if order == "stored" else "shuffled"
    images = order_indices(labels, first, np.random.default_rng(seed))[:limit]

    def part(segments: Sequence[int]) -> np.ndarray:
        # All segments of one image before the next, so that stored order interleaves them.
        items = np.stack(np.meshgrid(images, segments, indexing="ij"), -1).reshape(-1, 2)
        # Seeded again at each shift: a stream does not depend on the other streams.
        rng = np.random.default_rng([seed, 1])
        if order not in ("stored", "shuffled") or len(segments) > 1:
            items = items[order_indices(labels[items[:, 0]], order, rng, concentration)]
        return items[:, ::-1].astype(np.int32)

    def stream(name: str, domains: Sequence[Domain], mixed: bool = False) -> Stream:
        numbers = range(len(domains))
        parts = [part(numbers)] if mixed else [part([number]) for number in numbers]
        return Stream(name, seed, tuple(domains), tuple(parts))

    def domains_at(*severities: int) -> list[Domain]:
        return [
            Domain(name, severity)
            for name in corruptions
            for severity in ((0,) if name == CLEAN else severities)
        ]

    if setting == "gradual":
        return [stream(setting, domains_at(1, 2, 3, 4, 5, 4, 3, 2, 1))]
    each = {severity: domains_at(severity) for severity in severities}
    if setting == "reset_each_shift":
        return [stream(str(d), [d]) for d in dict.fromkeys(d for ds in each.values() for d in ds)]
    return [
        stream(f"{setting}-{severity}" if severity else setting, domains, setting == "mixed")
        for severity, domains in each.items()
    ]


def stream_of(
    name: str,
    domains: Sequence[Domain],
    images: np.ndarray,
    seed: int,
    segments: np.ndarray | None = None,
) -> Stream:
    """A stream of these images (images,), in this order and in one part.

    `segments` (images,) are the images' indices in `domains`; None for all 0.
    """
    segments = np.zeros(len(images)) if segments is None else segments
    items = np.stack([segments, images], 1).astype(np.int32)
    return Stream(name, seed, tuple(domains), (items,))


def order_indices(
    labels: np.ndarray, order: str, rng: np.random.Generator, concentration: float = 0.1
) -> np.ndarray:
    """A permutation (images,) of images with these labels, in one of `ORDERS`."""
    if order == "stored":
        return np.arange(len(labels))
    shuffled = rng.permutation(len(labels))
    if order == "shuffled":
        return shuffled
    if order == "correlated":
        return shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes = np.unique(labels)
    slot = np.empty(len(labels), int)
    for name in classes:
        members = shuffled[labels[shuffled] == name]
        shares = rng.dirichlet(np.full(len(classes), concentration))
        edges = (np.cumsum(shares[:-1]) * len(members)).round().astype(int)
        slot[members] = np.searchsorted(edges, np.arange(len(members)), side="right")
    again = rng.permutation(len(labels))
    return again[np.argsort(slot[again], kind="stable")]
