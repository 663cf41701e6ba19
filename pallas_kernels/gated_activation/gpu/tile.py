"""What the warpgroups of a GPU make of a tile of pre-activations and cotangents: 8 bits by rows and by columns.

First each warpgroup takes some of the rows of a tile. The 128 columns that have one scale in a row are held by
neighbouring threads, as in `rows.py`, and what they make of them goes straight to global memory.

Then each takes some of the columns, with all 128 rows. Every warp has columns of its own, and so finds their scales
alone. The GPU's matrix loads, which transpose numbers of 16 bits, give a thread two neighbours of a column at a time.
Rounded, they are neighbours in a number of 16 bits, which is stored as such: no byte moves alone. The copy engine takes
the transposed tile away.

The activation is computed once for each of the two. That costs a third more instructions, but warpgroups that rounded
the same numbers in both ways would have to hold all of them, and tell one another the largest of every row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.columns import BLOCK
from pallas_kernels.gated_activation.formulas import Gated
from pallas_kernels.on_gpu.smem import Views, single_view, swizzled
from pallas_kernels.on_gpu.strips import in_blocks, rows_in_blocks, store
from pallas_kernels.quantize import scale_of

SLOTS = 2
"""Tiles in shared memory: one that is worked on, and one that is on its way."""

_STAGED = 2
"""Results of a warpgroup by columns that wait for the copy engine."""

_PART = 32
"""Rows of a column of which the largest is found in floating point, with the signs taken off on the way."""

_GATE, _UP, _GRADIENT = range(3)
_OPERANDS = 3
"""Of a tile: gate, up and the cotangent."""


class Problem(NamedTuple):
    """What is asked, and how it is cut.

    Attributes:
      num_rows: R.
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
    """What the kernel writes; what is of gate comes before what is of up.

    Attributes:
      rows: cotangents in 8 bits [R, 2I].
      row_scale: float32 [2I/128, R].
      dh: cotangents by columns [2I, P].
      dh_scale: float32 [P/128, 2I].
      result: [I, P], likewise.
      result_scale: float32 [P/128, I].
      shares: of the cotangents of weights, float32 [I/128, R], or None.
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
      tiles: [slots, 3, warpgroups, 128, width] of gate, up and the cotangent.
      staged: [warpgroups, 2, width, 128], results by columns, as cotangents and as the result.
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
        of_results = problem.in_8_bits, problem.result_in_8_bits
        staged = [swizzled((warpgroups, _STAGED, width, BLOCK), dtype, any_row=False) for dtype in of_results]
        return cls(
            tiles=swizzled((SLOTS, _OPERANDS, warpgroups, BLOCK, width), problem.dtype),
            staged=staged if single_view.get() else plgpu.RefUnion(*staged),
            full=plgpu.Barrier(num_arrivals=_OPERANDS * warpgroups, num_barriers=SLOTS),
            empty=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=SLOTS),
        )


class Worker(NamedTuple):
    """A warpgroup, and the memory that it uses.

    Attributes:
      problem: see there.
      warpgroup: its index.
      pre: pre-activations [R, 2I].
      gradient: of the result [R, I].
      weights: of the rows of each block, float32 [B, 128]; or None.
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
        tiles, columns = Views.of(self.scratch.tiles).copied, self.problem.columns
        for operand, (source, begin) in enumerate(((self.pre, 0), (self.pre, columns), (self.gradient, 0))):
            plgpu.copy_gmem_to_smem(
                source.at[pl.ds(at.row, BLOCK), self._window(begin + self._column(at))],
                tiles.at[slot, operand, self.warpgroup],
                self.scratch.full.at[slot],
            )

    def store_by_rows(self, slot, at: Place) -> None:
        """Rounds the cotangents in this warpgroup's rows, and sums up the shares of their weights."""
        problem, rows_each = self.problem, BLOCK // self.problem.warpgroups
        height, layout = rows_in_blocks(problem.width), in_blocks(problem.width)
        shape = height, problem.width
        for piece in range(0, rows_each, height):
            start = pl.multiple_of(self.warpgroup * rows_each + piece, height)
            local, rows = pl.ds(start, height), pl.ds(at.row + start, height)
            weights = self._weights(at, local, shape, layout)
            found = [self._gated(slot, part, local, layout=layout) for part in range(problem.warpgroups)]
            # Not before: registers that hold cotangents all the while would be too many.
            gradients = [self._load(_GRADIENT, slot, part, local, layout=layout) for part in range(problem.warpgroups)]
            if self.out.shares is not None:
                # Weights multiply what the forward pass rounded, by rows.
                scale = _scale([gated.value for gated in found], 1, problem.result_in_8_bits)
                inverse = _spread(1 / scale, 0, shape, layout)
                shares = [
                    gradient * (gated.value * inverse).astype(problem.result_in_8_bits).astype(jnp.float32)
                    for gated, gradient in zip(found, gradients, strict=True)
                ]
                share = jnp.sum(functools.reduce(jnp.add, shares), axis=1) * scale
                store(self.out.shares.at[at.chunk, rows], share)
            by = zip(*(_pulled(*each, weights) for each in zip(found, gradients, strict=True)), strict=True)
            for i, values in enumerate(by):
                scale = _scale(values, 1, problem.in_8_bits)
                store(self.out.row_scale.at[i * problem.chunks + at.chunk, rows], scale)
                inverse = _spread(1 / scale, 0, shape, layout)
                begin = i * problem.columns + at.chunk * BLOCK
                for part, value in enumerate(values):
                    to = self.out.rows.at[rows, self._window(begin + part * problem.width)]
                    store(to, (value * inverse).astype(problem.in_8_bits))

    def store_by_columns(self, slot, at: Place) -> None:
        """Rounds this warpgroup's columns, of the result, of gate and of up; rows of others are zeros there."""
        problem, shape, layout = self.problem, (BLOCK, self.problem.width), _by_columns()
        weights = self._weights(at, slice(None), shape, layout)
        gated = self._gated(slot, self.warpgroup, layout=layout)
        gradient = self._load(_GRADIENT, slot, self.warpgroup, layout=layout)
        result = gated.value if weights is None else gated.value * weights
        found = [result, *_pulled(gated, gradient, weights)]

        def owned_alone():
            # Not an iota of the whole tile: a vector's numbers go along its rows, which an iota takes for columns.
            row = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=layout.reduce((1,)))
            return [jnp.where(_spread(row, 0, shape, layout) < at.num_owned, x, 0.0) for x in found]

        found = lax.cond(at.num_owned == BLOCK, lambda: found, owned_alone)
        of_dh, of_result = self.scratch.staged
        for i, value in enumerate(found):
            to, scale_to, staged = (
                (self.out.dh, self.out.dh_scale, of_dh) if i else (self.out.result, self.out.result_scale, of_result)
            )
            features = self._window(max(i - 1, 0) * problem.columns + self._column(at))
            scale = _scale([value[start : start + _PART] for start in range(0, BLOCK, _PART)], 0, staged.dtype)
            store(scale_to.at[at.block, features], scale)
            rounded = (value * _spread(1 / scale, 1, shape, layout)).astype(staged.dtype)
            mine = staged.at[self.warpgroup, i % _STAGED]
            # The copy that last used this buffer has left; at first, that may be the one just before.
            plgpu.wait_smem_to_gmem(_STAGED - 1 if i else 0, wait_read_only=True)
            mine.T[...] = rounded
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, to.at[features, pl.ds(pl.multiple_of(at.block * BLOCK, BLOCK), BLOCK)])

    def _gated(self, *place, layout) -> Gated:
        """Of a part of a tile: the result without weights, and its derivatives."""
        gate, up = (self._load(operand, *place, layout=layout) for operand in (_GATE, _UP))
        return self.problem.formulas(gate, up)

    def _load(self, operand: int, slot, *place, layout) -> jax.Array:
        """A part of a tile of an operand, in float32."""
        tiles = Views.of(self.scratch.tiles).tiled
        return plgpu.load(tiles.at[slot, operand, *place], layout=layout).astype(jnp.float32)

    def _weights(self, at: Place, rows, shape: tuple[int, int], layout) -> jax.Array | None:
        """Those of some rows, as a part of a tile."""
        if self.weights is None:
            return None
        vector = plgpu.load(self.weights.at[at.block, rows], layout=layout.reduce((1,)), optimized=False)
        return _spread(vector, 0, shape, layout)

    def _column(self, at: Place):
        """The first column of this warpgroup."""
        return at.chunk * BLOCK + self.warpgroup * self.problem.width

    def _window(self, begin):
        """The columns that a warpgroup takes, from one on."""
        return pl.ds(pl.multiple_of(begin, self.problem.width), self.problem.width)


