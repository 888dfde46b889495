"""Make a folder that `jaxtta.load` reads of a PyTorch file of weights.

    jaxtta convert ViT-B-32.pt vit-b-32                                    # OpenAI's archives
    jaxtta convert epoch_32.pt mine --config ViT-B-32.json                 # OpenCLIP's training
    jaxtta convert finetuned.pt tuned --activation quick_gelu              # a state dict
    jaxtta convert model/pytorch_model.bin converted                       # with its config.json

Run it once where PyTorch is installed; the folder needs none. Pickles are read with
`weights_only=True`, so that nothing in them runs. Wrappers (`state_dict`, `module.`, `_orig_mod.`,
…) are taken off. Class names need a tokenizer, tokenizer.json, or vocab.json and merges.txt: it is
copied from --tokenizer, else from beside the file or the configuration.
"""

from pathlib import Path
from typing import Annotated

import jax
import tyro

from jaxtta.cli.options import group
from jaxtta.models import CLIP, describe_preprocessing
from jaxtta.models.checkpoints.files import SENTENCE_PIECES, TOKENIZER_FILES
from jaxtta.models.checkpoints.pytorch import Activation, convert


@group
class Options:
    """Make a folder that jaxtta.load reads of a PyTorch file of weights."""

    # the file of weights: .pt, .pth, .ckpt, .bin, .bin.index.json or .safetensors
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]  # the new folder
    # config.json of transformers, or open_clip_config.json or model_configs/NAME.json of OpenCLIP,
    # by default the one beside the file; else what the parameters' shapes say
    config: Path | None = None
    tokenizer: Path | None = None  # folder with its files (default: beside the file)
    activation: Activation | None = None  # quick_gelu for OpenAI's weights, mostly gelu for others


def run(options: Options) -> None:
    """Convert, and say what came of it."""
    given = {name: getattr(options, name) for name in ("config", "tokenizer", "activation")}
    model, params = convert(options.file, options.out, **given)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{options.out}: {type(model).__name__} with {count:,} parameters")
    print(describe_preprocessing(model))
    names = (*TOKENIZER_FILES[1:3], *SENTENCE_PIECES)
    if isinstance(model, CLIP) and not any((options.out / name).exists() for name in names):
        print("tokenizer: none; class names need one: copy the original model's into the folder")
