"""The gradient of the weights on TPU: lhsᵀ · dout over the rows of each group.

    for each tile [block_k, block_n] of the matrices:
      for each group, empty ones included:
        for each block of rows that holds rows of the group: accumulate in float32, then round and write once

    floor in time = max(bytes of lhs, dout, out / HBM bandwidth, 2·M·K·N / peak)

Blocks of rows lie where memory cuts them, so one at the edge of a group also holds rows of its neighbours: they are
cleared in both operands, as 0 · NaN is NaN.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.chips import MIB, Chip
from pallas_kernels.grouped_matmul.group_sizes import bounds
from pallas_kernels.grouped_matmul.tpu.visits import visits_of
from pallas_kernels.tracing.varying import result_varying_as


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut: a multiple of the chip's tiling, or all of M, K, or N.

    Attributes:
      block_m: rows that are summed at a time.
      block_k: rows of a tile of the result.
      block_n: columns of a tile of the result.
    """

    block_m: int
    block_k: int
    block_n: int


def pick(
    chip: Chip,
    num_rows: int,
    shape: tuple[int, int, int],
    dtype: jax.typing.DTypeLike,
    out_dtype: jnp.dtype,
    *,
    adds: bool,
) -> Config:
    """The configuration of least modelled time for rows spread evenly over groups with matrices of `shape` [G, K, N].

    `adds` says that the result is added to an array, which is read for that.

    Raises:
      Unsupported: no tile fits VMEM.
    """
    num_groups, depth, columns = shape
    itemsize = jnp.dtype(dtype).itemsize
    limit = int(chip.fast_memory_bytes * 0.8) - 4 * MIB
    result_itemsize = out_dtype.itemsize * (2 if adds else 1)

    def vmem(config: Config) -> int:
        operands = 2 * config.block_m * (config.block_k + config.block_n) * itemsize
        transposed = 2 * config.block_m * (config.block_k + config.block_n) * itemsize
        return operands + transposed + config.block_k * config.block_n * (8 + 2 * result_itemsize)

    def seconds(config: Config) -> float:
        rows = -(-num_rows // config.block_m)
        visits = (rows + num_groups) * config.block_m
        tiles_k, tiles_n = -(-depth // config.block_k), -(-columns // config.block_n)
        padded = tiles_k * config.block_k * tiles_n * config.block_n
        multiply = 2 * visits * padded / chip.peak(dtype)
        read = visits * itemsize * (tiles_n * tiles_k * (config.block_k + config.block_n))
        result = num_groups * depth * columns * result_itemsize
        steps = (rows + num_groups) * tiles_k * tiles_n * 0.4e-6
        return max(multiply, (read + result) / chip.hbm_bandwidth) + steps

    options = [
        Config(block_m, block_k, block_n)
        for block_m in _sizes(num_rows, (64, 128, 256, 512))
        for block_k in _sizes(depth, (128, 256, 512, 1024, 2048))
        for block_n in _sizes(columns, (128, 256, 512, 1024, 2048))
    ]
    options = [config for config in options if vmem(config) <= limit]
    if not options:
        raise Unsupported(f"no tile of the gradient of weights {list(shape)} fits the VMEM of {chip.name}")
    return min(options, key=seconds)


def _sizes(size: int, blocks: tuple[int, ...]) -> list[int]:
    return [block for block in blocks if block < size] + ([size] if size <= blocks[-1] else [])


def grouped_drhs(
    lhs: jax.Array,
    dout: jax.Array,
    group_sizes: jax.Array,
    group_offset: jax.Array,
    onto: jax.Array | None,
    num_groups: int,
    out_dtype: jnp.dtype,
    config: Config,
    *,
    vmem_limit_bytes: int,
) -> jax.Array:
    """Runs the kernel.

    Args:
      lhs: [M, K], BF16 or float32.
      dout: [M, N], of the same dtype.
      group_sizes: int32 [E].
      group_offset: int32, the first group.
      onto: [G, K, N], what the result is added to, or None.
      num_groups: G.
      out_dtype: of the result, and of `onto`.
      config: how to cut the work.
      vmem_limit_bytes: what the kernel may use of VMEM.

    Returns:
      [G, K, N]; zeros, or what `onto` holds, for groups without rows.
    """
    (num_rows, depth), columns = lhs.shape, dout.shape[1]
    visits = _Visits.of(group_sizes, group_offset, num_groups, num_rows, config.block_m)

    def lhs_block(k, n, visit, group, block, begin, end):
        del n, group, begin, end
        return block[visit], k

    def dout_block(k, n, visit, group, block, begin, end):
        del k, group, begin, end
        return block[visit], n

    def out_block(k, n, visit, group, block, begin, end):
        del block, begin, end
        return group[visit + 1], k, n

    def body(group, block, begin, end, lhs_ref, dout_ref, *rest):
        *onto_ref, out_ref, total = rest
        visit = pl.program_id(2)
        mine = group[visit + 1]
        first_row = block[visit] * config.block_m

        @pl.when(group[visit] != mine)
        def _():
            total[...] = jnp.zeros_like(total)

        whole = (begin[mine] <= first_row) & (first_row + config.block_m <= end[mine])

        @pl.when(whole)
        def _():
            total[...] += _transposed_product(lhs_ref[...], dout_ref[...])

        @pl.when(~whole & (begin[mine] < end[mine]))
        def _():
            def owned(x):
                row = lax.broadcasted_iota(jnp.int32, x.shape, 0) + first_row
                return jnp.where((row >= begin[mine]) & (row < end[mine]), x, jnp.zeros_like(x))

            total[...] += _transposed_product(owned(lhs_ref[...]), owned(dout_ref[...]))

        @pl.when(group[visit + 2] != mine)
        def _():
            result = total[...].astype(out_dtype)
            out_ref[...] = onto_ref[0][...] + result if onto_ref else result

    itemsize = lhs.dtype.itemsize
    of_result = pl.BlockSpec((None, config.block_k, config.block_n), out_block)
    sums = [] if onto is None else [onto]
    scalars = visits.group, visits.block, visits.begin, visits.end
    operands = *scalars, lhs, dout, *sums
    result_bytes = (1 + len(sums)) * num_groups * depth * columns * out_dtype.itemsize
    return pl.pallas_call(
        body,
        out_shape=result_varying_as(lhs, (num_groups, depth, columns), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(pl.cdiv(depth, config.block_k), pl.cdiv(columns, config.block_n), visits.count),
            in_specs=[
                pl.BlockSpec((config.block_m, config.block_k), lhs_block),
                pl.BlockSpec((config.block_m, config.block_n), dout_block),
                *[of_result] * len(sums),
            ],
            out_specs=of_result,
            scratch_shapes=[pltpu.VMEM((config.block_k, config.block_n), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * columns,
            bytes_accessed=num_rows * (depth + columns) * itemsize + result_bytes,
            transcendentals=0,
        ),
        input_output_aliases={len(operands) - 1: 0} if sums else {},
        name="grouped_matmul_drhs",
    )(*operands)


def _transposed_product(lhs: jax.Array, dout: jax.Array) -> jax.Array:
    return lax.dot_general(
        lhs,
        dout,
        (((0,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if lhs.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


@dataclasses.dataclass(frozen=True)
class _Visits:
    """Which block of rows is read for which group, in order.

        group_sizes = [3, 0, 7], block_m = 4
        group = [-1, 0, 1, 2, 2, 2, -1, …], block = [0, 0, 0, 1, 2, …], count = 5

    Attributes:
      group: int32 [V + 2]: entry v + 1 is the group of visit v, those before the first and after the last are -1.
      block: int32 [V].
      begin: int32 [G], first row of each group.
      end: int32 [G], one past its last row.
      count: visits; a group without rows has one, to write its zeros.
    """

    group: Any
    block: Any
    begin: Any
    end: Any
    count: Any

    @classmethod
    def of(
        cls, group_sizes: jax.Array, group_offset: jax.Array, num_groups: int, num_rows: int, block_m: int
    ) -> "_Visits":
        begins, ends = bounds(group_sizes, num_rows)
        begin = lax.dynamic_slice_in_dim(begins, group_offset, num_groups)
        end = lax.dynamic_slice_in_dim(ends, group_offset, num_groups)
        blocks = pl.cdiv(num_rows, block_m)
        first = jnp.minimum(begin // block_m, blocks - 1)
        visits = jnp.where(end > begin, pl.cdiv(end, block_m) - first, 1)
        group, block, count = visits_of(first, visits, blocks)
        return cls(group, block, begin, end, count)
