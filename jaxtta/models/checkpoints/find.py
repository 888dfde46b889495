"""Finding a checkpoint: a folder, a hub's model, or what to give in its place."""

import contextlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxtta.models.checkpoints.files import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    PREPROCESSING_FILES,
    TOKENIZER_FILES,
    WEIGHTS,
    is_transformers,
    model_type,
    shards_of,
)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")
_NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
ADAPTER = "adapter_config.json"
_OPEN_CLIP_NAME = re.compile(
    # ViT-B-32, vit_base_patch16_clip_224.openai, …; with a slash only what is no owner on the hub:
    # ViT-B/32, ViT-B-32/laion2b_s34b_b79k
    r"(?i:ViT|RN\d+|coca|EVA\d*|convnext|MobileCLIP|nllb|roberta|xlm|swin|mt5)([-_x@][^/]*)?"
    r"|(ViT-[A-Za-z]+|RN\d+)([-x@][^/]*)?/.*"
)
_OPENAI = {
    "ViT-B-32": "openai/clip-vit-base-patch32",
    "ViT-B-16": "openai/clip-vit-base-patch16",
    "ViT-L-14": "openai/clip-vit-large-patch14",
    "ViT-L-14-336": "openai/clip-vit-large-patch14-336",
}


def find_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """A checkpoint's folder; the files of a hub model are fetched first.

    Args:
        path_or_hub_id: a folder here, or the id of a model on the hub.
        revision: of the hub's model.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if there is neither, or a link in the folder leads nowhere.
        TypeError: if it is neither a path nor a string.
        ValueError: if it is a file, or a LoRA adapter.
    """
    if not isinstance(path_or_hub_id, str | Path):
        raise TypeError(
            f"path_or_hub_id is {path_or_hub_id!r}, expected a folder or the id of a hub's model"
        )
    path = Path(path_or_hub_id)
    with contextlib.suppress(RuntimeError):  # there is no such user
        path = path.expanduser()
    if path.is_dir():
        _refuse_adapter(path)
        _refuse_broken_links(path)
        if not any((path / name).exists() for name in ("config.json", OPEN_CLIP_CONFIG)):
            refuse_pickles(path)
        return path
    if path.is_file():
        raise ValueError(_said_of_file(path))
    hub_id = str(path_or_hub_id).rstrip("/")
    hint = _said_of_name(hub_id)
    if hint or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise FileNotFoundError(
            f"{hub_id}: is neither a local folder nor a model's id (OWNER/NAME) on the Hugging "
            f"Face Hub{hint}"
        )
    return _from_hub(hub_id, revision)


class _Hub:
    """The files of a hub's model, fetched one by one."""

    def __init__(self, hub_id: str, revision: str | None) -> None:
        self.place = hub_id, revision
        self.unknown: dict[str, Exception] = {}

    def fetch(self, name: str) -> Path | None:
        """A file of the model; None if it has none of this name, or that is not known."""
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        hub_id, revision = self.place
        try:
            return Path(huggingface_hub.hf_hub_download(hub_id, name, revision=revision))
        except LocalEntryNotFoundError as error:
            # The hub could not be asked. That it has no such file may be known from last time.
            if huggingface_hub.try_to_load_from_cache(hub_id, name, revision=revision) is None:
                self.unknown[name] = error
            return None
        except EntryNotFoundError:  # the hub says that there is no such file
            return None

    def require(self, found: Any, names: Iterable[str]) -> None:
        """Where the hub cannot be asked, one file of a kind does: the others may not exist."""
        for name in names:
            if not found and name in self.unknown:
                raise self.unknown[name]


def _fetch_all(hub: _Hub) -> tuple[Path | None, Path | None, Sequence[str]]:
    """Fetch every file; the configuration, the weights and what these may be called."""
    config, weights, names = hub.fetch("config.json"), None, WEIGHTS
    if is_transformers(config):
        weights = next(filter(None, map(hub.fetch, WEIGHTS)), None)
    others = [PREPROCESSING_FILES]
    if weights is None and (other := hub.fetch(OPEN_CLIP_CONFIG)):
        config, names, others = other, OPEN_CLIP_WEIGHTS, []
        weights = hub.fetch(*OPEN_CLIP_WEIGHTS)
    if config is None:
        config = hub.fetch(ADAPTER)
        hub.require(config, ("config.json", OPEN_CLIP_CONFIG))
        return config, None, names
    hub.require(weights, names)
    if model_type(config) != "vit":
        others = [*others, TOKENIZER_FILES]
    for group in others:
        hub.require([*filter(None, map(hub.fetch, group))], group)
    if weights and weights.name.endswith("index.json"):
        for name in shards_of(weights):
            hub.fetch(name)
    return config, weights, names


