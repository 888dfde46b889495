"""Projections of updates that preserve a model's outputs on earlier inputs.

    projectors = jaxtta.continual.null_space_projectors(grams)          # by parameter path
    paper = optax.chain(null_space_projection(projectors), optax.adamw(1e-5))
    exact = optax.chain(optax.adamw(1e-5), null_space_projection(projectors))

Before the optimiser (paper) the gradient is projected, and an elementwise optimiser leaves the null
space again. After it (exact) the update is projected, and outputs on inputs in the kept subspace do
not change.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxtta.tree import nearest, path_of

Array = jax.Array


@flax.struct.dataclass
class Projector:
    """An orthogonal projection of a kernel's input side, stored as a basis.

    Attributes:
        basis: (inputs, rank), orthonormal columns.
        complement: whether it projects onto the orthogonal complement of the basis, not its span.

    Examples:
        >>> projector = jaxtta.optim.Projector(jnp.array([[1.0], [0.0]]), complement=True)
        >>> projector(jnp.array([[5.0], [7.0]])).tolist()  # without what the first input does
        [[0.0], [7.0]]
    """

    basis: Array
    complement: bool = flax.struct.field(pytree_node=False, default=False)

    def __call__(self, kernel: Array) -> Array:
        """Project a kernel (inputs, outputs), or its gradient."""
        basis = self.basis.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        inside = jnp.matmul(
            basis, jnp.matmul(basis.T, kernel, precision="highest"), precision="highest"
        ).astype(kernel.dtype)
        return kernel - inside if self.complement else inside

    def matrix(self) -> Array:
        """The square matrix (inputs, inputs)."""
        return self(jnp.eye(len(self.basis), dtype=self.basis.dtype))


def null_space_projection(projectors: Mapping[str, Projector]) -> optax.GradientTransformation:
    """Project the updates of some parameters; leave the others unchanged.

    Args:
        projectors: by the parameter's path, "visual_projection/kernel".

    Returns:
        The transformation, to chain before an optimiser (paper) or after it (exact).

    Raises:
        TypeError: if the projectors are not a dict of `Projector`.
        ValueError: in `init`, if a path is not a parameter's, or a parameter has another number of
            inputs.

    Examples:
        >>> projector = jaxtta.optim.Projector(jnp.array([[1.0], [0.0]]), complement=True)
        >>> keep = jaxtta.optim.null_space_projection({"dense/kernel": projector})
        >>> optimizer = optax.chain(optax.sgd(1.0), keep)
        >>> params = {"dense": {"kernel": jnp.ones((2, 1))}}
        >>> updates, _ = optimizer.update(params, optimizer.init(params))  # of a gradient of ones
        >>> updates["dense"]["kernel"].tolist()
        [[0.0], [-1.0]]

    References:
        https://arxiv.org/abs/2507.19839
    """
    if not isinstance(projectors, Mapping):
        raise TypeError(f"projectors is a {type(projectors).__name__}, expected a dict by path")
    for name, projector in projectors.items():
        if not isinstance(projector, Projector):
            raise TypeError(f"{name} has a {type(projector).__name__}, expected a Projector")

    def init(params: Any) -> optax.EmptyState:
        shapes = _shapes(params)
        if not shapes.keys() & projectors.keys():
            raise ValueError(
                f"no parameter has a projector: there are {', '.join(list(shapes)[:5])}, … and "
                f"projectors for {', '.join(list(projectors)[:5]) or 'none'}"
            )
        for name, projector in projectors.items():
            if name not in shapes:
                raise ValueError(
                    f"there is a projector for {name}, which is not a parameter; the nearest is "
                    f"{nearest(name, shapes)}"
                )
            if shapes[name][:1] != projector.basis.shape[:1]:
                raise ValueError(
                    f"{name} has shape {shapes[name]}, its projector is for "
                    f"{len(projector.basis)} inputs"
                )
        return optax.EmptyState()

    def project(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map_with_path(
            lambda path, g: projectors[path_of(path)](g) if path_of(path) in projectors else g,
            updates,
        )

    return optax.GradientTransformation(init, optax.stateless(project).update)


def project_out(basis: Any) -> optax.GradientTransformation:
    """Make updates orthogonal to given directions in the space of all parameters.

    For parameters without a null space of inputs, such as LayerNorm's. With gradients of a model's
    outputs as directions, small steps do not change those outputs (orthogonal gradient descent).
    Chain it after the optimiser, whose scaling would undo the projection.

    Args:
        basis: a tree like the parameters, each leaf with a leading axis (directions,), orthonormal;
            see `jaxtta.continual.output_gradient_basis`.

    Returns:
        The transformation.

    Raises:
        ValueError: in `init`, if the basis does not match the parameters.

    Examples:
        >>> basis = {"scale": jnp.array([[1.0, 0.0]])}  # one direction
        >>> optimizer = optax.chain(optax.sgd(1.0), jaxtta.optim.project_out(basis))
        >>> params = {"scale": jnp.ones(2)}
        >>> updates, _ = optimizer.update(params, optimizer.init(params))  # of a gradient of ones
        >>> updates["scale"].tolist()
        [0.0, -1.0]

    References:
        https://arxiv.org/abs/1910.07104
    """
    shapes = _shapes(basis, 1)

    def init(params: Any) -> optax.EmptyState:
        if _shapes(params) != shapes:
            name, shape = min(_shapes(params).items() ^ shapes.items())
            raise ValueError(f"the basis does not match the parameters: {name} of shape {shape}")
        return optax.EmptyState()

    def project(updates: Any, params: Any) -> Any:
        del params
        product = functools.partial(jnp.tensordot, precision="highest")
        parts = jax.tree.map(lambda b, u: product(b, u, u.ndim), basis, updates)
        along = sum(jax.tree.leaves(parts))  # (directions,)
        return jax.tree.map(lambda b, u: u - product(along, b, 1), basis, updates)

    return optax.GradientTransformation(init, optax.stateless(project).update)


def _shapes(tree: Any, skip: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes by path, without the first axes."""
    return {path_of(path): jnp.shape(leaf)[skip:] for path, leaf in jax.tree.leaves_with_path(tree)}
