r"""Label a stream of images with a model that adapts while it runs.

    jaxtta serve FOLDER_OR_IMAGES… --class-names cat dog

is `jaxtta classify` with BATCLIP and small batches. A step whose loss or update is not finite is
skipped and not counted as an update.

TNT needs no batch: it optimises a small noise map for each image, at the cost of more than a
hundred forward passes. A map can be learnt once for a camera, and then applied as it is:

    jaxtta serve IMAGES… --adapter tnt --learn-noise camera.safetensors
    jaxtta serve FOLDER --adapter tnt --noise camera.safetensors
"""

from jaxtta.cli import classify
from jaxtta.cli.options import group


@group
class Options(classify.Options):
    """Label images with a model that adapts."""

    adapter: str = "batclip"  # batclip, tent:lr=1e-4, tnt, … as in jaxtta sweep --adapters
    batch_size: int = 8  # images per step


run = classify.run
