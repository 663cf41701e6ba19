"""The gradient of the weights in 8 bits on Hopper: lhs[rows of g]ᵀ · dout[rows of g] of `Columns`, [G, K, N].

    out[g] = Σ over blocks b of g:  lhs.scale[b, :]ᵀ · dout.scale[b, :] ⊙ (lhs.values[:, b] · dout.values[:, b]ᵀ)
    floor in time = max(bytes of lhs, dout, out / HBM bandwidth, 2·P·K·N / peak), P the rows of the blocks in use

Built like `drhs`: one warpgroup loads, the others multiply, each 64 rows of an output tile. A step is a block of 128
rows. A group begins with a block of its own and zeros fill its last one, so no rows of others have to be cleared.

Both scales change from block to block. So each product of 64 x 128 x 128 has an accumulator of its own, and is added to
the total in float32, times the factor of its row and that of its column: a multiplication and a fused multiply-add an
element. What a product of 64 x 128 takes, in cycles (counted in the compiled code, not measured):

    tensor cores                                                                          256
    instructions of a scheduler: 64 + 64 for the elements, 18 loads of scales, 54 others  200
    shared memory, 128 bytes a cycle: operands 192, their copies 107, scales 72           370

A warpgroup that scales and adds leaves the tensor cores to the others. Of three, each needs them for a third of the
time, and may take twice as long as a product to wait for it, scale and add; while one stores its tile, two keep them
busy. Three are as many as the registers hold: 160 a thread, of which the total and the product take 64 each. Two have
room for 192 columns, but leave the tensor cores waiting while one stores; for few rows, whose sums in float32 wait for
memory, they are enough. Nobody tells them to take turns: the tensor
cores do one product after the other, so whoever is ahead gets further ahead.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.columns import BLOCK, Columns
from pallas_kernels.grouped_matmul.gpu.tiles import place_in_strips
from pallas_kernels.on_gpu.smem import SWIZZLE, Views, swizzled
from pallas_kernels.on_gpu.sums import Tile, run_onto
from pallas_kernels.on_gpu.wgmma import COLUMNS, ROWS, WGMMA_ROWS, zeros

_PIECE = 32
"""Columns of a total that are scaled and added at a time: the factors of more would not fit into the registers."""

_FEW_ROWS = 1024
"""Up to so many a group, sums in float32 are faster with two warpgroups and a longer ring: with 512 rows by 7 % on an
H200, where they are slower with 2048, by 5 %."""

_REGISTERS = {2: (232, 40), 3: (160, 32)}
"""Of each thread that multiplies, and of each that loads, by the number of math warpgroups."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      warpgroups: that multiply, 2 or 3, each 64 rows of an output tile.
      block_n: columns of an output tile, a multiple of 64, at most 256.
      num_stages: buffers in the ring.
      strip: column tiles visited for one row tile before the next.
      out_slots: parts of 128 bytes of an output tile's rows that can be on their way out at the same time; to add, all.
    """

    warpgroups: int = 3
    block_n: int = 128
    num_stages: int = 4
    strip: int = 8
    out_slots: int = 2

    @property
    def block_k(self) -> int:
        """Rows of an output tile."""
        return self.warpgroups * WGMMA_ROWS


def pick(out_dtype: jnp.dtype, rows_a_group: int, *, adds: bool) -> Config:
    """The configuration; with float32 sums a tile has slots for all of it. Rows count with what pads their blocks."""
    if not adds or out_dtype.itemsize < 4:
        return Config()
    return Config(warpgroups=2, out_slots=4) if rows_a_group <= _FEW_ROWS else Config(num_stages=3, out_slots=4)


def grouped_drhs(
    lhs: Columns,
    dout: Columns,
    first_blocks: jax.Array,
    onto: jax.Array | None,
    out_dtype: jnp.dtype,
    config: Config,
    *,
    num_blocks: int,
) -> jax.Array:
    """Runs the kernel.

    Args:
      lhs: of K features, a multiple of 8; e4m3 or e5m2.
      dout: of N features, a multiple of 8; e4m3 or e5m2.
      first_blocks: see `pallas_kernels.columns.first_blocks`.
      onto: [G, K, N], what the result is added to, or None.
      out_dtype: of the result, and of `onto`.
      config: see there.
      num_blocks: of the grid.

    Returns:
      [G, K, N].
    """
    num_groups, depth, columns = first_blocks.shape[0] - 1, lhs.values.shape[0], dout.values.shape[0]
    row_tiles, column_tiles = pl.cdiv(depth, config.block_k), pl.cdiv(columns, config.block_n)
    tiles_each = row_tiles * column_tiles
    num_tiles, stages, warpgroups = num_groups * tiles_each, config.num_stages, config.warpgroups
    pieces = [slice(i, i + _PIECE) for i in range(0, config.block_n, _PIECE)]

    def body(lhs, lhs_scale, dout, dout_scale, first_blocks, out, scratch: _Scratch):
        warpgroup = lax.axis_index("warpgroup")

        def place(tile):
            """Group, first row and first column of a tile."""
            group, local = lax.div(tile, tiles_each), lax.rem(tile, tiles_each)
            row_tile, column_tile = place_in_strips(local, row_tiles, column_tiles, config.strip)
            row = pl.multiple_of(row_tile * config.block_k, config.block_k)
            return group, row, pl.multiple_of(column_tile * config.block_n, config.block_n)

        def blocks_of(tile):
            """The first block of a tile's group and the one after its last."""
            group = lax.div(tile, tiles_each)
            return first_blocks[group], first_blocks[group + 1]

        def for_each_tile(function):
            """Calls `step = function(tile, its blocks, step)` for the tiles of this block; gives the number of steps.

            The blocks are asked for a tile ahead, so that nobody waits for them.
            """

            def one_tile(_, state):
                tile, blocks, step = state
                ahead = blocks_of(jnp.minimum(tile + num_blocks, num_tiles - 1))
                return tile + num_blocks, ahead, function(tile, blocks, step)

            first = lax.axis_index("block")
            count = lax.div(num_tiles + num_blocks - 1 - first, jnp.int32(num_blocks))
            state = first, blocks_of(jnp.minimum(first, num_tiles - 1)), jnp.int32(0)
            return lax.fori_loop(0, count, one_tile, state)[2]

        def load(tile, blocks, step):
            _, row, column = place(tile)
            rows, columns = pl.ds(row, config.block_k), pl.ds(column, config.block_n)

            def one_step(b, step):
                slot = lax.rem(step, stages)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(scratch.empty.at[slot])

                block = pl.ds(pl.multiple_of(b * BLOCK, BLOCK), BLOCK)
                for source, target in (
                    (lhs.at[rows, block], scratch.lhs),
                    (dout.at[columns, block], scratch.dout),
                    (lhs_scale.at[b, rows], scratch.lhs_scale),
                    (dout_scale.at[b, columns], scratch.dout_scale),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], scratch.full.at[slot])
                return step + 1

            first, end = blocks
            return lax.fori_loop(first, end, one_step, step)

        def release(step):
            plgpu.commit_smem()  # the copy engine may overwrite what has been read
            plgpu.barrier_arrive(scratch.empty.at[lax.rem(step, stages)])

        def add_product(step, is_first, totals):
            """`totals`, the pieces of this warpgroup's rows, with the product of a step; releases the step before.

            That is step − 1, counted on by the stages of the ring so that it is never negative.
            """
            slot = lax.rem(step, stages)
            mine = pl.ds(pl.multiple_of(warpgroup * WGMMA_ROWS, WGMMA_ROWS), WGMMA_ROWS)
            shape = WGMMA_ROWS, _PIECE

            def column_scale(piece):
                return plgpu.load(scratch.dout_scale.at[slot, piece], layout=COLUMNS)

            def multiply(accumulator):
                plgpu.wgmma(accumulator, scratch.lhs.at[slot, mine], scratch.dout.at[slot].transpose((1, 0)))
                # While it runs: what takes time, and what is needed first.
                pl.when(jnp.logical_not(is_first))(lambda: release(step + stages - 1))
                row_scale = plgpu.load(scratch.lhs_scale.at[slot, mine], layout=ROWS)
                first = column_scale(pieces[0])
                return plgpu.wgmma_accumulator_load(accumulator, wait_n=0), row_scale, first

            plgpu.barrier_wait(scratch.full.at[slot])
            product, row_scale, first = pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, config.block_n), jnp.float32))
            by_row = lax.broadcast_in_dim(row_scale, shape, (0,))
            for i, piece in enumerate(pieces):
                by_column = lax.broadcast_in_dim(column_scale(piece) if i else first, shape, (1,))
                totals[i] += product[:, piece] * (by_row * by_column)
            return totals

        def compute(tile, blocks, step):
            group, row, column = place(tile)
            first, end = blocks
            row += warpgroup * WGMMA_ROWS
            goes_to = Tile(out.at[group], Views.of(scratch.out), scratch.fetched, warpgroup, row, column)
            if onto is not None:
                pl.when(end > first)(goes_to.fetch)

            def one_step(block, state):
                step, totals = state
                return step + 1, add_product(step, block == first, list(totals))

            nothing = zeros(_PIECE, jnp.float32)
            step, totals = lax.fori_loop(first, end, one_step, (step, [nothing] * len(pieces)))
            pl.when(end > first)(lambda: release(step + stages - 1))
            result = lax.concatenate(totals, 1).astype(out_dtype)
            pl.when(onto is None or end > first)(lambda: goes_to.store(result))
            return step

        math_registers, load_registers = _REGISTERS[warpgroups]

        @pl.when(warpgroup == warpgroups)
        def _():
            plgpu.set_max_registers(load_registers, action="decrease")
            step = for_each_tile(load)
            # No barrier is left half-way.
            first = jnp.maximum(step - stages, 0)
            lax.fori_loop(first, step, lambda i, _: plgpu.barrier_wait(scratch.empty.at[lax.rem(i, stages)]), None)

        @pl.when(warpgroup < warpgroups)
        def _():
            plgpu.set_max_registers(math_registers, action="increase")
            for_each_tile(compute)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = functools.partial(
        plgpu.kernel,
        body,
        scratch_types=[_Scratch.describe(lhs.dtype, dout.dtype, out_dtype, config, adds=onto is not None)],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="grouped_matmul_drhs_8_bits",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Wherever threads read what others of their warpgroup wrote, `commit_smem` stands between.
            unsafe_no_auto_barriers=True,
        ),
    )
    out_type = jax.ShapeDtypeStruct((num_groups, depth, columns), out_dtype)
    return run_onto(kernel, out_type, onto, lhs.values, lhs.scale, dout.values, dout.scale, first_blocks)


