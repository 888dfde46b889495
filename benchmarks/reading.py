"""Images per second from JPEG files to batches."""

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from jaxtta import data
from jaxtta.models.preprocess import Preprocessing

FILES, BATCH = 640, 64
SHAPES = {"224 × 224 (ImageNet-C)": (224, 224), "500 × 375 (ImageNet)": (500, 375)}


def reading_times() -> pd.DataFrame:
    """Images per second of time and of a core, by the files' size and the number of threads."""
    preprocess = Preprocessing(224, 224, (224, 224))
    random, rows = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            for number in range(FILES):
                place = Path(folder) / f"class {number % 2}"
                place.mkdir(exist_ok=True)
                coarse = random.integers(0, 256, (14, 14, 3), np.uint8)
                smooth = Image.fromarray(coarse).resize(shape, Image.Resampling.BICUBIC)
                pixels = np.asarray(smooth) + random.normal(0, 20, (*shape[::-1], 3))
                noisy = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                noisy.save(place / f"{number}.jpg", quality=85)
            benchmark = {data.Domain(data.CLEAN): data.open_dataset("folder", folder)}
            items = np.stack([np.zeros(FILES, int), random.permutation(FILES)], 1)
            stream = data.Stream("clean", 0, (data.Domain(data.CLEAN),), (items,))
            batches = data.Batches(benchmark, (stream,), BATCH, preprocess)
            for threads in (1, 2, 4):
                wall, cpu = time.perf_counter(), time.process_time()
                count = sum(int(batch.mask.sum()) for batch in data.read_ahead(batches, threads))
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                found = {"images/s": count / wall, "images/s a core": count / cpu}
                rows[f"{name}, {threads} threads"] = found
    return pd.DataFrame(rows).T.round()
