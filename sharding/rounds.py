"""A sum over a number of rounds that only the data tell, with a gradient.

A `lax.fori_loop` over a traced number of rounds cannot be differentiated: the number of residuals is unknown. Here the
backward pass runs the same rounds again, each forward and back, so that nothing of a round outlives it and memory is
that of one round.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.varying import vary_over, varying_axes

Round = Callable[[jax.Array, Any, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_over_rounds(function: Round, count: jax.Array, constants: Any, args: Any) -> jax.Array:
    """Σ function(r, constants, args) for r = 0 … count − 1, added in that order.

    Args:
      function: one round; closes over nothing that is traced. Its results are float32 arrays of one shape.
      count: int32 [], traced. Chips that talk to each other in a round must agree on it.
      constants: pytree of arrays that take no gradient.
      args: pytree of arrays; those of 16 bits or more in floating point take a gradient, the others are constants.
    """
    total = jax.eval_shape(function, 0, constants, args)

    def body(index: jax.Array, so_far: jax.Array) -> jax.Array:
        return so_far + function(index, constants, args)

    zeros = vary_over(jnp.zeros(total.shape, total.dtype), varying_axes((constants, args)))
    return lax.fori_loop(0, count, body, zeros)


def _forward(function, count, constants, args):
    return sum_over_rounds(function, count, constants, args), (count, constants, args)


def _backward(function, residuals, dout):
    count, constants, args = residuals
    leaves, structure = jax.tree.flatten(args)
    trained = [i for i, leaf in enumerate(leaves) if _takes_gradient(leaf)]

    def one_round(index: jax.Array, values: list[jax.Array]) -> jax.Array:
        merged = list(leaves)
        for i, value in zip(trained, values, strict=True):
            merged[i] = value
        return function(index, constants, jax.tree.unflatten(structure, merged))

    def body(index: jax.Array, so_far: list[jax.Array]) -> list[jax.Array]:
        _, pullback = jax.vjp(functools.partial(one_round, index), [leaves[i] for i in trained])
        (gradients,) = pullback(dout)
        return [total + g.astype(jnp.float32) for total, g in zip(so_far, gradients, strict=True)]

    zeros = [vary_over(jnp.zeros(leaves[i].shape, jnp.float32), varying_axes(leaves[i])) for i in trained]
    totals = lax.fori_loop(0, count, body, zeros)
    gradients = [None] * len(leaves)
    for i, total in zip(trained, totals, strict=True):
        gradients[i] = total.astype(leaves[i].dtype)
    return None, None, jax.tree.unflatten(structure, gradients)


sum_over_rounds.defvjp(_forward, _backward)


def _takes_gradient(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize >= 2
