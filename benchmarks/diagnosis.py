"""Time and memory of a diagnosis, on synthetic features of ViT-B/16's size with 1,000 classes.

python benchmarks/diagnosis.py --images 50000
"""

import time

import jax.numpy as jnp
import numpy as np
import tyro

from jaxtta import diagnose, evaluate
from jaxtta.diagnose.model import base_metrics, set_metrics


def main(images: int = 50000, classes: int = 1000, size: int = 512) -> None:
    """Measure noise around the classes' texts, with one outlier axis."""
    rng, settings = np.random.default_rng(1), diagnose.Settings()
    head = rng.standard_normal((classes, size), np.float32)
    head /= np.linalg.norm(head, axis=1, keepdims=True)
    labels = np.arange(images, dtype=np.int32) % classes
    rows = rng.standard_normal((images, size), np.float32) + 5 * head[labels]
    rows[:, 0] += 20
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    other = rows + 0.05 * rng.standard_normal(rows.shape, np.float32)
    features, texts = diagnose.FeatureSet(rows, labels, []), jnp.asarray(head)
    before, start = evaluate.peak_memory_gb(), time.perf_counter()
    base, directions = base_metrics(texts, features, [*map(str, range(classes))], settings)
    found = set_metrics(texts, directions, features, settings.fractions)
    cka = diagnose.linear_cka(rows, other)
    shift, _ = diagnose.mmd_to_reference(rows[::2], rows[1::2])
    seconds, after = time.perf_counter() - start, evaluate.peak_memory_gb()
    print(
        f"outlier axes {base.outlier_axes}, accuracy {found.accuracy:.3f}, CKA {cka:.3f}, ", end=""
    )
    print(f"p-value {shift.p_value:.3f}: {seconds:.1f} s, {after:.2f} GB ({before:.2f} GB before)")


if __name__ == "__main__":
    tyro.cli(main)
