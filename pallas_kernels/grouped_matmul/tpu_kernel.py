"""The grouped matrix product on TPU: one kernel that keeps the weights streaming while it multiplies.

    for each group with rows:                    groups are found in the kernel, from group_sizes
      for each column tile of its matrix:        [K, block_n], all of K, read once, `weight_buffers` in flight
        for each row tile of the group:          [block_m, K], read ahead by one, kept while it is the only one
          multiply, scale, bias, activation      written while the next tile is multiplied

    floor in time = max(bytes of lhs, rhs, out / HBM bandwidth, 2·M·K·N / peak)

Tiles begin at the strip of rows that memory can address (see `tpu_rows`), so a strip can hold rows of several groups.
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

from pallas_kernels.grouped_matmul.tpu_math import Arithmetic, activate, product
from pallas_kernels.grouped_matmul.tpu_rows import Groups, Tile

Stage = Literal["full", "comp", "dma"]
"""What a kernel does: all of it, every multiplication on tiles that stay where they are, or every copy and no more."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      block_m: rows of a tile, a multiple of the strip.
      block_n: columns of a tile of the result, a multiple of 128 unless all of them; gate and up each have as many.
      weight_buffers: weight tiles in VMEM, of which all but one are on their way.
      chunk: columns that are multiplied at a time.
    """

    block_m: int
    block_n: int
    weight_buffers: int
    chunk: int


class Inputs(NamedTuple):
    """The operands in the layouts that the kernel reads; an absent one is None.

    Attributes:
      lhs: [M/s, s, K], strips of s rows.
      lhs_scale: float32 [M/s, s, 1], or [M/s, s, K/block].
      rhs: [G, K, N], or [G, N, K].
      rhs_scale: float32 [G, 1, N], or [G, K/block, N].
      bias: float32 [G, 1, N].
    """

    lhs: Any
    lhs_scale: Any
    rhs: Any
    rhs_scale: Any
    bias: Any


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
    layout = _Layout.of(inputs, arithmetic, config, cores)
    present = Inputs(*(x is not None for x in inputs))

    def body(sizes_ref, offset_ref, *refs):
        given = iter(refs[: sum(present)])
        operands = Inputs(*(next(given) if there else None for there in present))
        out_ref, scratch = refs[sum(present)], _Scratch(*refs[sum(present) + 1 :])
        _Core(operands, out_ref, scratch, arithmetic, config, layout, stage).run(sizes_ref, offset_ref)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((layout.strips, layout.sublanes, layout.columns), arithmetic.out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores,),
            in_specs=[anywhere] * sum(present),
            out_specs=anywhere,
            scratch_shapes=_Scratch.describe(inputs, arithmetic, config, layout),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit_bytes, disable_bounds_checks=True
        ),
        cost_estimate=cost,
        name="grouped_gate_up" if arithmetic.activation else "grouped_matmul",
    )(group_sizes, group_offset, *(x for x in inputs if x is not None))


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The sizes that follow from the operands and the configuration.

    Attributes:
      strips: M/s.
      sublanes: s.
      depth: K.
      groups: G.
      columns: of the result.
      column_tiles: of the result; the last one may be narrower.
      cores: that share them.
    """

    strips: int
    sublanes: int
    depth: int
    groups: int
    columns: int
    column_tiles: int
    cores: int

    @classmethod
    def of(cls, inputs: Inputs, arithmetic: Arithmetic, config: Config, cores: int) -> "_Layout":
        strips, sublanes, depth = inputs.lhs.shape
        columns = inputs.rhs.shape[1 if arithmetic.k_major else 2] // arithmetic.halves
        tiles = pl.cdiv(columns, config.block_n)
        return cls(strips, sublanes, depth, inputs.rhs.shape[0], columns, tiles, cores)


