"""The loading half of the Hopper kernel: one warpgroup that streams operands from global into shared memory.

With S = 3 slots, a step takes the loader through two phases, of which the first is free for the first S steps:

    step     0         1         2         3                    4
    wait     -         -         -         empty[0] (step 0)    empty[1] (step 1)
    copy     slot 0    slot 1    slot 2    slot 0               slot 1
    then     full[0]   full[1]   full[2]   full[0]              full[1]          as the copies land, on their own

Copies are asynchronous: the loader only issues them, and the copy engine arrives at the barrier when the bytes are
there. `full` expects one arrival from each copy of a step (`loads` in `Scratch.describe`), `empty` one from each math
warpgroup.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu.hopper.block import VECTOR_SLACK, VECTOR_START, Block, vector_shift
from pallas_kernels.grouped_matmul.gpu.hopper.problem import WGMMA_ROWS
from pallas_kernels.grouped_matmul.gpu.tiles import Tile

_LHS_BOXES = (16, 32, 48, WGMMA_ROWS)
"""Rows of lhs that one copy can bring."""

_PREFETCHED_STEPS = 2
"""As many as the memory delivers while a block waits for the sizes of the groups."""


class Loader(Block):
    """Fills the ring."""

    def copy_sizes(self):
        """Starts the copy of the groups' sizes, where that is asked for; it completes sizes_full."""
        if self.shape.copied_sizes:
            plgpu.copy_gmem_to_smem(self.inputs.group_sizes, self.scratch.group_sizes, self.scratch.sizes_full)

    def prefetch(self, block):
        """Has the cache fetch the weights that a block needs first, while the sizes of the groups are on their way.

        Which these are is a guess: right if each group has one row tile. A wrong one costs a little bandwidth.
        """
        shape, walk = self.shape, self.shape.walk
        if walk.num_groups != shape.num_groups or walk.num_rows > walk.num_groups * walk.block_m:
            return
        zero = jnp.int32(0)
        group, column = lax.div(block, jnp.int32(walk.column_tiles)), lax.rem(block, jnp.int32(walk.column_tiles))

        @pl.when(group < shape.num_groups)
        def _():
            for k in range(min(_PREFETCHED_STEPS, shape.steps)):
                for _, _, source in self._weights(Tile(group, zero, zero, column), group, 0, k):
                    plgpu.async_prefetch(source)

    def load(self, tile: Tile, state):
        """Streams the operands of a tile into the ring; state: (steps so far, tiles so far)."""
        step, tiles = state
        group, is_owned = self.weights_of(tile)
        for sweep in range(self.shape.sweeps):
            num_steps = jnp.where(is_owned, self.shape.steps, 0)
            if self.stage == "comp":  # fill the ring once
                num_steps = jnp.minimum(num_steps, self.config.num_stages - step)

            def one_step(k, step, sweep=sweep):
                slot = self.slot(step)

                # Wait until the step that used this slot before, S steps ago, has been read.
                @pl.when(step >= self.config.num_stages)
                def _():
                    plgpu.barrier_wait(self.scratch.empty.at[slot])

                # Start the copies of this step; they complete full[slot] by themselves.
                self._copy_operands(tile, group, sweep, k, slot)
                return step + 1

            with jax.named_scope("load"):
                step = lax.fori_loop(0, num_steps, one_step, step)
            # After the first sweep: that is when they are needed, and the tile before has done with its own by then.
            if sweep == 0 and self.scratch.side_full is not None:

                @pl.when(is_owned)
                def _():
                    # Wait until the tile before has been finished with its scales and bias.
                    @pl.when(tiles > 0)
                    def _():
                        plgpu.barrier_wait(self.scratch.side_empty)

                    # Start the copies of this tile's; they complete side_full.
                    self._copy_sides(tile, group)

        return step, tiles + is_owned.astype(jnp.int32)

    def drain(self, step, tiles):
        """Waits until all that was loaded has been read, so that no barrier is left half-way.

        `load` waits for a slot only when it wants to fill it again: the releases of the last S steps are still to come.
        """
        if self.stage != "comp":
            first = jnp.maximum(step - self.config.num_stages, 0)
            lax.fori_loop(first, step, lambda i, _: plgpu.barrier_wait(self.scratch.empty.at[self.slot(i)]), None)
        if self.scratch.side_full is not None:
            pl.when(tiles > 0)(lambda: plgpu.barrier_wait(self.scratch.side_empty))

    def _copy_operands(self, tile: Tile, group, sweep: int, k, slot):
        shape, full = self.shape, self.scratch.full.at[slot]
        for i in range(self.config.row_groups):
            self._copy_lhs(tile, i, self._depths(k), slot)
        for part, window, source in self._weights(tile, group, sweep, k):
            target = window
            if shape.k_major:
                target = slice(window * shape.wg_width, (window + 1) * shape.wg_width)
            plgpu.copy_gmem_to_smem(source, self.rhs_tiles.copied.at[slot, part, target], full)
        if self.epilogue.lhs_scale == "block":
            scales = self.inputs.lhs_scale.at[self.scale_step(k), self._scale_rows(tile)]
            plgpu.copy_gmem_to_smem(scales, self.scratch.lhs_scales.at[slot], full)

    def _copy_lhs(self, tile: Tile, row_group: int, depths, slot):
        """Copies the rows of one row group with the smallest box that holds them."""
        first = row_group * WGMMA_ROWS
        rows = jnp.clip(tile.rows - first, 1, WGMMA_ROWS)
        for too_few, box in itertools.pairwise((0, *_LHS_BOXES)):

            @pl.when((rows > too_few) & (rows <= box))
            def _(box=box):
                source = self.inputs.lhs.at[pl.ds(tile.row + first, box), depths]
                target = self.lhs_tiles.copied.at[slot, row_group, :box]
                plgpu.copy_gmem_to_smem(source, target, self.scratch.full.at[slot])

    def _copy_sides(self, tile: Tile, group):
        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=self.scratch.side_full)
        if self.epilogue.lhs_scale == "row":
            copy(self.inputs.lhs_scale.at[self._scale_rows(tile)], self.scratch.row_scale)
        width = self.shape.width
        for window in range(self.shape.windows):
            column = pl.multiple_of(tile.column * width, width)
            columns = pl.ds(column + window * self.shape.out_columns, width)
            target = slice(window * width, (window + 1) * width)
            if self.epilogue.rhs_scale == "channel":
                copy(self.inputs.rhs_scale.at[self.scale_group(group), columns], self.scratch.column_scale.at[target])
            if self.inputs.bias is not None:
                copy(self.inputs.bias.at[group, columns], self.scratch.bias.at[target])

    def _weights(self, tile: Tile, group, sweep: int, k):
        """What a step reads of rhs: (column group, window, part of rhs) for each copy."""
        shape, rhs = self.shape, self.inputs.rhs
        for part in range(self.config.column_groups):
            column = pl.multiple_of(self.column(tile, sweep, part), shape.wg_width)
            for window in range(shape.windows):
                columns = pl.ds(column + window * shape.out_columns, shape.wg_width)
                places = (columns, self._depths(k)) if shape.k_major else (self._depths(k), columns)
                yield part, window, rhs.at[group, *places]

    def _depths(self, k):
        return pl.ds(pl.multiple_of(k * self.shape.block_k, self.shape.block_k), self.shape.block_k)

    def _scale_rows(self, tile: Tile):
        first = pl.multiple_of(tile.row - vector_shift(tile), VECTOR_START)
        return pl.ds(first, self.config.block_m + VECTOR_SLACK)
