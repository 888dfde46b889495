"""Images per second when reading, and milliseconds to corrupt one image."""

import time

import cases
import pandas as pd

from jaxtta import data, models


def reading_times(images: data.Dataset, settings: cases.Settings) -> str:
    """Read up to 1,000 images in batches, and corrupt the first at severities 1, 3 and 5."""
    preprocess = models.from_config(cases.clip_config(settings.model)).preprocessing
    benchmark = data.corrupted(images, preprocess)
    streams = data.make_streams("reset_each_shift", [data.CLEAN], [0], images.labels, limit=1000)
    batches = data.Batches(benchmark, tuple(streams), settings.batch, preprocess)
    reader = data.read_ahead(batches, settings.workers)
    next(reader)  # the workers have started
    start = time.perf_counter()
    speed = sum(int(batch.mask.sum()) for batch in reader) / (time.perf_counter() - start)
    corrupted = {
        (domain.corruption, domain.severity): 1000
        * min(cases.timed(lambda dataset=dataset: dataset[0], 3, lambda image: image))
        for domain, dataset in benchmark.items()
        if domain.severity in (1, 3, 5)
    }
    times = pd.Series(corrupted).unstack(sort=False).to_string(float_format="{:.1f}".format)
    return (
        f"\nreading, {settings.workers} workers: {speed:.1f} images/s\n\n"
        f"ms to read and corrupt an image, by severity:\n{times}"
    )
