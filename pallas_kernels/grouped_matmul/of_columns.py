"""Sums over the rows of each group in 8 bits: what the gradient of a group's weights is, of `Columns`.

    lhs [K, P] · dout [N, P] -> [G, K, N]      group_sizes = [130, 0, 5]: rows 0–255 for group 0, 256–383 for group 2

Each block of 128 rows is a product with scales of its own for the rows and for the columns of the result.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.columns import BLOCK, Columns
from pallas_kernels.grouped_matmul.group_sizes import as_group_sizes
from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import check_qdtype
from pallas_kernels.tracing.concrete import is_known


def grouped_matmul_of_columns(
    lhs: Columns,
    dout: Columns,
    group_sizes: jax.Array,
    *,
    preferred_element_type: jax.typing.DTypeLike = jnp.bfloat16,
    onto: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """lhs[rows of g]ᵀ · dout[rows of g] for each group g, added up in float32; no gradient passes.

    Args:
      lhs: of K features.
      dout: of N features, of the same rows.
      group_sizes: integer [G], rows of each group, as when `lhs` and `dout` were made.
      preferred_element_type: dtype of the result.
      onto: [G, K, N] in that dtype, what the result is added to, in its buffer if nobody else needs it; or None.
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu"; see `pallas_kernels.backend`.

    Returns:
      [G, K, N]; zeros, or what `onto` holds, for groups without rows.

    Raises:
      ValueError: shapes or dtypes do not fit, or there are fewer blocks than group_sizes that are known take up.
      TypeError: on differentiation.
      Unsupported: a named backend cannot do this.
    """
    out_dtype = jnp.dtype(preferred_element_type)
    _check(lhs, dout, group_sizes)
    _check_onto(onto, (group_sizes.shape[0], lhs.values.shape[0], dout.values.shape[0]), out_dtype)
    return _multiplied(
        backend,
        lhs=lhs,
        dout=dout,
        group_sizes=as_group_sizes(group_sizes, lhs.values.shape[1]),
        onto=onto,
        out_dtype=out_dtype,
    )


def _check(lhs: Columns, dout: Columns, group_sizes: jax.Array) -> None:
    for name, columns in (("lhs", lhs), ("dout", dout)):
        if not isinstance(columns, Columns):
            raise ValueError(f"{name} must be Columns, got {type(columns).__name__}; make them with quantize_columns()")
        check_qdtype(columns.dtype)
        values, scale = columns.values.shape, columns.scale.shape
        if len(values) != 2 or values[1] % BLOCK or scale != (values[1] // BLOCK, values[0]):
            raise ValueError(
                f"{name} must have values [F, P] of whole blocks of {BLOCK} rows and scale [P/{BLOCK}, F], got "
                f"{list(values)} and {list(scale)}"
            )
    num_rows = lhs.values.shape[1]
    if dout.values.shape[1] != num_rows:
        raise ValueError(f"lhs and dout must hold the same rows, got P = {num_rows} and {dout.values.shape[1]}")
    if group_sizes.ndim != 1 or not group_sizes.size or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes must be an integer vector, not empty, got {group_sizes.dtype}{list(group_sizes.shape)}"
        )
    if is_known(group_sizes):
        sizes = np.asarray(group_sizes).astype(np.int64)
        if sizes.min() < 0 or (-(-sizes // BLOCK)).sum() > num_rows // BLOCK:
            raise ValueError(
                f"group_sizes must be at least 0 and fit into {num_rows // BLOCK} blocks of {BLOCK} rows, got "
                f"{sizes.tolist()}"
            )


def _check_onto(onto: jax.Array | None, shape: tuple[int, ...], dtype: jnp.dtype) -> None:
    if onto is not None and (onto.shape, onto.dtype) != (shape, dtype):
        raise ValueError(f"onto must be {dtype.name}{list(shape)}, got {onto.dtype.name}{list(onto.shape)}")


def _jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    raise TypeError(
        "grouped_matmul_of_columns() cannot be differentiated: 8-bit cotangents lose the gradient. It is meant for "
        "gradients; differentiate grouped_matmul() in their place"
    )


_multiplied = Operator("grouped_matmul", "grouped_matmul_of_columns", jvp=_jvp)
"""See `pallas_kernels.grouped_matmul.reference.grouped_matmul_of_columns`."""
