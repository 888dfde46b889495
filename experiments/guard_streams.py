"""Streams that do harm to an adapter, and friendly ones, of any benchmark of stored images.

    benchmark = with_frames(data.open_benchmark("arrays", FOLDER, model.preprocessing, names))
    streams = make_streams(benchmark, images=240, seed=1)      # streams["noise_first"][0]

A kind of stream has one or more streams; an adapter is reset at the beginning of each.
"""

from collections.abc import Callable, Sequence

import numpy as np

from jaxtta import data

NOISE, BLANK = data.Domain("noise_frames"), data.Domain("blank_frames")
"""Images without a label: they are seen, and count for nothing."""
BLOCK = 64  # images of one domain before the next, where domains alternate
BURST = 160  # frames without a label that come first
CLEAN = data.Domain(data.CLEAN)
ZERO_SHOT_FIRST = "wrong_first"
KINDS = (
    *("friendly", "continual", "clean", "alternating", "mixed", "one_class", "three_classes"),
    *("sorted", "sorted_continual", "label_shift", "long_tail", "half_noise", "half_blank"),
    *("noise_first", ZERO_SHOT_FIRST, "batch_1"),
)


def with_frames(benchmark: data.Benchmark, seed: int = 0) -> dict[data.Domain, data.Dataset]:
    """A benchmark with two more domains: uniform noise, and frames of one grey level each."""
    first = next(iter(benchmark.values()))
    rng, shape = np.random.default_rng(seed), (len(first), *first[0].shape)
    grey = rng.integers(0, 256, (len(first), 1, 1, 1), np.uint8)
    frames = {NOISE: rng.integers(0, 256, shape, np.uint8), BLANK: np.broadcast_to(grey, shape)}
    known = first.labels, data.class_names_of(benchmark)
    return {**benchmark} | {key: data.ArrayDataset(x, *known) for key, x in frames.items()}