class _Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      lhs: ring [stages, block_k, 128].
      dout: ring [stages, block_n, 128].
      lhs_scale: ring [stages, block_k].
      dout_scale: ring [stages, block_n].
      out: staging of the result, see `Tile`.
      full: a ring buffer has been filled.
      empty: a ring buffer has been read.
      fetched: what a warpgroup's tile is added to is in its slots; None where nothing is.
    """

    lhs: Any
    dout: Any
    lhs_scale: Any
    dout_scale: Any
    out: Any
    full: Any
    empty: Any
    fetched: Any

    @classmethod
    def describe(cls, lhs: jnp.dtype, dout: jnp.dtype, out: jnp.dtype, config: Config, *, adds: bool) -> "_Scratch":
        """The types to allocate."""
        stages = config.num_stages
        return cls(
            lhs=swizzled((stages, config.block_k, BLOCK), lhs, any_row=False),
            dout=swizzled((stages, config.block_n, BLOCK), dout, any_row=False),
            lhs_scale=plgpu.SMEM((stages, config.block_k), jnp.float32),
            dout_scale=plgpu.SMEM((stages, config.block_n), jnp.float32),
            out=swizzled((config.warpgroups, config.out_slots, WGMMA_ROWS, SWIZZLE // out.itemsize), out),
            full=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=stages),
            fetched=plgpu.Barrier(num_arrivals=config.out_slots, num_barriers=config.warpgroups) if adds else None,
        )
