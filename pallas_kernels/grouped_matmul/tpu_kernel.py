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
import functools
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
      chunk_m: rows that are multiplied at a time, a multiple of the strip.
      chunk_n: columns that are multiplied at a time.
    """

    block_m: int
    block_n: int
    weight_buffers: int
    chunk_m: int
    chunk_n: int


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

    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # elsewhere XLA might move what it believes to fit VMEM
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((layout.strips, layout.sublanes, layout.columns), arithmetic.out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores,),
            in_specs=[in_hbm] * sum(present),
            out_specs=in_hbm,
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

    group_index: Any
    group_begin: Any
    group_end: Any
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
        per_group = pltpu.SMEM((layout.groups,), jnp.int32)
        return list(
            cls(
                group_index=per_group,
                group_begin=per_group,
                group_end=per_group,
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
        scratch, cores = self.scratch, self.layout.cores
        core: Any = pl.program_id(0) if cores > 1 else 0
        groups = Groups(scratch.group_index, scratch.group_begin, scratch.group_end)
        num_rows = self.layout.strips * self.layout.sublanes
        count = groups.fill(sizes_ref, offset_ref, num_rows)
        mine = (self.layout.column_tiles - core + cores - 1) // cores
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
        lax.fori_loop(0, schedule.steps(), schedule.step, _Place.first())
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
        """Computes a tile of out from the given buffers of rhs and lhs, as much at a time as registers hold."""
        scratch, config, sublanes = self.scratch, self.config, self.layout.sublanes

        def compute(first: Any, strips: int, start: Any, width: int) -> None:
            at, columns = pl.ds(first, strips), pl.ds(start, width)
            lhs_scale = None if self.operands.lhs_scale is None else scratch.lhs_scale.at[rows, at]
            parts = []
            for half in range(self.arithmetic.halves):
                rhs = scratch.rhs.at[weights, half]
                rhs = rhs.at[columns] if self.arithmetic.k_major else rhs.at[:, columns]
                rhs_scale = None
                if self.operands.rhs_scale is not None:
                    rhs_scale = scratch.rhs_scale.at[weights, half, :, columns]
                part = product(scratch.lhs.at[rows, at], lhs_scale, rhs, rhs_scale, self.arithmetic)
                if self.operands.bias is not None:
                    part += scratch.bias[weights, half, :, columns]
                parts.append(part)
            out = activate(parts, self.arithmetic)
            out = jnp.where(tile.owned(out.shape, first * sublanes), out, 0).astype(self.arithmetic.out_dtype)
            scratch.out[buffer, at, :, columns] = out.reshape(strips, sublanes, width)

        strips = config.block_m // sublanes

        def for_columns(start: Any, width: int) -> None:
            # Rows that the group does not have are not multiplied.
            _for_parts(
                strips,
                config.chunk_m // sublanes,
                tile.strips,
                lambda first, count: compute(first, count, start, width),
            )

        _for_parts(config.block_n, config.chunk_n, None, for_columns)

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

    def steps(self) -> Any:
        """How many tiles the core computes."""
        core = self.core

        def add(group, total):
            return total + Tile.count(self.groups, group, core.config.block_m, core.layout.sublanes)

        return lax.fori_loop(0, self.count, add, jnp.int32(0)) * self.mine

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


def _for_parts(size: int, part: int, needed: Any, function: Any) -> None:
    """Calls `function(start, length)` for every part of `size`; for those below `needed` if it is not None."""
    whole = size // part
    if whole == 1:
        function(0, part)
    elif whole:
        count = whole if needed is None else jnp.minimum(pl.cdiv(needed, part), whole)
        pl.loop(0, count)(lambda index: function(pl.multiple_of(index * part, part), part))
    if size % part:
        rest = functools.partial(function, whole * part, size % part)
        rest() if needed is None else pl.when(needed > whole * part)(rest)
