"""Down and the weighted sum, and what it is added to: the tiles of y that are a block's.

Its teams take every other expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.store import store_rows
from pallas_kernels.on_gpu.wgmma import COLUMNS, ROWS, WGMMA_ROWS, along_columns, along_rows, vector_iota, zeros
from pallas_kernels.routed_mlp.gpu.multiply import Multiplier
from pallas_kernels.routed_mlp.gpu.scratch import MOST_COPIED, YStaging
from pallas_kernels.routed_mlp.gpu.sizes import BLOCK, TEAMS, TOKENS
from pallas_kernels.routed_mlp.gpu.walk import down_hit, turns_of


class Down(Multiplier):
    """A team at its experts."""

    def multiply(self, num_hits, step) -> None:
        """All of the block's tiles of y. From the last expert of one the teams go on to the first of the next."""
        sizes = self.sizes
        turns = turns_of(self.block, jnp.int32(sizes.down_tiles), sizes.config.blocks)
        count = turns_of(self.team, turns * num_hits, TEAMS)
        for i in range(sizes.config.rows_ahead // TEAMS):
            pl.when(i < count)(functools.partial(self._copy_rows, jnp.int32(i), num_hits))
        lax.fori_loop(0, turns, lambda turn, step: self._down_tile(turn, num_hits, count, step), step)

        # The last share has been taken, so that no barrier is left half-way.
        @pl.when((self.team != 0) & (turns > 0))
        def _():
            plgpu.barrier_wait(self.scratch.taken)

    def _down_tile(self, turn, num_hits, count, step):
        """The team's experts of one tile of y, of `count` that it multiplies in all."""
        sizes, scratch = self.sizes, self.scratch
        columns = sizes.config.out_columns
        tile = self.block + turn * sizes.config.blocks

        def hit_of(own):
            return down_hit(self.block, self.team + TEAMS * own, num_hits)

        def scales(own, k) -> list[list[Any]]:
            group = self.group(self.inputs.down_scale, scratch.experts[hit_of(own)])
            last = self.inputs.down_scale.shape[2] - 1
            block = lax.div(tile * columns, jnp.int32(BLOCK))
            return [
                [self.inputs.down_scale[group, block, jnp.minimum(k * sizes.down_depths + depth, last)]]
                for depth in range(sizes.down_depths_used)
            ]

        def one_expert(own, state):
            step, ahead, y = state
            hit = hit_of(own)
            expert = scratch.experts[hit]
            place = self._place_of_rows(own)
            (finish,) = self.side_of_columns(
                self.inputs.down_scale, self.inputs.down_bias, expert, [tile * columns], columns
            )

            def rows(k):
                first = place * sizes.h_rows + k * sizes.down_depths * TOKENS
                return pl.ds(pl.multiple_of(first, TOKENS), WGMMA_ROWS)

            plgpu.barrier_wait(scratch.rows_full.at[place])
            if sizes.by_block:

                def one_step(k, state):
                    step, ahead, totals = state
                    is_last = k == sizes.down_steps - 1
                    following = scales(own + is_last, jnp.where(is_last, 0, k + 1))
                    row_scale = plgpu.load(scratch.row_scale.at[rows(k)], layout=ROWS)
                    totals = self.add_step(step, scratch.rows.at[rows(k)], row_scale, ahead, totals)
                    return step + 1, following, totals

                step, ahead, (total,) = lax.fori_loop(
                    0, sizes.down_steps, one_step, (step, ahead, [zeros(columns, jnp.float32)])
                )
                total = self.over_depths(total, sizes.down_depths_used)
            else:
                step, total = self.sum(step, sizes.down_steps, sizes.down_depths, lambda k: scratch.rows.at[rows(k)])
                row_scale = plgpu.load(scratch.row_scale.at[rows(0)], layout=ROWS)
                total = total[:, :columns] * along_rows(row_scale, columns)
            share = finish(total)
            given = self._given(hit)
            # What is not of this expert may be anything, even NaN.
            y += jnp.where(along_rows(given, columns) != 0, share * along_rows(given, columns), 0.0)
            # The rows have been read: those of a later expert may take their place.
            plgpu.commit_smem()
            following = own + sizes.config.rows_ahead // TEAMS
            pl.when(following < count)(lambda: self._copy_rows(following, num_hits))
            return step, ahead, y

        # Of all experts of all tiles, one after the other, those that are the team's and of this tile.
        begin, end = (lax.div((turn + i) * num_hits + (TEAMS - 1) - self.team, jnp.int32(TEAMS)) for i in range(2))
        first = scales(begin, jnp.int32(0)) if sizes.by_block else []
        step, _, y = lax.fori_loop(begin, end, one_expert, (step, first, zeros(columns, jnp.float32)))
        self._add_up(y, turn, tile)
        return step

    def _add_up(self, y, turn, tile) -> None:
        """Adds the teams' shares of a tile of y and the residual, and stores the sum."""
        sizes, scratch = self.sizes, self.scratch
        columns = sizes.config.out_columns
        parts = range(columns // TOKENS)

        @pl.when(self.team != 0)
        def _():
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(scratch.taken))
            for i in parts:
                scratch.y_share[i] = y[:, i * TOKENS : (i + 1) * TOKENS]
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.shared)

        @pl.when(self.team == 0)
        def _():
            residual = self._residual(tile)
            plgpu.barrier_wait(scratch.shared)
            other = [plgpu.load(scratch.y_share.at[i], layout=plgpu.Layout.WGMMA) for i in parts]
            total = y + (other[0] if len(other) == 1 else lax.concatenate(other, 1))
            for token, numbers in enumerate(residual):
                total += jnp.where(along_rows(vector_iota(), columns) == token, along_columns(numbers), 0.0)
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch.taken)
            store_rows(
                self.y,
                YStaging.views(scratch.y_staging, columns, self.y.dtype),
                0,
                total.astype(self.y.dtype),
                row=0,
                rows=sizes.num_tokens,
                column=tile * columns,
            )

    def _residual(self, tile) -> list[jax.Array]:
        """The residual's part of a tile of y: float32 [columns] of each token; empty if there is none."""
        if self.inputs.residual is None:
            return []
        columns = self.sizes.config.out_columns
        window = pl.ds(tile * columns, columns)
        rows = [self.inputs.residual.at[token, window] for token in range(self.sizes.num_tokens)]
        return [plgpu.load(row, layout=COLUMNS, optimized=False).astype(jnp.float32) for row in rows]

    def _given(self, hit):
        """What each token, a row, gives an expert of the list; 0 for what is no token."""
        row = vector_iota()
        given = jnp.where(row == 0, self.scratch.token_weights[0, hit], 0.0)
        for token in range(1, self.sizes.num_tokens):
            given = jnp.where(row == token, self.scratch.token_weights[token, hit], given)
        return given

    def _place_of_rows(self, own):
        """Where the rows of h of the team's expert number `own` lie in shared memory."""
        places = self.sizes.config.rows_ahead // TEAMS
        return self.team * places + lax.rem(own, jnp.int32(places))

    def _copy_rows(self, own, num_hits) -> None:
        """Begins to copy the rows of h of the team's expert number `own`."""
        sizes, scratch = self.sizes, self.scratch
        place = self._place_of_rows(own)
        source = down_hit(self.block, self.team + TEAMS * own, num_hits) * sizes.h_rows
        target = place * sizes.h_rows
        barrier = scratch.rows_full.at[place]
        for begin in range(0, sizes.h_rows, MOST_COPIED):
            size = min(MOST_COPIED, sizes.h_rows - begin)
            here = pl.ds(pl.multiple_of(target + begin, WGMMA_ROWS), size)
            there = pl.ds(pl.multiple_of(source + begin, WGMMA_ROWS), size)
            plgpu.copy_gmem_to_smem(self.between.rounded.at[there], scratch.rows.at[here], barrier)
            plgpu.copy_gmem_to_smem(self.between.scale.at[there], scratch.row_scale.at[here], barrier)
