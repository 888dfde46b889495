"""Streams of images with distribution shifts, in padded batches.

streams = make_streams("continual", ("fog", "snow"), (5,), labels, order="shuffled", seed=1)
for batch in read_ahead(Batches(benchmark, tuple(streams), 64, model.preprocessing)):
    ...
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtta.corruptions import CLEAN
from jaxtta.data.datasets import Domain

SETTINGS = ("reset_each_shift", "continual", "gradual", "mixed")
ORDERS = ("shuffled", "stored", "correlated", "dirichlet")


class Stream(NamedTuple):
    """One sequence of images; an adapter is reset at its beginning only."""

    name: str  # unique among the streams of one seed
    seed: int  # of the order and of corruptions made on the fly
    segments: tuple[Domain, ...]  # reported separately; a domain may occur twice
    parts: tuple[np.ndarray, ...]  # (images, 2): segment, image in the dataset; no batch spans two

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
        setting: `reset_each_shift`, a stream per domain; `continual`, one through all corruptions
            at one severity; `gradual`, one that takes every corruption from severity 1 to 5 and
            back; `mixed`, one of all corruptions interleaved.
        corruptions: their names, in order.
        severities: those to include; (0,) for data with a fixed one.
        labels: (images,) the benchmark's labels.
        order: `shuffled`, `stored`, `correlated` (sorted by class) or `dirichlet` (each class split
            over as many time slots as classes, as in https://arxiv.org/abs/2303.13899).
        seed: of the order, and of corruptions made on the fly.
        limit: use at most this many images: the first in stored order, otherwise a sample.
        concentration: of the Dirichlet order; smaller values are closer to sorted by class.

    Examples:
        >>> labels = np.array([0, 1, 0, 1])
        >>> streams = jaxtta.data.make_streams("continual", ("fog", "snow"), (5,), labels)
        >>> [(stream.name, len(stream.items)) for stream in streams]
        [('continual-5', 8)]
    """
    for what, value, known in (("setting", setting, SETTINGS), ("order", order, ORDERS)):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}, expected one of {', '.join(known)}")
    if (limit is not None and limit < 1) or not concentration > 0:
        raise ValueError(f"limit {limit} and concentration {concentration} must be above 0")
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

    def domains_at(*levels: int) -> list[Domain]:
        found = {name: (0,) if name == CLEAN else levels for name in corruptions}
        return [Domain(name, level) for name in corruptions for level in found[name]]

    def stream(name: str, domains: Sequence[Domain]) -> Stream:
        numbers = range(len(domains))
        groups = [numbers] if setting == "mixed" else [[number] for number in numbers]
        return Stream(name, seed, tuple(domains), tuple(map(part, groups)))

    if setting == "gradual":
        return [stream(setting, domains_at(1, 2, 3, 4, 5, 4, 3, 2, 1))]
    each = {str(Domain(setting, level)): domains_at(level) for level in severities}
    if setting == "reset_each_shift":
        each = {str(domain): [domain] for domains in each.values() for domain in domains}
    return [stream(name, domains) for name, domains in each.items()]


def stream_of(
    name: str,
    domains: Sequence[Domain],
    images: np.ndarray,
    seed: int,
    segments: np.ndarray | None = None,
) -> Stream:
    """A stream of these images (images,) in one part; `segments` (images,) index `domains`."""
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
