"""The files of a checkpoint: their names, configurations in JSON."""

import json
from pathlib import Path
from typing import Any

SENTENCE_PIECES = ("spiece.model", "tokenizer.model")
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    *SENTENCE_PIECES,
)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack")
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors",)
PREPROCESSING_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where the image processor is looked for, as transformers 5 does; 4 writes the second."""
_LFS = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Refuse what git-LFS leaves in a file's place until the file is fetched.

    Args:
        path: of the file.

    Raises:
        ValueError: if it is a pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(
                f"{path}: is a git-LFS pointer, not the file itself; `git lfs pull` in its "
                "repository fetches it"
            )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: of the file.

    Returns:
        The object.

    Raises:
        ValueError: if the file holds something else.
    """
    refuse_pointer(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object")
    return content


def model_type(config: Path) -> str | None:
    """The model type that a `config.json` names; None where it cannot be read."""
    try:
        return read_json(config).get("model_type")
    except (OSError, ValueError):
        return None


def is_transformers(config: Path | None) -> bool:
    """Whether to read a `config.json` as transformers'; timm's, beside OpenCLIP's files, is not."""
    if config is None or not config.exists():
        return False
    try:
        return "model_type" in read_json(config)
    except ValueError:
        return True  # for its reader to refuse


def read_config(folder: Path, wanted: type) -> Any:
    """Read a checkpoint's `config.json`.

    Args:
        folder: the checkpoint's.
        wanted: a configuration class of transformers.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another kind of model.
    """
    path, model = folder / "config.json", wanted.__name__.removesuffix("Config")
    if not path.exists():
        raise FileNotFoundError(f"{folder}: has no config.json, so it is no {model} checkpoint")
    config = read_json(path)
    kind = config.get("model_type")
    if kind != wanted.model_type:
        raise ValueError(f"{path}: model_type is {kind!r}, expected {wanted.model_type!r}")
    try:
        return wanted.from_dict(config)
    except Exception as error:  # what transformers raises here differs by version
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is refused by transformers ({reason})") from error


def shards_of(index: Path) -> list[str]:
    """The files that an index of sharded weights names.

    Args:
        index: a `….index.json`.

    Returns:
        Their names, each once.

    Raises:
        ValueError: if it is not such an index.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise ValueError(f"{index}: is not an index of sharded weights: no weight_map of names")
    return sorted(set(names.values()))
