"""The loading warpgroup: streams the weights of both products through the ring, from one into the next without a pause.

Down's weights depend on nothing that the block waits for: when gate/up's last tiles are multiplied, and while blocks
wait for each other's rows of h, they are already on their way.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import Views
from pallas_kernels.routed_mlp.gpu.scratch import MOST_COPIED, Scratch
from pallas_kernels.routed_mlp.gpu.sizes import BLOCK, TEAMS, Inputs, Sizes
from pallas_kernels.routed_mlp.gpu.walk import Phases, down_hit, share_of, slot_of, turns_of, up_tile


class Loader:
    """The warpgroup."""

    def __init__(self, inputs: Inputs, scratch: Scratch, sizes: Sizes, block: jax.Array):
        self.inputs, self.scratch, self.sizes, self.block = inputs, scratch, sizes, block
        self.ring = Views.of(scratch.ring)

    def run(self, phases: Phases) -> None:
        """Loads everything that the phases multiply, in their order."""
        if phases.up:
            self._copy_x()
        plgpu.barrier_wait(self.scratch.listed)
        num_hits = self.scratch.num_hits[0]
        steps = [jnp.int32(0)] * TEAMS
        if phases.up:
            steps = self._load_up(num_hits, steps)
        if phases.down:
            steps = self._load_down(num_hits, steps)
        if self.sizes.stage != "comp":
            # What was loaded has been read, so that no barrier is left half-way.
            for team, step in enumerate(steps):
                first = jnp.maximum(step - self.sizes.config.slots_of_team, 0)
                lax.fori_loop(first, step, lambda i, _, team=team: self._wait_read(team, i), None)

    def _copy_x(self) -> None:
        for begin in range(0, self.sizes.x_rows, MOST_COPIED):
            rows = slice(begin, min(begin + MOST_COPIED, self.sizes.x_rows))
            plgpu.copy_gmem_to_smem(self.inputs.x.at[rows], self.scratch.x.at[rows], self.scratch.x_full)

    def _load_up(self, num_hits, steps):
        sizes, columns = self.sizes, self.sizes.config.columns
        begin, turns = share_of(self.block, num_hits * sizes.up_tiles, sizes)

        def of_turn(turn):
            hit, tile = up_tile(begin + turn, sizes)
            return self.inputs.gate_up.at[self.scratch.experts[hit]], tile * columns

        def load_step(slot, weights, column, k, step):
            for i in range(sizes.up_depths):
                for half in range(2):
                    rows = pl.ds(half * sizes.width + column, columns)
                    source = weights.at[rows, _depth(k * sizes.up_depths + i)]
                    self._copy(source, slot, (2 * i + half) * columns, step)

        return self._load_turns(turns, sizes.up_steps, steps, of_turn, load_step)

    def _load_down(self, num_hits, steps):
        sizes, columns = self.sizes, self.sizes.config.out_columns

        def of_turn(index):
            tile = self.block + lax.div(index, num_hits) * sizes.config.blocks
            expert = self.scratch.experts[down_hit(self.block, index, num_hits)]
            return self.inputs.down.at[expert], tile * columns

        def load_step(slot, weights, column, k, step):
            for i in range(sizes.down_depths):
                source = weights.at[pl.ds(column, columns), _depth(k * sizes.down_depths + i)]
                self._copy(source, slot, i * sizes.config.columns, step)

        tiles = turns_of(self.block, jnp.int32(sizes.down_tiles), sizes.config.blocks)
        return self._load_turns(tiles * num_hits, sizes.down_steps, steps, of_turn, load_step)

    def _load_turns(self, turns, steps_each: int, first_steps, of_turn, load_step):
        """The slots of so many pieces of work, of which teams take one in turn; returns the steps of each team so far.

        The teams' slots are filled in turns, as many of one as it has, then those of the other: all of the ring is on
        its way.
        """
        at_once = self.sizes.config.slots_of_team

        def load_together(together, _):
            turns_of_teams = [together * TEAMS + team for team in range(TEAMS)]
            sources = [of_turn(jnp.minimum(turn, turns - 1)) for turn in turns_of_teams]

            def load_some(part, _):
                begin = part * at_once
                end = jnp.minimum(begin + at_once, steps_each)
                for team, turn in enumerate(turns_of_teams):

                    def load_one(k, _, team=team):
                        step = first_steps[team] + together * steps_each + k
                        load_step(self._free_slot(team, step), *sources[team], k, step)

                    lax.fori_loop(begin, jnp.where(turn < turns, end, begin), load_one, None)

            lax.fori_loop(0, pl.cdiv(steps_each, at_once), load_some, None)

        lax.fori_loop(0, turns_of(jnp.int32(0), turns, TEAMS), load_together, None)
        return [step + turns_of(jnp.int32(team), turns, TEAMS) * steps_each for team, step in enumerate(first_steps)]

    def _free_slot(self, team, step):
        """The slot of a step, once the step that used it before has been read."""
        if self.sizes.stage != "comp":
            pl.when(step >= self.sizes.config.slots_of_team)(lambda: self._wait_read(team, step))
        return slot_of(team, step, self.sizes)

    def _wait_read(self, team, step) -> None:
        plgpu.barrier_wait(self.scratch.empty.at[slot_of(team, step, self.sizes)])

    def _copy(self, source, slot, row: int, step) -> None:
        """Begins to copy a tile of weights to the rows of a slot from `row` on."""

        def copy():
            target = self.ring.copied.at[slot, pl.ds(row, source.shape[0])]
            plgpu.copy_gmem_to_smem(source, target, self.scratch.full.at[slot])

        if self.sizes.stage == "comp":
            pl.when(step < self.sizes.config.slots_of_team)(copy)  # fill the ring once
        else:
            copy()


def _depth(tile):
    """The columns of weights that are a tile's."""
    return pl.ds(pl.multiple_of(tile * BLOCK, BLOCK), BLOCK)
