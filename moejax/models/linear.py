"""A product of tokens with a kernel [in, out], as `flax.nnx.Linear`; where that serves faster, by a kernel of ours."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels.dense_matmul import dense_matmul, pays
from pallas_kernels.tracing.unless_differentiated import unless_differentiated


def project(linear: nnx.Linear, x: jax.Array, *, is_split: bool) -> jax.Array:
    """linear(x), which a GPU's kernel computes of some hundred tokens where no gradient is asked for.

    Args:
      linear: with a bias, or a product of its own, it is called as it is.
      x: [..., in].
      is_split: whether a mesh splits x, which would be gathered for a kernel.

    Returns:
      [..., out].
    """
    is_plain = type(linear) is nnx.Linear and linear.bias is None and linear.dot_general is lax.dot_general
    dtype = linear.dtype or jnp.result_type(x, linear.kernel)
    sizes = math.prod(x.shape[:-1]), linear.in_features, linear.out_features
    if is_split or not is_plain or not pays(*sizes, dtype, is_bare=True):
        return linear(x)
    return unless_differentiated(_by_kernel, jnp.dot, x.astype(dtype), linear.kernel[...].astype(dtype))


def _by_kernel(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dense_matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)
