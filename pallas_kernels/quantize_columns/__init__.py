"""Rows of groups rounded to 8 bits with the rows last: what a product takes that sums over the rows of each group.

    x [M, F], groups of its rows  ->  values [F, P], scales of 128 rows of one group and one feature

For the gradient of a group's weights, lhs[rows]ᵀ · dout[rows], both operands are such `Columns`: see
`pallas_kernels.columns`. With `row_ids` the rows need not have been dispatched: tokens are gathered as they are
rounded.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.columns import Columns
from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import QDtype, check_qdtype, takes_gradient


def quantize_columns(
    x: jax.Array,
    group_sizes: jax.Array,
    *,
    row_ids: jax.Array | None = None,
    dtype: QDtype = "float8_e4m3fn",
    backend: str = "auto",
) -> Columns:
    """`x` as `Columns` of its groups; no gradient passes.

    Args:
      x: [M, F], the rows sorted by group, floating point of 16 or 32 bits; with `row_ids` tokens [T, F].
      group_sizes: integer [G], sizes of at least 0 that sum to at most M.
      row_ids: int32 [M], the token of each row; a row whose id is none of a token, as −1, is zeros. Of a plan they are
        `plan.order // K`.
      dtype: float8_e4m3fn, float8_e5m2 or int8.
      backend: "auto", "xla" or "pallas_gpu".

    Returns:
      Values [F, P] and scales [P/128, F], P = `columns.padded_rows(M, G)`, both as `quantize` gives them for the 128
      rows of a block. Where these hold a NaN or an infinity the scale is NaN, and the values mean nothing. Rows that no
      group owns count for nothing. What is behind the last block of a group may be anything.

    Raises:
      ValueError: an operand is not as above.
      TypeError: on differentiation, as with `quantize`.
      Unsupported: a named backend cannot do this.
    """
    if x.ndim != 2 or not takes_gradient(x):
        raise ValueError(f"x must be [M, F], floating point of 16 or 32 bits, got {x.dtype}{list(x.shape)}")
    if group_sizes.ndim != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be an integer vector, got {group_sizes.dtype}{list(group_sizes.shape)}")
    if row_ids is not None and (row_ids.ndim != 1 or row_ids.dtype != jnp.int32):
        raise ValueError(f"row_ids must be an int32 vector, got {row_ids.dtype}{list(row_ids.shape)}")
    operands = {"x": x, "group_sizes": group_sizes, "row_ids": row_ids, "dtype": jnp.dtype(check_qdtype(dtype))}
    return _quantized(backend, **operands)


def _jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    raise TypeError(
        "quantize_columns() cannot be differentiated: 8-bit cotangents lose the gradient. Wrap the rows in "
        "jax.lax.stop_gradient"
    )


_quantized = Operator("quantize_columns", "quantize_columns", jvp=_jvp)
"""See `pallas_kernels.quantize_columns.reference.quantize_columns`."""

__all__ = ["quantize_columns"]
