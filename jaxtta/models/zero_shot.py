"""Zero-shot tasks: class names and prompt templates to token ids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtta.models.checkpoints.files import TOKENIZER_FILES
from jaxtta.models.clip import CLIP
from jaxtta.models.prompts import Task, task_from_token_ids


def zero_shot_task(
    model: CLIP, class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
) -> Task:
    """Tokenise class prompts with the checkpoint's own tokenizer.

    Args:
        model: a loaded model.
        class_names: at least two; underscores become spaces, as published.
        templates: one or more, each with `{}` where the class name goes; several are averaged.

    Returns:
        The task.

    Raises:
        FileNotFoundError: if the checkpoint has no tokenizer.
        ValueError: if there are fewer than two classes, an empty name, a template without `{}` or
            a prompt too long for the model.
    """
    if isinstance(class_names, str) or isinstance(templates, str):
        raise ValueError("class names and templates are lists of strings, not one string")
    if len(class_names) < 2:
        raise ValueError(f"a task needs at least two classes, not {len(class_names)}")
    names = [name.replace("_", " ").strip() for name in class_names]
    if not all(names):
        raise ValueError(f"class name {names.index('')} is empty")
    if not templates:
        raise ValueError("a task needs at least one prompt template")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} needs one {{}} for the class name")
    # replace, not format: a template or a name may hold other braces
    prompts = [template.replace("{}", name) for name in names for template in templates]
    rows = _tokenizer(model)(prompts, verbose=False)["input_ids"]
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    if longest > model.text.max_length:
        raise ValueError(
            f"a prompt has {longest} tokens, the model takes at most {model.text.max_length}: "
            f"{prompts[lengths.index(longest)]!r}"
        )
    # Filled up with its own end of text, whatever pads a prompt's tokenizer.
    ids = [row + row[-1:] * (longest - len(row)) for row in rows]
    return task_from_token_ids(np.reshape(ids, (len(names), len(templates), longest)), names)


def _tokenizer(model: CLIP):  # noqa: ANN202 (a transformers class that differs by version)
    """The checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    folder = Path(model.source) if model.source else None
    if folder is None or not any((folder / name).exists() for name in TOKENIZER_FILES[1:3]):
        raise FileNotFoundError(
            f"{folder or 'this model'}: has no tokenizer (tokenizer.json, or vocab.json and "
            "merges.txt), which class names need; task_from_token_ids takes ready token ids"
        )
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise errors of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: its tokenizer cannot be read ({reason})") from error
