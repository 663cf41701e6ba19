"""The product of one to eight rows, in one launch: float32 products that each thread adds up in registers.

The matrix units would have float32 factors split into parts first, which are written, read and added up again: several
kernels, each of which takes longer than the bytes need.

A block has 4 or 8 columns of rhs, which lie in one sector of memory, and its four warpgroups take pieces of the rows in
turn. A thread has 4 columns of one row of a piece; nothing is moved between threads before the end:

    a block's columns of rhs          registers           shared memory
    turn 0   │ piece of warpgroup 0   of warpgroup 0 ┐
             │ piece of warpgroup 1   of warpgroup 1 ├ →  [M, 4, rows, columns]  →  [M, 4, columns]  →  out
             │ piece of warpgroup 2   of warpgroup 2 │
             │ piece of warpgroup 3   of warpgroup 3 ┘
    turn 1   │ piece of warpgroup 0
             …

At the end a warpgroup takes every fourth row of the result; each of its warps adds up what one warpgroup has. The order
of every sum follows from the sizes alone.

    floor in time = (K · N numbers of rhs) / HBM bandwidth; for a router's sizes the memory's latency, once for each
    `Config.pieces` turns
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import Chip
from pallas_kernels.dtypes import is_float
from pallas_kernels.on_gpu.strips import WARPGROUP, spread, store
from pallas_kernels.tracing.concrete import is_symbolic

_MOST_ROWS = 8
_MOST_ROWS_OF_16_BITS = 4
"""Where both factors have 16 bits the matrix units take them as they are (H200, 8 rows, 2048 by 128, BF16: 3.7 µs in
two kernels, 4.7 here; one row 3.9 and 3.1)."""
_TEAMS = 4
_WARPS = 4  # of a warpgroup
_VECTOR = 4  # columns of a thread
_LEFT_AHEAD = 16
"""Numbers of lhs that a thread asks for before it needs them."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is cut.

    Attributes:
      columns: of a block, 4 or 8.
      pieces: of rhs that a warpgroup asks memory for at once.
    """

    columns: int
    pieces: int = 8

    @property
    def rows(self) -> int:
        """Rows of a piece."""
        return WARPGROUP * _VECTOR // self.columns

    @property
    def layout(self) -> Any:
        """Of a piece, each thread with a part of a row."""
        tiles = (self.rows, self.columns), (self.rows // _WARPS, self.columns)
        if self.columns == _VECTOR:
            return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=(-4,), lane_dims=(-2,), vector_dim=-1)
        tiling = plgpu.Tiling((*tiles, (_VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)

    @property
    def layout_of_sums(self) -> Any:
        """Of the sums of all warpgroups, each warp with those of one."""
        tile = _TEAMS, self.rows // _WARPS, self.columns
        if self.columns == _VECTOR:
            return plgpu.Layout.TILED(plgpu.Tiling((tile,)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        tiling = plgpu.Tiling((tile, (_VECTOR,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


def pick(lhs: jax.Array, rhs: jax.Array, out_dtype: jnp.dtype, chip: Chip) -> Config | None:
    """How the kernel takes this product; None if it does not, or if more blocks were needed than run at a time."""
    if is_symbolic(*lhs.shape, *rhs.shape) or out_dtype != jnp.float32:
        return None
    if not (is_float(lhs.dtype) and is_float(rhs.dtype)):
        return None
    (num_rows, depth), num_columns = lhs.shape, rhs.shape[1]
    config = Config(columns=4 if num_columns <= 4 * chip.cores else 8)
    most_rows = _MOST_ROWS if 4 in (lhs.dtype.itemsize, rhs.dtype.itemsize) else _MOST_ROWS_OF_16_BITS
    is_few = 1 <= num_rows <= most_rows and depth >= config.rows
    # Columns in multiples of the larger of both blocks: there are few sizes, whatever the chip.
    return config if is_few and num_columns % 8 == 0 and 0 < num_columns <= config.columns * chip.cores else None


def float32_matmul(lhs: jax.Array, rhs: jax.Array, config: Config) -> jax.Array:
    """The product in float32, [M, K] · [K, N] -> [M, N], of factors that `pick` takes."""
    (num_rows, depth), num_columns = lhs.shape, rhs.shape[1]
    rows, layout = config.rows, config.layout
    vector_layout, row_layout = layout.reduce((1,)), config.layout_of_sums.reduce((0, 1))
    turns, rest = divmod(depth, _TEAMS * rows)
    loops, turns_at_end = divmod(turns, config.pieces)
    ahead = max(1, _LEFT_AHEAD // num_rows)

    def body(lhs, rhs, out, sums, sums_of_teams, written):
        team = lax.axis_index("warpgroup")
        window = pl.ds(lax.axis_index("block") * config.columns, config.columns)

        def load_right(first) -> jax.Array:
            return plgpu.load(rhs.at[pl.ds(first, rows), window], layout=layout, optimized=False)

        def load_left(first) -> list[jax.Array]:
            piece = pl.ds(first, rows)
            return [plgpu.load(lhs.at[t, piece], layout=vector_layout, optimized=False) for t in range(num_rows)]

        def along(vector: jax.Array) -> jax.Array:
            return spread(vector, config.columns, layout)

        def add(totals, turn, count: int, *, to_the_end: bool = False) -> list[jax.Array]:
            """`totals` with the products of `count` turns; `to_the_end`, the last turn is the one that is not whole."""
            begins = [((turn + i) * _TEAMS + team) * rows for i in range(count)]
            firsts = list(begins)
            if to_the_end:
                firsts[-1] = jnp.minimum(begins[-1], depth - rows)
            right = [load_right(first) for first in firsts]
            left = [load_left(first) for first in firsts[:ahead]]
            for i, factor in enumerate(right):
                if i + ahead < count:
                    left.append(load_left(firsts[i + ahead]))
                factor, vectors = factor.astype(jnp.float32), [x.astype(jnp.float32) for x in left[i]]
                if to_the_end and i == count - 1:
                    # What comes before its own rows is another piece's. Zeros in one factor would not do: 0 · inf.
                    row, first_own = _iota(rows, vector_layout), begins[i] - firsts[i]
                    vectors = [jnp.where(row >= first_own, x, 0.0) for x in vectors]
                    factor = jnp.where(along(row) >= first_own, factor, 0.0)
                totals = [total + along(x) * factor for total, x in zip(totals, vectors, strict=True)]
            return totals

        zeros = plgpu.layout_cast(jnp.zeros((rows, config.columns), jnp.float32), layout)
        totals = lax.fori_loop(
            0, loops, lambda i, totals: add(totals, i * config.pieces, config.pieces), [zeros] * num_rows
        )
        totals = add(totals, loops * config.pieces, turns_at_end + (rest > 0), to_the_end=rest > 0)
        for t, total in enumerate(totals):
            store(sums.at[t, team], total)
        plgpu.commit_smem()
        plgpu.barrier_arrive(written)
        plgpu.barrier_wait(written)

        def finish(t) -> None:
            of_all = plgpu.load(sums.at[t], layout=config.layout_of_sums, optimized=False)
            store(sums_of_teams.at[t], jnp.sum(of_all, axis=1))
            plgpu.commit_smem()
            terms = [plgpu.load(sums_of_teams.at[t, i], layout=row_layout, optimized=False) for i in range(_TEAMS)]
            store(out.at[t, window], functools.reduce(operator.add, terms))

        for begin in range(0, num_rows, _TEAMS):
            pl.when(begin + team < num_rows)(functools.partial(finish, begin + team))

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, num_columns), jnp.float32),
        scratch_types=[
            plgpu.SMEM((num_rows, _TEAMS, rows, config.columns), jnp.float32),
            plgpu.SMEM((num_rows, _TEAMS, config.columns), jnp.float32),
            plgpu.Barrier(num_arrivals=_TEAMS),
        ],
        grid=(num_columns // config.columns,),
        grid_names=("block",),
        num_threads=_TEAMS,
        thread_name="warpgroup",
        kernel_name="float32_matmul",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(lhs, rhs)


def _iota(rows: int, layout: Any) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=layout)
