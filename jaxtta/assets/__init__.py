"""The embedded default: a small real CLIP and 2,000 real pictures, ordinary folders both."""

from pathlib import Path

MODEL = Path(__file__).parent / "tiny-clip-cifar10"
"""A transformers checkpoint; see the model card in it."""
PICTURES = Path(__file__).parent / "cifar10-test-2000"
"""CIFAR-10 test pictures by class."""