def make_streams(
    benchmark: data.Benchmark,
    images: int,
    seed: int,
    right: Callable[[data.Domain, np.ndarray], np.ndarray],
    kinds: Sequence[str] = KINDS,
) -> dict[str, list[data.Stream]]:
    """Make the streams of each kind.

    Args:
        benchmark: with the domains of `with_frames`.
        images: of each domain that an adapter meets; fewer where a domain has not so many.
        seed: of the images, their order, and of which domains the kinds with five of them have.
        right: `right(domain, images)`, whether the frozen model is right on each, (images,) bool.
        kinds: those to make.

    Returns:
        The streams by kind. All are of five domains with a reset at each, but for: friendly, of
        all with a reset at each; continual and sorted_continual, through all without one; clean,
        alternating (two domains) and mixed (all), one stream each, as long as five domains.
    """
    shifts = [d for d in benchmark if d not in (CLEAN, NOISE, BLANK)]
    labels, classes = data.labels_of(benchmark), len(data.class_names_of(benchmark))
    some = min(5, len(shifts))
    few = [shifts[(seed - 1 + n * len(shifts) // some) % len(shifts)] for n in range(some)]

    def draw(rng: np.random.Generator, count: int, among: np.ndarray | None = None) -> np.ndarray:
        return rng.permutation(np.arange(len(labels)) if among is None else among)[:count]

    def skewed(rng: np.random.Generator) -> np.ndarray:
        """Images whose classes' shares fall from 1 to 1/50."""
        shares = rng.permutation(50.0 ** -np.linspace(0, 1, classes))
        wanted = (shares / shares.sum() * images).round().astype(int)
        each = [draw(rng, n, np.flatnonzero(labels == c)) for c, n in enumerate(wanted)]
        return draw(rng, images, np.concatenate(each))

    def in_order(rng: np.random.Generator, count: int, order: str) -> np.ndarray:
        chosen = draw(rng, count)
        return chosen[data.order_indices(labels[chosen], order, rng)]

    def frames(rng: np.random.Generator, count: int, first: bool) -> tuple[np.ndarray, np.ndarray]:
        """Images in segment 0, and as many as `count` frames in segment 1, before or among them."""
        own, other = draw(rng, images), draw(rng, count)
        segments = np.repeat([1, 0], [len(other), len(own)])
        numbers = np.concatenate([other, own])
        order = np.arange(len(numbers)) if first else rng.permutation(len(numbers))
        return segments[order], numbers[order]

    def of_classes(rng: np.random.Generator, count: int) -> np.ndarray:
        return draw(rng, images, np.flatnonzero(np.isin(labels, rng.permutation(classes)[:count])))

    def wrong_first(rng: np.random.Generator, domain: data.Domain) -> np.ndarray:
        chosen = draw(rng, images)
        return chosen[np.argsort(right(domain, chosen), kind="stable")]

    def through(rng: np.random.Generator, count: int, order: str) -> data.Stream:
        parts = [in_order(rng, count, order) for _ in shifts]
        segments = np.repeat(np.arange(len(shifts)), [len(part) for part in parts])
        return data.stream_of("all", shifts, np.concatenate(parts), seed, segments)

    def in_turn(rng: np.random.Generator) -> data.Stream:
        """Two unlike domains, each for a block, in turn."""
        length = min(5 * images, 2 * len(labels))
        segments = np.arange(length) // BLOCK % 2
        numbers = np.empty(length, int)
        for segment in (0, 1):
            numbers[segments == segment] = draw(rng, (segments == segment).sum())
        pair = [few[0], few[len(few) // 2]]
        return data.stream_of("two", pair, numbers, seed, segments)

    def mixed(rng: np.random.Generator) -> data.Stream:
        pairs = draw(rng, 5 * images, np.arange(len(labels) * len(shifts)))
        segments, numbers = np.divmod(pairs, len(labels))
        return data.stream_of("mixed", shifts, numbers, seed, segments)

    def resets(domains: Sequence[data.Domain], choose: Callable) -> list[data.Stream]:
        made = []
        for number, domain in enumerate(domains):
            chosen = choose(np.random.default_rng([seed, number]), domain)
            made.append(data.stream_of(str(domain), [domain], chosen, seed))
        return made

    def framed(kind: data.Domain, count: int, first: bool) -> list[data.Stream]:
        made = []
        for number, domain in enumerate(few):
            segments, chosen = frames(np.random.default_rng([seed, number]), count, first)
            made.append(data.stream_of(str(domain), [domain, kind], chosen, seed, segments))
        return made

    def fresh() -> np.random.Generator:
        return np.random.default_rng([seed, 99])

    shuffled: Callable = lambda rng, domain: draw(rng, images)  # noqa: E731
    made: dict[str, Callable[[], list[data.Stream]]] = {
        "friendly": lambda: resets(shifts, shuffled),
        "continual": lambda: [through(fresh(), images, "shuffled")],
        "clean": lambda: [data.stream_of("clean", [CLEAN], draw(fresh(), 5 * images), seed)],
        "alternating": lambda: [in_turn(fresh())],
        "mixed": lambda: [mixed(fresh())],
        "one_class": lambda: resets(few, lambda rng, domain: of_classes(rng, 1)),
        "three_classes": lambda: resets(few, lambda rng, domain: of_classes(rng, 3)),
        "sorted": lambda: resets(few, lambda rng, domain: in_order(rng, images, "correlated")),
        "sorted_continual": lambda: [through(fresh(), -(-images // 3), "correlated")],
        "label_shift": lambda: resets(few, lambda rng, domain: in_order(rng, images, "dirichlet")),
        "long_tail": lambda: resets(few, lambda rng, domain: skewed(rng)),
        "half_noise": lambda: framed(NOISE, images, first=False),
        "half_blank": lambda: framed(BLANK, images, first=False),
        "noise_first": lambda: framed(NOISE, BURST, first=True),
        "wrong_first": lambda: resets(few, wrong_first),
        "batch_1": lambda: resets(few, shuffled),
    }
    if unknown := set(kinds) - set(made):
        raise ValueError(f"unknown stream {min(unknown)!r}, expected one of {', '.join(made)}")
    return {kind: made[kind]() for kind in kinds}
