"""The manifest of a bundle, and whether its folder is as it says.

    manifest = verified(folder, digest)     # or a ValueError that names the file

Nothing that a folder holds is trusted: links are not followed, names are those that a bundle has,
and no module is imported and no file opened because a manifest names it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from jaxtta import io
from jaxtta.adapters.methods import METHODS
from jaxtta.deploy.setup import Setup, sha256_of
from jaxtta.images import printable

FORMAT = 1
MANIFEST, STATE, ALIASES = "manifest.json", "state.safetensors", "aliases.json"
FILES = {name: f"{name}.safetensors" for name in ("noise", "phi", "statistics")}
"""What an adapter may be made of beside its settings, by the field of `Setup`."""
_LARGEST = 2**22  # bytes of a manifest


def verified(folder: Path, name: str, place: Path | None = None) -> dict[str, Any]:
    """The manifest of a folder that ought to have a name; `place` is its path in messages."""
    place_ = printable(place or folder)
    listed = {entry.name: entry for entry in entries_of(folder, place)}
    if MANIFEST not in listed:
        raise ValueError(f"{place_}: is no bundle, it has no {MANIFEST}")
    with io.error_context(place_):
        if (digest := sha256_of(listed[MANIFEST])) != name:
            raise ValueError(
                f"its manifest has SHA-256 {digest}, not that of the folder's name: it was changed"
            )
        manifest = _read_manifest(listed[MANIFEST])
        files = manifest["files"]
        if odd := sorted({*listed} - {*files, MANIFEST}):
            raise ValueError(f"{odd[0]} is not in its manifest")
        for file, expected in files.items():
            if file not in listed:
                raise ValueError(f"{file} is missing")
            if entry_of(listed[file]) != expected:
                raise ValueError(f"{file} was changed after the bundle was made")
    return manifest


def _read_manifest(path: Path) -> dict[str, Any]:
    """A manifest whose digest is right, but which anybody may have made."""
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{MANIFEST} has more than {_LARGEST} bytes")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is not valid JSON ({error})") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"is a bundle of format {found}, this version of jaxtta has {FORMAT}")
    kinds = {"created": str, "setup": dict, "model": dict, "counters": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise ValueError(f"{MANIFEST} lacks {name}")
    setup, files = manifest["setup"], manifest["files"]
    require_named(str(setup.get("adapter")))
    # An adapter's files are those here, never others that the settings may name.
    named = {name for name in FILES if setup.get(name) is not None}
    wrong = [name for name in named if setup[name] != FILES[name]]
    if wrong or {*files} != {STATE, *(FILES[name] for name in named)}:
        raise ValueError(f"the files of {MANIFEST} are not those of its settings")
    of_mgtta = Setup.of(setup).files.keys() - named
    if of_mgtta:
        raise ValueError(f"lacks the file with the {sorted(of_mgtta)[0]} of its adapter")
    counts = ("steps", "seen", "updates")
    texts = [manifest["model"].get(name) for name in ("weights", "settings")]
    numbers = [manifest["counters"].get(name) for name in counts]
    if not all(isinstance(x, str) for x in texts) or not all(isinstance(x, int) for x in numbers):
        raise ValueError(f"{MANIFEST} lacks the model's fingerprint or the counters")
    return manifest


def require_model(path: Path, manifest: dict[str, Any], model: dict[str, str]) -> None:
    """Raise a ValueError if a bundle is of another model than that of a fingerprint."""
    for name, what in (("weights", "weights"), ("settings", "architecture or preprocessing")):
        if (own := manifest["model"][name]) != model[name]:
            raise ValueError(
                f"{printable(path)}: is the bundle of another model ({manifest['setup']['model']}):"
                f" its {what} have digest {own}, expected {model[name]}"
            )


def require_named(adapter: str) -> None:
    """Refuse adapters of one's own: to load them would import any module that a bundle names."""
    if adapter.removeprefix("guarded:").partition(":")[0] not in METHODS:
        raise ValueError(f"{adapter} is no adapter of jaxtta's, bundles are of these alone")


def entries_of(folder: Path, place: Path | None = None) -> list[Path]:
    """The files of a bundle; a ValueError for links, folders and other names."""
    known = {MANIFEST, STATE, *FILES.values()}
    with os.scandir(folder) as entries:
        for entry in entries:
            shown = printable(entry.name)
            if entry.name not in known:
                raise ValueError(f"{printable(place or folder)}: {shown} is no file of a bundle")
            if not entry.is_file(follow_symlinks=False):
                raise ValueError(f"{printable(place or folder)}: {shown} is a link or no file")
    return sorted(folder.iterdir())


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"sha256": sha256_of(path), "bytes": path.stat().st_size}


def is_digest(name: str) -> bool:
    """Whether a text is a SHA-256, as bundles' folders are called."""
    return re.fullmatch("[0-9a-f]{64}", name) is not None


def aliases_of(store: str | Path) -> dict[str, str | None]:
    """The digests of a store's current and previous bundle; None where there is none."""
    file = Path(store) / ALIASES
    found = io.read_json(file) if file.exists() else {}
    aliases = {name: found.get(name) for name in ("current", "previous")}
    for value in aliases.values():
        if value is not None and not is_digest(str(value)):
            raise ValueError(f"{file}: {value!r} is not the digest of a bundle")
    return aliases


def resolve(path: str | Path) -> Path:
    """The folder of a bundle; store/current and store/previous are looked up."""
    path = Path(path)
    if path.name in ("current", "previous") and not path.exists():
        digest = aliases_of(path.parent)[path.name]
        if digest is None:
            raise FileNotFoundError(f"{path.parent}: has no {path.name} bundle")
        path = path.parent / digest
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such bundle")
    return path.resolve()
