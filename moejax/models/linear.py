"""Tokens times weights [in, out], as `flax.nnx.Linear`; by `pallas_kernels.dense_matmul` where that is faster."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels import dense_matmul
from pallas_kernels.tracing.unless_differentiated import unless_differentiated


def project(linear: nnx.Linear, x: jax.Array, *, by_kernel: bool) -> jax.Array:
    """linear(x), by a kernel of ours where that is faster and no gradient is asked for.

    Args:
      linear: called as it is if it has a bias, a precision, a dtype of its result or a product of its own.
      x: [..., in].
      by_kernel: whether a kernel may do it.

    Returns:
      [..., out].
    """
    own = linear.bias, linear.precision, linear.preferred_element_type
    is_plain = type(linear) is nnx.Linear and linear.dot_general is lax.dot_general and own == (None, None, None)
    dtype = linear.dtype or jnp.result_type(x, linear.kernel)
    sizes = math.prod(x.shape[:-1]), linear.in_features, linear.out_features
    if not (by_kernel and is_plain and dense_matmul.pays(*sizes, dtype, is_bare=True)):
        return linear(x)
    return unless_differentiated(_by_kernel, jnp.dot, x.astype(dtype), linear.kernel[...].astype(dtype))


def _by_kernel(x: jax.Array, weights: jax.Array) -> jax.Array:
    return dense_matmul.dense_matmul(x.reshape(-1, x.shape[-1]), weights).reshape(*x.shape[:-1], -1)
