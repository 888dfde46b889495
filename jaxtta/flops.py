"""How many operations a program has, before it is compiled."""

import math
from typing import Any

CUDNN = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
"""Matrix products of cuDNN's attention, one of scores and values each; its gradient has five."""


def count_flops(program: Any) -> int:
    """Count the operations of a program's matrix products.

    XLA's own count, `cost_analysis()`, takes a loop's body once.

    Args:
        program: a jaxpr, as of `jax.jit(function).trace(*arguments).jaxpr.jaxpr`. Under
            `shard_map` it is one device's, otherwise all devices' together.

    Returns:
        Multiplications and additions, with all turns of loops of a known length, and of the
        branches of a condition the one that has most.

    Examples:
        >>> from jaxtta.flops import count_flops
        >>> program = jax.jit(jnp.matmul).trace(jnp.ones((2, 3)), jnp.ones((3, 5))).jaxpr.jaxpr
        >>> count_flops(program)  # 2 · 2 · 3 · 5
        60
    """
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * terms * math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name in CUDNN:  # queries and keys are (batch, tokens, heads, dim)
            queries, keys = (one.aval.shape for one in equation.invars[:2])
            products = CUDNN[equation.primitive.name]
            total += 2 * products * math.prod(queries) * keys[1]
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        inside = sum(count_flops(program) for program in inner if hasattr(program, "eqns"))
        total += equation.params.get("length", 1) * inside  # loops, jitted and derived functions
        branches = (count_flops(branch.jaxpr) for branch in equation.params.get("branches", ()))
        total += max(branches, default=0)
    return total