def _pulled(gated: Gated, gradient: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The cotangents of gate and up."""
    wide = gradient if weights is None else gradient * weights
    return wide * gated.by_gate, wide * gated.by_up


def _by_columns():
    """The layout of a tile [128, width] of which every warp has some columns with all their rows.

    Within them it is that of the matrix loads that transpose: of 8 columns and 8 rows, a thread has two neighbours in a
    column.
    """
    tiling = plgpu.Tiling(((8, 32), (8, 8), (2, 1)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -4), vector_dim=-2)


def _spread(vector: jax.Array, axis: int, shape: tuple[int, int], layout) -> jax.Array:
    """A number of each row (axis 0) or column (axis 1), as a part of a tile."""
    return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), layout)


def _scale(parts: Sequence[jax.Array], axis: int, dtype: jnp.dtype) -> jax.Array:
    """The scales of columns (axis 0) or rows (axis 1) that lie in all of `parts`."""
    largest = functools.reduce(jnp.maximum, map(jnp.abs, parts))
    # As integers, in the order of which NaN comes last: a float maximum over rows skips it in interpret mode.
    bits = jnp.max(lax.bitcast_convert_type(largest, jnp.int32), axis=axis)
    return scale_of(lax.bitcast_convert_type(bits, jnp.float32), dtype)
