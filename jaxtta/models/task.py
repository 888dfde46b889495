"""Zero-shot tasks: class names and prompt templates to token ids."""

import html
import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtta.models.checkpoints.files import (
    SENTENCE_PIECES,
    TOKENIZER_FILES,
    is_transformers,
    read_json,
    refuse_pointer,
)
from jaxtta.models.checks import require_model

log = logging.getLogger(__name__)


def mend_text(text: str) -> str:
    """Mend a text as the tokenizers of CLIP and OpenCLIP do before they split it.

    Curly quotes, ligatures, full-width letters and wrongly decoded bytes become what was meant,
    HTML entities the characters they stand for. transformers' tokenizers leave this out.

    Args:
        text: a prompt or a class name.

    Returns:
        The text that CLIP was trained on.

    Examples:
        >>> from jaxtta.models.task import mend_text
        >>> mend_text("a photo of Beth&#39;s  cafÃ©")
        "a photo of Beth's café"

    References:
        Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
        2021 (`clip/simple_tokenizer.py`).
    """
    import ftfy  # here, since ready token ids need none

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def canonicalize(text: str) -> str:
    """Leave out ASCII punctuation and capitals, as SigLIP was trained; underscores are spaces."""
    text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation))
    return " ".join(text.lower().split())


CLEANERS: dict[str | None, Callable[[str], str]] = {
    None: mend_text,  # CLIP's
    "lower": lambda text: mend_text(text).lower(),  # this and the next as OpenCLIP names them
    "canonicalize": lambda text: canonicalize(mend_text(text)),
    "siglip": str.lower,  # what transformers' tokenizers of SigLIP 2 leave out in some versions
}
"""What is done to prompts before they are tokenised."""


class Tokenized(Protocol):
    """A model whose classes are given as text; `jaxtta.models.CLIP` is one.

    Attributes:
        source: folder of the tokenizer, or None.
        max_length: tokens a prompt may have.
        padded_prompts: whether its prompts are all filled up to `max_length`, as SigLIP's are.
        clean: a key of `CLEANERS`.
    """

    @property
    def source(self) -> str | None: ...  # noqa: D102

    @property
    def max_length(self) -> int: ...  # noqa: D102

    @property
    def padded_prompts(self) -> bool: ...  # noqa: D102

    @property
    def clean(self) -> str | None: ...  # noqa: D102


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

    Examples:
        >>> task = jaxtta.models.task_from_token_ids(np.array([[856, 5, 857], [856, 9, 857]]))
        >>> task.classes, task.token_ids.shape  # one template
        (2, (2, 1, 3))
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
        class_names: at least two; underscores become spaces. Prompts are cleaned as the model's own
            tokenizer does (`CLEANERS`), and names that then are the same are logged.
        templates: one or more, each with `{}` where the class name goes; several are averaged.

    Returns:
        The task.

    Raises:
        FileNotFoundError: if the checkpoint has no tokenizer.
        TypeError: if the model is not a classifier, or names or templates are not strings.
        ValueError: if there are fewer than two classes, an empty name, a template without `{}`, a
            prompt too long for the model, or the tokenizer cannot be read.

    Examples:
        With `model` of `jaxtta.load`'s example:

        >>> names, templates = ["cat", "dog"], ["a photo of a {}.", "a drawing of a {}."]
        >>> task = jaxtta.zero_shot_task(model, names, templates)
        >>> task.class_names, task.token_ids.shape[:2]  # tokens of each class in each template
        (('cat', 'dog'), (2, 2))
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
    cleaned = [CLEANERS[model.clean](name) for name in names]
    if not all(cleaned):
        raise ValueError(f"class name {cleaned.index('')} is empty")
    _report_equal(names, cleaned)
    if not templates:
        raise ValueError("a task needs at least one prompt template")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"template {template!r} needs one {{}} for the class name")
    _report_numbers(names, templates)
    # replace, not format: a template or a name may hold other braces
    prompts = [template.replace("{}", name) for name in names for template in templates]
    tokenizer, texts = _tokenizer(model), [CLEANERS[model.clean](prompt) for prompt in prompts]
    rows = tokenizer(texts, verbose=False)["input_ids"]
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    if longest > model.max_length:
        raise ValueError(
            f"a prompt has {longest} tokens, the model takes at most {model.max_length}: "
            f"{prompts[lengths.index(longest)]!r}"
        )
    if model.padded_prompts:  # with what, and on which side, is a part of the prompt
        if tokenizer.pad_token is None:
            raise ValueError(
                f"{model.source}: its tokenizer has no padding token, with which this model's "
                "prompts are filled up"
            )
        ids = tokenizer(texts, padding="max_length", max_length=model.max_length)["input_ids"]
    else:  # with its own end of text, whatever pads a prompt's tokenizer
        ids = [row + row[-1:] * (longest - len(row)) for row in rows]
    return task_from_token_ids(np.reshape(ids, (len(names), len(templates), -1)), names)


def _report_equal(names: Sequence[str], cleaned: Sequence[str]) -> None:
    """Log the names that the model cannot tell apart."""
    by_text: dict[str, list[int]] = {}
    for number, text in enumerate(cleaned):
        by_text.setdefault(text.lower(), []).append(number)
    same = [
        " and ".join(f"{names[number]!r} ({number})" for number in numbers)
        for numbers in by_text.values()
        if len(numbers) > 1
    ]
    if same:
        log.warning("class names that are the same for the model: %s", "; ".join(same))


