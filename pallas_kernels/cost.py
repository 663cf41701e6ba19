"""What each operator must do at the least: arithmetic and bytes of main memory.

Each input is read once and each output written once; weights count only for groups that have rows. Kernels
hand these to the compiler (`pl.CostEstimate`), and bench turns them into floors.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.chips import Chip


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs (a multiply-add is two), and bytes to and from main memory."""

    flops: int = 0
    hbm_bytes: int = 0

    def compute_seconds(self, chip: Chip, dtype: jax.typing.DTypeLike) -> float:
        """Time of the arithmetic alone, at the chip's peak for operands of `dtype`."""
        return self.flops / chip.peak(dtype)

    def memory_seconds(self, chip: Chip) -> float:
        """Time of the main-memory traffic alone."""
        return self.hbm_bytes / chip.hbm_bandwidth

    def floor_seconds(self, chip: Chip, dtype: jax.typing.DTypeLike) -> float:
        """The time that no implementation beats: the larger of the two, overlapped."""
        return max(self.compute_seconds(chip, dtype), self.memory_seconds(chip))


def _size(dtype: jax.typing.DTypeLike) -> int:
    return jnp.dtype(dtype).itemsize


def grouped_matmul_cost(
    num_rows: int,
    k: int,
    n: int,
    touched_groups: int,
    *,
    lhs_dtype: jax.typing.DTypeLike,
    rhs_dtype: jax.typing.DTypeLike,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Cost:
    """[num_rows, k] · [k, n] over `touched_groups` groups that have rows."""
    weights = touched_groups * k * n * _size(rhs_dtype)
    rows = num_rows * (k * _size(lhs_dtype) + n * _size(out_dtype))
    return Cost(flops=2 * num_rows * k * n, hbm_bytes=weights + rows)


def grouped_gate_up_cost(
    num_rows: int,
    hidden: int,
    intermediate: int,
    touched_groups: int,
    *,
    lhs_dtype: jax.typing.DTypeLike,
    rhs_dtype: jax.typing.DTypeLike,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Cost:
    """The fused gate/up product: twice the columns, of which half are written."""
    dtypes = {"lhs_dtype": lhs_dtype, "rhs_dtype": rhs_dtype, "out_dtype": out_dtype}
    unfused = grouped_matmul_cost(num_rows, hidden, 2 * intermediate, touched_groups, **dtypes)
    return dataclasses.replace(unfused, hbm_bytes=unfused.hbm_bytes - num_rows * intermediate * _size(out_dtype))


def dense_matmul_cost(
    num_rows: int,
    k: int,
    n: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    gated: bool = False,
    has_residual: bool = False,
) -> Cost:
    """[num_rows, k] · [k, n] onto a residual, or the gated product of two such matrices."""
    of_groups = grouped_gate_up_cost if gated else grouped_matmul_cost
    cost = of_groups(num_rows, k, n, 1, lhs_dtype=dtype, rhs_dtype=dtype, out_dtype=dtype)
    return dataclasses.replace(cost, hbm_bytes=cost.hbm_bytes + has_residual * num_rows * n * _size(dtype))


def plan_cost(num_tokens: int, top_k: int, num_groups: int) -> Cost:
    """Ids read, order and inverse written, all int32, and two short vectors."""
    return Cost(hbm_bytes=4 * (3 * num_tokens * top_k + 2 * num_groups))


def dispatch_cost(
    num_tokens: int,
    num_rows: int,
    hidden: int,
    *,
    in_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Cost:
    """Each token read once, each row written once, and its index read."""
    return Cost(hbm_bytes=num_tokens * hidden * _size(in_dtype) + num_rows * (hidden * _size(out_dtype) + 4))


def combine_cost(
    num_tokens: int,
    num_rows: int,
    hidden: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    has_residual: bool = False,
) -> Cost:
    """Each row read once with its index and weight, each token written once; a multiply-add per element of a row."""
    return Cost(
        flops=2 * num_rows * hidden,
        hbm_bytes=num_rows * (hidden * _size(dtype) + 8) + (1 + has_residual) * num_tokens * hidden * _size(dtype),
    )


def rms_norm_cost(
    num_rows: int,
    hidden: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    has_residual: bool = False,
    scales: int = 0,
) -> Cost:
    """Each row read and written once, with its `scales`; a residual read too, and the sum written. Weights: float32."""
    rows = num_rows * hidden * ((3 if has_residual else 1) * _size(dtype) + _size(out_dtype))
    return Cost(flops=4 * num_rows * hidden, hbm_bytes=rows + 4 * (num_rows * scales + hidden))


def rms_norm_pullback_cost(
    num_rows: int,
    hidden: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    has_residual: bool = False,
) -> Cost:
    """Rows and their cotangents read, with a residual those of the sum too; gradients of rows and weight written."""
    rows = num_rows * hidden * ((3 if has_residual else 2) * _size(dtype) + _size(out_dtype))
    return Cost(flops=10 * num_rows * hidden, hbm_bytes=rows + 8 * hidden)


def gated_activation_cost(
    num_rows: int,
    width: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    out_dtype: jax.typing.DTypeLike | None = jnp.bfloat16,
    in_8_bits: bool = False,
) -> Cost:
    """Pre-activations read, [R, 2I]; [R, I] written in `out_dtype`, in 8 bits with scales of 1x128, or both."""
    elements = num_rows * width
    written = (0 if out_dtype is None else _size(out_dtype) * elements) + _in_8_bits(elements, in_8_bits)
    return Cost(flops=10 * elements, hbm_bytes=2 * elements * _size(dtype) + written)


def gated_activation_pullback_cost(
    num_rows: int,
    width: int,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    in_8_bits: bool = False,
    with_array: bool = True,
    with_result: jax.typing.DTypeLike | None = None,
    with_columns: bool = False,
) -> Cost:
    """Pre-activations and the cotangent read; [R, 2I] written in `dtype`, in 8 bits with scales of 1x128, or both.

    The result [R, I] may be written as well, in `with_result`, and `with_columns` [R, 3I] by columns in 8 bits, without
    the rows that fill up blocks.
    """
    elements = num_rows * width
    written = (2 * elements * _size(dtype) if with_array else 0) + _in_8_bits(2 * elements, in_8_bits)
    written += (0 if with_result is None else _size(with_result) * elements) + _in_8_bits(3 * elements, with_columns)
    return Cost(flops=20 * elements, hbm_bytes=3 * elements * _size(dtype) + written)


def _in_8_bits(elements: int, are_asked_for: bool) -> int:
    """Bytes of elements and their scales."""
    return elements + 4 * (elements // 128) if are_asked_for else 0


def quantize_transpose_cost(
    num_groups: int, k: int, n: int, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, layouts: int = 2
) -> Cost:
    """Weights read once, their 8-bit values written in one layout or both, a scale for each 128x128."""
    elements = num_groups * k * n
    scales = 4 * num_groups * (k // 128) * (n // 128)
    return Cost(flops=2 * elements, hbm_bytes=elements * (_size(dtype) + layouts) + scales)


def quantize_rows_cost(num_rows: int, hidden: int, *, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> Cost:
    """Rows read once, written in 8 bits, a scale for 128 elements of a row."""
    elements = num_rows * hidden
    return Cost(flops=2 * elements, hbm_bytes=elements * _size(dtype) + _in_8_bits(elements, are_asked_for=True))


def quantize_columns_cost(
    num_tokens: int, num_rows: int, features: int, *, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> Cost:
    """Each token read once, its rows' ids read, each row written in 8 bits, a scale for 128 of a feature."""
    scales = 4 * -(num_rows // -128)
    hbm_bytes = features * (num_tokens * _size(dtype) + num_rows + scales) + 4 * num_rows
    return Cost(flops=2 * num_rows * features, hbm_bytes=hbm_bytes)
