"""A matrix product with the precision of float32, whatever its operands are: the router's, forward and backward.

lhs [M, K], rhs [K, N] -> [M, N]
"""

import jax
import jax.numpy as jnp

from pallas_kernels.primitive import Operands, Operator, is_asked_for


def float32_matmul(
    lhs: jax.Array, rhs: jax.Array, *, out_dtype: jax.typing.DTypeLike = jnp.float32, backend: str = "auto"
) -> jax.Array:
    """The product of two matrices, summed in float32.

    Args:
      lhs: [M, K], BF16, FP16 or float32.
      rhs: [K, N], likewise.
      out_dtype: of the result: float32, or one of 16 bits, for which less precision will do.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [M, N]. Relative error, by norm, below 1e-6 in float32, and of the rounding in 16 bits.

    Raises:
      ValueError: shapes do not fit.
    """
    if lhs.ndim != 2 or rhs.ndim != 2 or lhs.shape[1] != rhs.shape[0]:
        raise ValueError(f"lhs and rhs must be [M, K] and [K, N], got {list(lhs.shape)} and {list(rhs.shape)}")
    return multiplied(backend, lhs=lhs, rhs=rhs, out_dtype=jnp.dtype(out_dtype))


def _transpose(backend: str, dout: jax.Array, operands: Operands) -> Operands:
    lhs, rhs = operands["lhs"], operands["rhs"]
    if is_asked_for(lhs):
        return {"lhs": multiplied(backend, lhs=dout, rhs=rhs.T, out_dtype=lhs.aval.dtype)}
    return {"rhs": multiplied(backend, lhs=lhs.T, rhs=dout, out_dtype=rhs.aval.dtype)}


multiplied = Operator("float32_matmul", "float32_matmul", linear_in=("lhs", "rhs"), transpose=_transpose)
"""`float32_matmul` as a primitive."""

__all__ = ["float32_matmul"]
