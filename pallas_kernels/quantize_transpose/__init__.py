"""Weights rounded to 8 bits in the two layouts that products of them and their gradients take, in one pass.

    weights [G, K, N]  ->  values [G, N, K] (K-major), and values [G, K, N] (N last), each with scales of 128x128

A product in 8 bits sums along the last dimension of its weights on Hopper: along K for lhs · rhs, along N for the
gradient of lhs. A block of 128x128 has the same scale either way, so that both are the same numbers (what Transformer
Engine calls a cast-transpose of square blocks).
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.primitive import Operands, Operator
from pallas_kernels.quantize import QDtype, QTensor, check_qdtype, scale_shape, takes_gradient
from pallas_kernels.quantize_transpose.reference import SCALING


def quantize_transpose(
    weights: jax.Array,
    dtype: QDtype = "float8_e4m3fn",
    *,
    k_major: bool = True,
    n_last: bool = True,
    backend: str = "auto",
) -> tuple[QTensor | None, QTensor | None]:
    """`quantize(weights, dtype, scaling="128x128")`, and the same transposed; no gradient passes.

    Args:
      weights: [G, K, N], floating point of 16 or 32 bits; K and N multiples of 128.
      dtype: float8_e4m3fn, float8_e5m2 or int8.
      k_major: whether to give the transposed one.
      n_last: whether to give the other.
      backend: "auto", "xla" or "pallas_gpu".

    Returns:
      [G, N, K] and [G, K, N], with None for what is not asked for.

    Raises:
      ValueError: `weights` are not as above, or neither layout is asked for.
      TypeError: on differentiation, as with `quantize`.
      Unsupported: a named backend cannot do this.
    """
    if weights.ndim != 3 or not takes_gradient(weights):
        raise ValueError(
            f"weights must be [G, K, N], floating point of 16 or 32 bits, got {weights.dtype}{list(weights.shape)}"
        )
    scale_shape(weights.shape, SCALING)
    if not (k_major or n_last):
        raise ValueError("one of k_major and n_last must be True, got False for both")
    return _quantized(backend, weights=weights, dtype=jnp.dtype(check_qdtype(dtype)), k_major=k_major, n_last=n_last)


def _jvp(backend: str, operands: Operands, tangents: Operands) -> tuple[Any, Any]:
    raise TypeError(
        "quantize_transpose() cannot be differentiated: 8-bit cotangents lose the gradient. Wrap the weights in "
        "jax.lax.stop_gradient"
    )


def _fewer(operands: Operands, used: list[bool]) -> tuple[Operands, list[bool]]:
    """A layout of which nothing is used is not written. Of each, the result has values and scales."""
    layouts = [name for name in ("k_major", "n_last") if operands[name]]
    needed = {name: any(used[2 * i : 2 * i + 2]) for i, name in enumerate(layouts)}
    return operands | needed, [needed[name] for name in layouts for _ in range(2)]


_quantized = Operator("quantize_transpose", "quantize_transpose", jvp=_jvp, fewer=_fewer)
"""See `pallas_kernels.quantize_transpose.reference.quantize_transpose`."""

__all__ = ["SCALING", "quantize_transpose"]
