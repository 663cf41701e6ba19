"""The gradient of the weights on Hopper: lhs[rows of g]ᵀ · dout[rows of g] for each group, [G, K, N].

    floor in time = max(bytes of lhs, dout, out / HBM bandwidth, 2·M·K·N / peak)

Built like `kernel`: one warpgroup loads, two multiply, each 64 of the 128 rows of an output tile; here the rows of a
group are what is summed over, 64 in a step. Copies begin at every eighth row, so the first and the last step of a group
may hold rows of others. Those are overwritten with zeros in both operands (a NaN times zero would stay a NaN). Groups
without rows take no step, and store zeros, or nothing where results are added.

A tile has few steps, 17 if its group has 1024 rows, so what happens once a tile counts:
- The first step is taken last but one: what is to be cleared, of that one and of the last, is cleared while the tensor
  cores have a step in hand.
- A tile of 16 bits goes out at once, from buffers that hold all of it: the ring has three stages, not four, for that.
- Where the rows of the next tile's group lie is read while the tensor cores work.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu.tiles import place_in_strips
from pallas_kernels.on_gpu.smem import SWIZZLE, Views, swizzled
from pallas_kernels.on_gpu.sums import Tile, run_onto
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS

ROW_ALIGNMENT = 8
"""The number of rows of lhs and dout must be a multiple of this."""

_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_n: columns of an output tile, at most 256.
      block_rows: rows of lhs and dout in a step.
      num_stages: buffers in the ring.
      strip: column tiles visited for one row tile before the next.
      out_slots: parts of 128 bytes of an output tile's rows that can be on their way out at the same time; to add, all.
    """

    block_n: int = 256
    block_rows: int = 64
    num_stages: int = 3
    strip: int = 4
    out_slots: int = 4


def pick(out_dtype: jnp.dtype, *, adds: bool) -> Config:
    """The configuration; with float32 sums a tile of half the width has slots for all of it."""
    return Config(block_n=128, num_stages=5, strip=8) if adds and out_dtype.itemsize == 4 else Config()


