"""Grouped matrix products: row groups of one matrix times one weight matrix per group.

    lhs [M, K] · rhs [G, K, N] -> [M, N]      group_sizes = [17, 31, 24]: rows 0–16 · rhs[0], 17–47 · rhs[1], …

`grouped_matmul` is the plain product (the down projection), `grouped_gate_up` the fused gate/up projection with its
gated activation. Rows past the sum of `group_sizes`, and rows of groups outside the window that `rhs` covers, are
never read as data and come out as zeros.

Operands may be quantised two ways. A `QTensor` is a constant in 8 bits (serving: no gradient reaches it). With
`quantization=` the operands arrive in BF16 or float32 and are rounded inside; the gradient passes the rounding as if
it were not there (straight-through) and uses the rounded operands (training). Rows that were rounded before, as fewer
tokens, are a `Rounded`, for which the same holds.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.activations import Activation
from pallas_kernels.grouped_matmul.checks import check_gate_up, check_operands
from pallas_kernels.grouped_matmul.gradients import (
    GATE_UP_NAME,
    activated,
    activated_and_rounded,
    factors,
    multiplied,
)
from pallas_kernels.grouped_matmul.group_sizes import as_group_sizes
from pallas_kernels.grouped_matmul.of_columns import grouped_matmul_of_columns
from pallas_kernels.quantize import (
    Operand,
    QDtype,
    QTensor,
    Quantization,
    Rounded,
    Rows,
    Scaling,
    Weights,
    check_qdtype,
    scale_shape,
)

_RESULT_SCALING: Scaling = "1x128"
"""How `grouped_gate_up_in_8_bits` scales its result."""


def grouped_matmul(
    lhs: Rows,
    rhs: Weights,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None = None,
    group_offset: jax.Array | int = 0,
    transpose_rhs: bool = False,
    quantization: Quantization | None = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Multiplies each group of rows by that group's matrix, and adds its bias.

    Args:
      lhs: [M, K], BF16, FP16, float32, a QTensor or a `Rounded`. Rows lie sorted by group.
      rhs: [G, K, N] ([G, N, K] with `transpose_rhs`), an array or a QTensor; or `RoundedWeights` of [G, K, N].
      group_sizes: integer [E], E ≥ G: rows per group, for all groups that the rows are sorted by. A negative one counts
        as 0, and groups end at row M however many rows they claim; inside of `pallas_kernels.debug.debug_checks` both
        are errors that name the group, when the program runs.
      bias: [G, N], or None.
      group_offset: the first group that `rhs` holds: rhs[g] belongs to group_sizes[group_offset + g].
      transpose_rhs: whether rhs lies as [G, N, K] (the layout FP8 needs on Hopper).
      quantization: round array operands to 8 bits inside, keeping gradients; None multiplies them as they are.
      preferred_element_type: dtype of the result; default is that of lhs (bfloat16 when lhs is a QTensor).
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu"; see `pallas_kernels.backend`.

    Returns:
      [M, N]; zeros in rows that belong to none of the G groups.

    Raises:
      ValueError: shapes or dtypes do not fit; group_sizes that are known at trace time are negative or exceed M.
      Unsupported: a named backend cannot do this.
    """
    check_operands(_multiplied(lhs), rhs, group_sizes, bias, group_offset, transpose_rhs)
    group_sizes = as_group_sizes(group_sizes, lhs.shape[0])
    offset = jnp.asarray(group_offset, jnp.int32)
    operands = factors(backend, lhs, rhs, group_sizes, offset, transpose_rhs=transpose_rhs, quantization=quantization)
    return multiplied(backend, **operands, bias=bias, out_dtype=_result_dtype(lhs, preferred_element_type))


