"""Make a folder that `jaxtta.load` reads of a PyTorch file of weights.

    jaxtta convert ViT-B-32.pt vit-b-32                                    # OpenAI's archives
    jaxtta convert epoch_32.pt mine --config ViT-B-32.json                 # OpenCLIP's training
    jaxtta convert finetuned.pt mine --activation quick_gelu               # a state dict
    jaxtta convert model/pytorch_model.bin mine                            # with its config.json

Run it once where PyTorch is installed; the folder needs none. Pickles are read with
`weights_only=True`, so that nothing in them runs. Wrappers (`state_dict`, `module.`, `_orig_mod.`,
…) are taken off. The new folder is loaded before it gets its name: what does not fit is said here.
Class names need a tokenizer: its files are copied from --tokenizer, else from beside the file or
the configuration.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import tyro

from jaxtta.models import CLIP, describe_preprocessing
from jaxtta.models.checkpoints.files import SENTENCE_PIECES, TOKENIZER_FILES
from jaxtta.models.checkpoints.pytorch import Activation, convert


@dataclasses.dataclass(frozen=True)
class Options:
    """Make a folder that jaxtta.load reads of a PyTorch file of weights."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The file of weights: .pt, .pth, .ckpt, .bin, .bin.index.json or .safetensors."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The new folder."""
    config: Path | None = None
    """config.json of transformers, or open_clip_config.json or model_configs/NAME.json of OpenCLIP
    (default: the one beside the file; else what the parameters' shapes say)."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json, or vocab.json and merges.txt (default: beside the file)."""
    activation: Activation | None = None
    """For state dicts without a configuration: quick_gelu for OpenAI's weights and what was trained
    from them, gelu for most of OpenCLIP's."""
    debug: bool = False
    """Show tracebacks."""


def run(options: Options) -> None:
    """Convert, and say what came of it."""
    given = {name: getattr(options, name) for name in ("config", "tokenizer", "activation")}
    model, params = convert(options.file, options.out, **given)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{options.out}: {type(model).__name__} with {count:,} parameters")
    print(describe_preprocessing(model))
    names = (*TOKENIZER_FILES[1:3], *SENTENCE_PIECES)
    has_tokenizer = any((options.out / name).exists() for name in names)
    if isinstance(model, CLIP) and not has_tokenizer:
        files = "vocab.json and merges.txt into the folder (those of openai/clip-vit-base-patch32"
        if model.padded_prompts:
            files = "tokenizer.json into the folder (that of google/siglip-base-patch16-224"
        print(f"tokenizer: none; class names need one. Copy {files}, if the model was trained so)")
