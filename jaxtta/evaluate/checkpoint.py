"""Checkpoints of whatever runs in steps: sweeps, meta-training, continual learning.

save_checkpoint(folder, step, {"state": state, "seen": array}, note={"rows": rows})
step, tree, note = restore_checkpoint(folder, like={"state": initial, "seen": array})
"""

from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict

from jaxtta.io import load_arrays, load_state, save_state


def save_checkpoint(folder: Path, step: int, tree: Any, note: Any = None) -> None:
    """Save a tree of arrays and a JSON value after so many steps; only the newest step is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.safetensors"
    save_state(path, tree, note)
    for earlier in folder.glob("step-*.safetensors"):
        if earlier != path:
            earlier.unlink()


def restore_checkpoint(folder: Path, like: Any = None) -> tuple[int, Any, Any] | None:
    """Restore the newest step, its tree and its note; None without a checkpoint.

    `like` is a tree of the same structure; what the checkpoint has beside it is left out. Without,
    the tree is nested dicts of numpy arrays. Raises a ValueError if it is damaged or does not fit.
    """
    steps = {int(path.stem[5:]): path for path in folder.glob("step-*.safetensors")}
    if not steps:
        return None
    path = steps[max(steps)]
    try:
        arrays, metadata = load_arrays(path)
        tree = unflatten_dict(arrays, "/") if like is None else load_state(path, like, part=True)
    except ValueError as error:
        raise ValueError(f"{error}; remove it to start from the beginning") from error
    return max(steps), tree, metadata.get("note")