def grouped_gate_up(
    lhs: Rows,
    rhs: Weights,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None = None,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    group_offset: jax.Array | int = 0,
    transpose_rhs: bool = False,
    quantization: Quantization | None = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> jax.Array:
    """act(lhs · gate + b_gate) · (lhs · up + b_up) for each group of rows: kernel one of an expert MLP.

    Args:
      lhs: [M, H], BF16, FP16, float32, a QTensor or a `Rounded`. Rows lie sorted by group.
      rhs: [G, H, 2I] ([G, 2I, H] with `transpose_rhs`), the gate matrix in the first I columns and the up matrix in
        the last I.
      group_sizes: integer [E], E ≥ G: rows per group; see `grouped_matmul` for negative ones and too many rows.
      bias: [G, 2I], or None.
      activation: silu, gelu, gelu_tanh, swigluoai or relu2; see `pallas_kernels.activations`.
      activation_limit: clamp before the activation, or None.
      group_offset: the first group that `rhs` holds.
      transpose_rhs: whether rhs lies as [G, 2I, H] (the layout FP8 needs on Hopper).
      quantization: round array operands to 8 bits inside, keeping gradients; None multiplies them as they are.
      preferred_element_type: dtype of the result; default is that of lhs (bfloat16 when lhs is a QTensor).
      backend: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      [M, I]; zeros in rows that belong to none of the G groups. Differentiation stores the pre-activations [M, 2I]
      in the dtype of the result; wrap the call in `jax.checkpoint` to recompute them instead.

    Raises:
      ValueError: shapes or dtypes do not fit; group_sizes that are known at trace time are negative or exceed M.
      Unsupported: a named backend cannot do this.
    """
    check_gate_up(_multiplied(lhs), rhs, group_sizes, bias, group_offset, transpose_rhs, activation, activation_limit)
    group_sizes = as_group_sizes(group_sizes, lhs.shape[0])
    offset = jnp.asarray(group_offset, jnp.int32)
    operands = factors(backend, lhs, rhs, group_sizes, offset, transpose_rhs=transpose_rhs, quantization=quantization)
    out_dtype = _result_dtype(lhs, preferred_element_type)
    operands |= {"bias": bias, "activation": activation, "activation_limit": activation_limit, "out_dtype": out_dtype}
    return activated(backend, **operands)


def grouped_gate_up_in_8_bits(
    lhs: Rows,
    rhs: Weights,
    group_sizes: jax.Array,
    *,
    dtype: QDtype = "float8_e4m3fn",
    bias: jax.Array | None = None,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    group_offset: jax.Array | int = 0,
    transpose_rhs: bool = False,
    quantization: Quantization | None = None,
    backend: str = "auto",
) -> QTensor:
    """`grouped_gate_up` whose result is rounded to 8 bits for the product that follows; no gradient passes.

    Args:
      lhs: see `grouped_gate_up`, as for all that is not listed here.
      rhs: likewise.
      group_sizes: likewise.
      dtype: of the result.
      bias: see `grouped_gate_up`.
      activation: likewise.
      activation_limit: likewise.
      group_offset: likewise.
      transpose_rhs: likewise.
      quantization: likewise.
      backend: likewise.

    Returns:
      [M, I] with scales "1x128".

    Raises:
      ValueError: as `grouped_gate_up`, or I is not divisible by 128.
      Unsupported: a named backend cannot do this.
    """
    check_gate_up(_multiplied(lhs), rhs, group_sizes, bias, group_offset, transpose_rhs, activation, activation_limit)
    group_sizes = as_group_sizes(group_sizes, lhs.shape[0])
    scale_shape((lhs.shape[0], rhs.shape[1 if transpose_rhs else 2] // 2), _RESULT_SCALING)
    lhs, rhs, bias = jax.lax.stop_gradient((lhs, rhs, bias))
    offset = jnp.asarray(group_offset, jnp.int32)
    operands = factors(backend, lhs, rhs, group_sizes, offset, transpose_rhs=transpose_rhs, quantization=quantization)
    return activated(
        backend,
        **operands,
        bias=bias,
        activation=activation,
        activation_limit=activation_limit,
        out_dtype=jnp.dtype(check_qdtype(dtype)),
    )


def grouped_gate_up_rounded(
    lhs: Rows,
    rhs: Weights,
    group_sizes: jax.Array,
    *,
    dtype: QDtype = "float8_e4m3fn",
    bias: jax.Array | None = None,
    activation: Activation = "silu",
    activation_limit: float | None = None,
    group_offset: jax.Array | int = 0,
    transpose_rhs: bool = False,
    quantization: Quantization | None = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    backend: str = "auto",
) -> Rounded:
    """`grouped_gate_up_in_8_bits` for training: gradients pass the rounding as if it were not there.

    Args:
      lhs: see `grouped_gate_up`, as for all that is not listed here.
      rhs: likewise.
      group_sizes: likewise.
      dtype: of 8 bits.
      bias: see `grouped_gate_up`.
      activation: likewise.
      activation_limit: likewise.
      group_offset: likewise.
      transpose_rhs: likewise.
      quantization: likewise.
      preferred_element_type: dtype of the result's `array`; default is that of lhs (bfloat16 when lhs is a QTensor).
        Pre-activations are stored in it where a gradient is asked for, and rounded from it to 8 bits.
      backend: likewise.

    Returns:
      A `Rounded` [M, I] with scales "1x128", whose `array` is what its 8 bits say.

    Raises:
      ValueError: as `grouped_gate_up`, or I is not divisible by 128.
      Unsupported: a named backend cannot do this.
    """
    check_gate_up(_multiplied(lhs), rhs, group_sizes, bias, group_offset, transpose_rhs, activation, activation_limit)
    group_sizes = as_group_sizes(group_sizes, lhs.shape[0])
    scale_shape((lhs.shape[0], rhs.shape[1 if transpose_rhs else 2] // 2), _RESULT_SCALING)
    offset = jnp.asarray(group_offset, jnp.int32)
    operands = factors(backend, lhs, rhs, group_sizes, offset, transpose_rhs=transpose_rhs, quantization=quantization)
    array, rounded = activated_and_rounded(
        backend,
        **operands,
        bias=bias,
        activation=activation,
        activation_limit=activation_limit,
        out_dtype=_result_dtype(lhs, preferred_element_type),
        in_8_bits=jnp.dtype(check_qdtype(dtype)),
    )
    return Rounded(array, rounded, is_widened=True)


def result_can_stay(quantization: Quantization, width: int) -> bool:
    """Whether what `grouped_gate_up_in_8_bits` gives, [M, width], is what `quantization` would round it to."""
    return quantization.lhs_scaling == _RESULT_SCALING and width % 128 == 0


def _multiplied(lhs: Rows) -> Operand:
    return lhs.in_8_bits if isinstance(lhs, Rounded) else lhs


def _result_dtype(lhs: Rows, preferred: jax.typing.DTypeLike | None) -> jnp.dtype:
    if preferred is not None:
        return jnp.dtype(preferred)
    return jnp.dtype(jnp.bfloat16) if isinstance(lhs, QTensor) else lhs.dtype


__all__ = [
    "GATE_UP_NAME",
    "Operand",
    "grouped_gate_up",
    "grouped_gate_up_in_8_bits",
    "grouped_gate_up_rounded",
    "grouped_matmul",
    "grouped_matmul_of_columns",
    "result_can_stay",
]
