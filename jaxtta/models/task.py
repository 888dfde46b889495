"""Zero-shot tasks: class names and prompt templates to token ids."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from jaxtta.models.classifier import require_model

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


class Tokenized(Protocol):
    """A model whose classes are given as text; `jaxtta.models.CLIP` is one.

    Attributes:
        source: folder of the tokenizer, or None.
        max_length: tokens a prompt may have.
    """

    @property
    def source(self) -> str | None: ...  # noqa: D102

    @property
    def max_length(self) -> int: ...  # noqa: D102


class Task(NamedTuple):
    """A zero-shot classification task: what the classes are called, in tokens.

    Attributes:
        token_ids: (classes, templates, length) integers, on the host.
        class_names: one name a class, or () where only token ids are known.
    """

    token_ids: np.ndarray
    class_names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.token_ids.shape[0]


def task_from_token_ids(token_ids: np.ndarray, class_names: Sequence[str] = ()) -> Task:
    """Make a task of ready token ids.

    Args:
        token_ids: (classes, length) or (classes, templates, length) integers.
        class_names: one name a class, if there are any.

    Returns:
        The task.

    Raises:
        ValueError: if the array has another shape or dtype, or fewer than two classes.
    """
    token_ids = np.asarray(token_ids)
    if token_ids.ndim == 2:
        token_ids = token_ids[:, None]
    if token_ids.ndim != 3 or not np.issubdtype(token_ids.dtype, np.integer):
        raise ValueError(
            "token ids must be integers of shape (classes, length) or (classes, templates, "
            f"length), not {token_ids.dtype} of shape {token_ids.shape}"
        )
    if len(token_ids) < 2:
        raise ValueError(f"a task needs at least two classes, not {len(token_ids)}")
    if class_names and len(class_names) != len(token_ids):
        raise ValueError(f"{len(class_names)} class names for {len(token_ids)} classes")
    return Task(token_ids.astype(np.int32), tuple(class_names))


def zero_shot_task(
    model: Tokenized, class_names: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)
) -> Task:
    """Tokenise class prompts with the checkpoint's own tokenizer.

    Args:
        model: a loaded model.
        class_names: at least two; underscores become spaces.
        templates: one or more, each with `{}` where the class name goes; several are averaged.

    Returns:
        The task.

    Raises:
        FileNotFoundError: if the checkpoint has no tokenizer.
        TypeError: if the model is none, or names or templates are no list of strings.
        ValueError: if there are fewer than two classes, an empty name, a template without `{}` or
            a prompt too long for the model.
    """
    if not hasattr(model, "max_length"):
        require_model(model)
        raise ValueError("this model has no text tower: its classes are its own, task is None")
    if isinstance(class_names, str) or isinstance(templates, str):
        raise ValueError("class names and templates are lists of strings, not one string")
    for name, given in (("class_names", class_names), ("templates", templates)):
        if isinstance(given, Mapping | Set) or not hasattr(given, "__len__"):
            raise TypeError(f"{name} is a {type(given).__name__}, expected a list of strings")
        if odd := [value for value in given if not isinstance(value, str)]:
            raise TypeError(f"{name} holds {odd[0]!r}, expected strings")
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
    if longest > model.max_length:
        raise ValueError(
            f"a prompt has {longest} tokens, the model takes at most {model.max_length}: "
            f"{prompts[lengths.index(longest)]!r}"
        )
    # Filled up with its own end of text, whatever pads a prompt's tokenizer.
    ids = [row + row[-1:] * (longest - len(row)) for row in rows]
    return task_from_token_ids(np.reshape(ids, (len(names), len(templates), longest)), names)


def _tokenizer(model: Tokenized):  # noqa: ANN202 (a transformers class that differs by version)
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
