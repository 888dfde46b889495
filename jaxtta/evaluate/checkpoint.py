"""Checkpoints of whatever runs in steps: sweeps, meta-training, continual learning.

save_checkpoint(folder, step, {"state": state, "done": array}, note={"rows": rows})
step, tree, note = restore_checkpoint(folder, like={"state": initial, "done": array})
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from jaxtta.io import atomic_write

DIGEST = 16  # bytes before the content


def save_checkpoint(folder: Path, step: int, tree: Any, note: Any = None) -> None:
    """Save a checkpoint, written whole; the newest is kept.

    Args:
        folder: for this run only; created if missing.
        step: the number of finished steps.
        tree: a nested dict of arrays and of states, any pytrees.
        note: any JSON value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}"
    content = serialization.msgpack_serialize({"tree": _plain(tree), "note": json.dumps(note)})
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(hashlib.blake2b(content, digest_size=DIGEST).digest())
        file.write(content)
    for earlier in folder.glob("step-*"):
        if earlier != path:
            earlier.unlink()


def restore_checkpoint(folder: Path, like: Any = None) -> tuple[int, Any, Any] | None:
    """Restore the newest checkpoint.

    Args:
        folder: of the run.
        like: a tree with the structure to restore; what the checkpoint has beside it is left out.
            None for nested dicts of numpy arrays, in which a state's leaves are numbered.

    Returns:
        Step, tree and note; None without a checkpoint.

    Raises:
        ValueError: if it is damaged, or of something else than `like`.
    """
    path = max(folder.glob("step-*"), key=lambda path: int(path.name[5:]), default=None)
    if path is None:
        return None
    content = path.read_bytes()
    digest, content = content[:DIGEST], memoryview(content)[DIGEST:]
    if hashlib.blake2b(content, digest_size=DIGEST).digest() != digest:
        raise ValueError(f"{path}: is damaged, remove it to start from the beginning")
    saved = serialization.msgpack_restore(content)
    tree = jax.tree.map(np.array, saved["tree"])  # copies that can be written to
    try:
        tree = tree if like is None else _filled(like, tree)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: is a checkpoint of something else ({error!r})") from error
    return int(path.name[5:]), tree, json.loads(saved["note"])


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _plain(node: Any) -> Any:
    """Nested dicts with string keys; the leaves of other nodes are numbered."""
    if isinstance(node, dict):
        return {str(name): _plain(value) for name, value in node.items()}
    if jax.tree.all_leaves([node]):
        return _array(node)
    return {str(number): _array(leaf) for number, leaf in enumerate(jax.tree.leaves(node))}


def _filled(like: Any, saved: Any) -> Any:
    if isinstance(like, dict):
        return {name: _filled(value, saved[str(name)]) for name, value in like.items()}
    leaves, structure = jax.tree.flatten(like)
    alone = jax.tree.all_leaves([like])
    kept = [saved] if alone else [saved[str(number)] for number in range(len(saved))]
    for leaf, array in zip(leaves, kept, strict=True):
        expected = _array(leaf)
        if (array.shape, array.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{array.dtype}{array.shape}, expected {expected.dtype}{expected.shape}"
            )
    kept = [
        jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array
        for leaf, array in zip(leaves, kept, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)