class _Scratch(NamedTuple):
    """A core's memory. Sizes with [2] or [weight_buffers] in front are buffers of a ring."""

    index: Any
    begin: Any
    end: Any
    stored: Any  # [2, 2]: strips and column tile of the copy that leaves each buffer of out; no copy if no strips
    lhs: Any
    lhs_scale: Any
    rhs: Any
    rhs_scale: Any
    bias: Any
    out: Any
    shared: Any  # [column tiles, s, block_n]: the strip in which the next group goes on
    zeros: Any
    lhs_copied: Any
    rhs_copied: Any
    out_copied: Any
    zeros_copied: Any

    @classmethod
    def describe(cls, inputs: Inputs, arithmetic: Arithmetic, config: Config, layout: _Layout) -> "list[Any]":
        """The memory that `pallas_call` is asked for; a dummy for what an absent operand needs."""
        s, n, halves, buffers = layout.sublanes, config.block_n, arithmetic.halves, config.weight_buffers
        tile = config.block_m // s
        rhs = (n, layout.depth) if arithmetic.k_major else (layout.depth, n)

        def of(operand, *shape):
            return pltpu.SMEM((1,), jnp.int32) if operand is None else pltpu.VMEM(shape, operand.dtype)

        def rows(operand):
            return of(operand, 2, tile, s, 1 if operand is None else operand.shape[2])

        def columns(operand):
            return of(operand, buffers, halves, 1 if operand is None else operand.shape[1], n)

        out_dtype, dma = arithmetic.out_dtype, pltpu.SemaphoreType.DMA
        return list(
            cls(
                *Groups.scratch(layout.groups),
                stored=pltpu.SMEM((2, 2), jnp.int32),
                lhs=rows(inputs.lhs),
                lhs_scale=rows(inputs.lhs_scale),
                rhs=of(inputs.rhs, buffers, halves, *rhs),
                rhs_scale=columns(inputs.rhs_scale),
                bias=columns(inputs.bias),
                out=pltpu.VMEM((2, tile, s, n), out_dtype),
                shared=pltpu.VMEM((layout.column_tiles, s, n), out_dtype),
                zeros=pltpu.VMEM((tile, s, n), out_dtype),
                lhs_copied=dma((2,)),
                rhs_copied=dma((buffers,)),
                out_copied=dma((2,)),
                zeros_copied=dma,
            )
        )