def _tokenizer(model: Tokenized) -> Any:
    """The checkpoint's tokenizer."""
    folder = Path(model.source) if model.source else None
    whole, vocabulary, merges = ((folder or Path()) / name for name in TOKENIZER_FILES[1:4])
    pieces = folder is not None and any((folder / name).exists() for name in SENTENCE_PIECES)
    if folder is None or not (
        whole.exists() or pieces or (vocabulary.exists() and merges.exists())
    ):
        raise FileNotFoundError(
            f"{folder or 'this model'}: has no tokenizer (tokenizer.json, vocab.json and "
            "merges.txt, or spiece.model), which class names need; task_from_token_ids takes ready "
            "token ids"
        )
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            refuse_pointer(folder / name)
    if not whole.exists() and vocabulary.exists() and merges.exists():
        _refuse_cut_merges(vocabulary, merges)
    kind = _tokenizer_class(folder)
    try:
        return kind.from_pretrained(folder)
    except ImportError as error:
        raise ValueError(
            f"{folder}: its tokenizer needs a package that is not installed (for spiece.model "
            "sentencepiece and protobuf)"
        ) from error
    except Exception as error:  # transformers and tokenizers raise errors of many kinds
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder}: its tokenizer cannot be read ({reason})") from error


def _refuse_cut_merges(vocabulary: Path, merges: Path) -> None:
    """CLIP's tokens are 512 of bytes, one for each merge, and the special ones."""
    start = read_json(vocabulary).get("<|startoftext|>", 0)
    lines = merges.read_text("utf-8").splitlines()
    count = sum(bool(line) and not line.startswith("#version") for line in lines)
    if isinstance(start, int) and start > 512 + count:
        raise ValueError(
            f"{merges}: has {count} merges, expected the {start - 512} of {vocabulary.name}; is "
            "the file complete?"
        )


def _tokenizer_class(folder: Path) -> Any:
    """What reads a folder's tokenizer: transformers' choice, or where nothing names one CLIP's."""
    from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerFast

    settings, whole, vocabulary = (folder / name for name in TOKENIZER_FILES[:3])
    named = settings.exists() and "tokenizer_class" in read_json(settings)
    pieces = any((folder / name).exists() for name in SENTENCE_PIECES)
    if named or pieces or is_transformers(folder / "config.json"):
        return AutoTokenizer
    if whole.exists():
        return PreTrainedTokenizerFast
    if "<|startoftext|>" not in read_json(vocabulary):
        raise ValueError(
            f"{vocabulary}: is not CLIP's (it has no <|startoftext|>), and no "
            "tokenizer_config.json says whose it is"
        )
    return CLIPTokenizer


def _report_numbers(names: Sequence[str], templates: Sequence[str]) -> None:
    """Log names that say nothing about a class: 3, class 3, n01440764."""
    if any("number" in template or "digit" in template for template in templates):
        return
    empty = [
        name
        for name in names
        if re.fullmatch(r"(class|label)?[ -]*\d+([.,]\d+)?|n\d{8}", name.lower())
    ]
    if empty:
        prompt = templates[0].replace("{}", empty[0])
        log.warning("%d class names are numbers: %r means nothing to a model", len(empty), prompt)


def task_for(model: Any, class_names: Sequence[str], templates: Sequence[str]) -> Task | None:
    """The task of a dataset's classes; None for a model that has these classes of its own.

    Raises:
        ValueError: if the model's own classes are others.

    Examples:
        With `model` and `dataset` of `jaxtta.load`'s example:

        >>> task = jaxtta.models.task_for(model, dataset.class_names, ["a photo of a {}."])
        >>> task.class_names[:2]
        ('airplane', 'automobile')
    """
    own = getattr(model, "class_names", None)
    if own is None:
        # Refused there, if it has neither classes of its own nor a text tower.
        return zero_shot_task(model, class_names, templates)
    if len(own) != len(class_names):
        raise ValueError(
            f"the model has {len(own)} classes of its own, the dataset has {len(class_names)}"
        )
    if any(re.fullmatch(r"LABEL_\d+", name) for name in own):
        log.warning("the model does not name its classes: their order is taken to be the dataset's")
        return None
    places: dict[str, set[int]] = {}
    for number, name in enumerate(own):
        for synonym in _synonyms(name):
            places.setdefault(synonym, set()).add(number)
    found = [set().union(*(places.get(s, ()) for s in _synonyms(name))) for name in class_names]
    moved = [number for number, hits in enumerate(found) if hits and number not in hits]
    known = sum(number in hits for number, hits in enumerate(found))
    # ImageNet's names hold a few doubles, and the prompts' names differ from the model's.
    if len(moved) > len(own) // 50 or 2 * known < len(own):
        odd = moved[0] if moved else next(n for n, hits in enumerate(found) if not hits)
        raise ValueError(
            f"the model's classes are not the dataset's, or in another order: class {odd} is "
            f"{own[odd]!r} in the model and {class_names[odd]!r} in the dataset"
        )
    return None


def _synonyms(name: str) -> set[str]:
    """The names that one of ImageNet's class names lists."""
    return {part.strip().lower() for part in name.replace("_", " ").split(",")}
