"""The product on Hopper: tiles of the result for each multiprocessor, or a tile for several of them that share its K.

Its floors are `pallas_kernels.cost.dense_matmul_cost`. Beside its steps a block takes about 2 µs: its start, its first
copies, its last store. So all tiles should be multiplied at once, and by all multiprocessors. They have 128 rows, or 64
where so many more still make one wave. Where tiles of 64 by 64 are too few for that, each gets several blocks, a
cluster, which multiply parts of K. Each sends the others, into their shared memory, what it has of the columns that
they finish, and adds up what it gets of its own:

        K                                   a block of the first part          a block of the second part
     ┌─────┬─────┐   ┌─────┐                    ┌─────┬─────┐                      ┌─────┬─────┐
     │first│     │   │first│ K                  │ sum │  ───┼────────────────────► │     │ sum │
     │     │     │ · ├─────┤             =      │     │ ◄───┼────────────────────  │     │     │
     └─────┴─────┘   │     │                    └─────┴─────┘                      └─────┴─────┘
                     └─────┘                     finishes the left columns          finishes the right ones

What blocks read of the same rows or columns they read each for itself. Copies that a cluster shares gained nothing: the
cache gives 18 TB/s where neighbours read the same, and an H200 has room for 30 clusters of four blocks, not for 33.

In a block one warpgroup loads, and one or two multiply, each its 64 rows of the tile. Copies of an lhs of fewer
rows are no higher than it is: the copy engine fills what lies past its end with zeros, and with copies of 64 rows a
product of 8, 2048 by 2 × 4096, took 13.3 µs for 10.1. The last tiles of more rows, and residuals, are still filled.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import Activation, gated
from pallas_kernels.dense_matmul.gpu.problem import BLOCK_K
from pallas_kernels.dense_matmul.gpu.sizes import Sizes
from pallas_kernels.on_gpu.cluster_sum import ClusterSum
from pallas_kernels.on_gpu.smem import Views, swizzled
from pallas_kernels.on_gpu.sums import Tile
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS

_PART = "part"
"""The axis of a cluster."""

LimitedActivation = tuple[Activation, float | None]
"""An activation, and the clamp before it."""


def dense_product(
    lhs: jax.Array,
    rhs: jax.Array,
    residual: jax.Array | None,
    activation: LimitedActivation | None,
    sizes: Sizes,
) -> jax.Array:
    """Runs the kernel.

    Args:
      lhs: [M, K].
      rhs: [K, N], or [K, 2N] for a gated product, gate and then up.
      residual: [M, N], or None.
      activation: of a gated product; None for a plain one.
      sizes: of all that.

    Returns:
      [M, N].
    """
    problem, config = sizes.problem, sizes.config
    warpgroups = config.warpgroups

    def body(lhs, rhs, residual, out, scratch):
        warpgroup = lax.axis_index("warpgroup")
        block = _Block(lhs, rhs, scratch, sizes)

        @pl.when(warpgroup == warpgroups)
        def _():
            if warpgroups > 1:  # threads of two in all have up to 255 as it is
                plgpu.set_max_registers(40, action="decrease")
            block.load()

        @pl.when(warpgroup < warpgroups)
        def _():
            if warpgroups > 1:
                plgpu.set_max_registers(232, action="increase")
            row = pl.multiple_of(block.row + warpgroup * WGMMA_ROWS, WGMMA_ROWS)
            column = block.column + block.part * sizes.finished_columns
            tile = Tile(out, Views.of(scratch.out), scratch.fetched, warpgroup, row, column, added_to=residual)
            if problem.adds:
                tile.fetch()
            total = block.multiply(warpgroup)
            if config.parts > 1:
                total = ClusterSum(scratch.received, scratch.landed, _PART)(_shares(total, sizes), warpgroup)
            if activation is not None:
                gate, up = total[:, : sizes.finished_columns], total[:, sizes.finished_columns :]
                total = gated(gate, up, *activation)
            tile.store(total)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((problem.rows, problem.columns), problem.dtype),
        scratch_types=[_Scratch.describe(sizes)],
        grid=sizes.grid,
        grid_names=("column", "row"),
        cluster=(config.parts,),
        cluster_names=(_PART,),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="dense_matmul" if activation is None else "dense_gate_up",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            # Wherever threads read what others of their warpgroup wrote, `commit_smem` stands between.
            unsafe_no_auto_barriers=True,
        ),
    )
    return kernel(lhs, rhs, residual)


def _shares(total: jax.Array, sizes: Sizes) -> list[jax.Array]:
    """What each part finishes of a tile [64, block_n]: its columns, of gate and of up side by side."""
    shares = []
    for share in range(sizes.config.parts):
        first_columns = range(share * sizes.finished_columns, sizes.config.block_n, sizes.tile_columns)
        windows = [total[:, first : first + sizes.finished_columns] for first in first_columns]
        shares.append(windows[0] if len(windows) == 1 else lax.concatenate(windows, 1))
    return shares


class _Block:
    """A block: its tile and its part of K."""

    def __init__(self, lhs: Any, rhs: Any, scratch: "_Scratch", sizes: Sizes):
        self.lhs, self.rhs, self.scratch, self.sizes = lhs, rhs, scratch, sizes
        self.lhs_tiles = Views.of(scratch.lhs)
        self.row = lax.axis_index("row") * sizes.config.block_m
        self.column = lax.axis_index("column") * sizes.tile_columns
        self.part = lax.axis_index(_PART)
        parts = jnp.int32(sizes.config.parts)
        self.first, end = (lax.div((self.part + i) * sizes.problem.steps, parts) for i in range(2))
        self.steps = end - self.first

    def load(self) -> None:
        """Fills the ring, step by step, each buffer when it has been read."""
        sizes, scratch = self.sizes, self.scratch

        def one_step(i, carry):
            slot = self._slot(i)
            pl.when(i >= sizes.config.num_stages)(lambda: plgpu.barrier_wait(scratch.empty.at[slot]))
            copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=scratch.full.at[slot])
            depths = pl.ds(pl.multiple_of((self.first + i) * BLOCK_K, BLOCK_K), BLOCK_K)
            for w in range(sizes.config.warpgroups):
                rows = pl.ds(pl.multiple_of(self.row + w * WGMMA_ROWS, WGMMA_ROWS), sizes.lhs_copy_rows)
                copy(self.lhs.at[rows, depths], self.lhs_tiles.copied.at[slot, w, pl.ds(0, sizes.lhs_copy_rows)])
            for window in range(sizes.problem.windows):
                columns = pl.ds(window * sizes.problem.columns + self.column, sizes.tile_columns)
                copy(self.rhs.at[depths, columns], scratch.rhs.at[slot, window])
            return carry

        lax.fori_loop(0, self.steps, one_step, None)
        # Until all has been read: a block must not end with a barrier half-way.
        last = jnp.maximum(self.steps - sizes.config.num_stages, 0)
        lax.fori_loop(last, self.steps, lambda i, _: plgpu.barrier_wait(scratch.empty.at[self._slot(i)]), None)

    def multiply(self, warpgroup) -> jax.Array:
        """The sum of a warpgroup's products [64, block_n], float32."""
        sizes, scratch = self.sizes, self.scratch

        def release(i):
            plgpu.barrier_arrive(scratch.empty.at[self._slot(i)])

        def sum_up(accumulator):
            def one_step(i, carry):
                slot = self._slot(i)
                plgpu.barrier_wait(scratch.full.at[slot])
                for window in range(sizes.problem.windows):
                    its = accumulator
                    if sizes.problem.windows > 1:
                        its = accumulator.at[:, pl.ds(window * sizes.tile_columns, sizes.tile_columns)]
                    plgpu.wgmma(its, self.lhs_tiles.tiled.at[slot, warpgroup], scratch.rhs.at[slot, window])
                # At most the product that was started last still runs: what the one before it read may be overwritten.
                plgpu.wgmma_wait(1)
                pl.when(i > 0)(lambda: release(i - 1))
                return carry

            lax.fori_loop(0, self.steps, one_step, None)
            total = accumulator[...]
            release(self.steps - 1)
            return total

        return pl.run_scoped(sum_up, plgpu.ACC((WGMMA_ROWS, sizes.config.block_n), jnp.float32))

    def _slot(self, step):
        return lax.rem(step, jnp.int32(self.sizes.config.num_stages))


