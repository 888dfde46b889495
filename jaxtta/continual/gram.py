"""Gram matrices: which directions the inputs of a kernel have taken, and which they left free.

grams = task_grams(model, params, batches)                    # by path, after a task
kept = combine_grams(kept, grams)                             # over tasks
projectors = null_space_projectors(kept, rho=0.15)            # before the next one
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxtta.models import CLIP, Params
from jaxtta.optim import Projector

Array = jax.Array
Grams = dict[str, Array]
PROJECTION = "visual_projection/kernel"


def check_tower(model: CLIP) -> None:
    """Raise a ValueError if the image tower is no transformer."""
    if model.feature_shape is None:
        raise ValueError("the kernels of GNSP are those of a vision transformer, not of a ResNet")


def kernel_inputs(model: CLIP, params: Params, images: Array) -> dict[str, Array]:
    """What the kernels that GNSP trains are multiplied with, in an ordinary forward pass.

    Args:
        model: the model.
        params: its parameters.
        images: (batch, height, width, 3), uint8 or float in [0, 1].

    Returns:
        (batch, tokens, inputs) by the kernel's path: both MLP kernels of every block of the image
        tower for all tokens, and the projection for the class token, (batch, 1, inputs).

    Raises:
        ValueError: if the image tower is no transformer.
    """
    check_tower(model)
    out, seen = model.vision.apply(
        {"params": params["vision_model"]},
        model.normalize(images),
        all_tokens=True,
        mutable=["inputs"],
    )
    inputs = {PROJECTION: out.pooled[:, None]}
    for path, (value,) in jax.tree.leaves_with_path(
        seen["inputs"], is_leaf=lambda x: isinstance(x, tuple)
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("_inputs")
        inputs[f"vision_model/{name}/kernel"] = value
    return inputs


def batch_gram(inputs: Array) -> Array:
    """XᵀX of one batch, scaled to a Frobenius norm of 1.

    Args:
        inputs: (rows, inputs); rows of zeros count for nothing.

    Returns:
        (inputs, inputs); zeros for no rows.
    """
    inputs = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    return scaled(jnp.matmul(inputs.T, inputs, precision="highest"))


def scaled(gram: Array) -> Array:
    """Scale a matrix to a Frobenius norm of 1; zeros stay zeros."""
    norm = jnp.linalg.norm(gram)
    return gram / jnp.where(norm > 0, norm, 1)


def task_grams(
    model: CLIP,
    params: Params,
    batches: Iterable[Any],
    chosen: Callable[[str], bool] | None = None,
) -> Grams:
    """Gather the Gram matrices of a task.

    Args:
        model: the model, after the task.
        params: its parameters.
        batches: images (batch, height, width, 3) or anything with `images` and `mask`. Every
            batch is scaled by itself, so that its size matters (published: 16).
        chosen: of a kernel's path, whether to gather its matrix; None for all that GNSP trains.

    Returns:
        A matrix of Frobenius norm 1 for each kernel, by its path.

    Raises:
        ValueError: if there is no image, or no kernel is chosen.
    """
    sums: Grams = {}
    for batch in batches:
        images = jnp.asarray(getattr(batch, "images", batch))
        mask = jnp.asarray(getattr(batch, "mask", np.ones(len(images), bool)))
        if mask.any():
            grams = _batch_grams(model, chosen, params, images, mask)
            sums = jax.tree.map(jnp.add, sums, grams) if sums else grams
    if not sums:
        raise ValueError("Gram matrices of a task without images")
    return {name: scaled(gram) for name, gram in sums.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_grams(
    model: CLIP,
    chosen: Callable[[str], bool] | None,
    params: Params,
    images: Array,
    mask: Array,
) -> Grams:
    images = jnp.where(mask[:, None, None, None], images, 0).astype(images.dtype)
    inputs = kernel_inputs(model, params, images)
    if chosen is not None:
        names = list(inputs)
        inputs = {name: x for name, x in inputs.items() if chosen(name)}
        if not inputs:
            raise ValueError(f"no kernel is chosen; there are {', '.join(names[:5])}, …")
    rows = {name: jnp.where(mask[:, None, None], x, 0) for name, x in inputs.items()}
    return {name: batch_gram(x.reshape(-1, x.shape[-1])) for name, x in rows.items()}


def combine_grams(earlier: Grams, task: Grams) -> Grams:
    """Add a task's Gram matrices to those of the tasks before it.

    Args:
        earlier: the sums so far; empty for none.
        task: the new ones, each of norm 1.

    Returns:
        The sums; the projection's is scaled to norm 1 before the new one is added, as published.

    Raises:
        ValueError: if they are of other kernels.
    """
    if not earlier:
        return dict(task)
    if odd := sorted(earlier.keys() ^ task.keys()):
        raise ValueError(f"only one of two tasks has Gram matrices of {', '.join(odd[:5])}")
    return {
        name: (scaled(earlier[name]) if name == PROJECTION else earlier[name]) + gram
        for name, gram in task.items()
    }


def check_rho(rho: float) -> None:
    """Raise a ValueError if rho is not between 0 and 1."""
    if not 0 < rho < 1:
        raise ValueError(f"rho is {rho}, expected a number between 0 and 1")


def null_space_projector(
    gram: Array, rho: float = 0.15, on: Literal["host", "device"] = "host"
) -> Projector:
    """The projection on the directions that inputs have hardly taken.

    Args:
        gram: (inputs, inputs), symmetric.
        rho: the share of the sum of singular values that may be given up; the directions of the
            smallest ones that together stay below it are free. Of a matrix of zeros all are.
        on: where the eigenvectors are found: in float64 on the host; or, faster, in float32 on
            the device that has the matrix.

    Returns:
        The projector, by the thinner of free and kept directions.

    Raises:
        ValueError: if rho is not between 0 and 1, or the matrix is not square or not finite.
    """
    check_rho(rho)
    if on not in ("host", "device"):
        raise ValueError(f"on is {on!r}, expected host or device")
    gram = jnp.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix has shape {gram.shape}, expected a square")
    if not jnp.isfinite(gram).all():
        raise ValueError("a Gram matrix has entries that are not finite")
    if on == "host":
        values, vectors_of = _with_lapack(np.asarray(gram, np.float64))
    elif all(device.platform == "cpu" for device in gram.devices()):
        values, vectors_of = _with_lapack(np.asarray(gram, np.float32))
    else:
        values, vectors_of = _with_jax(gram.astype(jnp.float32))
    # Ascending; the matrix has no negative ones but for rounding.
    values = np.asarray(values, np.float64).clip(0)
    free = int((np.cumsum(values) / (values.sum() or 1) < rho).sum())
    complement = free > len(gram) // 2
    basis = vectors_of(slice(free, None) if complement else slice(free))
    return Projector(jnp.asarray(basis, gram.dtype), complement)


def _with_jax(matrix: Array) -> tuple[np.ndarray, Callable[[slice], np.ndarray]]:
    """As `_with_lapack`, on the matrix's device."""
    # Sliced on the host: on the device every new width would compile.
    values, vectors = map(np.asarray, jnp.linalg.eigh(matrix))
    return values, lambda part: vectors[:, part]


