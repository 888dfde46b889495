"""Adapters over streams: all step on each batch as it is read, and each image is read once."""

import contextlib
import dataclasses
import logging
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxtta import data
from jaxtta.adapters import Adapter, AdapterConfig, AdapterSpec, make_adapter, parse_adapter
from jaxtta.adapters.by_name import with_rate
from jaxtta.data import Batches, Domain, Stream
from jaxtta.evaluate import provenance, store
from jaxtta.evaluate.predictions import BATCH, IMAGE, Predictions, score
from jaxtta.io import as_json, digest_of, restore_checkpoint, save_checkpoint
from jaxtta.models import Batch, Classifier, Params, Task
from jaxtta.models.preprocess import Preprocessing

_log = logging.getLogger(__name__)
TIMED = 8  # of so many batches the second is waited for, and timed; the others queue


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
        checkpoint_every: batches between two checkpoints within a stream.
        trust_data: take earlier results without checking that the stored images are the same.
        log: called with each new result.
        progress: show a progress bar.
        about: what to keep with the results that changes none; None for `about(model)`.

    Returns:
        The results of this shard's streams, by stream, then adapter.

    Raises:
        ValueError: for unknown adapters or domains, or a folder in use or of other settings.
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
    data.select(spec.benchmark, (d for stream in spec.streams for d in stream.segments))
    settings = _settings_of(spec, model, params)
    how = (model, spec.task, config, settings["model"]["weights"])
    made = {each.text: (each, make_adapter(each, *how)) for each in specs}
    batches = spec.batches(model, specs)
    own = {each.text: provenance.identity_of(each, config, batches.canvas) for each in specs}
    told = as_json(provenance.about(model) if about is None else about)
    share = range(len(batches.streams))[shard[0] :: shard[1]]
    results: dict[tuple[int, str], Predictions] = {}
    runs = []
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder, trust_data = stack.enter_context(tempfile.TemporaryDirectory()), True
        root = Path(folder)
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
        places = [place for run in runs for place in run.places[run.done :]]
        source = data.read_ahead(batches, workers, places)
        stack.enter_context(contextlib.closing(source))  # ends its threads or processes
        steps: dict[str, Callable] = {}  # compiled
        total = sum(len(run.places) for run in runs)
        show = {"total": total, "initial": total - len(places), "unit": "batch"}
        with tqdm(**show, disable=not progress or not runs) as bar:
            for run in runs:
                run.finish(steps, source, bar)
                for name in run.note["settings"]:
                    place = {"place": [run.number, names.index(name)]}
                    result = run.result(name, spec.setting, told | place)
                    result.save(store.result_path(root, name, result.stream, result.seed))
                    results[run.number, name] = result
                    if log is not None:
                        log(result)
                run.tree.clear()
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


