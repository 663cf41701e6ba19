"""The products in plain XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation, gated_halves


def dense_matmul(lhs: jax.Array, rhs: jax.Array, *, residual: jax.Array | None) -> jax.Array:
    """See `pallas_kernels.dense_matmul.dense_matmul`."""
    product = _product(lhs, rhs)
    return (product if residual is None else product + residual).astype(lhs.dtype)


def dense_gate_up(
    lhs: jax.Array, rhs: jax.Array, *, activation: Activation, activation_limit: float | None
) -> jax.Array:
    """See `pallas_kernels.dense_matmul.dense_gate_up`."""
    h = _product(lhs, rhs.reshape(rhs.shape[0], -1))
    return gated_halves(h, activation, activation_limit).astype(lhs.dtype)


def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    precision = "highest" if lhs.dtype == jnp.float32 else None
    return jnp.dot(lhs, rhs, precision=precision, preferred_element_type=jnp.float32)
