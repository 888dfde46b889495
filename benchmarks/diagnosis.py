"""Time and memory of a diagnosis, on synthetic features of ViT-B/16's size with 1,000 classes.

python benchmarks/diagnosis.py --images 50000
"""

import time

import jax.numpy as jnp
import numpy as np
import tyro

from jaxtta import diagnose, evaluate, models


def main(images: int = 50000, classes: int = 1000, size: int = 512) -> None:
    """Measure noise around the classes' texts, with one outlier axis."""
    rng, labels = np.random.default_rng(1), np.arange(images, dtype=np.int32) % classes
    head = models.l2_normalize(jnp.asarray(rng.standard_normal((classes, size), np.float32)))
    rows = rng.standard_normal((images, size), np.float32) + 5 * np.asarray(head)[labels]
    rows[:, 0] += 20
    rows = np.asarray(models.l2_normalize(jnp.asarray(rows)))
    other = rows + 0.05 * rng.standard_normal(rows.shape, np.float32)
    start, names = time.perf_counter(), [*map(str, range(classes))]
    base = diagnose.LabelledSet("base", head, names, diagnose.FeatureSet(rows, labels, []))
    found, _ = diagnose.diagnose_model("model", [base], diagnose.Settings())
    text = f"outlier axes {found.base.outlier_axes}, accuracy {found.sets['base'].accuracy:.3f}, "
    text += f"CKA {diagnose.linear_cka(rows, other):.3f}, "
    text += f"p-value {diagnose.mmd_to_reference(rows[::2], rows[1::2])[0].p_value:.3f}: "
    print(f"{text}{time.perf_counter() - start:.1f} s, {evaluate.peak_memory_gb():.2f} GB")


if __name__ == "__main__":
    tyro.cli(main)
