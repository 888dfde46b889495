r"""Label a stream of images with a model that adapts while it runs.

    jaxtta serve FOLDER_OR_IMAGES… --class-names cat dog

is `jaxtta classify` with BATCLIP and small batches: one line per image, with its label, the
confidence, and how many updates of the model the answer had. A step whose loss or update is not
finite is skipped and not counted.

TNT needs no batch: it optimises a small noise map for each image, at the cost of more than a
hundred forward passes. A map can be learnt once for a camera, and then applied as it is:

    jaxtta serve IMAGES… --adapter tnt --learn-noise camera.safetensors
    jaxtta serve FOLDER --adapter tnt --noise camera.safetensors
"""

from pathlib import Path

from jaxtta.adapters import TNTConfig, load_noise, save_noise
from jaxtta.cli import classify
from jaxtta.cli.options import group


@group
class Options(classify.Options):
    """Label images with a model that adapts.

    Attributes:
        adapter: batclip, tent:lr=1e-4, tnt, … as in jaxtta sweep --adapters.
        batch_size: images per step.
        learn_noise: learn one noise map over all images and save it here (tnt only).
        noise: a saved noise map to apply unchanged (tnt only); with --learn-noise, the initial one.
    """

    adapter: str = "batclip"
    batch_size: int = 8
    learn_noise: Path | None = None
    noise: Path | None = None


def run(options: Options) -> int:
    """Print one line per image; return the exit code."""
    if options.adapter.partition(":")[0] != "tnt" and (options.noise or options.learn_noise):
        raise ValueError("--noise and --learn-noise are for --adapter tnt")
    if options.learn_noise and not options.learn_noise.parent.is_dir():
        raise FileNotFoundError(f"{options.learn_noise.parent}: no such folder")
    noise = load_noise(options.noise)[0] if options.noise else None
    frozen = TNTConfig(views=1, steps=0) if options.noise else TNTConfig()
    config = TNTConfig(online=True) if options.learn_noise else frozen
    code, state = classify.label(options, "serve", config, noise)
    if options.learn_noise:
        save_noise(options.learn_noise, state.noise, config)
    return code
