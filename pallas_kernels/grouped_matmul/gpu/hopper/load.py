"""The loading half of the Hopper kernel: one warpgroup that streams operands from global into shared memory.

With S = 3 slots, a step takes the loader through two phases, of which the first is free for the first S steps:

    step     0         1         2         3                    4
    wait     -         -         -         empty[0] (step 0)    empty[1] (step 1)
    copy     slot 0    slot 1    slot 2    slot 0               slot 1
    then     full[0]   full[1]   full[2]   full[0]              full[1]          as the copies land, on their own

Copies are asynchronous: the loader only issues them, and the copy engine arrives at the barrier when the bytes are
there. `full` expects one arrival from each copy of a step (`loads` in `Scratch.describe`), `empty` one from each math
warpgroup.

Where the kernel starts before its predecessor has ended (`on_gpu.prefetch`), the weights of the first steps can come
before the wait. The sizes of groups may be the predecessor's, so the tile is guessed, and full[slot] cannot count these
copies yet: they have barriers of their own, and the loader passes them on.

    before the wait      weights of the guess -> slot k, then ahead[k]
    the tile is known    rows of the tile     -> slot k, then full[k]
    ahead[k]             a right guess: full[k] is told. A wrong one: weights of the tile -> slot k, then full[k]
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu.hopper.block import VECTOR_SLACK, VECTOR_START, Block, vector_shift
from pallas_kernels.grouped_matmul.gpu.tiles import Tile
from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS

_LHS_BOXES = (16, 32, 48, WGMMA_ROWS)
"""Rows of lhs that one copy can bring."""

_PREFETCHED_STEPS = 2
"""As many as the memory delivers while a block waits for the sizes of the groups."""


class Loader(Block):
    """Fills the ring."""

    def fetch_ahead(self, block):
        """Fetches the first weights of the block, by guess, while the kernel before this one may still run."""
        if self.config.prefetch.mode == "l2":
            self._prefetch(block, self.shape.steps_ahead)
        if self.scratch.ahead is None:
            return
        self.guess = self._guess(block)

        def one_step(k, _):
            self._copy_weights(self.guess, self.guess.group, 0, k, k, self.scratch.ahead.at[k])

        lax.fori_loop(0, self._ahead_if(self._is_guessed), one_step, None)

    def begin(self):
        """See `Block.begin`; where this kernel may be overlapped from its begin on, the next one may start now."""
        super().begin()
        if self.shape.launch_step == 0:
            self.config.prefetch.launch_dependents()

    def copy_sizes(self):
        """Starts the copy of the groups' sizes, where that is asked for; it completes sizes_full."""
        if self.shape.copied_sizes:
            plgpu.copy_gmem_to_smem(self.inputs.group_sizes, self.scratch.group_sizes, self.scratch.sizes_full)

    def prefetch(self, block):
        """Has the cache fetch the weights that a block needs first, while the sizes of the groups are on their way.

        Which these are is a guess. A wrong one costs a little bandwidth.
        """
        if self.config.prefetch.mode in ("none", "pdl"):  # else that has been done
            self._prefetch(block, min(_PREFETCHED_STEPS, self.shape.steps))

    def _prefetch(self, block, steps: int):
        if not self.shape.can_guess:
            return
        self.guess = self._guess(block)

        @pl.when(self._is_guessed)
        def _():
            for k in range(steps):
                for _, _, source in self._weights(self.guess, self.guess.group, 0, k):
                    plgpu.async_prefetch(source)

    def _guess(self, block) -> Tile:
        """The first tile of a block, as far as it can be told without the sizes: as if each group had one row tile."""
        zero, column_tiles = jnp.int32(0), jnp.int32(self.shape.walk.column_tiles)
        return Tile(lax.div(block, column_tiles), zero, zero, lax.rem(block, column_tiles))

    @property
    def _is_guessed(self):
        """Whether the block has a first tile, by the guess."""
        return self.guess.group < self.shape.num_groups

    def load(self, tile: Tile, state):
        """Streams the operands of a tile into the ring; state: (steps so far, tiles so far)."""
        step, tiles = state
        group, is_owned = self.weights_of(tile)
        for sweep in range(self.shape.sweeps):
            begin: Any = 0
            if sweep == 0 and self.scratch.ahead is not None:
                begin = self._take_ahead(tile, group, is_owned & (tiles == 0))
            num_steps = jnp.where(is_owned, self.shape.steps, 0)
            if self.stage == "comp":  # fill the ring once
                num_steps = jnp.minimum(num_steps, self.config.num_stages - step)

            def one_step(k, step, sweep=sweep):
                slot = self.slot(step)
                self._launch_at(step)

                # Wait until the step that used this slot before, S steps ago, has been read.
                @pl.when(step >= self.config.num_stages)
                def _():
                    plgpu.barrier_wait(self.scratch.empty.at[slot])

                # Start the copies of this step; they complete full[slot] by themselves.
                self._copy_rows(tile, k, slot)
                self._copy_weights(tile, group, sweep, k, slot, self.scratch.full.at[slot])
                self._copy_block_scales(tile, k, slot)
                return step + 1

            with jax.named_scope("load"):
                step = lax.fori_loop(begin, num_steps, one_step, step + begin)
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

    def finish(self):
        """Allows the next kernel to start if that has not been done: all that there is to load is under way."""
        if self.shape.launch_step:
            self.config.prefetch.launch_dependents()

    def drain(self, step, tiles):
        """Waits until all that was loaded has been read, so that no barrier is left half-way.

        `load` waits for a slot only when it wants to fill it again: the releases of the last S steps are still to come.
        What was guessed of a block that then had no tile is still to come too.
        """
        if self.scratch.ahead is not None:
            untaken = self._ahead_if(self._is_guessed & (tiles == 0))
            lax.fori_loop(0, untaken, lambda k, _: plgpu.barrier_wait(self.scratch.ahead.at[k]), None)
        if self.stage != "comp":
            first = jnp.maximum(step - self.config.num_stages, 0)
            lax.fori_loop(first, step, lambda i, _: plgpu.barrier_wait(self.scratch.empty.at[self.slot(i)]), None)
        if self.scratch.side_full is not None:
            pl.when(tiles > 0)(lambda: plgpu.barrier_wait(self.scratch.side_empty))

    def _take_ahead(self, tile: Tile, group, is_first):
        """Completes the steps whose weights were guessed, at the first tile of a block; returns how many these are."""
        full, ahead, steps = self.scratch.full, self.scratch.ahead, self._ahead_if(is_first)
        is_right = self._is_guessed & (group == self.guess.group) & (tile.column == self.guess.column)

        def copy_rows(k, _):
            self._copy_rows(tile, k, k)
            self._copy_block_scales(tile, k, k)

        def take_weights(k, _state):
            # The slot is written, with the right weights or others.
            pl.when(self._is_guessed)(lambda: plgpu.barrier_wait(ahead.at[k]))

            @pl.when(is_right)
            def _():
                for _copy in self._weights(tile, group, 0, k):
                    plgpu.barrier_arrive(full.at[k])

            pl.when(jnp.logical_not(is_right))(lambda: self._copy_weights(tile, group, 0, k, k, full.at[k]))

        # All rows first: the weights may still be on their way.
        with jax.named_scope("load"):
            lax.fori_loop(0, steps, copy_rows, None)
            lax.fori_loop(0, steps, take_weights, None)
        return steps

    def _ahead_if(self, condition):
        """Steps whose weights are guessed, or none."""
        # A loop whose length the compiler knows, it would unroll.
        return jnp.where(condition, self.shape.steps_ahead, 0)

    def _launch_at(self, step):
        """Allows the next kernel to start when `step` is the one from which on it may."""
        if launch_step := self.shape.launch_step:
            is_now = step == max(launch_step, self.shape.steps_ahead)
            pl.when(is_now)(self.config.prefetch.launch_dependents)

    def _copy_rows(self, tile: Tile, k, slot):
        for i in range(self.config.row_groups):
            self._copy_lhs(tile, i, self._depths(k), slot)

    def _copy_weights(self, tile: Tile, group, sweep: int, k, slot, barrier):
        for part, window, source in self._weights(tile, group, sweep, k):
            target = window
            if self.shape.k_major:
                target = slice(window * self.shape.wg_width, (window + 1) * self.shape.wg_width)
            plgpu.copy_gmem_to_smem(source, self.rhs_tiles.copied.at[slot, part, target], barrier)

    def _copy_block_scales(self, tile: Tile, k, slot):
        if self.epilogue.lhs_scale == "block":
            scales = self.inputs.lhs_scale.at[self.scale_step(k), self._scale_rows(tile)]
            plgpu.copy_gmem_to_smem(scales, self.scratch.lhs_scales.at[slot], self.scratch.full.at[slot])

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