@dataclasses.dataclass(frozen=True)
class _Core:
    """The work of one core. A copy is described anew to be waited for: the same shapes, the same bytes."""

    operands: Inputs
    out: Any
    scratch: _Scratch
    arithmetic: Arithmetic
    config: Config
    layout: _Layout
    stage: Stage

    def run(self, sizes_ref: Any, offset_ref: Any) -> None:
        """All of it."""
        scratch, core = self.scratch, pl.program_id(0)
        groups = Groups(scratch.index, scratch.begin, scratch.end)
        num_rows = self.layout.strips * self.layout.sublanes
        count = groups.fill(sizes_ref, offset_ref, num_rows)
        mine = (self.layout.column_tiles - core + self.layout.cores - 1) // self.layout.cores
        schedule = _Schedule(groups, count, core, mine, self)
        for buffer in range(self.config.weight_buffers if self.stage == "comp" else self.config.weight_buffers - 1):
            schedule.start_weights(jnp.int32(buffer))

        @pl.when((count > 0) & (mine > 0))
        def _():
            self.copy_rows(schedule.tile(0, 0), 0, "start")
            if self.stage == "comp":
                self.copy_rows(schedule.tile(0, 0), 1, "start")
                self.copy_rows(schedule.tile(0, 0), 1, "wait")

        scratch.shared[...] = jnp.zeros_like(scratch.shared)
        scratch.zeros[...] = jnp.zeros_like(scratch.zeros)
        for buffer in range(2):
            scratch.stored[buffer, 0] = jnp.int32(0)
        schedule.fill_zeros("start")
        lax.fori_loop(0, count, schedule.group, (jnp.int32(0), jnp.int32(0), jnp.int32(1)))
        for buffer in range(2):
            self.await_store(buffer)
        schedule.fill_zeros("wait")

    # ---- Copies ------------------------------------------------------------------------------------------------------

    def for_width(self, column_tile: jax.Array, copy) -> None:
        """Calls `copy(width)` with the columns of a tile; the last one may have fewer."""
        width = self.config.block_n
        last = self.layout.column_tiles - 1
        rest = self.layout.columns - last * width
        if rest == width:
            copy(width)
        else:
            pl.when(column_tile < last)(lambda: copy(width))
            pl.when(column_tile == last)(lambda: copy(rest))

    def columns(self, column_tile: jax.Array, width: int, half: int = 0) -> Any:
        """The columns of a tile, in rhs for one half of it."""
        if self.layout.column_tiles == 1:
            return pl.ds(half * self.layout.columns, width)
        start = half * self.layout.columns + column_tile * self.config.block_n
        return pl.ds(pl.multiple_of(start, 128), width)

    def copy_rows(self, tile: Tile, buffer: Any, act: Literal["start", "wait"]) -> None:
        """Rows of lhs and their scales."""
        source = pl.ds(tile.strip, tile.strips)
        for operand, ring in (
            (self.operands.lhs, self.scratch.lhs),
            (self.operands.lhs_scale, self.scratch.lhs_scale),
        ):
            if operand is not None:
                copy = pltpu.make_async_copy(
                    operand.at[source], ring.at[buffer, pl.ds(0, tile.strips)], self.scratch.lhs_copied.at[buffer]
                )
                getattr(copy, act)()

    def copy_weights(
        self, group: jax.Array, column_tile: jax.Array, buffer: Any, act: Literal["start", "wait"]
    ) -> None:
        """A tile of rhs, with its scales and bias."""
        sem = self.scratch.rhs_copied.at[buffer]

        def copy(width: int) -> None:
            for half in range(self.arithmetic.halves):
                columns, narrow = self.columns(column_tile, width, half), pl.ds(0, width)
                rhs, ring = self.operands.rhs.at[group], self.scratch.rhs.at[buffer, half]
                if self.arithmetic.k_major:
                    pairs = [(rhs.at[columns], ring.at[narrow])]
                else:
                    pairs = [(rhs.at[:, columns], ring.at[:, narrow])]
                if self.operands.rhs_scale is not None:
                    scale = self.operands.rhs_scale.at[group, :, columns]
                    pairs.append((scale, self.scratch.rhs_scale.at[buffer, half, :, narrow]))
                if self.operands.bias is not None:
                    bias = self.operands.bias.at[group, :, columns]
                    pairs.append((bias, self.scratch.bias.at[buffer, half, :, narrow]))
                for source, target in pairs:
                    getattr(pltpu.make_async_copy(source, target, sem), act)()

        self.for_width(column_tile, copy)

    def copy_out(self, source: Any, strip: Any, strips: Any, column_tile: jax.Array, sem: Any, act: str) -> None:
        """Strips [strips, s, block_n] of the result, or of zeros."""

        def copy(width: int) -> None:
            target = self.out.at[pl.ds(strip, strips), :, self.columns(column_tile, width)]
            narrow = source.at[pl.ds(0, strips), :, pl.ds(0, width)]
            getattr(pltpu.make_async_copy(narrow, target, sem), act)()

        self.for_width(column_tile, copy)

    def start_store(self, tile: Tile, strips: jax.Array, column_tile: jax.Array, buffer: Any) -> None:
        """Starts to write the first `strips` strips of a buffer of out, if there are any."""
        self.scratch.stored[buffer, 0] = strips
        self.scratch.stored[buffer, 1] = column_tile

        @pl.when(strips > 0)
        def _():
            sem = self.scratch.out_copied.at[buffer]
            self.copy_out(self.scratch.out.at[buffer], tile.strip, strips, column_tile, sem, "start")

    def await_store(self, buffer: Any) -> None:
        """Waits until a buffer of out is written."""
        strips, column_tile = self.scratch.stored[buffer, 0], self.scratch.stored[buffer, 1]

        @pl.when(strips > 0)
        def _():
            sem = self.scratch.out_copied.at[buffer]
            self.copy_out(self.scratch.out.at[buffer], 0, strips, column_tile, sem, "wait")

    # ---- Arithmetic --------------------------------------------------------------------------------------------------

    def multiply(self, tile: Tile, weights: Any, rows: Any, buffer: Any) -> None:
        """Computes a tile of out from the given buffers of rhs and lhs."""
        scratch, block_n, chunk = self.scratch, self.config.block_n, self.config.chunk

        def compute(start: Any, width: int) -> None:
            at = pl.ds(start, width)
            parts = []
            lhs = scratch.lhs.at[rows]
            lhs_scale = None if self.operands.lhs_scale is None else scratch.lhs_scale.at[rows]
            for half in range(self.arithmetic.halves):
                rhs = scratch.rhs.at[weights, half]
                rhs = rhs.at[at] if self.arithmetic.k_major else rhs.at[:, at]
                rhs_scale = None
                if self.operands.rhs_scale is not None:
                    rhs_scale = scratch.rhs_scale.at[weights, half, :, at]
                part = product(lhs, lhs_scale, rhs, rhs_scale, self.arithmetic)
                if self.operands.bias is not None:
                    part += scratch.bias[weights, half, :, at]
                parts.append(part)
            out = activate(parts, self.arithmetic)
            out = jnp.where(tile.owned(out.shape), out, 0).astype(self.arithmetic.out_dtype)
            shape = (self.config.block_m // self.layout.sublanes, self.layout.sublanes, width)
            scratch.out[buffer, :, :, at] = out.reshape(shape)

        whole = block_n // chunk
        if whole > 1:
            pl.loop(0, whole)(lambda index: compute(pl.multiple_of(index * chunk, chunk), chunk))
        elif whole:
            compute(0, chunk)
        if block_n % chunk:
            compute(whole * chunk, block_n % chunk)

    def take_shared(self, tile: Tile, column_tile: jax.Array, buffer: Any) -> None:
        """Puts in what earlier groups left of the first strip."""

        @pl.when(tile.begin > 0)
        def _():
            row = lax.broadcasted_iota(jnp.int32, (self.layout.sublanes, self.config.block_n), 0)
            out = self.scratch.out.at[buffer, 0]
            out[...] = jnp.where(row < tile.begin, self.scratch.shared[column_tile], out[...])

    def leave_shared(self, tile: Tile, column_tile: jax.Array, buffer: Any) -> None:
        """Keeps the last strip for the groups that go on in it."""

        @pl.when(tile.whole_strips < tile.strips)
        def _():
            self.scratch.shared[column_tile] = self.scratch.out[buffer, tile.whole_strips]


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """The order of a core's work, and what is copied ahead of it."""

    groups: Groups
    count: jax.Array  # groups with rows
    first_column: jax.Array
    mine: jax.Array  # column tiles of this core: every `cores`-th from the first one on
    core: _Core

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

    def group(self, group: jax.Array, state: Any) -> Any:
        """The column tiles of a listed group."""
        core = self.core
        tiles = Tile.count(self.groups, group, core.config.block_m, core.layout.sublanes)

        def column(index, state):
            number = group * self.mine + index
            buffers = core.config.weight_buffers
            weights = lax.rem(number, jnp.int32(buffers))
            column_tile = self.column_tile(index)
            if core.stage != "comp":
                self.start_weights(number + buffers - 1)
                core.copy_weights(self.groups.index[group], column_tile, weights, "wait")
            else:
                pl.when(number < buffers)(
                    lambda: core.copy_weights(self.groups.index[group], column_tile, weights, "wait")
                )
            return lax.fori_loop(0, tiles, lambda tile, state: row_tile(index, weights, tile, state), state)

        def row_tile(index, weights, number, state):
            step, rows, awaited = state
            tile, column_tile = self.tile(group, number), self.column_tile(index)
            last_row, last_column = number + 1 == tiles, index + 1 == self.mine
            again = last_row & (number == 0) & ~last_column  # the next step takes the same rows
            next_group = group + (last_row & last_column).astype(jnp.int32)
            more = next_group < self.count
            if core.stage != "comp":
                following = self.tile(jnp.minimum(next_group, self.count - 1), jnp.where(last_row, 0, number + 1))
                pl.when(more & ~again)(lambda: core.copy_rows(following, 1 - rows, "start"))
            pl.when(awaited == 1)(lambda: core.copy_rows(tile, rows, "wait"))
            buffer = lax.rem(step, 2)
            core.await_store(buffer)
            if core.stage != "dma":
                core.multiply(tile, weights, rows, buffer)
                pl.when(number == 0)(lambda: core.take_shared(tile, column_tile, buffer))
                core.leave_shared(tile, column_tile, buffer)
            strips = jnp.where(last_row & (group + 1 < self.count), tile.whole_strips, tile.strips)
            if core.stage != "comp":
                core.start_store(tile, strips, column_tile, buffer)
            switch = (~again).astype(jnp.int32)
            if core.stage == "comp":
                return step + 1, rows, jnp.int32(0)
            return step + 1, jnp.where(again, rows, 1 - rows), switch

        return lax.fori_loop(0, self.mine, column, state)

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