def grouped_drhs(
    lhs: jax.Array,
    dout: jax.Array,
    begins: jax.Array,
    ends: jax.Array,
    onto: jax.Array | None,
    out_dtype: jnp.dtype,
    config: Config,
    *,
    num_blocks: int,
) -> jax.Array:
    """Runs the kernel.

    Args:
      lhs: [M, K], BF16 or FP16; M a multiple of ROW_ALIGNMENT, K of 8.
      dout: [M, N], the same dtype; N a multiple of 64.
      begins: int32 [G], first row of each group.
      ends: int32 [G], the row after its last.
      onto: [G, K, N], what the result is added to, or None.
      out_dtype: of the result, and of `onto`.
      config: see there.
      num_blocks: of the grid.

    Returns:
      [G, K, N].
    """
    num_groups, depth, columns = begins.shape[0], lhs.shape[1], dout.shape[1]
    row_tiles, column_tiles = pl.cdiv(depth, _WARPGROUPS * WGMMA_ROWS), pl.cdiv(columns, config.block_n)
    stages, block_rows = config.num_stages, config.block_rows
    lhs_chunk = SWIZZLE // lhs.dtype.itemsize
    assert lhs_chunk == WGMMA_ROWS, "one swizzled row of lhs is as wide as a wgmma is high"

    def body(lhs, dout, begins, ends, out, scratch: _Scratch):
        warpgroup = lax.axis_index("warpgroup")
        lhs_tiles, staging = Views.of(scratch.lhs), Views.of(scratch.out)
        tiles_each = row_tiles * column_tiles

        def rows_of(group) -> _Rows:
            return _Rows(begins[group], ends[group], block_rows)

        def group_of(tile):
            """The group of a tile; the last one, if there is no tile of this number."""
            return jnp.minimum(lax.div(tile, jnp.int32(tiles_each)), num_groups - 1)

        def place(tile):
            """Group, row tile and column tile of a tile."""
            local = lax.rem(tile, tiles_each)
            return group_of(tile), *place_in_strips(local, row_tiles, column_tiles, config.strip)

        def for_each_tile(function, carry):
            @plgpu.nd_loop((num_groups * tiles_each,), collective_axes="block", init_carry=carry)
            def last(info, carry):
                return function(info.index[0], carry)

            return last

        def load(tile, step):
            group, row_tile, column_tile = place(tile)
            group_rows = rows_of(group)

            def one_step(i, step):
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(scratch.empty.at[slot])

                rows = pl.ds(pl.multiple_of(group_rows.of_step(i), ROW_ALIGNMENT), block_rows)
                for w in range(_WARPGROUPS):
                    chunk = pl.ds(pl.multiple_of((row_tile * _WARPGROUPS + w) * WGMMA_ROWS, WGMMA_ROWS), WGMMA_ROWS)
                    plgpu.copy_gmem_to_smem(lhs.at[rows, chunk], lhs_tiles.copied.at[slot, w], scratch.full.at[slot])
                chunk = pl.ds(pl.multiple_of(column_tile * config.block_n, config.block_n), config.block_n)
                plgpu.copy_gmem_to_smem(dout.at[rows, chunk], scratch.dout.at[slot], scratch.full.at[slot])
                return step + 1

            return lax.fori_loop(0, group_rows.steps, one_step, step)

        def clear_other_rows(slot, first_row, group_rows: _Rows):
            """Zeros for the rows of a step that lie outside of the group: this warpgroup's share of them."""

            def clear(ref):
                row = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA) + first_row
                value = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
                is_own = (row >= group_rows.begin) & (row < group_rows.end)
                ref[...] = jnp.where(is_own, value, jnp.zeros_like(value))

            clear(lhs_tiles.tiled.at[slot, warpgroup])
            share = config.block_n // _WARPGROUPS
            for w in range(_WARPGROUPS):
                columns = slice(w * share, (w + 1) * share)
                pl.when(warpgroup == w)(functools.partial(clear, scratch.dout.at[slot, :, columns]))
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.cleared)
            plgpu.barrier_wait(scratch.cleared)

        def multiply(group_rows: _Rows, step, accumulator):
            """Sums up the steps of a tile, the first of which is number `step`."""

            def release(i):
                plgpu.barrier_arrive(scratch.empty.at[lax.rem(step + i, stages)])

            def one_step(i, carry):
                slot = lax.rem(step + i, stages)
                first_row = group_rows.of_step(i)
                plgpu.barrier_wait(scratch.full.at[slot])

                @pl.when((first_row < group_rows.begin) | (first_row + block_rows > group_rows.end))
                def _():
                    clear_other_rows(slot, first_row, group_rows)

                plgpu.wgmma(accumulator, lhs_tiles.tiled.at[slot, warpgroup].transpose((1, 0)), scratch.dout.at[slot])
                plgpu.wgmma_wait(1)
                pl.when(i > 0)(lambda: release(i - 1))
                return carry

            lax.fori_loop(0, group_rows.steps, one_step, None)
            total = accumulator[...]
            pl.when(group_rows.steps > 0)(lambda: release(group_rows.steps - 1))
            return total.astype(out_dtype)

        def compute(tile, carry):
            step, group_rows = carry
            group, row_tile, column_tile = place(tile)
            after = rows_of(group_of(tile + num_blocks))
            row = pl.multiple_of((row_tile * _WARPGROUPS + warpgroup) * WGMMA_ROWS, WGMMA_ROWS)
            column = pl.multiple_of(column_tile * config.block_n, config.block_n)
            goes_to = Tile(out.at[group], staging, scratch.fetched, warpgroup, row, column)
            if onto is not None:
                pl.when(group_rows.steps > 0)(goes_to.fetch)
            result = pl.run_scoped(
                functools.partial(multiply, group_rows, step), plgpu.ACC((WGMMA_ROWS, config.block_n), jnp.float32)
            )
            pl.when(onto is None or group_rows.steps > 0)(lambda: goes_to.store(result))
            return step + group_rows.steps, after

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            step = for_each_tile(load, jnp.int32(0))
            # No barrier is left half-way.
            first = jnp.maximum(step - stages, 0)
            lax.fori_loop(first, step, lambda i, _: plgpu.barrier_wait(scratch.empty.at[lax.rem(i, stages)]), None)

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            for_each_tile(compute, (jnp.int32(0), rows_of(group_of(lax.axis_index("block")))))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = functools.partial(
        plgpu.kernel,
        body,
        scratch_types=[_Scratch.describe(lhs.dtype, out_dtype, config, adds=onto is not None)],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul_drhs",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Wherever threads read what others of their warpgroup wrote, `commit_smem` stands between.
            unsafe_no_auto_barriers=True,
        ),
    )
    out_type = jax.ShapeDtypeStruct((num_groups, depth, columns), out_dtype)
    return run_onto(kernel, out_type, onto, lhs, dout, begins, ends)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a group, and the steps in which they are summed up (scalars on the device).

    The first step begins at the last row up to `begin` at which a copy can. It is taken last but one.

    Attributes:
      begin: the first row.
      end: the row after the last.
      block_rows: rows of a step.
    """

    begin: jax.Array
    end: jax.Array
    block_rows: int = dataclasses.field(metadata={"static": True})

    @property
    def _first(self) -> jax.Array:
        return lax.div(self.begin, ROW_ALIGNMENT) * ROW_ALIGNMENT

    @property
    def steps(self) -> jax.Array:
        """How many steps there are."""
        steps = lax.div(self.end - self._first + (self.block_rows - 1), self.block_rows)
        return jnp.where(self.end > self.begin, steps, 0)

    def of_step(self, i: jax.Array) -> jax.Array:
        """The first row of the step that is taken after `i` others."""
        first, last = self.steps - 2, self.steps - 1
        place = jnp.where(i < first, i + 1, jnp.where(i == first, 0, last))
        return self._first + place * self.block_rows


class _Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      lhs: ring [stages, warpgroups, block_rows, 64].
      dout: ring [stages, block_rows, block_n].
      out: staging of the result, see `Tile`.
      full: a ring buffer has been filled.
      empty: a ring buffer has been read.
      cleared: both math warpgroups have cleared their share of a step.
      fetched: what a warpgroup's tile is added to is in its slots; None where nothing is.
    """

    lhs: Any
    dout: Any
    out: Any
    full: Any
    empty: Any
    cleared: Any
    fetched: Any

    @classmethod
    def describe(cls, dtype: jnp.dtype, out_dtype: jnp.dtype, config: Config, *, adds: bool) -> "_Scratch":
        """The types to allocate."""
        stages, rows = config.num_stages, config.block_rows
        return cls(
            lhs=swizzled((stages, _WARPGROUPS, rows, WGMMA_ROWS), dtype),
            dout=swizzled((stages, rows, config.block_n), dtype, any_row=False),
            out=swizzled((_WARPGROUPS, config.out_slots, WGMMA_ROWS, SWIZZLE // out_dtype.itemsize), out_dtype),
            full=plgpu.Barrier(num_arrivals=_WARPGROUPS + 1, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=stages),
            cleared=plgpu.Barrier(num_arrivals=_WARPGROUPS),
            fetched=plgpu.Barrier(num_arrivals=config.out_slots, num_barriers=_WARPGROUPS) if adds else None,
        )
