"""Rows rounded to 8 bits in one pass, as products and exchanges take them.

    x [T, H]  ->  values [T, H], scales of 1x128

`quantize_rows` is `quantize` with these scales, as an operator. `rows_in_8_bits` and `rounded` take it where it has
kernels, and scale as they are told.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import QTensor, Rounded, Scaling, check_qdtype, quantize, scale_shape, takes_gradient
from pallas_kernels.quantize_rows.reference import SCALING
from pallas_kernels.tracing.concrete import is_symbolic


def quantize_rows(x: jax.Array, dtype: jax.typing.DTypeLike = "float8_e4m3fn", *, backend: str = "auto") -> QTensor:
    """`quantize(x, dtype, scaling="1x128")`; no gradient passes.

    Args:
      x: [..., T, H], floating point of 16 or 32 bits; H a multiple of 128.
      dtype: float8_e4m3fn, float8_e5m2 or int8.
      backend: "auto", "xla" or "pallas_gpu".

    Raises:
      ValueError: an argument is not as above.
      TypeError: on differentiation, as with `quantize`.
      Unsupported: a named backend cannot do this.
    """
    if not takes_gradient(x) or x.dtype.itemsize > 4:
        raise ValueError(f"x must be floating point of 16 or 32 bits, got {x.dtype}{list(x.shape)}")
    scale_shape(x.shape, SCALING)
    return _quantized(backend, x=x, dtype=jnp.dtype(check_qdtype(dtype)))


def rows_in_8_bits(x: jax.Array, dtype: jax.typing.DTypeLike, *, scaling: Scaling, backend: str) -> QTensor:
    """`quantize(x, dtype, scaling=scaling)`, by `quantize_rows` where that has kernels for it; no gradient passes.

    Args:
      x: floating point [..., T, H].
      dtype: of 8 bits.
      scaling: as `quantize` takes it.
      backend: of kernels.
    """
    x = jax.lax.stop_gradient(x)
    in_one_pass = scaling == SCALING and jnp.dtype(dtype) != jnp.int8 and x.dtype.itemsize <= 4
    if in_one_pass and not is_symbolic(*x.shape):
        return quantize_rows(x, dtype, backend=backend)
    return quantize(x, dtype, scaling=scaling)


def rounded(x: jax.Array, dtype: jax.typing.DTypeLike, *, scaling: Scaling, backend: str) -> Rounded:
    """`x` with what `rows_in_8_bits` makes of it."""
    return Rounded(x, rows_in_8_bits(x, dtype, scaling=scaling, backend=backend))


def _jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    raise TypeError(
        "quantize_rows() cannot be differentiated: 8-bit cotangents lose the gradient. Wrap the rows in "
        "jax.lax.stop_gradient"
    )


_quantized = Operator("quantize_rows", "quantize_rows", jvp=_jvp)
"""See `pallas_kernels.quantize_rows.reference.quantize_rows`."""

__all__ = ["SCALING", "quantize_rows", "rounded", "rows_in_8_bits"]
