"""The meta gradient generator (MGG): a learned optimiser that denoises gradients.

    phi = init_meta_gradient_generator(jax.random.key(0))
    optimizer = meta_gradient_generator(phi, 1e-3)      # for any pytree and any objective

Every scalar parameter has its own recurrent memory, a linear layer that takes one gradient step
for each gradient. The generator's weights `phi` are shared by all parameters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from jaxtta.io import load_arrays, save_arrays
from jaxtta.tree import all_finite

Array = jax.Array
MGGParams = dict[str, Array]
EPSILON, NORM_EPSILON = 1e-8, 1e-6


class MetaGradientState(NamedTuple):
    """The generator's state, for all scalar parameters of a tree in one row.

    Attributes:
        count: () number of updates so far.
        mean: (parameters,) decaying mean of the gradients.
        square: (parameters,) decaying mean of the squared gradients.
        kernel: (parameters, hidden, hidden) of the memories.
        bias: (parameters, hidden) of the memories.
    """

    # The name as in optax, although a tuple has a method of that name.
    count: Array
    mean: Array
    square: Array
    kernel: Array
    bias: Array


def init_meta_gradient_generator(key: Array, hidden: int = 8) -> MGGParams:
    """Initialise the generator's weights at random, to start meta-training from.

    Args:
        key: PRNG key.
        hidden: size of the memories.

    Returns:
        A flat dict of float32 arrays.

    Examples:
        >>> phi = jaxtta.optim.init_meta_gradient_generator(jax.random.key(0))
        >>> phi["query"].shape, sum(x.size for x in phi.values()) < 200  # whatever the model
        ((2, 8), True)
    """
    keys = jax.random.split(key, 6)

    def linear(key: Array, inputs: int, outputs: int) -> Array:
        return jax.random.uniform(key, (inputs, outputs), minval=-1, maxval=1) * inputs**-0.5

    return {
        "query": linear(keys[0], 2, hidden),
        "key": linear(keys[1], 2, hidden),
        "value": linear(keys[2], 2, hidden),
        "lr_kernel": 0.02 * jax.random.normal(keys[3], (2,)),
        "lr_bias": jnp.zeros(()),
        "token_scale": jnp.zeros(()),
        "memory_kernel": 0.02 * jax.random.normal(keys[4], (hidden, hidden)),
        "memory_bias": jnp.zeros(hidden),
        "memory_norm_scale": jnp.ones(hidden),
        "memory_norm_bias": jnp.zeros(hidden),
        "post_norm_scale": jnp.ones(hidden),
        "post_norm_bias": jnp.zeros(hidden),
        "output": linear(keys[5], hidden, 1),
    }


def check_mgg_params(phi: MGGParams) -> int:
    """Check the weights' names and shapes.

    Args:
        phi: the weights.

    Returns:
        The hidden size.

    Raises:
        TypeError: if they are not a dict: a file's name, or all that `load_mgg` gives.
        ValueError: if an array is missing, unexpected or has the wrong shape for the hidden size.
    """
    if not isinstance(phi, Mapping):
        raise TypeError(f"phi is a {type(phi).__name__}, expected a dict: phi, _ = load_mgg(FILE)")
    shapes = {name: tuple(jnp.shape(array)) for name, array in phi.items()}
    query = shapes.get("query", ())
    hidden = query[1] if len(query) == 2 and query[1] else 8
    expected = jax.eval_shape(lambda: init_meta_gradient_generator(jax.random.key(0), hidden))
    for name in dict.fromkeys([*expected, *shapes]):
        if name not in shapes or name not in expected:
            problem = "missing" if name in expected else "unexpected"
            raise ValueError(f"phi: {problem} parameter {name}, expected {', '.join(expected)}")
        if shapes[name] != expected[name].shape:
            raise ValueError(
                f"phi: {name} has shape {shapes[name]}, expected {expected[name].shape} for a "
                f"hidden size of {hidden}"
            )
    return hidden


def meta_gradient_generator(
    phi: MGGParams, learning_rate: optax.ScalarOrSchedule, b1: float = 0.9, b2: float = 0.99
) -> optax.GradientTransformation:
    """Turn gradients into updates of magnitude at most the learning rate.

    Differentiable with respect to `phi`, also through `init`, where the memories' initial values
    are part of `phi`. Parameters whose gradient is always zero are updated too, so leave out those
    that the objective does not use.

    Args:
        phi: the weights, from `load_mgg` or meta-training.
        learning_rate: step size, or an optax schedule of it.
        b1: decay of the gradients' mean.
        b2: decay of their squares' mean.

    Returns:
        The transformation. It treats all leaves as one row of scalars, so the updates do not depend
        on how the parameters are divided into leaves.

    Raises:
        ValueError: if the weights' names or shapes are wrong.

    Examples:
        >>> phi, _ = jaxtta.optim.load_mgg(jaxtta.assets.PHI)
        >>> optimizer = jaxtta.optim.meta_gradient_generator(phi, 1e-3)
        >>> params, gradients = {"scale": jnp.ones(4)}, {"scale": jnp.array([9.0, 1.0, 0.1, -9.0])}
        >>> updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params))
        >>> bool((jnp.abs(updates["scale"]) <= 1e-3).all())
        True

    References:
        https://arxiv.org/abs/2412.16901
    """
    hidden = check_mgg_params(phi)

    def init(params: Any) -> MetaGradientState:
        flat = ravel_pytree(params)[0]
        count, dtype = flat.size, jnp.promote_types(flat.dtype, jnp.float32)
        return MetaGradientState(
            jnp.zeros((), jnp.int32),
            jnp.zeros(count, dtype),
            jnp.zeros(count, dtype),
            jnp.broadcast_to(jnp.asarray(phi["memory_kernel"], dtype), (count, hidden, hidden)),
            jnp.broadcast_to(jnp.asarray(phi["memory_bias"], dtype), (count, hidden)),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MetaGradientState]:
        del params
        flat, unravel = ravel_pytree(updates)
        flat = flat.astype(state.mean.dtype)
        count = jnp.asarray(optax.safe_increment(state.count))
        mean = b1 * state.mean + (1 - b1) * flat
        square = b2 * state.square + (1 - b2) * flat**2
        inputs = generator_inputs(flat, mean, square, count, b1, b2)
        outputs, kernel, bias = generate(phi, inputs, state.kernel, state.bias)
        state = MetaGradientState(count, mean, square, kernel, bias)
        return jax.tree.map(lambda y, g: y.astype(g.dtype), unravel(outputs), updates), state

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )


def generator_inputs(
    gradients: Array, mean: Array, square: Array, count: Array, b1: float, b2: float
) -> Array:
    """The generator's inputs: mean gradient and gradient, over the root mean square.

    Args:
        gradients: (parameters,).
        mean: (parameters,), the decaying mean.
        square: (parameters,), the decaying mean square.
        count: () number of this update, from 1.
        b1: decay of the mean.
        b2: decay of the mean square.

    Returns:
        (parameters, 2).
    """
    # The reference implementation's exponent is one more than Adam's.
    mean, square = (x / (1 - b ** (count + 1)) for x, b in ((mean, b1), (square, b2)))
    return jnp.stack([mean, gradients], -1) / (jnp.sqrt(square) + EPSILON)[:, None]


def generate(
    phi: MGGParams, inputs: Array, kernel: Array, bias: Array
) -> tuple[Array, Array, Array]:
    """Update every memory by one gradient step, and compute the updates from it.

    Args:
        phi: the weights.
        inputs: (parameters, 2).
        kernel: (parameters, hidden, hidden) of the memories.
        bias: (parameters, hidden).

    Returns:
        Updates (parameters,) in (-1, 1), and the memories' new kernel and bias.
    """
    phi = {name: array.astype(inputs.dtype) for name, array in phi.items()}
    hidden = bias.shape[-1]
    query, key, value = (inputs @ phi[name] for name in ("query", "key", "value"))
    rate = jax.nn.sigmoid(inputs @ phi["lr_kernel"] + phi["lr_bias"]) / hidden
    rate = (rate * jnp.maximum(1 + phi["token_scale"], 0))[:, None]

    def norm(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        inverse = jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + NORM_EPSILON)
        return centred * inverse * phi[f"{name}_norm_scale"] + phi[f"{name}_norm_bias"]

    def read(what: Array, kernel: Array, bias: Array) -> Array:
        return (what[:, :, None] * kernel).sum(1) + bias

    # One gradient step on ½‖norm(z) − (value − key)‖².
    normed, pull_back = jax.vjp(lambda z: norm(z, "memory"), read(key, kernel, bias))
    (error,) = pull_back(normed - (value - key))
    kernel = kernel - rate[:, :, None] * key[:, :, None] * error[:, None, :]
    bias = bias - rate * error
    out = query + norm(read(query, kernel, bias), "memory")
    return jnp.tanh(norm(out, "post") @ phi["output"])[:, 0], kernel, bias


def save_mgg(path: str | Path, phi: MGGParams, metadata: dict[str, Any] | None = None) -> None:
    """Save a generator's weights.

    Args:
        path: of the `.safetensors` file.
        phi: the weights.
        metadata: how they were trained, anything JSON can hold.

    Raises:
        ValueError: if the weights' names or shapes are wrong.

    Examples:
        >>> phi = jaxtta.optim.init_meta_gradient_generator(jax.random.key(0))
        >>> jaxtta.optim.save_mgg("mgg.safetensors", phi, {"epochs": 0})
        >>> jaxtta.optim.load_mgg("mgg.safetensors")[1]
        {'epochs': 0}
    """
    check_mgg_params(phi)
    save_arrays(path, phi, metadata)


def load_mgg(path: str | Path) -> tuple[MGGParams, dict[str, Any]]:
    """Load weights that `save_mgg` saved.

    Args:
        path: of the file.

    Returns:
        The weights, and the metadata: how they were trained.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or does not hold a generator's weights.

    Examples:
        >>> phi, about = jaxtta.optim.load_mgg(jaxtta.assets.PHI)  # trained for the bundled model
        >>> phi["query"].shape
        (2, 8)
    """
    arrays, metadata = load_arrays(path)
    phi = {name: jnp.asarray(array) for name, array in arrays.items()}
    try:
        check_mgg_params(phi)
        if not all_finite(phi):
            raise ValueError("phi: holds values that are not finite")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return phi, metadata
