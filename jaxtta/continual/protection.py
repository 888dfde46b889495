"""What an adapting model must not forget: directions in which its clean outputs would change."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

Array = jax.Array


def output_basis(
    forward: Callable[[Any, Array], Array], adapted: Any, images: Array, rank: int
) -> Any:
    """Find the directions in which a model's answers to some pictures change most.

    Args:
        forward: `forward(adapted, images)` to logits (batch, classes).
        adapted: the parameters that will be adapted.
        images: (pictures, height, width, 3), clean ones.
        rank: how many directions, at most one a picture.

    Returns:
        A tree like `adapted`, each leaf with a leading axis (rank,); orthonormal over all leaves,
        for `jaxtta.optim.orthogonal_to`.

    Raises:
        ValueError: if the rank is below 1 or above the number of pictures.
    """
    if not 1 <= rank <= len(images):
        raise ValueError(f"rank is {rank}, expected 1 to {len(images)} for as many pictures")

    def answer(adapted: Any, image: Array) -> Array:
        """The log-probability of what is answered now."""
        log_p = jax.nn.log_softmax(forward(adapted, image[None])[0])
        return log_p[jax.lax.stop_gradient(log_p.argmax())]

    def gradient(image: Array) -> Array:
        return ravel_pytree(jax.grad(answer)(adapted, image))[0]

    gradients = jax.jit(lambda images: jax.lax.map(gradient, images))(jnp.asarray(images))
    _, _, directions = jnp.linalg.svd(gradients, full_matrices=False)
    return jax.vmap(ravel_pytree(adapted)[1])(directions[:rank])
