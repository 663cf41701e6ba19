"""Tokens times weights [in, out], as `flax.nnx.Linear`; by `pallas_kernels.dense_matmul` where that is faster."""

import math
from typing import TypeGuard

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from pallas_kernels import dense_matmul
from pallas_kernels.tracing.unless_differentiated import unless_transformed
from sharding.mesh import AnyMesh, is_split_here


def project(linear: nnx.Module, x: jax.Array, *, made_on: AnyMesh | None) -> jax.Array:
    """linear(x), by a kernel of ours where that is faster: on one chip, where no gradient and no batch is asked for.

    Args:
      linear: `nnx.Linear`, or what stands in its place, which is called as it is. So is one with a bias or settings.
      x: [..., in].
      made_on: the mesh that `linear` was made on, if any.

    Returns:
      [..., out].
    """
    if not _is_plain(linear) or is_split_here(made_on, x, weights := linear.kernel[...]):
        return linear(x)
    dtype, (depth, columns) = linear.dtype or jnp.result_type(x, weights), weights.shape
    if not dense_matmul.pays(math.prod(x.shape[:-1]), depth, columns, dtype, is_bare=True):
        return linear(x)
    return unless_transformed(_by_kernel, jnp.dot, x.astype(dtype), weights.astype(dtype))


def _is_plain(linear: nnx.Module) -> TypeGuard[nnx.Linear]:
    """Whether it is x · kernel in its dtype and nothing else."""
    if type(linear) is not nnx.Linear:
        return False
    settings = linear.bias, linear.precision, linear.preferred_element_type
    own = linear.dot_general is not lax.dot_general or linear.promote_dtype is not promote_dtype
    return settings == (None, None, None) and not own


def _by_kernel(x: jax.Array, weights: jax.Array) -> jax.Array:
    product = dense_matmul.dense_matmul(x.reshape(-1, x.shape[-1]), weights)
    return product.reshape(*x.shape[:-1], weights.shape[-1])