@dataclasses.dataclass
class StreamRun:
    """Stream `number` with the adapters that have not finished it, whose settings are given."""

    batches: Batches
    number: int
    adapters: Mapping[str, tuple[AdapterSpec, Adapter]]
    params: Any
    note: Mapping[str, Any]  # the adapters' settings, and the content of the images
    folder: Path  # of its checkpoints
    every: int | None = None  # batches between two of them
    done: int = 0
    tree: dict[str, Any] = dataclasses.field(default_factory=dict)  # adapters' states and records

    def __post_init__(self) -> None:
        """Go to the newest checkpoint of these settings."""
        self.stream = self.batches.streams[self.number]
        self.places = self.batches.of(self.number)
        self.labels = data.labels_of(self.batches.benchmark)[self.stream.items[:, 1]]
        if not self.every or not self.folder.is_dir():
            return
        self._begin()
        try:
            if saved := restore_checkpoint(self.folder, self.tree):
                done, tree, note = saved
                fits = note["settings"].items() >= self.note["settings"].items()
                if not fits or self.note["content"] not in (None, note["content"]):
                    raise ValueError("other settings or images, or not known which")
                for node in tree.values():  # arrays that can be written to
                    node["record"] = {key: np.array(x) for key, x in node["record"].items()}
                self.tree, self.done = tree, done
        except ValueError as error:
            _log.warning("%s: ignored, restarting the stream (%s)", self.folder, error)

    def _begin(self) -> None:
        for name in self.note["settings"]:
            record = {key: np.zeros(len(self.labels), kind) for key, kind in IMAGE.items()}
            record |= {key: np.zeros(len(self.places), kind) for key, kind in BATCH.items()}
            record["seconds"][:] = np.nan
            state = self.adapters[name][1].init(self.params, jax.random.key(self.stream.seed))
            self.tree[name] = {"state": state, "record": record}

    def finish(self, steps: dict[str, Callable], source: Iterator[Any], bar: tqdm) -> None:
        """Step through the rest of the stream; `steps` are the adapters' compiled ones."""
        if not self.tree:
            self._begin()
        title = f"{self.stream.name} seed {self.stream.seed}"
        bar.set_description(title)
        before: tuple[Any, ...] = ()  # a batch's scores are fetched while the next is computed
        for number in range(self.done, len(self.places)):
            batch = next(source)  # arrays that the step transfers
            timed = number % TIMED == min(1, len(self.places) - 1)  # the first loads the program
            scores: dict[str, Any] = {}
            for name, node in self.tree.items():
                spec, adapter = self.adapters[name]
                inputs = Batch(batch.images, batch.mask, batch.index)
                if spec.needs_originals:
                    inputs = Batch(batch.originals, batch.mask, batch.index, batch.sizes)
                if name not in steps:  # once per sweep, and not timed
                    bar.set_description(f"compiling {name} …")
                    step = jax.jit(adapter.step, donate_argnums=1)
                    steps[name] = step.lower(self.params, node["state"], inputs).compile()
                    bar.set_description(title)
                if timed:
                    jax.block_until_ready((before, scores, node["state"]))
                start = time.perf_counter()
                node["state"], prediction = steps[name](self.params, node["state"], inputs)
                if timed:
                    jax.block_until_ready(prediction)
                    node["record"]["seconds"][number] = time.perf_counter() - start
                scores[name] = score(prediction.logits, batch.labels)
                scores[name]["skipped"] = prediction.metrics.get("skipped", False)
            if before:
                self._keep(bar, *before)
            before = number, batch, scores
            last = number + 1 == len(self.places)
            if last or (self.every and (number + 1) % self.every == 0):
                self._keep(bar, *before)
                before = ()
                if not last:
                    save_checkpoint(self.folder, number + 1, self.tree, self.note)

    def _keep(self, bar: tqdm, number: int, batch: Any, scores: dict[str, Any]) -> None:
        """Fetch a batch's scores, and show the top-1 accuracy so far in per cent."""
        shown, seen = {}, batch.index[batch.mask]
        for name, values in scores.items():
            record = self.tree[name]["record"]
            record["skipped"][number] = bool(values.pop("skipped"))
            record["seen"][seen] = True
            for key, value in values.items():
                record[key][seen] = np.asarray(value)[batch.mask]
            right = (record["prediction"] == self.labels) & record["seen"]
            shown[name] = f"{100 * right.sum() / max(record['seen'].sum(), 1):.1f}"
        bar.set_postfix(shown)
        bar.update()

    def result(self, name: str, setting: str, about: dict[str, Any]) -> Predictions:
        """The finished stream's predictions of one adapter."""
        record, benchmark = self.tree[name]["record"], self.batches.benchmark
        segments, images = self.stream.items.T
        unreadable = tuple(
            data.name_of(benchmark[self.stream.segments[segment]], image)
            for segment, image in self.stream.items[~record["seen"]].tolist()
        )
        if len(unreadable) == len(images):
            raise ValueError(f"none of the images could be read, such as {unreadable[0]}")
        rows = {"segment": segments, "image": images, "label": self.labels}
        return Predictions(
            adapter=name,
            stream=self.stream.name,
            seed=self.stream.seed,
            setting=setting,
            domains=self.stream.segments,
            class_names=tuple(data.class_names_of(benchmark)),
            rows=pd.DataFrame(rows | {key: record[key] for key in IMAGE}),
            steps=pd.DataFrame({key: record[key] for key in BATCH}),
            unreadable=unreadable,
            settings=self.note["settings"][name],
            about=about,
            peak_memory_gb=peak_memory_gb(),
            content=self.note["content"],
        )


def peak_memory_gb() -> float:
    """Peak memory so far, of the accelerator or of this process."""
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    unit = 1 if sys.platform == "darwin" else 1024
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit) / 1e9
