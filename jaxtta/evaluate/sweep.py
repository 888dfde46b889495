"""Adapters over streams: all step on each batch as it is read, and each image is read once."""

import contextlib
import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from jaxtta import data
from jaxtta.adapters import Adapter, AdapterConfig, AdapterSpec, make_adapter, parse_adapter
from jaxtta.adapters.by_name import with_rate
from jaxtta.data import Batches, Domain, Stream
from jaxtta.evaluate import provenance, store
from jaxtta.evaluate.placement import Split, place, require_devices
from jaxtta.evaluate.predictions import Predictions
from jaxtta.evaluate.streams import StreamRun, finish, groups_of
from jaxtta.io import as_json, digest_of
from jaxtta.models import Classifier, Params, Task
from jaxtta.models.preprocess import Preprocessing

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
    devices: int | None = None,
    split: Split = "streams",
    checkpoint_every: int | None = None,
    trust_data: bool = False,
    log: Callable[[Predictions], None] | None = None,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
) -> list[Predictions]:
    """Run every adapter over every stream; what the folder has already is not computed again.

    Args:
        spec: images, streams and classes.
        adapters: texts as for `parse_adapter`, or functions `(model, task) -> Adapter` by name.
        model: any classifier.
        params: its frozen parameters.
        folder: for the results, locked during the run; None to keep nothing.
        config: settings of adapters that their texts do not say.
        workers: as for `data.read_ahead`.
        shard: this run's index and the number of runs that share the streams.
        devices: how many to use; None for one.
        split: "streams", each device steps through its own; "batch", all share each batch, and so
            do the devices of other hosts that run the same after `jax.distributed.initialize`.
        checkpoint_every: batches between two checkpoints within a stream.
        trust_data: take earlier results without checking that the stored images are the same.
        log: called with each new result.
        progress: show a progress bar.
        about: what to keep with the results that changes none; None for `about(model)`.

    Returns:
        The results of this shard's streams, by stream, then adapter.

    Raises:
        ValueError: for unknown adapters or domains, a folder in use or of other settings, or
            devices that there are not or that do not divide the batch.

    Examples:
        >>> domain = jaxtta.data.Domain("clean")  # other names: see `jaxtta.load`
        >>> stream = jaxtta.data.stream_of("clean", [domain], np.arange(8), seed=0)
        >>> spec = jaxtta.evaluate.Spec({domain: dataset}, [stream], task, batch_size=4)
        >>> results = jaxtta.evaluate.sweep(spec, ["zero_shot"], model, params, progress=False)
        >>> [(result.adapter, len(result.rows)) for result in results]
        [('zero_shot', 8)]
    """
    given: Any = adapters
    if isinstance(given, Mapping):
        given = [AdapterSpec(text, text, {}, make) for text, make in given.items()]
    specs = [parse_adapter(each) if isinstance(each, str) else each for each in given]
    names = [each.text for each in specs]
    streams = [f"{stream.name} of seed {stream.seed}" for stream in spec.streams]
    for what, listed in (("adapters", names), ("streams", streams)):
        if not listed or len(set(listed)) < len(listed):
            raise ValueError(f"a sweep needs one or more {what} of distinct names, not {listed}")
    if spec.batch_size < 1:
        raise ValueError(f"batch_size is {spec.batch_size}, expected at least 1")
    count = require_devices(devices, split, spec.batch_size)
    data.select(spec.benchmark, (d for stream in spec.streams for d in stream.segments))
    settings = _settings_of(spec, model, params)
    how = (model, spec.task, config, settings["model"]["weights"])
    made = {each.text: (each, make_adapter(each, *how)) for each in specs}
    batches = spec.batches(model, specs)
    own = {each.text: provenance.identity_of(each, config, batches.canvas) for each in specs}
    told = as_json(provenance.about(model) if about is None else about)
    share = range(len(batches.streams))[shard[0] :: shard[1]]
    results: dict[tuple[int, str], Predictions] = {}
    runs, writes = [], jax.process_index() == 0  # of several hosts, one
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder, trust_data = stack.enter_context(tempfile.TemporaryDirectory()), True
        root = Path(folder)
        if writes:
            stack.enter_context(store.lock(root, settings, shard))
        contents = {} if trust_data else provenance.contents_of(batches, share, progress)
        for number in share:
            stream, missing = batches.streams[number], {}
            shown = {
                "domains": [str(domain) for domain in stream.segments],
                "images": f"{len(stream.items)}, in order {digest_of(stream.parts)}",
            }
            shared = settings | {"streams": settings["streams"] | shown}
            for name, adapter in own.items():
                identity = as_json(shared | {"adapter": adapter})
                path = store.result_path(root, name, stream.name, stream.seed)
                found = store.read_result(path, identity, contents.get(number))
                if found is None:
                    missing[name] = identity
                else:
                    results[number, name] = found
            if missing:
                note = {"settings": missing, "content": contents.get(number)}
                kept = root / "checkpoints" / store.safe_name(f"{stream.name}--seed{stream.seed}")
                inputs = (batches, number, made, params, note, kept, checkpoint_every)
                runs.append(StreamRun(*inputs))
        if results and None in contents.values():
            _log.warning("%s: earlier results are unchecked: the images have no content()", folder)
        on = place(params, count, split, len(runs))
        groups = groups_of(runs, on.streams)
        rounds = (one for group in groups for one in zip_longest(*(run.left for run in group)))
        places = [place for one in rounds for place in one if place is not None]
        if jax.process_count() > 1:  # the first writes when all have read
            found = multihost_utils.process_allgather(np.array([len(results), len(places)]))
            if (found != found[0]).any():
                raise ValueError(f"{folder}: hosts do not find the same, expected a shared folder")
        source = data.read_ahead(batches, workers, places, on.streams)
        stack.enter_context(contextlib.closing(source))  # ends its threads or processes
        steps: dict[str, Callable] = {}  # compiled
        total = sum(len(run.places) for run in runs)
        show = {"total": total, "initial": total - len(places), "unit": "batch"}
        with tqdm(**show, disable=not progress or not runs or not writes) as bar:
            for run in (run for group in groups for run in finish(group, on, steps, source, bar)):
                for name in run.note["settings"]:
                    more = {"place": [run.number, names.index(name)], "devices": count}
                    result = run.result(name, spec.setting, told | more)
                    results[run.number, name] = result
                    if writes:
                        result.save(store.result_path(root, name, result.stream, result.seed))
                        if log is not None:
                            log(result)
                run.tree.clear()
                if writes:
                    shutil.rmtree(run.folder, ignore_errors=True)
    return [results[number, name] for number in share for name in names]


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
    return as_json(groups)


