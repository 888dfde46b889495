"""The bundled default: a small real CLIP and 2,000 real images."""

from pathlib import Path

MODEL = Path(__file__).parent / "tiny-clip-cifar10"
"""A transformers checkpoint; see the model card in it."""
PHI = Path(__file__).parent / "mgg-tiny-clip-cifar10" / "phi.safetensors"
"""Weights of MGTTA's gradient generator, trained on the bundled model; see the card beside it."""
STATISTICS = PHI.with_name("statistics.safetensors")
"""Statistics of clean CIFAR-10 images' features under the bundled model."""
IMAGES = Path(__file__).parent / "cifar10-test-2000.npz"
"""200 CIFAR-10 test images of each class (Krizhevsky, 2009): `images`, `labels`, `class_names`."""
