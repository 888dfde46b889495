"""Taking a parameter tree apart by names, and putting it together again."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[str, Any]
Trainable = Callable[[str], bool]
"""Says of a parameter's path, "vision_model/post_layernorm/scale", whether it is adapted."""


def partition(params: Tree, trainable: Trainable) -> tuple[Tree, Tree]:
    """Split a tree in two by the names of its leaves.

    Args:
        params: nested dict of arrays.
        trainable: a predicate on paths such as "vision_model/post_layernorm/scale".

    Returns:
        The chosen leaves and the others, each a sub-tree with the same paths as in `params`;
        `merge(others, chosen)` gives `params` back. Nothing is copied.

    Raises:
        ValueError: if no leaf is chosen.
    """
    chosen, others = {}, {}
    for path, leaf in flatten_dict(params, sep="/").items():
        (chosen if trainable(path) else others)[path] = leaf
    if not chosen:
        raise ValueError(f"no parameter is chosen; there are {_some(list(others))}")
    return unflatten_dict(chosen, sep="/"), unflatten_dict(others, sep="/")


def merge(params: Tree, adapted: Tree) -> Tree:
    """Lay a sub-tree over a tree.

    Args:
        params: nested dict of arrays, the whole tree or what `partition` left of it.
        adapted: nested dict whose leaves take the place of those in `params`, or join them.

    Returns:
        A new nested dict; its leaves are those given, uncopied.

    Raises:
        ValueError: if a path is a leaf in one tree and a branch in the other, or a leaf has
            another shape.
    """
    merged = dict(params)
    for name, value in adapted.items():
        old = params.get(name)
        if old is None:
            merged[name] = value
        elif isinstance(old, Mapping) != isinstance(value, Mapping):
            raise ValueError(f"{name} is a leaf in one tree and a branch in the other")
        elif isinstance(value, Mapping):
            merged[name] = merge(old, value)
        elif jnp.shape(old) != jnp.shape(value):
            raise ValueError(f"{name} has shape {jnp.shape(value)}, expected {jnp.shape(old)}")
        else:
            merged[name] = value
    return merged


def normalisation_parameters(tower: str = "both") -> Trainable:
    """Choose the scales and biases of normalisation layers.

    Args:
        tower: "image", "text" or "both".

    Returns:
        A predicate on paths, for `partition` and `adapters.online`.

    Raises:
        ValueError: if the tower is another.
    """
    roots = {
        "image": ("vision_model/",),
        "text": ("text_model/",),
        "both": ("vision_model/", "text_model/"),
    }
    if tower not in roots:
        raise ValueError(f"tower is {tower!r}, expected one of {', '.join(roots)}")

    def trainable(path: str) -> bool:
        *_, layer, leaf = ("", *path.split("/"))
        # "norm" is in every transformers' name of such a layer, pre_layrnorm among them
        return path.startswith(roots[tower]) and "norm" in layer and leaf in ("scale", "bias")

    return trainable


def count(tree: Any) -> int:
    """Number of parameters in a pytree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every floating leaf is finite; a bool scalar."""
    checks = [
        jnp.isfinite(leaf).all()
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)
    ]
    return jnp.stack(checks).all() if checks else jnp.asarray(True)


def stays_finite(before: Any, after: Any) -> jax.Array:
    """Whether no finite entry of a pytree has become infinite or NaN; a bool scalar."""

    def check(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(jnp.asarray(new).dtype, jnp.inexact):
            return jnp.asarray(True)
        return (jnp.isfinite(new) | ~jnp.isfinite(old)).all()

    checks = jax.tree.leaves(jax.tree.map(check, before, after))
    return jnp.stack(checks).all() if checks else jnp.asarray(True)


def select(condition: jax.Array, chosen: Any, other: Any) -> Any:
    """Leaf by leaf `chosen` where the scalar condition holds, else `other`, bit for bit."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