def _with_lapack(matrix: np.ndarray) -> tuple[np.ndarray, Callable[[slice], np.ndarray]]:
    """Eigenvalues of a symmetric matrix, ascending, and those eigenvectors that are asked for.

    As LAPACK's `syevd` finds them, but only the vectors that are asked for are turned back from
    those of the tridiagonal matrix.

    Args:
        matrix: (size, size).

    Returns:
        (size,), and a function from a slice of them to their eigenvectors, (size, count).
    """
    size = len(matrix)
    if size == 1:
        return matrix[0], lambda part: np.ones_like(matrix)[:, part]
    reduce, reduce_lwork, turn = scipy.linalg.get_lapack_funcs(
        ("sytrd", "sytrd_lwork", "ormqr"), (matrix,)
    )
    lwork, _ = reduce_lwork(size, lower=True)
    reflectors, diagonal, beside, tau, _ = reduce(matrix, lower=True, lwork=int(lwork))
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, beside, lapack_driver="stevd")

    def vectors_of(part: slice) -> np.ndarray:
        first, others = np.split(vectors[:, part], [1])  # the reflectors leave the first row alone
        arguments = ("L", "N", reflectors[1:, :-1], tau, others)
        _, work, _ = turn(*arguments, lwork=-1)
        turned, _, _ = turn(*arguments, lwork=int(work[0]))
        return np.concatenate([first, turned])

    return values, vectors_of


def null_space_projectors(
    grams: Mapping[str, Array], rho: float = 0.15, on: Literal["host", "device"] = "host"
) -> dict[str, Projector]:
    """Projectors for kernels by their paths; see `null_space_projector`.

    Args:
        grams: by path.
        rho: as there.
        on: as there.

    Returns:
        By path.

    Raises:
        ValueError: as there; the message names the matrix.
    """
    projectors = {}
    for name, gram in grams.items():
        try:
            projectors[name] = null_space_projector(gram, rho, on)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return projectors