class Choice(NamedTuple):
    """A selected learning rate, the mean top-1 accuracy by rate, and what it was chosen on."""

    rate: float
    accuracies: dict[float, float]
    chosen_on: str


def tune_learning_rate(
    adapter: str,
    rates: Sequence[float],
    spec: Spec,
    model: Classifier,
    params: Params,
    folder: str | Path | None = None,
    **options: Any,
) -> Choice:
    """Select the rate with the highest mean accuracy on the four extra corruptions of ImageNet-C.

    The selection uses the labels of these images. If they are also the test images, it is
    independent of the test corruptions but not of the images. Of equally good rates the smallest is
    selected. The other arguments are those of `sweep`; the streams are of these corruptions.
    """
    shown = sorted({domain.corruption for stream in spec.streams for domain in stream.segments})
    texts = {with_rate(adapter, rate): float(rate) for rate in sorted(set(rates))}
    top1: dict[float, list[float]] = {rate: [] for rate in texts.values()}
    for result in sweep(spec, list(texts), model, params, folder, **options):
        segments = (result.segment(number).query("seen") for number in range(len(result.domains)))
        top1[texts[result.adapter]] += [rows["top1"].mean() for rows in segments]
    accuracies = {rate: float(np.mean(values)) for rate, values in top1.items()}
    chosen_on = f"{', '.join(shown)}; {len(np.unique(spec.streams[0].items[:, 1]))} images each"
    return Choice(max(accuracies, key=accuracies.__getitem__), accuracies, chosen_on)