def _from_hub(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub's model in the cache."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    missing = f"{hub_id}: is neither a local folder nor a model on the Hugging Face Hub"
    try:
        config, weights, names = _fetch_all(_Hub(hub_id, revision))
    except LocalEntryNotFoundError as error:
        reason = "the Hugging Face Hub cannot be reached; give"
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            reason = "HF_HUB_OFFLINE is set, so that the hub is not asked; unset it, or give"
        raise FileNotFoundError(
            f"{hub_id}: is neither a local folder nor complete in the hub's cache, and {reason} a "
            "folder"
        ) from error
    except Exception as error:  # the hub's client raises its HTTP library's errors too
        raise FileNotFoundError(f"{missing} ({type(error).__name__})") from error
    if config is None:
        raise FileNotFoundError(f"{missing} (it has no config.json)")
    _refuse_adapter(config.parent)
    if weights is None:
        raise FileNotFoundError(
            f"{hub_id}: has none of {', '.join(names)}; pickled weights (.bin, .pt) are converted "
            f"once, where PyTorch is installed: `hf download {hub_id}`, then `jaxtta convert FILE "
            "OUT`"
        )
    return config.parent


def _refuse_adapter(folder: Path) -> None:
    if (folder / ADAPTER).exists():
        raise ValueError(
            f"{folder}: holds a LoRA adapter ({ADAPTER}); merge it into its base model with peft's "
            "merge_and_unload() and save that with save_pretrained(…)"
        )


def _refuse_broken_links(folder: Path) -> None:
    """The hub's cache is made of links; a copy of them has no files."""
    for name in ("config.json", OPEN_CLIP_CONFIG, *PREPROCESSING_FILES, *TOKENIZER_FILES, *WEIGHTS):
        if (folder / name).is_symlink() and not (folder / name).exists():
            target = (folder / name).readlink()
            raise FileNotFoundError(f"{folder / name}: is a link to {target}, which is not there")


def refuse_pickles(folder: Path) -> None:
    """Say how to convert a folder's pickled weights, if it has any.

    Args:
        folder: the checkpoint's.

    Raises:
        ValueError: if there are some; it names the one to convert.
    """
    pickled = [
        file
        for file in sorted(folder.iterdir())
        if file.name.endswith(PICKLE_SUFFIXES) and not file.name.startswith(_NO_WEIGHTS)
    ]
    if pickled:  # the index of shards, else the last epoch
        chosen = max(pickled, key=lambda file: (file.suffix == ".json", file.stat().st_mtime))
        raise ValueError(f"{chosen}: {_said_of_pickle(chosen)}")


def _said_of_file(path: Path) -> str:
    """What to do where a file was given for a folder."""
    if path.name.endswith(PICKLE_SUFFIXES):
        return f"{path}: {_said_of_pickle(path)}"
    if path.name in (*WEIGHTS, *OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG, "config.json"):
        return f"{path}: is a file, expected the checkpoint's folder; give {path.parent}"
    return (
        f"{path}: is a file, expected a checkpoint's folder; `jaxtta convert {path} OUT` makes one "
        "of a file of weights"
    )


def _said_of_pickle(path: Path) -> str:
    return (
        "pickled weights can run code and are not read; convert them once, where PyTorch is "
        f"installed, with `jaxtta convert {path} OUT`"
    )


def _said_of_name(name: str) -> str:
    """What to give in place of another library's name of a model."""
    if name.startswith(("hf-hub:", "hf_hub:", "https://huggingface.co/")):
        rest = name.removeprefix("https://huggingface.co/").split(":")[-1]
        return f"; give {rest}"
    if _OPEN_CLIP_NAME.fullmatch(name) and not name.endswith((*PICKLE_SUFFIXES, ".safetensors")):
        plain = name.replace("/", "-").replace("@", "-").removesuffix("px").removesuffix("-openai")
        example = _OPENAI.get(plain, _OPENAI["ViT-B-32"])
        return (
            ": it is a name of OpenCLIP's or timm's, which do not name files; give the id of the "
            f"weights on the hub, as {example} or laion/CLIP-ViT-B-32-laion2B-s34B-b79K, or a "
            "folder with open_clip_config.json and open_clip_model.safetensors"
        )
    return ""
