"""Grouped matrix products in plain XLA: the definition of the answer, on any platform.

Rows are cut into blocks of at most `_BLOCK_M` that lie in one group; a loop runs over the blocks in use, so that the
work follows the rows that exist and not the static size of the buffer. Each block reads one group's weights. All
arithmetic is in float32; 8-bit operands are dequantised first.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.activations import Activation, gated_halves
from pallas_kernels.columns import Columns, dequantize_columns, padded_sizes
from pallas_kernels.grouped_matmul.group_sizes import bounds
from pallas_kernels.quantize import Operand, QTensor, dequantize, quantize
from pallas_kernels.tracing.concrete import is_symbolic
from pallas_kernels.tracing.running_sums import running_sums
from pallas_kernels.tracing.varying import vary_over, varying_axes

_BLOCK_M = 64


def grouped_matmul(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None,
    group_offset: jax.Array | int,
    transpose_rhs: bool,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See `pallas_kernels.grouped_matmul.grouped_matmul`."""
    num_columns = rhs.shape[1] if transpose_rhs else rhs.shape[2]

    def block(rows: Operand, group: jax.Array) -> jax.Array:
        return _product(rows, _take(rhs, group), bias, group, transpose_rhs)

    return _map_blocks(block, lhs, group_sizes, rhs.shape[0], group_offset, num_columns, out_dtype)


