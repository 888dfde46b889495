"""Orthogonal gradient descent: the parameter directions that change a model's clean outputs.

https://arxiv.org/abs/1910.07104
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Array = jax.Array


def output_gradient_basis(
    forward: Callable[[Any, Any, Array], Array],
    context: Any,
    adapted: Any,
    images: Array,
    rank: int,
) -> Any:
    """Orthonormal basis of the gradients of a model's predictions on some images.

    Args:
        forward: `forward(context, adapted, images)` to logits (batch, classes).
        context: its other inputs, such as the frozen parameters.
        adapted: the parameters that will be adapted.
        images: (images, height, width, 3), clean.
        rank: number of directions, at most the number of images.

    Returns:
        A tree like `adapted`, each leaf with a leading axis (rank,); orthonormal over all leaves,
        for `jaxtta.optim.project_out`. If the gradients span less, the last directions are zeros.

    Raises:
        ValueError: if the rank is below 1 or above the number of images or of parameters, or
            a gradient is not finite.

    Examples:
        >>> adapted = {"scale": jnp.ones(3)}
        >>> def forward(context, adapted, images):
        ...     return images.mean((1, 2)) * adapted["scale"]  # three classes
        >>> images = jax.random.uniform(jax.random.key(0), (4, 2, 2, 3))
        >>> basis = jaxtta.continual.output_gradient_basis(forward, None, adapted, images, rank=2)
        >>> basis["scale"].shape
        (2, 3)
    """
    flat, unravel = ravel_pytree(adapted)
    for most, name in ((len(images), "images"), (flat.size, "parameters")):
        if not 1 <= rank <= most:
            raise ValueError(f"rank is {rank}, expected 1 to {most}, the number of {name}")

    def prediction(adapted: Any, context: Any, image: Array) -> Array:
        """Log-probability of the predicted class."""
        log_p = jax.nn.log_softmax(forward(context, adapted, image[None])[0])
        return log_p[jax.lax.stop_gradient(log_p.argmax())]

    @jax.jit
    def gradients_of(context: Any, adapted: Any, images: Array) -> Array:
        return jax.lax.map(
            lambda image: ravel_pytree(jax.grad(prediction)(adapted, context, image))[0], images
        )

    gradients = gradients_of(context, adapted, jnp.asarray(images))
    if not jnp.isfinite(gradients).all():
        raise ValueError("gradients of the predictions are not finite")
    _, sizes, directions = jnp.linalg.svd(gradients, full_matrices=False)
    rounding = sizes[0] * min(gradients.shape) * jnp.finfo(sizes.dtype).eps
    directions = jnp.where((sizes > rounding)[:, None], directions, 0)
    return jax.vmap(unravel)(directions[:rank])
