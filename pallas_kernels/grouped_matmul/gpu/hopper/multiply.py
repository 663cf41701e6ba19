"""The multiplying half of the Hopper kernel: warpgroups that empty the ring, finish tiles and store them.

`wgmma` is asynchronous and reads its operands from shared memory while it runs. A slot can therefore be released only
when its product is done, which is one step later, so that the tensor cores always have the next product in hand:

    step        s                       s + 1                       s + 2
    wait        full[s]                 full[s + 1]                 full[s + 2]          slots are modulo S
    start       product s               product s + 1               product s + 2
    wait        product s - 1           product s                   product s + 1
    release     empty[s - 1]            empty[s]                    empty[s + 1]

After the last step of a tile the accumulators are read, which waits for the last product, and its slot is released.
With block scales every product has an accumulator of its own, which is scaled and added to the total at the place of
"release" (see `_sum_by_block`). Without them, one accumulator sums up the whole of K. What lies between the end of a
product and the start of the next one should be no more than these sums, as the other warpgroup has the tensor cores for
as long only: the fence after the reading of scales, which waits for all warps, comes while the product runs. An
accumulator that is made right before its product is not cleared by instructions of its own.

A tile ends with `_finish` (side_full -> scales, bias, activation -> side_empty) and `store_rows`, which goes through
staging buffers of the warpgroup's own, and waits for its own stores instead of at a barrier.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import gated
from pallas_kernels.grouped_matmul.gpu.hopper.block import Block, vector_shift
from pallas_kernels.grouped_matmul.gpu.tiles import Tile
from pallas_kernels.on_gpu.smem import Views
from pallas_kernels.on_gpu.store import store_rows, store_vector
from pallas_kernels.on_gpu.wgmma import COLUMNS, ROWS, WGMMA_ROWS
from pallas_kernels.quantize import SCALE_BLOCK, clipped_to, finite_scale

_STEPS_AT_ONCE = 4
"""Steps with block scales between which the tensor cores do not wait."""

_LATER_STEPS_AT_ONCE = 1
"""The same after the first sweep, whose result is in the registers as well: two more accumulators would not fit."""


class Multiplier(Block):
    """One math warpgroup: its rows or columns of every tile."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.begin()  # there is nothing to do earlier
        self.warpgroup = lax.axis_index("warpgroup")
        splits_rows = self.config.column_groups == 1
        self.row_group = self.warpgroup if splits_rows else 0
        self.column_group = 0 if splits_rows else self.warpgroup
        self.staging = Views.of(self.scratch.out)

    def compute(self, tile: Tile, step):
        """Multiplies, finishes and stores a tile; `step` counts the steps so far."""
        shape = self.shape
        group, is_owned = self.weights_of(tile)
        num_steps = jnp.where(is_owned, shape.steps, 0)  # of a sweep
        row = tile.row + self.row_group * WGMMA_ROWS
        rows = jnp.clip(tile.rows - self.row_group * WGMMA_ROWS, 0, WGMMA_ROWS)
        by_block = "block" in (self.epilogue.lhs_scale, self.epilogue.rhs_scale)
        # With block scales the registers do not suffice for another way through the ring.
        can_idle = self.config.row_groups > 1 and not by_block
        works: Any = is_owned & (rows > 0) if can_idle else is_owned
        if self.stage == "comp":  # in a way that the compiler does not see: nothing is stored
            rows = jnp.where(step < 0, rows, 0)

        def store(result):
            scale = None
            if self.epilogue.requantizes:
                result, scale = self._to_fp8(result)
            column = self.column(tile, 0, self.column_group)
            store_rows(self.outs[0], self.staging, self.warpgroup, result, row=row, rows=rows, column=column)
            if scale is not None:
                column_rows = jnp.where(jnp.equal(self.column_group, 0), rows, 0)
                buffer = self.scratch.out_scales.at[self.warpgroup]
                store_vector(self.outs[1].at[tile.column], buffer, scale, row, column_rows)

        @pl.when(works)
        def _():
            results = []
            for sweep in range(shape.sweeps):
                with jax.named_scope("multiply"):
                    sum_up = self._sum_by_block if by_block else self._sum
                    total = sum_up(tile, group, sweep, num_steps, step + sweep * num_steps)
                with jax.named_scope("finish"):
                    results.append(self._finish(total, tile, group, sweep))
            with jax.named_scope("store"):
                store(results[0] if len(results) == 1 else lax.concatenate(results, 1))

        if can_idle:
            idles = is_owned & jnp.logical_not(works)
            pl.when(idles)(lambda: self._pass(step, shape.sweeps * num_steps))

        @pl.when(jnp.logical_not(is_owned))
        def _():
            zeros = jnp.zeros((WGMMA_ROWS, shape.sweeps * shape.wg_width), self._finished_dtype)
            store(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))

        return step + shape.sweeps * num_steps

    def _pass(self, step, num_steps):
        """Lets a tile go by that has no rows for this warpgroup: the tensor cores are the other one's."""

        def one_step(_, step):
            # The barriers count on every warpgroup: each step is waited for and released, unread.
            self._wait_full(step)
            self._release(self.slot(step))
            return step + 1

        lax.fori_loop(0, num_steps, one_step, step)
        if self.scratch.side_full is not None:
            plgpu.barrier_wait(self.scratch.side_full)
            plgpu.barrier_arrive(self.scratch.side_empty)

    def _sum(self, tile: Tile, group, sweep: int, num_steps, step):
        """The sum over K of this warpgroup's products: [64, wg_columns] in float32."""
        del tile, group, sweep
        last_slot = self.config.num_stages - 1

        def multiply_all(accumulator):
            def one_step(k, step):
                # The operands of this step have landed.
                self._wait_full(step)
                # Start its product.
                self._multiply(accumulator, self.slot(step))
                # At most the product that was started last is still running.
                plgpu.wgmma_wait(1)

                # So the slot of the step before (step - 1 modulo S) may be filled again.
                @pl.when(k > 0)
                def _():
                    self._release(self.slot(step + last_slot))

                return step + 1

            lax.fori_loop(0, num_steps, one_step, step)
            total = accumulator[...]  # waits for the last product
            self._release(self.slot(step + num_steps + last_slot))
            return total

        return pl.run_scoped(multiply_all, plgpu.ACC((WGMMA_ROWS, self.shape.wg_columns), jnp.float32))

    def _sum_by_block(self, tile: Tile, group, sweep: int, num_steps, step):
        """The same, with the scales of each 128 of K applied to their part of the sum.

        Where the registers hold two parts they are both in flight: the tensor cores multiply one while the one before
        it is scaled and added.
        """
        shape = self.shape
        width = math.gcd(SCALE_BLOCK, shape.wg_width)  # of columns that surely share the scale of the weights
        pieces = [slice(i, i + width) for i in range(0, shape.wg_columns, width)]
        at_once = _LATER_STEPS_AT_ONCE if sweep else _STEPS_AT_ONCE
        if shape.wg_columns > SCALE_BLOCK:
            at_once = 1
        weight_scale = functools.partial(self._weight_scale, self.column(tile, sweep, self.column_group))

        def some_steps(first, count, totals):
            scales = [[weight_scale(group, first + i, p.start) for p in pieces] for i in range(count)]

            def multiply_from(i, before, sums):
                """Steps i to `count`; the product of step i - 1 may still run: `before` is what `add` takes of it."""
                if i == count:
                    return add(i - 1, before, 0, sums)

                def multiply(accumulator):
                    # Start the product of step i, and read its scales meanwhile.
                    self._multiply(accumulator, self.slot(step + first + i))
                    mine = accumulator, self._row_scale(tile, self.slot(step + first + i))
                    plgpu.commit_smem()  # the copy engine may overwrite what has been read
                    # While it runs, scale and add the product before it, and go on.
                    return multiply_from(i + 1, mine, sums if before is None else add(i - 1, before, 1, sums))

                # The operands of step i have landed.
                self._wait_full(step + first + i)
                return pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, shape.wg_columns), jnp.float32))

            def add(i, product, in_flight, sums):
                """`sums` with the product of step i, once at most `in_flight` products still run; releases its slot."""
                accumulator, row_scale = product
                part = plgpu.wgmma_accumulator_load(accumulator, wait_n=in_flight)
                self._release(self.slot(step + first + i))
                factors = [_along_rows(row_scale * scale, (WGMMA_ROWS, width)) for scale in scales[i]]
                return [total + part[:, p] * factor for total, p, factor in zip(sums, pieces, factors, strict=True)]

            return multiply_from(0, None, totals)

        zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, width), jnp.float32), plgpu.Layout.WGMMA)
        totals, rounds = [zeros] * len(pieces), lax.div(num_steps, jnp.int32(at_once))
        totals = lax.fori_loop(0, rounds, lambda i, t: some_steps(i * at_once, at_once, t), totals)
        if at_once > 1:
            totals = lax.fori_loop(rounds * at_once, num_steps, lambda k, t: some_steps(k, 1, t), totals)
        return totals[0] if len(pieces) == 1 else lax.concatenate(totals, 1)

    def _row_scale(self, tile: Tile, slot) -> Any:
        """The block scales of this warpgroup's rows in a buffer of the ring."""
        if self.epilogue.lhs_scale != "block":
            return 1.0
        return plgpu.load(self.scratch.lhs_scales.at[slot, self._vector_rows(tile)], layout=ROWS)

    def _multiply(self, accumulator, slot):
        if self.stage == "dma":
            return
        lhs = self.lhs_tiles.tiled.at[slot, self.row_group]
        if self.shape.k_major:
            rhs = self.rhs_tiles.tiled.at[slot, self.column_group]
            plgpu.wgmma(accumulator, lhs, rhs.transpose((1, 0)))
            return
        for window in range(self.shape.windows):
            columns = slice(window * self.shape.wg_width, (window + 1) * self.shape.wg_width)
            rhs = self.rhs_tiles.tiled.at[slot, self.column_group, window]
            plgpu.wgmma(accumulator.at[:, columns], lhs, rhs)

    def _weight_scale(self, column, group, k, first: int) -> Any:
        """The scale at step k of the accumulators' columns from `first` on, which begin at `column` of the result."""
        if self.epilogue.rhs_scale != "block":
            return 1.0
        shape, scales = self.shape, self.inputs.rhs_scale
        window, offset = divmod(first, shape.wg_width)
        block = lax.div(column + offset + window * shape.out_columns, jnp.int32(SCALE_BLOCK))
        return scales[self.scale_group(group), jnp.minimum(block, scales.shape[1] - 1), self.scale_step(k)]

    # ---- finishing ---------------------------------------------------------------------------------------------------

    def _finish(self, total, tile: Tile, group, sweep: int):
        """Scales, bias and activation: [64, wg_columns] in float32 -> [64, wg_width], ready to be stored."""
        epilogue, scratch, width = self.epilogue, self.scratch, self.shape.wg_width
        if scratch.side_full is not None and sweep == 0:
            plgpu.barrier_wait(scratch.side_full)
        scale: Any = 1.0
        if epilogue.lhs_scale == "tensor":
            scale = self.inputs.lhs_scale[0]
        if epilogue.rhs_scale == "tensor":
            scale = scale * self.inputs.rhs_scale[self.scale_group(group)]
        if epilogue.lhs_scale == "row":
            scale = plgpu.load(scratch.row_scale.at[self._vector_rows(tile)], layout=ROWS) * scale
        if "tensor" in (epilogue.lhs_scale, epilogue.rhs_scale) or epilogue.lhs_scale == "row":
            total = total * _along_rows(scale, total.shape)

        def along_columns(ref, window):
            first = window * self.shape.width + sweep * self.shape.sweep_width
            mine = pl.ds(first + self.column_group * width, width)
            values = plgpu.load(ref.at[mine], layout=COLUMNS).astype(jnp.float32)
            return lax.broadcast_in_dim(values, (WGMMA_ROWS, width), (1,))

        parts = []
        for window in range(self.shape.windows):
            part = total[:, window * width : (window + 1) * width]
            if epilogue.rhs_scale == "channel":
                part = part * along_columns(scratch.column_scale, window)
            if self.inputs.bias is not None:
                part = part + along_columns(scratch.bias, window)
            parts.append(part)
        if scratch.side_full is not None and sweep == self.shape.sweeps - 1:
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.side_empty)
        if epilogue.activation is None:
            return parts[0].astype(self._finished_dtype)
        gate, up = parts
        return gated(gate, up, epilogue.activation, epilogue.activation_limit).astype(self._finished_dtype)

    @property
    def _finished_dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.float32) if self.epilogue.requantizes else self.epilogue.out_dtype

    def _to_fp8(self, value):
        """A result [64, wg_width] as FP8, and the scales of its rows: what `quantize` does with scaling "1x128"."""
        dtype, buffer = self.epilogue.out_dtype, self.scratch.out_scales
        amax = jnp.max(jnp.abs(value), axis=1)
        if self.config.column_groups > 1:
            buffer[self.warpgroup] = amax
            # Both have written.
            plgpu.barrier_arrive(self.scratch.shared_scales)
            plgpu.barrier_wait(self.scratch.shared_scales)
            amax = jnp.maximum(amax, plgpu.load(buffer.at[1 - self.warpgroup], layout=ROWS))
            # Both have read: the buffer may be written for the next tile.
            plgpu.barrier_arrive(self.scratch.shared_scales)
            plgpu.barrier_wait(self.scratch.shared_scales)
        scale = finite_scale(amax, dtype)
        return clipped_to(value * _along_rows(1 / scale, value.shape), dtype), scale

    # ---- the ring and its scales -------------------------------------------------------------------------------------

    def _vector_rows(self, tile: Tile):
        """Where the scales of this warpgroup's rows lie among those that `_scale_rows` copied."""
        return pl.ds(vector_shift(tile) + self.row_group * WGMMA_ROWS, WGMMA_ROWS)

    def _wait_full(self, step):
        def wait():
            plgpu.barrier_wait(self.scratch.full.at[self.slot(step)])

        if self.stage == "comp":
            pl.when(step < self.config.num_stages)(wait)
        else:
            wait()

    def _release(self, slot):
        if self.stage != "comp":
            plgpu.barrier_arrive(self.scratch.empty.at[slot])


def _along_rows(scale: Any, shape: tuple[int, ...]) -> Any:
    """One number for all rows, or one for each, as a factor of a tile."""
    return lax.broadcast_in_dim(scale, shape, (0,)) if jnp.ndim(scale) else scale
