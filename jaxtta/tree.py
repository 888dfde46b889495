"""Taking a parameter tree apart by the paths of its leaves, and putting it together again."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Tree = dict[str, Any]
Trainable = Callable[[str], bool]
"""Whether a parameter is adapted, by its path, "vision_model/post_layernorm/scale"."""


def path_of(keys: tuple[Any, ...]) -> str:
    """The path of a leaf from the keys that `jax.tree.leaves_with_path` gives."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def require_trainable(trainable: Any, name: str = "trainable") -> None:
    """Raise a TypeError for anything but a predicate on paths: a list of them, a tower's name."""
    uncalled = trainable is normalisation_parameters
    if uncalled or not callable(trainable):
        given = "normalisation_parameters" if uncalled else f"a {type(trainable).__name__}"
        raise TypeError(
            f"{name} is {given}, expected a function of a parameter's path "
            "such as normalisation_parameters('image'); for a list: lambda path: path in names"
        )


def require_params(params: Any) -> None:
    """Raise a TypeError for parameters with a leaf that is not an array: a model, a file's name."""
    for leaf in jax.tree.leaves(params):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)):
            raise TypeError(
                f"params holds a {type(leaf).__name__}, expected a tree of arrays: "
                "model, params = jaxtta.load(…)"
            )


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that is most alike, for a message about one that is not there."""
    return difflib.get_close_matches(name, list(names), 1, 0)[0]


def paths_of(params: Any) -> set[str]:
    """The paths of all leaves of a tree.

    Examples:
        >>> sorted(jaxtta.tree.paths_of({"norm": {"scale": 1, "bias": 0}, "kernel": 2}))
        ['kernel', 'norm/bias', 'norm/scale']
    """
    return {path_of(keys) for keys, _ in jax.tree.leaves_with_path(params)}


def partition(params: Any, trainable: Trainable) -> tuple[Tree, Tree]:
    """Split a tree in two by the paths of its leaves.

    Args:
        params: a pytree of arrays: nested dicts, lists, a Flax NNX state.
        trainable: a predicate on paths such as "vision_model/post_layernorm/scale", or
            "layers/0/scale".

    Returns:
        The chosen leaves and the others, each a nested dict with the same paths as in `params`;
        `merge(params, chosen)` gives `params` back, and so does `merge(others, chosen)` for nested
        dicts. Nothing is copied.

    Raises:
        TypeError: if the predicate is not a function, or gives one (call it first).
        ValueError: if no leaf is chosen.

    Examples:
        >>> params = {"norm": {"scale": 1.0}, "dense": {"kernel": 2.0}}
        >>> chosen, others = jaxtta.tree.partition(params, lambda path: path.startswith("norm/"))
        >>> chosen, others
        ({'norm': {'scale': 1.0}}, {'dense': {'kernel': 2.0}})
    """
    require_trainable(trainable)
    chosen, others = {}, {}
    for keys, leaf in jax.tree.leaves_with_path(params):
        parts = tuple(path_of((key,)) for key in keys) or ("",)  # a key may hold a slash
        answer = trainable("/".join(parts))
        if callable(answer):
            raise TypeError("trainable gives a function, not a bool: call it first")
        (chosen if answer else others)[parts] = leaf
    if not chosen:
        names = ["/".join(parts) for parts in others]
        raise ValueError(f"no parameter is chosen; there are {_some(names)}")
    return unflatten_dict(chosen), unflatten_dict(others)


def merge(params: Any, adapted: Mapping[str, Any]) -> Any:
    """Replace the leaves of a tree by those of a sub-tree.

    Args:
        params: a pytree of arrays, the whole tree or what `partition` left of a nested dict.
        adapted: nested dict whose leaves replace those in `params`, or join those of a dict.

    Returns:
        A new tree of the same type; its leaves are those given, uncopied.

    Raises:
        TypeError: if `adapted` is not a dict.
        ValueError: if a path is a leaf in one tree and a branch in the other, or is not in
            `params` and `params` is not a dict, or a leaf has another shape.

    Examples:
        >>> params = {"norm": {"scale": 1.0, "bias": 0.0}, "dense": {"kernel": 2.0}}
        >>> jaxtta.tree.merge(params, {"norm": {"scale": 1.5}})
        {'norm': {'scale': 1.5, 'bias': 0.0}, 'dense': {'kernel': 2.0}}
    """
    if not isinstance(adapted, Mapping):
        raise TypeError(f"adapted is a {type(adapted).__name__}, expected a nested dict of leaves")
    if not isinstance(params, dict):
        return _replace(params, flatten_dict(adapted, sep="/"))
    merged, keys = dict(params), {str(key): key for key in params}  # an NNX list has integer keys
    for name, value in adapted.items():
        key = keys.get(name, name)
        old = params.get(key)
        is_branch = isinstance(value, Mapping)
        if old is not None and jax.tree_util.treedef_is_leaf(jax.tree.structure(old)) == is_branch:
            raise ValueError(f"{name} is a leaf in one tree and a branch in the other")
        if old is not None and is_branch:
            merged[key] = merge(old, value)
        else:
            _check_shape(name, old, value)
            merged[key] = value
    return merged


def _replace(params: Any, leaves: dict[str, Any]) -> Any:
    paths = paths_of(params)
    if unknown := sorted(leaves.keys() - paths):
        raise ValueError(f"{unknown[0]} is no leaf of the tree; there are {_some(sorted(paths))}")

    def replace(keys: tuple[Any, ...], old: Any) -> Any:
        path = path_of(keys)
        value = leaves.get(path, old)
        _check_shape(path, old, value)
        return value

    return jax.tree.map_with_path(replace, params)


def _check_shape(name: str, old: Any, value: Any) -> None:
    if old is not None and jnp.shape(old) != jnp.shape(value):
        raise ValueError(f"{name} has shape {jnp.shape(value)}, expected {jnp.shape(old)}")


def normalisation_parameters(tower: str = "both") -> Trainable:
    """Choose the scales and biases of normalisation layers.

    A bias is chosen by the name of its layer, which must contain "norm"; of layers in a list, which
    have numbers, only the scales are.

    Args:
        tower: "image", "text" or "both"; what is not under "text_model" counts as image.

    Returns:
        A predicate on paths, for `partition` and `adapters.online`.

    Raises:
        ValueError: if the tower is another.

    Examples:
        >>> trainable = jaxtta.tree.normalisation_parameters("image")
        >>> trainable("vision_model/post_layernorm/scale"), trainable("visual_projection/kernel")
        (True, False)
    """
    if tower not in ("image", "text", "both"):
        raise ValueError(f"tower is {tower!r}, expected one of image, text, both")

    def trainable(path: str) -> bool:
        *_, layer, leaf = ("", *path.removesuffix("/value").split("/"))  # NNX adds /value
        if tower != "both" and path.startswith("text_model/") != (tower == "text"):
            return False
        # Only normalisation layers have a leaf called scale in Flax. Biases go by the layer's name:
        # "norm" is in all of transformers' names for such layers, pre_layrnorm among them.
        return leaf == "scale" or ("norm" in layer and leaf == "bias")

    return trainable


def below_block(trainable: Trainable, number: int) -> Trainable:
    """Leave out a tower's top blocks.

    Args:
        trainable: a predicate on paths.
        number: of the first block that is left out, from 0 as in "layers/9/…"; a ResNet's stages
            are "layer1/…" to "layer4/…".

    Returns:
        A predicate that chooses what `trainable` does in the blocks below and outside of blocks;
        `below_block(normalisation_parameters("image"), 9)` for the published rule on ViT-B.

    Examples:
        >>> norms = jaxtta.tree.normalisation_parameters("image")
        >>> trainable = jaxtta.tree.below_block(norms, 9)
        >>> [trainable(f"vision_model/encoder/layers/{n}/layer_norm1/scale") for n in (8, 9)]
        [True, False]
    """
    require_trainable(trainable)

    def chosen(path: str) -> bool:
        found = re.search(r"(?:^|/)(?:layer|layers/|blocks/)(\d+)(?:/|$)", path)
        return trainable(path) and (found is None or int(found[1]) < number)

    return chosen


def adapted_part(params: Any, trainable: Trainable) -> Tree:
    """Copy the leaves that a method adapts, in at least float32.

    An update of 1e-3 would be lost in bfloat16. Arguments and errors are those of `partition`.

    Examples:
        >>> params = {"norm": {"scale": jnp.ones(2, jnp.bfloat16)}, "kernel": jnp.ones(2)}
        >>> adapted = jaxtta.tree.adapted_part(params, jaxtta.tree.normalisation_parameters())
        >>> jax.tree.map(lambda x: x.dtype.name, adapted)
        {'norm': {'scale': 'float32'}}
    """
    chosen, _ = partition(params, trainable)
    return jax.tree.map(
        lambda x: jnp.array(x, jnp.promote_types(x.dtype, jnp.float32), copy=True), chosen
    )


def fingerprint(params: Any) -> jax.Array:
    """A checksum of a tree of arrays, by which its state is recognised.

    Args:
        params: a pytree of arrays.

    Returns:
        () uint32, of every bit of every leaf; the same under `jit` and for any sharding.

    Examples:
        >>> first, second = jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])
        >>> bool(jaxtta.tree.fingerprint({"a": first}) == jaxtta.tree.fingerprint({"a": second}))
        False
    """
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(params)):
        total = total + _checksum(jnp.asarray(leaf)) * jnp.uint32(2 * number + 1)
    return total


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if jnp.iscomplexobj(leaf):
        leaf = jnp.stack([leaf.real, leaf.imag])
    if leaf.dtype == bool or jnp.dtype(leaf.dtype).name in ("int2", "int4", "uint2", "uint4"):
        leaf = leaf.astype(jnp.int8)
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    bits = bits.ravel().astype(jnp.uint32)
    # Each entry is mixed with its place before the sum (murmur's finaliser), so that flipped signs,
    # or two values that changed places, do not cancel.
    mixed = bits ^ (jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


def all_finite(tree: Any) -> jax.Array:
    """Whether every entry of every floating leaf is finite; a bool scalar.

    Examples:
        >>> bool(jaxtta.tree.all_finite({"a": jnp.ones(2), "b": jnp.array([jnp.inf])}))
        False
    """
    checks = [
        jnp.isfinite(leaf).all()
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)
    ]
    return _all(checks)


def stays_finite(before: Any, after: Any) -> jax.Array:
    """Whether no finite entry of a pytree has become infinite or NaN; a bool scalar."""

    def check(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(jnp.asarray(new).dtype, jnp.inexact):
            return jnp.asarray(True)
        return (jnp.isfinite(new) | ~jnp.isfinite(old)).all()

    checks = jax.tree.leaves(jax.tree.map(check, before, after))
    return _all(checks)


def _all(checks: list[jax.Array]) -> jax.Array:
    """Whether all bool scalars are true."""
    # The smallest of the sorted: XLA would repeat a plain conjunction in every kernel that reads
    # it, one for each leaf, and take almost twice as long to compile a step.
    return jnp.sort(jnp.stack(checks))[0] if checks else jnp.asarray(True)


def _some(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
