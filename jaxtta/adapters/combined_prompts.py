"""Prompts that name several classes, put together from tokens on the device.

    words = class_words(model, ["cat", "ox", "owl"])          # once, with the model's tokenizer
    length = combined_length(words, labels=2)
    combined_prompts(words, jnp.array([[2, 0]]), length)      # "a photo of a owl or cat"

Which classes are named may change under `jit`; all prompts have one shape.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtta.models import zero_shot_task

Array = jax.Array


class ClassWords(NamedTuple):
    """What prompts of several classes are made of, in tokens.

    Attributes:
        prefix: (prefix,) the beginning of text and what precedes the names.
        names: (classes, longest), each class's name, filled up with −1.
        joiner: (joiner,) what stands between two names, the word "or".
        suffix: (suffix,) what follows the names, the end of text last.
    """

    prefix: Array | np.ndarray
    names: Array | np.ndarray
    joiner: Array | np.ndarray
    suffix: Array | np.ndarray


def class_words(
    model: Any, class_names: Sequence[str], template: str = "a photo of a {}"
) -> ClassWords:
    """Tokenise class names and the words around them, once.

    CLIP's tokens do not reach across spaces, so that prompts can be put together from the tokens of
    their words; this is checked for every class.

    Args:
        model: a loaded model with a tokenizer.
        class_names: as in `zero_shot_task`.
        template: with `{}` where the names go.

    Returns:
        The words, as numpy arrays.

    Raises:
        FileNotFoundError: if the checkpoint has no tokenizer.
        ValueError: as `zero_shot_task`, or if a name's tokens depend on the template.
    """
    rows = zero_shot_task(model, [*class_names, "or", "and"], ("{}", template)).token_ids
    end = rows[0, 0, -1]
    names = [row[1 : (row == end).argmax()] for row in rows[:, 0]]
    *names, joiner, _ = names
    whole = [row[: (row == end).argmax() + 1] for row in rows[:, 1]]
    # Two words that begin with other letters, so with other tokens.
    start = next(n for n, (a, b) in enumerate(zip(*whole[-2:], strict=False)) if a != b)
    prefix, suffix = whole[-2][:start], whole[-2][start + len(joiner) :]
    for number, (name, text) in enumerate(zip(names, whole, strict=False)):
        if not np.array_equal(np.concatenate([prefix, name, suffix]), text):
            raise ValueError(
                f"the tokens of {class_names[number]!r} are others in the template {template!r}, "
                "which needs spaces around {}"
            )
    longest = max(map(len, names))
    padded = [np.pad(name, (0, longest - len(name)), constant_values=-1) for name in names]
    return ClassWords(prefix, np.stack(padded), joiner, suffix)


def combined_length(words: ClassWords, labels: int) -> int:
    """Tokens of the longest prompt that names several classes."""
    lengths = np.sort((np.asarray(words.names) >= 0).sum(1))
    around = len(words.prefix) + (labels - 1) * len(words.joiner) + len(words.suffix)
    return int(lengths[-labels:].sum()) + around


def combined_prompts(words: ClassWords, chosen: Array, length: int) -> Array:
    """Put together prompts that name several classes each.

    Args:
        words: what they are made of.
        chosen: (batch, labels) integers, the classes in order.
        length: tokens of the longest (`combined_length`).

    Returns:
        (batch, length) token ids, filled up with the end of text.
    """
    batch, labels = chosen.shape
    spread = (batch, labels, len(words.joiner))
    named = [jnp.asarray(words.names)[chosen], jnp.broadcast_to(words.joiner, spread)]
    middle = jnp.concatenate(named, -1).reshape(batch, -1)[:, : -len(words.joiner)]
    ends = (jnp.broadcast_to(x, (batch, len(x))) for x in (words.prefix, words.suffix))
    row = jnp.concatenate([next(ends), middle, next(ends)], 1)
    # A stable sort moves the holes behind short names to the end, whatever their number.
    order = jnp.argsort((row < 0).astype(jnp.int32), axis=1, stable=True)
    row = jnp.take_along_axis(row, order, axis=1)[:, :length]
    return jnp.where(row < 0, jnp.asarray(words.suffix)[-1], row)


def words_for(
    model: Any,
    task: Any,
    labels: int = 3,
    template: str = "a photo of a {}",
    words: ClassWords | None = None,
) -> ClassWords:
    """What CLIPArTT's prompts are made of: the words given, or else the task's class names.

    Args:
        model: CLIP.
        task: the classes.
        labels: classes that a prompt names.
        template: with `{}` where the names go.
        words: ready tokens; None for none.

    Returns:
        The words.

    Raises:
        FileNotFoundError: as `class_words`.
        TypeError: if the task or words are something else.
        ValueError: as `class_words`, or if the model or the task is not what CLIPArTT needs, or a
            prompt of several classes is too long for the model.
    """
    if not hasattr(model, "encode_text"):
        raise ValueError("CLIPArTT needs a text tower, for prompts of its own; this model has none")
    if model.padded_prompts:
        raise ValueError(
            "CLIPArTT's prompts end at different places; this model, as SigLIP, reads each whole"
        )
    model.prompts(task)  # for its errors
    if words is None and not task.class_names:
        raise ValueError(
            "CLIPArTT writes class names into prompts and the task has none: zero_shot_task keeps "
            "them, or give words"
        )
    words = class_words(model, task.class_names, template) if words is None else words
    if not isinstance(words, ClassWords):
        raise TypeError(f"words is a {type(words).__name__}, expected ClassWords: class_words(…)")
    if len(words.names) != task.classes:
        raise ValueError(f"words of {len(words.names)} classes, the task has {task.classes}")
    if labels > task.classes:
        raise ValueError(f"a prompt names {labels} labels, the task has {task.classes} classes")
    length = combined_length(words, labels)
    if length > model.max_length:
        raise ValueError(
            f"a prompt of {labels} classes may have {length} tokens, the model takes at most "
            f"{model.max_length}"
        )
    return words
