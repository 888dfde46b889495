"""Gram matrices of the inputs of kernels, and projectors on the directions that they leave free.

    grams = task_grams(model, params, batches)              # by path, after a task
    kept = combine_grams(kept, grams)                       # over tasks
    projectors = null_space_projectors(kept, rho=0.15)      # before the next task

Every batch is scaled by itself, and so is every task.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jaxtta.models import CLIP, Params
from jaxtta.models.classifier import images_and_mask
from jaxtta.models.vit import VisionTransformer
from jaxtta.optim import Projector
from jaxtta.tree import path_of, require_trainable

Array = jax.Array
Grams = dict[str, Array]
PROJECTION = "visual_projection/kernel"


def check_tower(model: CLIP) -> None:
    """Raise a ValueError if the image tower has no class token that is projected."""
    if model.feature_shape is None:
        kind = "SigLIP" if isinstance(model.vision, VisionTransformer) else "a ResNet"
        raise ValueError(f"GNSP needs CLIP with a vision transformer, not {kind}")


def kernel_inputs(model: CLIP, params: Params, images: Array) -> dict[str, Array]:
    """Inputs of the kernels that GNSP trains, in a forward pass.

    Args:
        model: the model.
        params: its parameters.
        images: (batch, height, width, 3), uint8 or float in [0, 1].

    Returns:
        (batch, tokens, inputs) by the kernel's path: both MLP kernels of every block of the image
        tower for all tokens, and the projection for the class token, (batch, 1, inputs).

    Raises:
        ValueError: if the image tower is not a transformer.

    Examples:
        With `model`, `params` and `images` of `jaxtta.load`'s example:

        >>> inputs_of = jax.jit(jaxtta.continual.kernel_inputs, static_argnums=0)
        >>> inputs_of(model, params, images)["visual_projection/kernel"].shape
        (8, 1, 192)
    """
    check_tower(model)
    out, recorded = model.vision.apply(
        {"params": params["vision_model"]},
        model.normalize(images),
        all_tokens=True,
        mutable=["inputs"],
    )
    inputs = {PROJECTION: out.pooled[:, None]}
    for path, (value,) in jax.tree.leaves_with_path(
        recorded["inputs"], is_leaf=lambda x: isinstance(x, tuple)
    ):
        name = path_of(path).removesuffix("_inputs")
        inputs[f"vision_model/{name}/kernel"] = value
    return inputs


def batch_gram(inputs: Array) -> Array:
    """XᵀX of one batch, scaled to a Frobenius norm of 1.

    Args:
        inputs: (rows, inputs); rows of zeros do not contribute.

    Returns:
        (inputs, inputs); zeros if there are no rows.

    Examples:
        >>> gram = jaxtta.continual.batch_gram(jnp.array([[3.0, 0.0], [0.0, 0.0]]))
        >>> gram.tolist()
        [[1.0, 0.0], [0.0, 0.0]]
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
    """Sum the Gram matrices of a task's batches.

    Args:
        model: the model, after the task.
        params: its parameters.
        batches: images (batch, height, width, 3) or objects with `images` and `mask`. Every batch
            is scaled separately, so the batch size matters (paper: 16).
        chosen: predicate on kernels' paths; None for all kernels that GNSP trains.

    Returns:
        Matrices (inputs, inputs) of Frobenius norm 1, by the kernels' paths.

    Raises:
        TypeError: if `chosen` is not a function.
        ValueError: if there are no images, they are not as a model takes them, or no kernel is
            chosen.

    Examples:
        With `model`, `params` and `images` of `jaxtta.load`'s example:

        >>> grams = jaxtta.continual.task_grams(model, params, [images[:4], images[4:]])
        >>> grams["visual_projection/kernel"].shape
        (192, 192)
    """
    if chosen is not None:
        require_trainable(chosen, "chosen")
    sums: Grams = {}
    for batch in batches:
        images, mask = images_and_mask(batch)
        if mask.any():
            grams = _batch_grams(model, chosen, params, images, mask)
            sums = jax.tree.map(jnp.add, sums, grams) if sums else grams
    if not sums:
        raise ValueError("no images to compute Gram matrices from")
    return {name: scaled(gram) for name, gram in sums.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _batch_grams(
    model: CLIP, chosen: Callable[[str], bool] | None, params: Params, images: Array, mask: Array
) -> Grams:
    images = jnp.where(mask[:, None, None, None], images, 0).astype(images.dtype)
    inputs = kernel_inputs(model, params, images)
    if chosen is not None:
        names = list(inputs)
        inputs = {name: x for name, x in inputs.items() if chosen(name)}
        if not inputs:
            raise ValueError(f"no kernel is chosen, expected some of {', '.join(names[:5])}, …")
    rows = {name: jnp.where(mask[:, None, None], x, 0) for name, x in inputs.items()}
    return {name: batch_gram(x.reshape(-1, x.shape[-1])) for name, x in rows.items()}


def combine_grams(earlier: Grams, task: Grams) -> Grams:
    """Add a task's Gram matrices to the sums over earlier tasks.

    Args:
        earlier: the sums over earlier tasks; empty before the first.
        task: the task's matrices, each of norm 1.

    Returns:
        The new sums. As in the reference implementation, the sum for the visual projection is
        scaled to norm 1 before the task's matrix is added.

    Raises:
        ValueError: if the two are for different kernels.

    Examples:
        >>> task = {"mlp/fc1/kernel": jnp.eye(2)}
        >>> kept = jaxtta.continual.combine_grams({}, task)
        >>> jaxtta.continual.combine_grams(kept, task)["mlp/fc1/kernel"].tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    if not earlier:
        return dict(task)
    if unpaired := sorted(earlier.keys() ^ task.keys()):
        raise ValueError(f"only one of the tasks has Gram matrices of {', '.join(unpaired[:5])}")
    return {
        name: (scaled(earlier[name]) if name == PROJECTION else earlier[name]) + gram
        for name, gram in task.items()
    }


def check_rho(rho: float) -> None:
    """Raise a ValueError if rho is not between 0 and 1."""
    if not 0 < rho < 1:
        raise ValueError(f"rho is {rho}, expected a number between 0 and 1")


def null_space_projector(
    gram: Array, rho: float = 0.15, backend: Literal["host", "device"] = "host"
) -> Projector:
    """Projector on the approximate null space of a Gram matrix.

    Args:
        gram: (inputs, inputs), symmetric.
        rho: the free directions are those of the smallest eigenvalues whose sum stays below this
            share of the sum of all; all directions for a matrix of zeros.
        backend: where to compute the eigenvectors: "host" in float64, or "device", faster, in
            float32 on the matrix's device.

    Returns:
        The projector on the free directions, stored as the smaller basis of free and kept ones.

    Raises:
        ValueError: if rho is not between 0 and 1, or the matrix is not square or not finite.

    Examples:
        >>> gram = jnp.diag(jnp.array([10.0, 1.0, 0.1]))  # inputs so far had little of the last two
        >>> projector = jaxtta.continual.null_space_projector(gram, rho=0.15)
        >>> projector.matrix().round(3).diagonal().tolist()
        [0.0, 1.0, 1.0]
    """
    check_rho(rho)
    if backend not in ("host", "device"):
        raise ValueError(f"backend is {backend!r}, expected host or device")
    gram = jnp.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix has shape {gram.shape}, expected a square matrix")
    if not jnp.isfinite(gram).all():
        raise ValueError("a Gram matrix has entries that are not finite")
    if backend == "host":
        values, vectors_of = _with_lapack(np.asarray(gram, np.float64))
    elif all(device.platform == "cpu" for device in gram.devices()):
        values, vectors_of = _with_lapack(np.asarray(gram, np.float32))
    else:
        values, vectors_of = _with_jax(gram.astype(jnp.float32))
    # Ascending; negative values are rounding errors.
    values = np.asarray(values, np.float64).clip(0)
    free = int((np.cumsum(values) / (values.sum() or 1) < rho).sum())
    complement = free > len(gram) // 2
    basis = vectors_of(slice(free, None) if complement else slice(free))
    return Projector(jnp.asarray(basis, gram.dtype), complement)


def _with_jax(matrix: Array) -> tuple[np.ndarray, Callable[[slice], np.ndarray]]:
    """The same as `_with_lapack`, on the matrix's device."""
    # Sliced on the host: on the device every new width would be compiled.
    values, vectors = map(np.asarray, jnp.linalg.eigh(matrix))
    return values, lambda part: vectors[:, part]


def _with_lapack(matrix: np.ndarray) -> tuple[np.ndarray, Callable[[slice], np.ndarray]]:
    """Eigenvalues of a symmetric matrix, and a selection of its eigenvectors.

    The algorithm of LAPACK's `syevd`, except that only the selected vectors are transformed back
    from those of the tridiagonal matrix.

    Args:
        matrix: (size, size).

    Returns:
        Eigenvalues (size,), ascending, and a function from a slice of them to their eigenvectors
        (size, count).
    """
    size = len(matrix)
    if size == 1:
        return matrix[0], lambda part: np.ones_like(matrix)[:, part]
    reduce, reduce_lwork, apply_q = scipy.linalg.get_lapack_funcs(
        ("sytrd", "sytrd_lwork", "ormqr"), (matrix,)
    )
    lwork, _ = reduce_lwork(size, lower=True)
    reflectors, diagonal, off_diagonal, tau, _ = reduce(matrix, lower=True, lwork=int(lwork))
    values, vectors = scipy.linalg.eigh_tridiagonal(diagonal, off_diagonal, lapack_driver="stevd")

    def vectors_of(part: slice) -> np.ndarray:
        first, others = np.split(vectors[:, part], [1])  # not changed by the reflectors
        arguments = ("L", "N", reflectors[1:, :-1], tau, others)
        _, work, _ = apply_q(*arguments, lwork=-1)
        return np.concatenate([first, apply_q(*arguments, lwork=int(work[0]))[0]])

    return values, vectors_of


def null_space_projectors(
    grams: Mapping[str, Array], rho: float = 0.15, backend: Literal["host", "device"] = "host"
) -> dict[str, Projector]:
    """Projectors for several kernels; see `null_space_projector`.

    Args:
        grams: Gram matrices (inputs, inputs) by path.
        rho: share of the eigenvalues' sum that is free.
        backend: where to compute the eigenvectors.

    Returns:
        Projectors by path.

    Raises:
        ValueError: as `null_space_projector` does; the message names the kernel.

    Examples:
        >>> grams = {"mlp/fc1/kernel": jnp.diag(jnp.array([10.0, 1.0, 0.1]))}
        >>> projectors = jaxtta.continual.null_space_projectors(grams)
        >>> keep = jaxtta.optim.null_space_projection(projectors)  # chain it with an optimiser
    """
    projectors = {}
    for name, gram in grams.items():
        try:
            projectors[name] = null_space_projector(gram, rho, backend)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return projectors
