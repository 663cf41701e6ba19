"""Gate/up and the activation: the tiles of h that are a block's, its teams taking every other one."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.activations import gated
from pallas_kernels.on_gpu.smem import Views
from pallas_kernels.on_gpu.store import store_rows
from pallas_kernels.on_gpu.wgmma import ROWS, WGMMA_ROWS, along_rows, zeros
from pallas_kernels.routed_mlp.gpu.multiply import Multiplier
from pallas_kernels.routed_mlp.gpu.sizes import BLOCK, TEAMS, TOKENS
from pallas_kernels.routed_mlp.gpu.walk import share_of, turns_of, up_tile


class GateUp(Multiplier):
    """A team at its tiles of h."""

    def copy_x_scale(self) -> None:
        """Copies the scales of x to shared memory."""
        for begin in range(0, self.inputs.x_scale.shape[0], WGMMA_ROWS):
            window = slice(begin, begin + WGMMA_ROWS)
            self.scratch.x_scale[window] = plgpu.load(self.inputs.x_scale.at[window], layout=ROWS, optimized=False)
        plgpu.commit_smem()

    def multiply(self, num_hits, step):
        """The tiles of h that are this block's; returns the steps so far."""
        sizes, scratch = self.sizes, self.scratch
        columns = sizes.config.columns
        begin, turns = share_of(self.block, num_hits * sizes.up_tiles, sizes)
        own_turns = turns_of(self.team, turns, TEAMS)
        halves = (0, sizes.width)

        def scales(turn, k) -> list[list[Any]]:
            """The scales of the weights of a step; past the last one, of the last."""
            hit, tile = up_tile(begin + jnp.minimum(turn, turns - 1), sizes)
            group = self.group(self.inputs.gate_up_scale, scratch.experts[hit])
            last = self.inputs.gate_up_scale.shape[2] - 1
            return [
                [
                    self.inputs.gate_up_scale[
                        group,
                        half // BLOCK + lax.div(tile * columns, jnp.int32(BLOCK)),
                        jnp.minimum(k * sizes.up_depths + depth, last),
                    ]
                    for half in halves
                ]
                for depth in range(sizes.up_depths)
            ]

        def one_tile(own_turn, state):
            step, ahead = state
            turn = self.team + TEAMS * own_turn
            hit, tile = up_tile(begin + turn, sizes)
            expert = scratch.experts[hit]
            side = self.side_of_columns(
                self.inputs.gate_up_scale,
                self.inputs.gate_up_bias,
                expert,
                [half + tile * columns for half in halves],
                columns,
            )

            def rows(k):
                return pl.ds(pl.multiple_of(k * sizes.up_depths * TOKENS, TOKENS), WGMMA_ROWS)

            if sizes.by_block:

                def one_step(k, state):
                    step, ahead, totals = state
                    is_last = k == sizes.up_steps - 1
                    following = scales(turn + TEAMS * is_last, jnp.where(is_last, 0, k + 1))
                    row_scale = plgpu.load(scratch.x_scale.at[rows(k)], layout=ROWS)
                    totals = self.add_step(step, scratch.x.at[rows(k)], row_scale, ahead, totals)
                    return step + 1, following, totals

                start = [zeros(columns, jnp.float32) for _ in halves]
                step, ahead, sums = lax.fori_loop(0, sizes.up_steps, one_step, (step, ahead, start))
                sums = [self.over_depths(total, sizes.up_depths) for total in sums]
            else:
                step, total = self.sum(step, sizes.up_steps, sizes.up_depths, lambda k: scratch.x.at[rows(k)])
                total = total * along_rows(plgpu.load(scratch.x_scale, layout=ROWS), 2 * columns)
                sums = [total[:, :columns], total[:, columns:]]
            gate, up = (finish(part) for finish, part in zip(side, sums, strict=True))
            h = gated(gate, up, sizes.activation, sizes.activation_limit)
            column = tile * columns
            depth, place = lax.div(column, jnp.int32(BLOCK)), lax.rem(column, jnp.int32(BLOCK))
            store_rows(
                self.between.h,
                Views.of(scratch.h_staging),
                self.team,
                h,
                row=hit * sizes.h_rows + depth * TOKENS,
                rows=sizes.num_tokens,
                column=place,
            )
            if not sizes.by_block:
                self._store_largest(h, hit, tile)
            return step, ahead

        first = scales(self.team, jnp.int32(0)) if sizes.by_block else []
        return lax.fori_loop(0, own_turns, one_tile, (step, first))[0]

    def _store_largest(self, h, hit, tile) -> None:
        """The largest number of each token of a tile of h, from which its scale will be made."""
        buffer = self.scratch.row_numbers.at[self.team]
        buffer[...] = jnp.max(jnp.abs(h), axis=1)  # the tile before has left with its rows
        plgpu.commit_smem()
        first = pl.multiple_of(hit * self.sizes.up_groups * WGMMA_ROWS + tile * TOKENS, TOKENS)
        plgpu.copy_smem_to_gmem(buffer.at[:TOKENS], self.between.largest.at[pl.ds(first, TOKENS)])
