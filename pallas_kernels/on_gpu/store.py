"""Storing the rows of a tile that belong to its group."""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.smem import Views

_STORES_AT_ONCE = 8  # whose loads are issued together, so that their latencies overlap


def store_rows(out, staging: Views, warpgroup, value: jax.Array, *, row, rows, column) -> None:
    """Stores value[:rows] to out[row : row + rows, column : …], cutting off columns past the end of `out`.

    Columns pass through shared memory to the copy engine: as many at a time as half of the slots hold, or all at once
    where more than two slots hold them. It stores boxes of a size fixed in advance, so a number of rows that is known
    on the device alone goes out as boxes of powers of two, the largest first.

    Args:
      out: global memory, [M, N].
      staging: shared memory [warpgroups, slots, R, C]; C columns pass through it at a time.
      warpgroup: index of the calling warpgroup.
      value: registers, [R, columns].
      row: first row of `out`.
      rows: how many rows to store, 0 … R, a number on the device or a Python one; None for all, cut off past the end of
        `out`.
      column: first column of `out`.
    """
    slots, chunk = staging.tiled.shape[1], staging.tiled.shape[-1]
    num_chunks = value.shape[1] // chunk
    at_once = slots if 2 < slots >= num_chunks else max(1, slots // 2)

    @pl.when(rows is None or rows > 0)
    def _():
        for first in range(0, num_chunks, at_once):
            # The stores that last used these slots have left; with a remainder, they may be the ones just before.
            others = slots // at_once - 1 if first >= slots or num_chunks % slots == 0 else 0
            plgpu.wait_smem_to_gmem(others, wait_read_only=True)
            chunks = range(first, min(first + at_once, num_chunks))
            for i in chunks:
                staging.tiled[warpgroup, i % slots] = value[:, i * chunk : (i + 1) * chunk]
            plgpu.commit_smem()
            for i in chunks:
                buffer = warpgroup, i % slots
                _copy_rows(staging.copied, buffer, out, row, rows, pl.ds(column + i * chunk, chunk))
            plgpu.commit_smem_to_gmem_group()


def _copy_rows(staging, buffer, out, row, rows, columns) -> None:
    box = staging.shape[2]
    if rows is None or isinstance(rows, int):
        box = box if rows is None else rows
        plgpu.copy_smem_to_gmem(staging.at[*buffer, :box], out.at[pl.ds(row, box), columns], commit_group=False)
        return
    while box:
        begin = rows & ~(2 * box - 1)

        @pl.when((rows & box) != 0)
        def _(box=box, begin=begin):
            source = staging.at[*buffer, pl.ds(pl.multiple_of(begin, box), box)]
            plgpu.copy_smem_to_gmem(source, out.at[pl.ds(row + begin, box), columns], commit_group=False)

        box //= 2


def store_vector(out, buffer, value: jax.Array, row, rows) -> None:
    """Stores value[:rows] to out[row : row + rows]; `buffer` is shared memory [R] of this warpgroup alone."""
    num_rows = value.shape[0]

    @pl.when(rows == num_rows)
    def _():
        out[pl.ds(row, num_rows)] = value

    @pl.when((rows > 0) & (rows < num_rows))
    def _():
        buffer[...] = value
        plgpu.commit_smem()

        def store_some(i, _):
            places = [i * _STORES_AT_ONCE + j for j in range(_STORES_AT_ONCE)]
            for place, scalar in [(place, buffer[place]) for place in places]:

                @pl.when(place < rows)
                def _(place=place, scalar=scalar):
                    out[row + place] = scalar

        jax.lax.fori_loop(0, pl.cdiv(rows, _STORES_AT_ONCE), store_some, None)
        plgpu.commit_smem()
