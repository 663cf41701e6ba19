"""The grouped matrix product on TPU: one kernel that keeps the weights streaming while it multiplies.

    for each group with rows:                    groups are found in the kernel, from group_sizes
      for each column tile of its matrix:        [K, block_n], all of K, read once, `weight_buffers` in flight
        for each row tile of the group:          [block_m, K], read ahead by one, kept while it is the only one
          multiply, scale, bias, activation      written while the next tile is multiplied

    floor in time = max(bytes of lhs, rhs, out / HBM bandwidth, 2·M·K·N / peak)

Tiles begin at the strip of rows that memory can address (see `rows`), so a strip can hold rows of several groups.
It is written once, by the last of them: until then what it holds so far waits in VMEM, one strip for each column. Rows
of a tile that its group does not own are cleared by selection, never by multiplication, so a NaN there goes nowhere.

On a chip whose two cores act as one device, each core takes every other column tile.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tpu.core import Core
from pallas_kernels.grouped_matmul.tpu.math import Arithmetic
from pallas_kernels.grouped_matmul.tpu.memory import Config, Inputs, Layout, Scratch
from pallas_kernels.grouped_matmul.tpu.rows import Groups, Tile
from pallas_kernels.stage import Stage
from pallas_kernels.tracing.varying import result_varying_as


def grouped_product(
    group_sizes: jax.Array,
    group_offset: jax.Array,
    inputs: Inputs,
    arithmetic: Arithmetic,
    config: Config,
    *,
    cores: int,
    vmem_limit_bytes: int,
    cost: pl.CostEstimate,
    stage: Stage = "full",
) -> jax.Array:
    """Runs the kernel.

    Args:
      group_sizes: int32 [E].
      group_offset: int32 [1], the group of rhs[0].
      inputs: the operands.
      arithmetic: what to do with them.
      config: how to cut the work.
      cores: cores that act as one device.
      vmem_limit_bytes: what the kernel may use of VMEM.
      cost: of the operator.
      stage: see `Stage`.

    Returns:
      [M/s, s, N], or [M/s, s, N/2] with an activation; zeros in rows that no group owns.
    """
    layout = Layout.of(inputs, arithmetic, config, cores)
    present = Inputs(*(x is not None for x in inputs))

    def body(sizes_ref, offset_ref, *refs):
        given = iter(refs[: sum(present)])
        operands = Inputs(*(next(given) if there else None for there in present))
        out_ref, scratch = refs[sum(present)], Scratch(*refs[sum(present) + 1 :])
        _run(Core(operands, out_ref, scratch, arithmetic, config, layout, stage), sizes_ref, offset_ref)

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # elsewhere XLA might move what it believes to fit VMEM
    return pl.pallas_call(
        body,
        out_shape=result_varying_as(inputs.lhs, (layout.strips, layout.sublanes, layout.columns), arithmetic.out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores,),
            in_specs=[in_hbm] * sum(present),
            out_specs=in_hbm,
            scratch_shapes=Scratch.describe(inputs, arithmetic, config, layout),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        cost_estimate=cost,
        name="grouped_gate_up" if arithmetic.activation else "grouped_matmul",
    )(group_sizes, group_offset, *(x for x in inputs if x is not None))


def _run(core: Core, sizes_ref: Any, offset_ref: Any) -> None:
    """All the work of a core."""
    scratch, cores = core.scratch, core.layout.cores
    number: Any = pl.program_id(0) if cores > 1 else 0
    groups = Groups(scratch.group_index, scratch.group_begin, scratch.group_end)
    num_rows = core.layout.strips * core.layout.sublanes
    count, tiles = groups.fill(sizes_ref, offset_ref, num_rows, core.config.block_m, core.layout.sublanes)
    mine = (core.layout.column_tiles - number + cores - 1) // cores
    schedule = _Schedule(groups, count, number, mine, core)
    for buffer in range(core.config.weight_buffers if core.stage == "comp" else core.config.weight_buffers - 1):
        schedule.start_weights(jnp.int32(buffer))

    @pl.when((count > 0) & (mine > 0))
    def _():
        core.copy_rows(schedule.tile(0, 0), 0, "start")
        if core.stage == "comp":
            core.copy_rows(schedule.tile(0, 0), 1, "start")
            core.copy_rows(schedule.tile(0, 0), 1, "wait")

    scratch.shared[...] = jnp.zeros_like(scratch.shared)
    scratch.zeros[...] = jnp.zeros_like(scratch.zeros)
    for buffer in range(2):
        scratch.stored[buffer, 0] = jnp.int32(0)
    schedule.fill_zeros("start")
    lax.fori_loop(0, tiles * mine, schedule.step, _Place.first())
    for buffer in range(2):
        core.await_store(buffer)
    schedule.fill_zeros("wait")


class _Place(NamedTuple):
    """Where a core is in its work.

    Attributes:
      group: of those with rows.
      column: of the core's column tiles.
      tile: of the group's row tiles.
      weights: weight tiles before this one.
      rows: buffer of the rows.
      awaited: 1 if the rows may still be on their way.
    """

    group: jax.Array
    column: jax.Array
    tile: jax.Array
    weights: jax.Array
    rows: jax.Array
    awaited: jax.Array

    @classmethod
    def first(cls) -> "_Place":
        zero = jnp.int32(0)
        return cls(zero, zero, zero, zero, rows=zero, awaited=jnp.int32(1))


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """The order of a core's work, and what is copied ahead of it."""

    groups: Groups
    count: jax.Array  # groups with rows
    first_column: Any
    mine: Any  # column tiles of this core: every `cores`-th from the first one on
    core: Core

    def column_tile(self, index: Any) -> jax.Array:
        return self.first_column + index * self.core.layout.cores

    def tile(self, group: Any, tile: Any) -> Tile:
        return Tile.of(self.groups, group, tile, self.core.config.block_m, self.core.layout.sublanes)

    def start_weights(self, number: jax.Array) -> None:
        """Starts to copy the weight tile of that number in the order of use, if there is one."""
        group, column = number // jnp.maximum(self.mine, 1), number % jnp.maximum(self.mine, 1)

        @pl.when(number < self.count * self.mine)
        def _():
            buffer = lax.rem(number, jnp.int32(self.core.config.weight_buffers))
            self.core.copy_weights(self.groups.index[group], self.column_tile(column), buffer, "start")

    def step(self, number: jax.Array, at: "_Place") -> "_Place":
        """Computes the tile at a place while others are copied; returns the next place."""
        core, config = self.core, self.core.config
        tiles = Tile.count(self.groups, at.group, config.block_m, core.layout.sublanes)
        tile, column_tile = self.tile(at.group, at.tile), self.column_tile(at.column)
        weights = lax.rem(at.weights, jnp.int32(config.weight_buffers))
        last_tile, last_column = at.tile + 1 == tiles, at.column + 1 == self.mine
        last_of_group = last_tile & last_column
        next_group = at.group + last_of_group.astype(jnp.int32)
        again = (tiles == 1) & ~last_column  # the next step takes the same rows

        @pl.when(at.tile == 0)
        def _():
            if core.stage != "comp":
                self.start_weights(at.weights + config.weight_buffers - 1)
            loaded = core.stage != "comp" or at.weights < config.weight_buffers
            pl.when(loaded)(lambda: core.copy_weights(self.groups.index[at.group], column_tile, weights, "wait"))

        if core.stage != "comp":

            @pl.when((next_group < self.count) & ~again)
            def _():
                core.copy_rows(self.tile(next_group, jnp.where(last_tile, 0, at.tile + 1)), 1 - at.rows, "start")

        pl.when(at.awaited == 1)(lambda: core.copy_rows(tile, at.rows, "wait"))
        buffer = lax.rem(number, 2)
        core.await_store(buffer)
        if core.stage != "dma":
            core.multiply(tile, weights, at.rows, buffer)
            pl.when(at.tile == 0)(lambda: core.take_shared(tile, column_tile, buffer))
            core.leave_shared(tile, column_tile, buffer)
        if core.stage != "comp":
            goes_on = last_tile & (at.group + 1 < self.count)
            core.start_store(tile, jnp.where(goes_on, tile.whole_strips, tile.strips), column_tile, buffer)
        stays = again | (core.stage == "comp")
        return _Place(
            group=next_group,
            column=jnp.where(last_of_group, 0, at.column + last_tile.astype(jnp.int32)),
            tile=jnp.where(last_tile, 0, at.tile + 1),
            weights=at.weights + last_tile.astype(jnp.int32),
            rows=jnp.where(stays, at.rows, 1 - at.rows),
            awaited=jnp.where(stays, 0, 1),
        )

    def fill_zeros(self, act: Literal["start", "wait"]) -> None:
        """Writes zeros in the strips before the first group and after the last."""
        core = self.core
        if core.stage == "comp":
            return
        strips, sublanes, chunk = core.layout.strips, core.layout.sublanes, core.config.block_m // core.layout.sublanes
        some = self.count > 0
        before = jnp.where(some, self.groups.begin[0] // sublanes, strips)
        last = jnp.maximum(self.count - 1, 0)
        after = jnp.where(some, pl.cdiv(self.groups.end[last], sublanes), strips)

        def fill(begin: jax.Array, end: jax.Array) -> None:
            def piece(number, _):
                strip = begin + number // self.mine * chunk
                column_tile = self.column_tile(number % self.mine)
                size = jnp.minimum(chunk, end - strip)
                core.copy_out(core.scratch.zeros, strip, size, column_tile, core.scratch.zeros_copied, act)
                return 0

            lax.fori_loop(0, pl.cdiv(end - begin, chunk) * self.mine, piece, 0)

        fill(jnp.int32(0), before)
        fill(after, jnp.int32(strips))
