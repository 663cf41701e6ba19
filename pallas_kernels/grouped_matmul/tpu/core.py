"""What a TPU core does in the grouped matrix product: copies between HBM and VMEM, and the arithmetic of a tile."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.tpu.math import Arithmetic, activate, product
from pallas_kernels.grouped_matmul.tpu.memory import Config, Inputs, Layout, Scratch, chunk_lengths
from pallas_kernels.grouped_matmul.tpu.rows import Tile
from pallas_kernels.grouped_matmul.tpu.tiling import LANES
from pallas_kernels.stage import Stage


@dataclasses.dataclass(frozen=True)
class Core:
    """What one core can do. To wait for a copy, describe it again: only its shapes, that is, its bytes, matter."""

    operands: Inputs
    out: Any
    scratch: Scratch
    arithmetic: Arithmetic
    config: Config
    layout: Layout
    stage: Stage

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
        source, target, sems = pl.ds(tile.strip, tile.strips), pl.ds(0, tile.strips), self.scratch.lhs_copied.at[buffer]
        lhs, ring = self.operands.lhs, self.scratch.lhs.at[buffer]
        triples = [
            (lhs.at[source, :, part], ring.at[target, :, part], sems.at[number])
            for number, part in enumerate(_parts(self.layout.depth, self.config.copies))
        ]
        if self.operands.lhs_scale is not None:
            scale = self.operands.lhs_scale.at[source], self.scratch.lhs_scale.at[buffer, target]
            triples.append((*scale, sems.at[0]))
        for triple in triples:
            getattr(pltpu.make_async_copy(*triple), act)()

    def copy_weights(
        self, group: jax.Array, column_tile: jax.Array, buffer: Any, act: Literal["start", "wait"]
    ) -> None:
        """A tile of rhs, with its scales and bias."""
        copies = self.config.copies
        parts = _parts(self.layout.depth, max(1, copies // self.arithmetic.halves))

        def copy(width: int) -> None:
            for half in range(self.arithmetic.halves):
                columns, narrow = self.columns(column_tile, width, half), pl.ds(0, width)
                rhs, ring = self.operands.rhs.at[group], self.scratch.rhs.at[buffer, half]
                pairs = []
                for depths in parts:
                    if self.arithmetic.k_major:
                        pairs.append((rhs.at[columns, depths], ring.at[narrow, depths]))
                    else:
                        pairs.append((rhs.at[depths, columns], ring.at[depths, narrow]))
                if self.operands.rhs_scale is not None:
                    scale = self.operands.rhs_scale.at[group, :, columns]
                    pairs.append((scale, self.scratch.rhs_scale.at[buffer, half, :, narrow]))
                if self.operands.bias is not None:
                    bias = self.operands.bias.at[group, :, columns]
                    pairs.append((bias, self.scratch.bias.at[buffer, half, :, narrow]))
                for number, (source, target) in enumerate(pairs, half * len(parts)):
                    sem = self.scratch.rhs_copied.at[buffer, number % copies]
                    getattr(pltpu.make_async_copy(source, target, sem), act)()

        self.for_width(column_tile, copy)

    def copy_out(self, source: Any, strip: Any, strips: Any, column_tile: jax.Array, sems: Any, act: str) -> None:
        """Strips [strips, s, block_n] of the result, or of zeros."""

        def copy(width: int) -> None:
            first = self.columns(column_tile, width).start
            for number, part in enumerate(_parts(width, self.config.copies)):
                start = first + part.start
                start = start if isinstance(start, int) else pl.multiple_of(start, LANES)
                target = self.out.at[pl.ds(strip, strips), :, pl.ds(start, part.size)]
                narrow = source.at[pl.ds(0, strips), :, part]
                getattr(pltpu.make_async_copy(narrow, target, sems.at[number]), act)()

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

        def for_columns(start: Any, width: int) -> None:
            _for_chunks(
                config.block_m // sublanes,
                chunk_lengths(config.chunk_m // sublanes, self.layout.depth // self.arithmetic.scale_block),
                tile.strips,
                lambda first, count: compute(first, count, start, width),
            )

        _for_parts(config.block_n, config.chunk_n, for_columns)

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


def _parts(size: int, count: int) -> list[Any]:
    """At most `count` parts of a minor dimension, which are copied by themselves: whole lanes, or all of it."""
    if size % LANES:
        return [pl.ds(0, size)]
    part = pl.cdiv(size // LANES, count) * LANES
    return [pl.ds(first, min(part, size - first)) for first in range(0, size, part)]


def _for_parts(size: int, part: int, function: Any) -> None:
    """Calls `function(start, length)` for every part of `size`."""
    whole, rest = divmod(size, part)
    if whole == 1:
        function(0, part)
    elif whole:
        pl.loop(0, whole)(lambda index: function(pl.multiple_of(index * part, part), part))
    if rest:
        function(whole * part, rest)


def _for_chunks(size: int, lengths: Sequence[int], needed: Any, function: Any) -> None:
    """Calls `function(start, length)` for the first `needed` of `size`: in chunks of the last of `lengths`, and then
    for what is left in the shortest one that holds it, so that few are done in vain.
    """
    chunk = lengths[-1]
    longest_rest = lengths[-2] if len(lengths) > 1 else 0
    whole = (needed + chunk - 1 - longest_rest) // chunk
    if size == chunk:
        pl.when(whole > 0)(lambda: function(0, chunk))
    else:
        pl.loop(0, whole)(lambda index: function(pl.multiple_of(index * chunk, chunk), chunk))
    rest = needed - whole * chunk
    for shorter, length in itertools.pairwise([0, *lengths[:-1]]):
        start = 0 if size == chunk else pl.multiple_of(whole * chunk, chunk)
        pl.when((rest > shorter) & (rest <= length))(functools.partial(function, start, length))