def grouped_gate_up(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None,
    activation: Activation,
    activation_limit: float | None,
    group_offset: jax.Array | int,
    transpose_rhs: bool,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array | QTensor:
    """See `pallas_kernels.grouped_matmul.grouped_gate_up`; an 8-bit `out_dtype` gives a QTensor with 1x128 scales."""
    in_8_bits = jnp.dtype(out_dtype).itemsize == 1
    num_columns = rhs.shape[1] if transpose_rhs else rhs.shape[2]

    def block(rows: Operand, group: jax.Array) -> jax.Array:
        h = _product(rows, _take(rhs, group), bias, group, transpose_rhs)
        return gated_halves(h, activation, activation_limit)

    dtype = jnp.float32 if in_8_bits else out_dtype
    out = _map_blocks(block, lhs, group_sizes, rhs.shape[0], group_offset, num_columns // 2, dtype)
    return quantize(out, out_dtype, scaling="1x128") if in_8_bits else out


def grouped_matmul_drhs(
    lhs: Operand,
    dout: Operand,
    group_sizes: jax.Array,
    *,
    num_groups: int,
    group_offset: jax.Array | int,
    onto: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """lhs[rows of g]ᵀ · dout[rows of g] for each of `num_groups` groups from `group_offset` on: [G, K, N].

    Groups without rows get zeros. `onto`, [G, K, N] in `out_dtype`, is what the result is added to; kernels do that in
    its buffer, if nobody else needs it.
    """

    def body(index, accumulator):
        group, rows, mask = _locate(index, blocks)
        lhs_block = jnp.where(mask, _as_float32(_slice(lhs, rows, blocks.block_m)), 0)
        dout_block = jnp.where(mask, _as_float32(_slice(dout, rows, blocks.block_m)), 0)
        update = _dot(lhs_block.T, dout_block)
        return accumulator.at[group].add(update)

    blocks = _Blocks(group_sizes, num_groups, group_offset, num_rows=lhs.shape[0])
    zeros = jnp.zeros((num_groups, lhs.shape[1], dout.shape[1]), jnp.float32)
    if lhs.shape[0] == 0:
        return zeros.astype(out_dtype) if onto is None else onto
    sums = lax.fori_loop(0, blocks.count, body, vary_over(zeros, varying_axes(lhs))).astype(out_dtype)
    return sums if onto is None else onto + sums


def grouped_matmul_of_columns(
    lhs: Columns,
    dout: Columns,
    group_sizes: jax.Array,
    *,
    onto: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`grouped_matmul_drhs` of the rows that `lhs` and `dout` stand for, of as many groups as there are sizes."""
    return grouped_matmul_drhs(
        dequantize_columns(lhs),
        dequantize_columns(dout),
        padded_sizes(jnp.clip(group_sizes, 0, lhs.values.shape[1])),
        num_groups=group_sizes.shape[0],
        group_offset=0,
        onto=onto,
        out_dtype=out_dtype,
    )


class _Blocks:
    """Where the row blocks of a window of groups lie. Built inside the traced function, of traced arrays."""

    def __init__(self, group_sizes: jax.Array, num_groups: int, group_offset: jax.Array | int, num_rows: int):
        starts, ends = bounds(group_sizes, num_rows)
        # Of rows that could be fewer than a block, the result gets a block more, and `_slice_array` repeats the last.
        self.padding = _BLOCK_M if is_symbolic(num_rows) else 0
        self.block_m = self.padding or min(_BLOCK_M, max(num_rows, 1))
        self.num_rows = num_rows + self.padding
        self.starts = lax.dynamic_slice_in_dim(starts, group_offset, num_groups)
        self.ends = lax.dynamic_slice_in_dim(ends, group_offset, num_groups)
        per_group = -(-(self.ends - self.starts) // self.block_m)
        self.last = running_sums(per_group)
        self.first = self.last - per_group
        self.count = self.last[-1]


def _locate(index: jax.Array, blocks: _Blocks) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group of a block, its first row, and which of its rows [block_m, 1] belong to it.

    A block that would reach past the end of the buffer starts earlier; the mask leaves out what is not its own.
    """
    group = (blocks.last <= index).sum(dtype=jnp.int32)
    begin = blocks.starts[group] + (index - blocks.first[group]) * blocks.block_m
    first_row = jnp.clip(begin, 0, blocks.num_rows - blocks.block_m)
    row = first_row + jnp.arange(blocks.block_m)
    mask = (row >= begin) & (row < blocks.ends[group])
    return group, first_row, mask[:, None]


def _map_blocks(
    function: Callable[[Operand, jax.Array], jax.Array],
    lhs: Operand,
    group_sizes: jax.Array,
    num_groups: int,
    group_offset: jax.Array | int,
    num_columns: int,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Applies `function(rows [block_m, K], group) -> [block_m, N]` to every block; other rows are zeros."""
    blocks = _Blocks(group_sizes, num_groups, group_offset, num_rows=lhs.shape[0])

    def body(index, out):
        group, first_row, mask = _locate(index, blocks)
        new = function(_slice(lhs, first_row, blocks.block_m), group).astype(out_dtype)
        old = lax.dynamic_slice_in_dim(out, first_row, blocks.block_m)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mask, new, old), first_row, 0)

    zeros = jnp.zeros((blocks.num_rows, num_columns), out_dtype)
    if lhs.shape[0] == 0:
        return zeros
    out = lax.fori_loop(0, blocks.count, body, vary_over(zeros, varying_axes(lhs)))
    return out[: lhs.shape[0]] if blocks.padding else out


def _product(
    rows: Operand, weights: Operand, bias: jax.Array | None, group: jax.Array, transpose_rhs: bool
) -> jax.Array:
    if isinstance(rows, QTensor) or isinstance(weights, QTensor):
        rows, weights = _as_float32(rows), _as_float32(weights)
    out = _dot(rows, weights.T if transpose_rhs else weights)
    return out if bias is None else out + bias[group].astype(jnp.float32)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product with float32 accumulation, and float32 operands in full (not the chip's TF32 or BF16 passes)."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _slice(operand: Operand, first_row: jax.Array, num_rows: int) -> Operand:
    if isinstance(operand, QTensor):
        # One scale for all rows (per tensor, per channel) has nothing to slice; otherwise each row gets its own.
        scale = operand.scale
        if scale.shape[0] != 1:
            rows_per_scale = operand.shape[0] // scale.shape[0]
            scale = scale[(first_row + jnp.arange(num_rows)) // rows_per_scale]
        return QTensor(_slice_array(operand.values, first_row, num_rows), scale)
    return _slice_array(operand, first_row, num_rows)


def _slice_array(x: jax.Array, first_row: jax.Array, num_rows: int) -> jax.Array:
    if is_symbolic(x.shape[0]):
        return x[jnp.minimum(first_row + jnp.arange(num_rows), x.shape[0] - 1)]
    return lax.dynamic_slice_in_dim(x, first_row, num_rows)


def _take(operand: Operand, group: jax.Array) -> Operand:
    def take(leaf: jax.Array) -> jax.Array:  # groups may share a scale
        return lax.dynamic_index_in_dim(leaf, group // (operand.shape[0] // leaf.shape[0]), keepdims=False)

    return jax.tree.map(take, operand)


def _as_float32(operand: Operand) -> jax.Array:
    return dequantize(operand) if isinstance(operand, QTensor) else operand.astype(jnp.float32)