class _Scratch(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      lhs: ring [stages, warpgroups, 64, 64].
      rhs: ring [stages, windows, 64, tile_columns].
      out: what a tile is added to, then the tile; see `Tile`.
      full: a ring buffer has been filled.
      empty: a ring buffer has been read.
      fetched: see `Tile`; None where nothing is added.
      received: see `ClusterSum`; None where K is whole.
      landed: likewise.
    """

    lhs: Any
    rhs: Any
    out: Any
    full: Any
    empty: Any
    fetched: Any
    received: Any
    landed: Any

    @classmethod
    def describe(cls, sizes: Sizes) -> "_Scratch":
        """The types to allocate."""
        problem, config, stages = sizes.problem, sizes.config, sizes.config.num_stages
        warpgroups = config.warpgroups
        received = landed = None
        if config.parts > 1:
            columns = problem.windows * sizes.finished_columns
            received, landed = ClusterSum.scratch(warpgroups, config.parts, columns)
        return cls(
            lhs=swizzled((stages, warpgroups, WGMMA_ROWS, BLOCK_K), problem.dtype),
            rhs=swizzled((stages, problem.windows, BLOCK_K, sizes.tile_columns), problem.dtype, any_row=False),
            out=swizzled((warpgroups, sizes.out_slots, WGMMA_ROWS, sizes.out_chunk), problem.dtype),
            full=plgpu.Barrier(num_arrivals=warpgroups + problem.windows, num_barriers=stages),
            empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            fetched=plgpu.Barrier(num_arrivals=sizes.out_slots, num_barriers=warpgroups) if problem.adds else None,
            received=received,
            landed=landed,
        )
