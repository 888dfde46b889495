"""What an adapting model must not forget: directions in which its clean outputs would change."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Array = jax.Array


def output_basis(
    forward: Callable[[Any, Any, Array], Array],
    context: Any,
    adapted: Any,
    images: Array,
    rank: int,
) -> Any:
    """Find the directions in which a model's answers to some images change most.

    Args:
        forward: `forward(context, adapted, images)` to logits (batch, classes).
        context: what it needs beside, the frozen parameters for one.
        adapted: the parameters that will be adapted.
        images: (images, height, width, 3), clean ones.
        rank: how many directions, at most one an image.

    Returns:
        A tree like `adapted`, each leaf with a leading axis (rank,); orthonormal over all leaves,
        for `jaxtta.optim.orthogonal_to`. Where the gradients span less, the last ones are zeros.

    Raises:
        ValueError: if the rank is below 1 or above the number of images or of parameters, or
            a gradient is not finite.
    """
    flat, unravel = ravel_pytree(adapted)
    for most, of in ((len(images), "images"), (flat.size, "parameters")):
        if not 1 <= rank <= most:
            raise ValueError(f"rank is {rank}, expected 1 to {most} for as many {of}")

    def answer(adapted: Any, context: Any, image: Array) -> Array:
        """The log-probability of what is answered now."""
        log_p = jax.nn.log_softmax(forward(context, adapted, image[None])[0])
        return log_p[jax.lax.stop_gradient(log_p.argmax())]

    @jax.jit
    def gradients_of(context: Any, adapted: Any, images: Array) -> Array:
        return jax.lax.map(
            lambda image: ravel_pytree(jax.grad(answer)(adapted, context, image))[0], images
        )

    gradients = gradients_of(context, adapted, jnp.asarray(images))
    if not jnp.isfinite(gradients).all():
        raise ValueError("gradients of the answers to be kept are not finite")
    _, sizes, directions = jnp.linalg.svd(gradients, full_matrices=False)
    rounding = sizes[0] * min(gradients.shape) * jnp.finfo(sizes.dtype).eps
    directions = jnp.where((sizes > rounding)[:, None], directions, 0)
    return jax.vmap(unravel)(directions[:rank])
