"""Adapters over streams: all step on each batch as it is read, and each image is read once."""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxtta import data
from jaxtta.adapters import Adapter, AdapterConfig, AdapterSpec, make_adapter, parse_adapter
from jaxtta.data import Batches, Domain, Stream
from jaxtta.data.datasets import stored_in
from jaxtta.evaluate import provenance
from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.run import StreamRun
from jaxtta.evaluate.store import Store
from jaxtta.models import Classifier, Params, Task
from jaxtta.models.preprocess import Preprocessing

Logger = Callable[[Predictions], None]
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a sweep runs on.

    `canvas` is the size to which full-size images are padded for adapters that make their own
    views; None for `canvas_for` of the clean images. `settings` are what else the streams were made
    with, JSON values, by which a run with other settings is told what differs.
    """

    benchmark: data.Benchmark
    streams: Sequence[Stream]
    task: Task | None  # None for a model with classes of its own
    batch_size: int
    canvas: int | None = None
    setting: str = ""  # of the streams, or "datasets"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    templates: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, expected at least 1")
        _require_distinct("streams", [f"{s.name} of seed {s.seed}" for s in self.streams])

    def batches(self, model: Classifier, adapters: Sequence[AdapterSpec] = ()) -> Batches:
        """The streams in batches, with full-size images if one of the adapters needs them."""
        canvas = None
        if any(spec.needs_originals for spec in adapters):
            first = self.benchmark[self.streams[0].segments[0]]
            canvas = self.canvas or data.canvas_for(self.benchmark.get(Domain(data.CLEAN), first))
        side = model.image_size
        preprocess = getattr(model, "preprocessing", Preprocessing(side, side, (side, side)))
        return Batches(self.benchmark, tuple(self.streams), self.batch_size, preprocess, canvas)


def sweep(
    spec: Spec,
    adapters: Iterable[str | AdapterSpec] | Mapping[str, Callable[..., Adapter]],
    model: Classifier,
    params: Params,
    folder: str | Path | None = None,
    *,
    config: AdapterConfig = AdapterConfig(),  # noqa: B008
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    checkpoint_every: int | None = None,
    trust_data: bool = False,
    log: Logger | None = None,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
) -> list[Predictions]:
    """Run every adapter over every stream; what the folder has already is not computed again.

    Args:
        spec: images, streams and classes.
        adapters: texts as for `parse_adapter`, or functions `(model, task) -> Adapter` by name.
        model: the model.
        params: its frozen parameters.
        folder: for the results, locked during the run; None to keep nothing.
        config: settings of adapters that their texts do not say.
        workers: processes that read images ahead; 0 for a thread.
        shard: this run's index and the number of runs that share the streams.
        checkpoint_every: batches between two checkpoints within a stream.
        trust_data: take earlier results without checking that the stored images are the same.
        log: called with each new result.
        progress: show a progress bar.
        about: what to keep with the results that changes none; None for `about(model)`.

    Returns:
        The results of this shard's streams, by stream, then adapter.

    Raises:
        ValueError: for unknown adapters or domains; if the folder is in use, or has other settings
            or images; if no image of a stream can be read. Finished results are kept.
    """
    if not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard is {shard}, expected (i, n) with i below n")
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder, trust_data = stack.enter_context(tempfile.TemporaryDirectory()), True
        specs = specs_of(adapters)
        data.select(spec.benchmark, dict.fromkeys(d for s in spec.streams for d in s.segments))
        settings = _settings_of(spec, model, params)
        how = (model, spec.task, config, settings["model"]["weights"])
        made = {each.text: (each, make_adapter(each, *how)) for each in specs}
        batches = spec.batches(model, specs)
        own = {each.text: provenance.identity_of(each, config, batches.canvas) for each in specs}
        told = provenance.as_json(provenance.about(model) if about is None else about)
        store = Store(Path(folder), settings)
        stack.enter_context(store.lock(shard))

        share = range(shard[0], len(batches.streams), shard[1])
        contents = dict.fromkeys(share) if trust_data else _contents(batches, share, progress)
        results: dict[tuple[int, str], Predictions] = {}
        runs = []
        for number in share:
            stream, missing = batches.streams[number], {}
            for name, adapter in own.items():
                identity = _identity_of(settings, stream, adapter)
                found = store.read((name, stream.name, stream.seed), identity, contents[number])
                if found is None:
                    missing[name] = identity
                else:
                    results[number, name] = found
            if missing:
                inputs = (batches, number, made, params, missing, contents[number])
                kept = store.checkpoints(stream.name, stream.seed)
                runs.append(StreamRun(*inputs, kept, checkpoint_every))
        if results and not trust_data and None in contents.values():
            dataset = stored_in(batches.benchmark[batches.streams[0].segments[0]])
            _log.warning(
                "%s: earlier results are taken as they are, since %s cannot tell whether its "
                "images have changed: it has no content()",
                *(folder, type(dataset).__name__),
            )
        places = [place for run in runs for place in run.places[run.done :]]
        total = sum(len(run.places) for run in runs)
        source = iter(data.read_ahead(batches, workers, places)) if runs else iter(())
        steps: dict[str, Callable] = {}  # compiled
        hidden = not progress or not runs
        with tqdm(total=total, initial=total - len(places), unit="batch", disable=hidden) as bar:
            for run in runs:
                run.finish(steps, source, bar)
                for name in run.settings:
                    place = {"place": [run.number, list(own).index(name)]}
                    result = run.result(name, spec.setting, told | place)
                    result.save(store.path(name, result.stream, result.seed))
                    results[run.number, name] = result
                    if log is not None:
                        log(result)
                run.remove()
            next(source, None)  # ends the reader processes
    return [results[number, name] for number in share for name in own]


def specs_of(given: Any) -> list[AdapterSpec]:
    """The adapters of a sweep, as `sweep` takes them."""
    if isinstance(given, str | AdapterSpec):
        raise TypeError(f"adapters is {given!r}, expected a list of adapters")
    if isinstance(given, Mapping):
        given = [AdapterSpec(text, text, {}, make) for text, make in given.items()]
    specs = [parse_adapter(each) if isinstance(each, str) else each for each in given]
    _require_distinct("adapters", [spec.text for spec in specs])
    return specs


def _require_distinct(what: str, names: Sequence[str]) -> None:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a sweep needs one or more {what} of distinct names, not {names}")


def _settings_of(spec: Spec, model: Classifier, params: Params) -> dict[str, Any]:
    """The settings that all results of a folder share."""
    dataset = spec.benchmark[spec.streams[0].segments[0]]
    found = provenance.fingerprints(dataset, params, model, spec.task)
    groups = {
        "model": {name: found.get(name) for name in ("weights", "model_settings", "tokens")},
        "data": {name: found[name] for name in ("images", "class_names")},
        "streams": {"batch_size": spec.batch_size, "setting": spec.setting, **spec.settings},
    }
    if spec.task is not None:
        groups["model"]["templates"] = spec.templates
    if not type(model).__module__.startswith("jaxtta."):
        groups["model"]["source"] = provenance.source_of(type(model))
    return provenance.as_json(groups)


def _identity_of(
    shared: Mapping[str, Any], stream: Stream, adapter: Mapping[str, Any]
) -> dict[str, Any]:
    """All settings that decide an adapter's result on a stream."""
    own = {
        "domains": [str(domain) for domain in stream.segments],
        "images": f"{len(stream.items)}, in order {provenance.digest_of(stream.parts)}",
    }
    streams = {**shared["streams"], **own}
    return provenance.as_json({**shared, "streams": streams, "adapter": adapter})


def _contents(batches: Batches, share: range, progress: bool) -> dict[int, str | None]:
    """One digest of the stored images of each stream; None where a dataset cannot tell."""
    known, found = {}, {}
    for number in tqdm(share, desc="checking the images", leave=False, disable=not progress):
        parts = []
        for domain in batches.streams[number].segments:
            dataset = stored_in(batches.benchmark[domain])
            if id(dataset) not in known:
                known[id(dataset)] = data.content_of(dataset)
            parts.append(known[id(dataset)])
        found[number] = None if None in parts else provenance.digest_of(parts)
    return found
