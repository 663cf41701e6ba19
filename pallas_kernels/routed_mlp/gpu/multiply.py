"""What the multiplying warpgroups do in either product: slots of the ring times rows, scaled depth by depth."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import Views
from pallas_kernels.on_gpu.wgmma import COLUMNS, WGMMA_ROWS, along_columns, along_rows, iota, vector_iota
from pallas_kernels.routed_mlp.gpu.scratch import Scratch
from pallas_kernels.routed_mlp.gpu.sizes import SLOT_ROWS, TOKENS, Between, Inputs, Sizes
from pallas_kernels.routed_mlp.gpu.walk import slot_of


class Multiplier:
    """One of the teams' warpgroups."""

    def __init__(self, inputs: Inputs, between: Between, y: Any, scratch: Scratch, sizes: Sizes, block: jax.Array):
        self.inputs, self.between, self.y, self.scratch, self.sizes = inputs, between, y, scratch, sizes
        self.block, self.team = block, lax.axis_index("warpgroup")
        self.ring = Views.of(scratch.ring).tiled

    def add_step(self, step, lhs, row_scale, scales, totals):
        """`totals` with the product of a slot, of which each depth is scaled by itself; then frees the slot.

        Args:
          step: whose slot it is.
          lhs: 64 rows, of the depths of the slot and more.
          row_scale: of these rows.
          scales: of the weights, one for each depth of the slot and each of the totals.
          totals: what lies side by side in the rows of a depth, each [64, columns]; rows of a tile belong to its depth.
        """
        slot = self._wait_full(step)
        if self.sizes.stage == "dma":
            self._free(step)
            return totals

        def multiply(accumulator):
            plgpu.wgmma(accumulator, lhs, self.ring.at[slot].transpose((1, 0)))
            return accumulator[...]

        product = pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, SLOT_ROWS), jnp.float32))
        self._free(step)
        part = self._own_depths(product, SLOT_ROWS // (self.sizes.config.columns * len(totals)))
        depth = lax.div(vector_iota(), jnp.int32(TOKENS))
        sums, first = [], 0
        for n, total in enumerate(totals):
            scale = row_scale * scales[0][n]
            for i, of_depth in enumerate(scales[1:], 1):
                scale = jnp.where(depth == i, row_scale * of_depth[n], scale)
            columns = total.shape[1]
            sums.append(total + part[:, first : first + columns] * along_rows(scale, columns))
            first += columns
        return sums

    def sum(self, step, steps: int, depths: int, lhs):
        """The steps so far, and the sum of the products of `steps` slots, their depths added up."""

        def multiply_all(accumulator):
            def one_step(k, step):
                slot = self._wait_full(step)
                if self.sizes.stage != "dma":
                    plgpu.wgmma(accumulator, lhs(k), self.ring.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(1)
                # The product of the step before is done.
                pl.when(k > 0)(lambda: self._free(step - 1))
                return step + 1

            end = lax.fori_loop(0, steps, one_step, step)
            total = accumulator[...]
            self._free(end - 1)
            return end, total

        end, total = pl.run_scoped(multiply_all, plgpu.ACC((WGMMA_ROWS, SLOT_ROWS), jnp.float32))
        return end, self.over_depths(self._own_depths(total, depths), depths)

    def _own_depths(self, product, depths: int):
        """Of a product of all depths with all depths, for the rows of each depth what they have with their own."""
        width = SLOT_ROWS // depths
        row_depth = lax.div(iota(0, width), jnp.int32(TOKENS))
        part = product[:, :width]
        for i in range(1, depths):
            part = jnp.where(row_depth == i, product[:, i * width : (i + 1) * width], part)
        return part

    def over_depths(self, total, depths: int):
        """The sum over the tiles of rows of the first `depths` depths, in the rows of the first tile."""
        sums = []
        for i in range(total.shape[1] // TOKENS):
            buffer = self.scratch.depth_sums.at[self.team, i % 2]
            buffer[:WGMMA_ROWS] = total[:, i * TOKENS : (i + 1) * TOKENS]
            plgpu.commit_smem()
            tiles = [
                plgpu.load(buffer.at[depth * TOKENS : depth * TOKENS + WGMMA_ROWS], layout=plgpu.Layout.WGMMA)
                for depth in range(depths)
            ]
            sums.append(functools.reduce(operator.add, tiles))
        return sums[0] if len(sums) == 1 else lax.concatenate(sums, 1)

    def side_of_columns(self, scale, bias, expert, firsts: list[Any], columns: int) -> list[Callable[[Any], Any]]:
        """For each range of columns, what finishes its sums: scales of columns and bias, which are read at once."""

        def finishing(first):
            window = pl.ds(first, columns)
            by_column = None
            if not self.sizes.by_block:
                by_column = plgpu.load(scale.at[self.group(scale, expert), window], layout=COLUMNS, optimized=False)
            added = None
            if bias is not None:
                added = plgpu.load(bias.at[expert, window], layout=COLUMNS, optimized=False).astype(jnp.float32)

            def finish(total):
                if by_column is not None:
                    total = total * along_columns(by_column)
                return total if added is None else total + along_columns(added)

            return finish

        return [finishing(first) for first in firsts]

    def group(self, scale, expert):
        """Where the scales of an expert lie."""
        return expert if scale.shape[0] > 1 else 0

    def _slot(self, step):
        return slot_of(self.team, step, self.sizes)

    def _wait_full(self, step):
        slot = self._slot(step)

        def wait():
            plgpu.barrier_wait(self.scratch.full.at[slot])

        if self.sizes.stage == "comp":
            pl.when(step < self.sizes.config.slots_of_team)(wait)
        else:
            wait()
        return slot

    def _free(self, step) -> None:
        if self.sizes.stage != "comp":
            plgpu.barrier_arrive(self.scratch.empty.at[self._slot(step)])
