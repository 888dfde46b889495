"""Writing checkpoints that transformers reads."""

import json
import logging
import shutil
from pathlib import Path
from types import ModuleType

from safetensors.numpy import save as to_bytes

from jaxtta.models.checkpoints import siglip, transformers
from jaxtta.models.checkpoints.files import TOKENIZER_FILES
from jaxtta.models.checkpoints.preprocessing import processor_settings
from jaxtta.models.classifier import Params
from jaxtta.models.clip import CLIP
from jaxtta.models.vit import VisionTransformer

log = logging.getLogger(__name__)


def save(folder: str | Path, model: CLIP, params: Params) -> None:
    """Write a transformers checkpoint: configuration, weights, preprocessing and tokenizer.

    Args:
        folder: made if it is missing; files in it are overwritten.
        model: the model; its tokenizer is copied from its source, if it has one.
        params: the parameter tree.

    Raises:
        TypeError: if the model is a supervised classifier, or none.
        ValueError: if the model is neither transformers' CLIP nor its SigLIP, as with a ResNet, or
            the image processor cannot do the model's preprocessing.

    Examples:
        With `model`, `params` and `task` of `jaxtta.load`'s example, a model that has learnt:

        >>> state = jaxtta.adapters.tent(model, task).init(params)
        >>> jaxtta.models.save("adapted", model, jaxtta.tree.merge(params, state.adapted))
        >>> model, params = jaxtta.load("adapted")
    """
    if not isinstance(model, CLIP):
        raise TypeError(f"model is a {type(model).__name__}, only CLIP and SigLIP can be saved")
    try:
        writer = _writer(model)
        settings = processor_settings(model.preprocessing)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if model.preprocessing.rounding != "transformers" and model.preprocessing.crop is not None:
        log.warning(
            "%s: transformers crops images of some sizes one pixel beside OpenCLIP's centre", folder
        )
    if model.clean in ("lower", "canonicalize"):
        log.warning(
            "%s: OpenCLIP cleans this model's prompts (%s) before they are tokenised, transformers "
            "leaves that to the tokenizer",
            folder,
            model.clean,
        )
    cropped = model.preprocessing.crop is not None or isinstance(model.preprocessing.resize, int)
    if writer is siglip and not cropped:  # SigLIP's own processor does not crop
        settings["image_processor_type"] = "SiglipImageProcessor"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    writer.config_of(model).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
    # transformers 5 would take another one's settings from there.
    (folder / "processor_config.json").unlink(missing_ok=True)
    source = Path(model.source).resolve() if model.source else folder.resolve()
    for name in TOKENIZER_FILES:
        if source != folder.resolve() and (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    tensors = to_bytes(writer.tensors_of(params), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(tensors)


def _writer(model: CLIP) -> ModuleType:
    """What writes a model, by the settings in which CLIP and SigLIP differ."""
    vision, text = model.vision, model.text
    if not isinstance(vision, VisionTransformer):
        raise ValueError(
            f"a {type(vision).__name__} image tower cannot be saved as a transformers checkpoint"
        )
    if not text.has_projection:
        raise ValueError(
            "a text tower without projection cannot be saved as a transformers checkpoint"
        )
    own = (vision.class_token, text.causal, not text.projection_bias, not model.logit_bias)
    if len({*own}) != 1:
        raise ValueError(
            "a model between CLIP and SigLIP (class token, causal text, biases of text projection "
            "and logits) cannot be saved as a transformers checkpoint"
        )
    return transformers if vision.class_token else siglip
