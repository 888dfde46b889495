"""Adapters over streams: all step on each batch as it is read, and each image is read once."""

import dataclasses
import itertools
import logging
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from tqdm import tqdm

from jaxtta.adapters import Adapter
from jaxtta.data import (
    CLEAN,
    Batches,
    Benchmark,
    Domain,
    Stream,
    StreamBatch,
    canvas_for,
    class_names_of,
    content_of,
    name_of,
    read_ahead,
    select,
)
from jaxtta.evaluate import provenance
from jaxtta.evaluate.adapters import (
    AdapterConfig,
    AdapterSpec,
    check_mgtta_files,
    identity_of,
    make_adapter,
    specs_of,
)
from jaxtta.evaluate.checkpoint import restore_checkpoint, save_checkpoint
from jaxtta.evaluate.predictions import ROWS, Predictions, score
from jaxtta.evaluate.store import Store
from jaxtta.models import Batch, Classifier, Params, Task
from jaxtta.models.preprocess import Preprocessing

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a sweep runs on.

    Attributes:
        benchmark: the datasets by domain.
        streams: of the benchmark's images.
        task: the classes' prompts; None for a model with classes of its own.
        batch_size: images per batch.
        canvas: size to which full-size images are padded for adapters that make their own views;
            None for the largest side in a sample of the images, at most 512.
        setting: name of the streams' setting, for the results.
        settings: further settings that results depend on and that streams do not show, as JSON
            values: the options that the streams were made with.
        templates: of the prompts, for the results.
    """

    benchmark: Benchmark
    streams: Sequence[Stream]
    task: Task | None
    batch_size: int
    canvas: int | None = None
    setting: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    templates: Sequence[str] = ()

    def batches(self, model: Classifier, adapters: Sequence[AdapterSpec] = ()) -> Batches:
        """The streams in batches, with full-size images if one of the adapters needs them."""
        canvas = None
        if any(spec.needs_originals for spec in adapters):
            first = next(iter(self.benchmark.values()))
            canvas = self.canvas or canvas_for(self.benchmark.get(Domain(CLEAN), first))
        preprocess = getattr(model, "preprocessing", Preprocessing(model.image_size))
        return Batches(self.benchmark, tuple(self.streams), self.batch_size, preprocess, canvas)


def sweep(
    spec: Spec,
    adapters: Sequence[str | AdapterSpec] | Mapping[str, Callable[..., Adapter]],
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
        model: the model.
        params: its parameters, frozen.
        folder: for the results, locked during the run; None to keep nothing.
        config: settings of adapters that their names do not say.
        workers: processes that read images ahead; 0 for a thread.
        shard: this run's index and the number of runs that share the streams.
        checkpoint_every: batches between two checkpoints within a stream.
        trust_data: take earlier results without checking that the stored images are the same.
        log: called with each new result.
        progress: show a progress bar.
        about: what to keep with the results beside their settings; None for `about(model)`.

    Returns:
        The results of this shard's streams, by stream, then adapter.

    Raises:
        ValueError: if the folder is in use, or has other settings or images; if no image of a
            stream can be read; for unknown domains or adapters.
        OSError: if the folder cannot be written; finished results are kept.
    """
    options = {"workers": workers, "shard": shard, "progress": progress, "about": about}
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            return sweep(
                *(spec, adapters, model, params, scratch),
                config=config,
                log=log,
                trust_data=True,
                **options,
            )
    specs = specs_of(adapters)
    made = {each.text: make_adapter(each, model, spec.task, config) for each in specs}
    batches = spec.batches(model, specs)
    share = range(shard[0], len(batches.streams), shard[1])
    select(spec.benchmark, list(dict.fromkeys(d for s in spec.streams for d in s.segments)))
    shared = _shared_settings(spec, model, params)
    check_mgtta_files(specs, config, shared["model"]["weights"])
    own = {each.text: identity_of(each, config, batches.canvas) for each in specs}
    originals = {each.text for each in specs if each.needs_originals}
    about = dict(provenance.about(model) if about is None else about)
    store = Store(Path(folder), shared)
    results: dict[tuple[int, str], Predictions] = {}
    with store.lock(shard):
        contents = dict.fromkeys(share) if trust_data else _contents(batches, share, progress)
        jobs = []
        for number in share:
            job = _Job(number, batches, contents[number], store)
            for name in own:
                settings = job.settings_of(own[name])
                found = store.read(name, job.stream.name, job.stream.seed, settings, job.content)
                if found is not None:
                    results[number, name] = found
                else:
                    job.settings[name] = settings
            if job.settings:
                jobs.append(job)
        if results and not trust_data and None in contents.values():
            _logger.warning(
                "%s: earlier results are taken as they are, since the dataset cannot tell whether "
                "its images have changed: it has no content()",
                folder,
            )
        for job in jobs:
            if checkpoint_every is not None:
                job.restore(made, params)
        to_read = [place for job in jobs for place in job.places[job.done :]]
        total = sum(len(job.places) for job in jobs)
        with tqdm(
            total=total,
            initial=total - len(to_read),
            unit="batch",
            disable=not progress or not jobs,
        ) as bar:
            source = iter(read_ahead(batches, workers, to_read)) if jobs else iter(())
            steps: dict[str, Callable] = {}
            for job in jobs:
                job.start(made, params)
                for step in range(job.done, len(job.places)):
                    job.step(step, next(source), made, params, steps, originals, bar)
                    finished = step + 1
                    if checkpoint_every and not finished % checkpoint_every < len(job.places):
                        job.save(finished)
                for place, name in enumerate(own):
                    if name in job.settings:
                        result = job.result(name, spec, about | {"place": [job.number, place]})
                        store.write(result)
                        results[job.number, name] = result
                        if log is not None:
                            log(result)
                job.remove()
            next(source, None)  # ends the reader processes
    return [results[number, name] for number in share for name in own]
