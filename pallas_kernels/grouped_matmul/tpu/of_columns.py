"""The gradient of the weights in 8 bits on TPU: lhs[rows of g]ᵀ · dout[rows of g] of `Columns`.

    for each tile [block_k, block_n] of the matrices:
      for each group, empty ones included:
        for each block of 128 rows of the group: the product in 8 bits, times the scales of its rows and columns

    floor in time = max(bytes of lhs, dout, out / HBM bandwidth, 2·P·K·N / peak), P the rows of the blocks in use

Built like `drhs`. A group begins with a block of its own and zeros fill its last one, so no rows have to be cleared.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import Chip
from pallas_kernels.columns import BLOCK, Columns, first_blocks
from pallas_kernels.grouped_matmul.tpu.visits import visits_of
from pallas_kernels.tracing.varying import result_varying_as

_LARGEST_TILE = 1024
"""Rows and columns of a tile of the result, at most: more would not fit VMEM beside their product."""

_SUBLANES = 8


def grouped_drhs(
    lhs: Columns,
    dout: Columns,
    group_sizes: jax.Array,
    onto: jax.Array | None,
    out_dtype: jnp.dtype,
    chip: Chip,
    *,
    vmem_limit_bytes: int,
    largest_tile: int = _LARGEST_TILE,
) -> jax.Array:
    """Runs the kernel.

    Args:
      lhs: of K features.
      dout: of N features.
      group_sizes: int32 [G], as when the operands were made.
      onto: [G, K, N], what the result is added to, or None.
      out_dtype: of the result, and of `onto`.
      chip: where it runs.
      vmem_limit_bytes: what the kernel may use of VMEM.
      largest_tile: for tests.

    Returns:
      [G, K, N]; zeros, or what `onto` holds, for groups without rows.
    """
    depth, columns = lhs.values.shape[0], dout.values.shape[0]
    block_k, block_n = min(depth, largest_tile), min(columns, largest_tile)
    num_groups, num_blocks = group_sizes.shape[0], lhs.scale.shape[0]
    visits = _Visits.of(group_sizes, num_blocks)
    is_native = lhs.dtype == dout.dtype and chip.is_native(lhs.dtype)
    multiplied_as = lhs.dtype if is_native else jnp.dtype(jnp.bfloat16)  # which holds any of 8 bits

    def body(group, block, has_rows, lhs_ref, lhs_scale, dout_ref, dout_scale, *rest):
        del block
        *onto_ref, out_ref, total = rest
        visit = pl.program_id(2)
        mine = group[visit + 1]

        @pl.when(group[visit] != mine)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(has_rows[mine] != 0)
        def _():
            product = lax.dot_general(
                lhs_ref[...].astype(multiplied_as),
                dout_ref[...].astype(multiplied_as),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.int32 if multiplied_as == jnp.int8 else jnp.float32,
            )
            by_row = jnp.broadcast_to(lhs_scale[...], (_SUBLANES, block_k)).T[:, :1]
            total[...] += product.astype(jnp.float32) * (by_row * dout_scale[...])

        @pl.when(group[visit + 2] != mine)
        def _():
            result = total[...].astype(out_dtype)
            out_ref[...] = onto_ref[0][...] + result if onto_ref else result

    def values(features: int, axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((features, BLOCK), lambda *at: (at[axis], at[4][at[2]]))

    def scales(features: int, axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, features), lambda *at: (at[4][at[2]], 0, at[axis]))

    of_result = pl.BlockSpec((None, block_k, block_n), lambda *at: (at[3][at[2] + 1], at[0], at[1]))
    sums = [] if onto is None else [onto]
    scalars = visits.group, visits.block, visits.has_rows
    operands = *scalars, lhs.values, lhs.scale[:, None], dout.values, dout.scale[:, None], *sums
    of_operands = values(block_k, 0), scales(block_k, 0), values(block_n, 1), scales(block_n, 1)
    result_bytes = (1 + len(sums)) * num_groups * depth * columns * out_dtype.itemsize
    return pl.pallas_call(
        body,
        out_shape=result_varying_as(lhs.values, (num_groups, depth, columns), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(depth, block_k), pl.cdiv(columns, block_n), visits.count),
            in_specs=[*of_operands, *[of_result] * len(sums)],
            out_specs=of_result,
            scratch_shapes=[pltpu.VMEM((block_k, block_n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_blocks * BLOCK * depth * columns,
            bytes_accessed=num_blocks * BLOCK * (depth + columns) + result_bytes,
            transcendentals=0,
        ),
        input_output_aliases={len(operands) - 1: 0} if sums else {},
        name="grouped_matmul_drhs_8_bits",
    )(*operands)


@dataclasses.dataclass(frozen=True)
class _Visits:
    """Which block is read for which group, in order.

        group_sizes = [130, 0, 5]  ->  group = [-1, 0, 0, 1, 2, -1, …], block = [0, 1, 2, 2, …], count = 4

    Attributes:
      group: int32 [V + 2]: entry v + 1 is the group of visit v, those before the first and after the last are -1.
      block: int32 [V].
      has_rows: int32 [G], 0 for a group without rows.
      count: visits; a group without rows has one, to write its zeros.
    """

    group: jax.Array
    block: jax.Array
    has_rows: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, group_sizes: jax.Array, num_blocks: int) -> "_Visits":
        """Those of groups that lie in so many blocks."""
        first = first_blocks(group_sizes)
        blocks = first[1:] - first[:-1]
        group, block, count = visits_of(first[:-1], jnp.maximum(blocks, 1), num_blocks)
        return cls(group, block, (blocks > 0).astype(jnp.int32), count)
