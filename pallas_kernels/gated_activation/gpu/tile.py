"""What the warpgroups of a GPU make of a tile of pre-activations and cotangents: 8 bits by rows and by columns.

First each warpgroup takes some of the rows of a tile. The 128 columns that have one scale in a row are held by
neighbouring threads, as in `rows.py`, and what they make of them goes straight to global memory.

Then each takes some of the columns, with all 128 rows. Every warp has columns of its own, and so finds their scales
alone. The rounded tile is transposed in shared memory, from where the copy engine takes it; for that, the even rows of
a tile and its odd ones are buffers of their own: see `byte_pairs`.

The activation is computed once for each of the two. That costs a third more instructions, but warpgroups that rounded
the same numbers in both ways would have to hold all of them, and tell one another the largest of every row.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.columns import BLOCK
from pallas_kernels.gated_activation.formulas import Gated
from pallas_kernels.on_gpu.byte_pairs import Transposed, side_by_side
from pallas_kernels.on_gpu.smem import Views, swizzled
from pallas_kernels.on_gpu.strips import in_blocks, rows_in_blocks, store
from pallas_kernels.quantize import scale_of

HALF = BLOCK // 2
"""Even rows of a block, and odd ones."""

SLOTS = 2
"""Tiles in shared memory: one that is worked on, and one that is on its way."""

_STAGED = 2
"""Results of a warpgroup by columns that wait for the copy engine."""

_OPERANDS = 3
"""Gate, up and the cotangent."""

_GRADIENT = 2
"""The last of these."""


class Problem(NamedTuple):
    """What is asked, and how it is cut.

    Attributes:
      num_rows: R, even.
      columns: I, a multiple of 128.
      dtype: of the operands, of 16 bits.
      in_8_bits: dtype of the cotangents of gate and up.
      result_in_8_bits: dtype of the result.
      warpgroups: that share a tile.
      formulas: (gate, up) -> the result and its derivatives.
    """

    num_rows: int
    columns: int
    dtype: jnp.dtype
    in_8_bits: jnp.dtype
    result_in_8_bits: jnp.dtype
    warpgroups: int
    formulas: Callable[[jax.Array, jax.Array], Gated]

    @property
    def pairs(self) -> int:
        """Pairs of an even row and the odd one after it."""
        return self.num_rows // 2

    @property
    def chunks(self) -> int:
        """Tiles side by side."""
        return self.columns // BLOCK

    @property
    def width(self) -> int:
        """Columns of a tile that a warpgroup takes."""
        return BLOCK // self.warpgroups


class Place(NamedTuple):
    """Which tile it is.

    Attributes:
      block: of rows.
      chunk: of columns.
      row: the first.
      num_owned: how many rows are the group's; 0 if there is nothing to do by columns.
    """

    block: Any
    chunk: Any
    row: Any
    num_owned: Any


class Results(NamedTuple):
    """What the kernel writes, with pairs of rows as one: those of gate come before those of up.

    Attributes:
      rows: cotangents in 8 bits [R/2, 2 · 2I].
      row_scale: float32 [2I/128, R/2, 2].
      dh: cotangents by columns [2I, P], or in pairs: see `byte_pairs`.
      dh_scale: float32 [P/128, 2I].
      result: [I, P], likewise.
      result_scale: float32 [P/128, I].
      shares: of the cotangents of weights, float32 [I/128, R/2, 2], or None.
    """

    rows: Any
    row_scale: Any
    dh: Any
    dh_scale: Any
    result: Any
    result_scale: Any
    shares: Any = None


class Scratch(NamedTuple):
    """Shared memory and barriers of a block of threads.

    Attributes:
      tiles: [slots, 3, 2, warpgroups, 64, width] of gate, up and the cotangent, even rows and odd rows.
      staged: [warpgroups, 2, width, 128], results by columns.
      full: [slots] barriers, complete when a tile has landed.
      empty: [slots] barriers, complete when all warpgroups have read a tile.
    """

    tiles: Any
    staged: Any
    full: Any
    empty: Any

    @classmethod
    def describe(cls, problem: Problem) -> "Scratch":
        """The types to allocate."""
        warpgroups, width = problem.warpgroups, problem.width
        staged = (warpgroups, _STAGED, width, BLOCK)
        return cls(
            tiles=swizzled((SLOTS, _OPERANDS, 2, warpgroups, HALF, width), problem.dtype),
            staged=Transposed.describe(staged, problem.in_8_bits, problem.result_in_8_bits),
            full=plgpu.Barrier(num_arrivals=_OPERANDS * 2 * warpgroups, num_barriers=SLOTS),
            empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=SLOTS),
        )


class Worker(NamedTuple):
    """A warpgroup, and the memory that it uses.

    Attributes:
      problem: see there.
      warpgroup: its index.
      pre: pre-activations [R/2, 2 · 2I].
      gradient: of the result [R/2, 2 · I].
      weights: of the rows of each block, float32 [B, 2, 64], even rows and odd rows; or None.
      out: see `Results`.
      scratch: see `Scratch`.
    """

    problem: Problem
    warpgroup: Any
    pre: Any
    gradient: Any
    weights: Any
    out: Results
    scratch: Scratch

    def fetch(self, slot, at: Place) -> None:
        """Has this warpgroup's columns of a tile copied."""
        sources = (self.pre, 0), (self.pre, self.problem.columns), (self.gradient, 0)
        for parity in range(2):
            pair, side = _pair(at.row + parity)
            for operand, (source, begin) in enumerate(sources):
                place = side * (source.shape[1] // 2) + begin + self._column(at)
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(pair, HALF), self._window(place)],
                    Views.of(self.scratch.tiles).copied.at[slot, operand, parity, self.warpgroup],
                    self.scratch.full.at[slot],
                )

    def store_by_rows(self, slot, at: Place) -> None:
        """Rounds this warpgroup's rows, all even or all odd, of gate and of up, and sums up their weights' shares."""
        problem = self.problem
        parity, rows_each = lax.rem(self.warpgroup, 2), BLOCK // problem.warpgroups
        pair, side = _pair(at.row + parity)
        height, layout = rows_in_blocks(problem.width), in_blocks(problem.width)
        for piece in range(0, rows_each, height):
            start = pl.multiple_of(lax.div(self.warpgroup, 2) * rows_each + piece, height)
            local, rows = pl.ds(start, height), pl.ds(pair + start, height)
            weights = self._weights(at, parity, local, (height, problem.width), layout)
            found = [
                self._pulled(weights, slot, parity, part, local, layout=layout) for part in range(problem.warpgroups)
            ]
            values, *by = zip(*found, strict=True)
            if self.out.shares is not None:
                # Weights multiply what the forward pass rounded, by rows.
                scale = _scale(values, 1, problem.result_in_8_bits)
                inverse = _spread(1 / scale, 0, (height, problem.width), layout)
                shares = [
                    self._load(_GRADIENT, slot, parity, part, local, layout=layout)
                    * (value * inverse).astype(problem.result_in_8_bits).astype(jnp.float32)
                    for part, value in enumerate(values)
                ]
                share = jnp.sum(functools.reduce(jnp.add, shares), axis=1) * scale
                store(self.out.shares.at[at.chunk, rows, side], share)
            for i, values in enumerate(by):
                scale = _scale(values, 1, problem.in_8_bits)
                store(self.out.row_scale.at[i * problem.chunks + at.chunk, rows, side], scale)
                inverse = _spread(1 / scale, 0, (height, problem.width), layout)
                begin = (2 * side + i) * problem.columns + at.chunk * BLOCK
                for part, value in enumerate(values):
                    to = self.out.rows.at[rows, self._window(begin + part * problem.width)]
                    store(to, (value * inverse).astype(problem.in_8_bits))

    def store_by_columns(self, slot, at: Place) -> None:
        """Rounds this warpgroup's columns, of the result, of gate and of up; rows of others are zeros there."""
        problem = self.problem
        shape, layout = (HALF, problem.width), _by_columns()
        staged = Transposed.of(self.scratch.staged, 2)
        halves = []
        for parity in range(2):
            weights = self._weights(at, parity, slice(None), shape, layout)
            result, *by = self._pulled(weights, slot, parity, self.warpgroup, layout=layout)
            halves.append([result if weights is None else result * weights, *by])

        def owned_alone():
            row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            is_owned = [2 * row + parity < at.num_owned for parity in range(2)]
            return [[jnp.where(is_owned[parity], x, 0.0) for x in half] for parity, half in enumerate(halves)]

        halves = lax.cond(at.num_owned == BLOCK, lambda: halves, owned_alone)
        of_result, of_dh = (self.out.result, self.out.result_scale), (self.out.dh, self.out.dh_scale)
        for i, values in enumerate(zip(*halves, strict=True)):
            (to, scale_to), dtype = (of_dh, problem.in_8_bits) if i else (of_result, problem.result_in_8_bits)
            features = self._window(max(i - 1, 0) * problem.columns + self._column(at))
            scale = _scale(values, 0, dtype)
            store(scale_to.at[at.block, features], scale)
            inverse = _spread(1 / scale, 1, shape, layout)
            even, odd = ((x * inverse).astype(dtype) for x in values)
            mine = self.warpgroup, i % _STAGED
            # The copy that last used this buffer has left; at first, that may be the one just before.
            plgpu.wait_smem_to_gmem(_STAGED - 1 if i else 0, wait_read_only=True)
            staged.pairs.at[mine].T[...] = side_by_side(even, odd)
            plgpu.commit_smem()
            rounded = staged.values[0 if i else 1].at[mine]
            length = rounded.shape[1]
            rows = pl.ds(pl.multiple_of(at.block * length, length), length)
            plgpu.copy_smem_to_gmem(rounded, to.at[features, rows])

    def _pulled(self, weights: jax.Array | None, *place, layout) -> tuple[jax.Array, ...]:
        """Of a part of a tile, float32: the result without weights, and cotangents."""
        gate, up, gradient = (self._load(operand, *place, layout=layout) for operand in range(_OPERANDS))
        found = self.problem.formulas(gate, up)
        wide = gradient if weights is None else gradient * weights
        return found.value, wide * found.by_gate, wide * found.by_up

    def _load(self, operand: int, slot, *place, layout) -> jax.Array:
        """A part of a tile of an operand, in float32."""
        tiles = Views.of(self.scratch.tiles).tiled
        return plgpu.load(tiles.at[slot, operand, *place], layout=layout).astype(jnp.float32)

    def _weights(self, at: Place, parity, rows, shape: tuple[int, int], layout) -> jax.Array | None:
        """Those of some rows, as a part of a tile."""
        if self.weights is None:
            return None
        vector = plgpu.load(self.weights.at[at.block, parity, rows], layout=layout.reduce((1,)), optimized=False)
        return _spread(vector, 0, shape, layout)

    def _column(self, at: Place):
        """The first column of this warpgroup."""
        return at.chunk * BLOCK + self.warpgroup * self.problem.width

    def _window(self, begin):
        """The columns that a warpgroup takes, from one on."""
        return pl.ds(pl.multiple_of(begin, self.problem.width), self.problem.width)


def _pair(row):
    """Which pair of rows a row is of, and which of the two it is."""
    return lax.shift_right_logical(row, 1), row & 1


def _by_columns():
    """The layout of a tile [64, width] of which every warp has some columns with all their rows.

    Within them it is that of the matrix stores: 8 rows of 8 numbers, of which a thread has two neighbours in a row.
    """
    tiling = plgpu.Tiling(((HALF, 32), (HALF, 8), (8, 8), (2,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-6,), lane_dims=(-3, -2), vector_dim=-1)


def _spread(vector: jax.Array, axis: int, shape: tuple[int, int], layout) -> jax.Array:
    """A number of each row (axis 0) or column (axis 1), as a part of a tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), layout)


def _scale(parts: tuple[jax.Array, ...], axis: int, dtype: jnp.dtype) -> jax.Array:
    """The scales of columns (axis 0) or rows (axis 1) that lie in all of `parts`."""
    largest = functools.reduce(jnp.maximum, map(jnp.abs, parts))
    # As integers, in the order of which NaN comes last: a float maximum over rows skips it in interpret mode.
    bits = jnp.max(lax.bitcast_convert_type(largest, jnp.int32), axis=axis)
    return scale_of(lax.bitcast_convert_type(bits, jnp.float32), dtype)
