"""Products of some tokens with a dense network's weights, cut so that every multiprocessor has work at once.

    dense_matmul     lhs [M, K] · rhs [K, N] + residual [M, N]                     -> [M, N]
    dense_gate_up    act(lhs · gate) · (lhs · up), gate and up in rhs [K, 2, N]    -> [M, N]

For which they are faster than XLA's, `pays` says: of some of 16 to 2048 tokens.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation, check_activation
from pallas_kernels.arrays import require_arrays, require_given_arrays
from pallas_kernels.backend import Unsupported
from pallas_kernels.dtypes import is_float
from pallas_kernels.primitive import Operator
from pallas_kernels.tracing.concrete import is_symbolic
from pallas_kernels.tracing.target import target_platform


def dense_matmul(
    lhs: jax.Array, rhs: jax.Array, *, residual: jax.Array | None = None, backend: str = "auto"
) -> jax.Array:
    """The product lhs · rhs + residual, summed in float32 and rounded once. Takes no gradient.

    Args:
      lhs: [M, K], BF16, FP16 or float32.
      rhs: [K, N], of that dtype.
      residual: [M, N], of that dtype, or None for nothing.
      backend: "auto", "xla" or "pallas_gpu".

    Returns:
      [M, N] in the dtype of lhs.

    Raises:
      TypeError: an argument is not an array.
      ValueError: shapes or dtypes do not fit.
      Unsupported: the named backend cannot do it.
    """
    require_given_arrays(lhs=lhs, rhs=rhs)
    require_arrays(residual=residual)
    _check(lhs, rhs)
    if residual is not None and (residual.shape, residual.dtype) != ((lhs.shape[0], rhs.shape[1]), lhs.dtype):
        wanted, got = f"{lhs.dtype}{[lhs.shape[0], rhs.shape[1]]}", f"{residual.dtype}{list(residual.shape)}"
        raise ValueError(f"residual must be [M, N] of the dtype of lhs, {wanted}, got {got}")
    return _dense_matmul(backend, lhs=lhs, rhs=rhs, residual=residual)


def dense_gate_up(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    backend: str = "auto",
) -> jax.Array:
    """The first half of a gated network, act(lhs · gate) · (lhs · up), rounded once. Takes no gradient.

    Args:
      lhs: [M, K], BF16, FP16 or float32.
      rhs: [K, 2, N], gate and then up, of that dtype.
      activation: of the gate.
      activation_limit: the clamp before it, or None.
      backend: "auto", "xla" or "pallas_gpu".

    Returns:
      [M, N] in the dtype of lhs.

    Raises:
      As `dense_matmul`.
    """
    require_given_arrays(lhs=lhs, rhs=rhs)
    check_activation(activation, activation_limit)
    _check(lhs, rhs, 2)
    return _dense_gate_up(backend, lhs=lhs, rhs=rhs, activation=activation, activation_limit=activation_limit)


def pays(num_rows: int, depth: int, columns: int, dtype: jax.typing.DTypeLike, *, is_bare: bool = False) -> bool:
    """Whether the kernels are faster than XLA's for products of this size on the chip that is traced for.

    docs/results.md has figures.

    Args:
      num_rows: M.
      depth: K.
      columns: N.
      dtype: of the operands.
      is_bare: whether there is neither a gate nor a residual.
    """
    if target_platform() != "gpu" or is_symbolic(num_rows, depth, columns):
        return False
    from pallas_kernels.dense_matmul import gpu

    try:
        return gpu.pays(num_rows, depth, columns, jnp.dtype(dtype), is_bare=is_bare)
    except Unsupported:
        return False


_dense_matmul = Operator("dense_matmul", "dense_matmul")
_dense_gate_up = Operator("dense_matmul", "dense_gate_up")


def _check(lhs: jax.Array, rhs: jax.Array, *halves: int) -> None:
    if lhs.ndim != 2 or not is_float(lhs.dtype):
        raise ValueError(f"lhs must be [M, K], BF16, FP16 or float32, got {lhs.dtype}{list(lhs.shape)}")
    if (rhs.shape[:-1], rhs.dtype) != ((lhs.shape[1], *halves), lhs.dtype):
        wanted = ", ".join(map(str, ("K", *halves, "N")))
        got = f"{rhs.dtype}{list(rhs.shape)}"
        raise ValueError(f"rhs must be [{wanted}] of the dtype of lhs, {lhs.dtype}, K = {lhs.shape[1]}, got {got}")


__all__ = ["dense_gate_up", "dense_matmul", "pays"]
