"""Many keys, cut into chunks: one kernel counts those of each chunk, another one places them.

The row of a key is the number of keys in the groups before its own, of those of its group in the chunks before its own,
and of those before it in its chunk, which are compared with it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu import smem
from pallas_kernels.on_gpu.strips import launch
from pallas_kernels.on_gpu.wgmma import COLUMNS, ROWS, along_columns, along_rows, iota, vector_iota, zeros
from pallas_kernels.plan.gpu.tiles import TILE, in_tiles, ints, scatter

_CHUNK = 512
"""Keys of a chunk."""

MOST_GROUPS = 4096
"""Whose counts fit into shared memory."""


def sort_many(keys: jax.Array, num_groups: int) -> list[jax.Array]:
    """Rows and order, of N keys rounded up to whole chunks, and sizes."""
    keys = in_tiles(keys, _CHUNK)
    tiles = _CHUNK // TILE
    chunks, group_tiles = keys.shape[0] // tiles, pl.cdiv(num_groups, TILE)
    counts = _count_in_chunks(keys, chunks, group_tiles)
    chunk_tiles = counts.shape[1] // TILE

    def body(keys, counts, rows, order, group_sizes, my_keys, earlier, sizes, places, values, copied):
        chunk = lax.axis_index("block")
        plgpu.copy_gmem_to_smem(keys.at[pl.ds(chunk * tiles, tiles)], my_keys, copied)

        def sum_of_groups(tile, total_before):
            """Keys of each of 64 groups: in the chunks before this one, and in all."""
            group = pl.ds(tile * TILE, TILE)

            def add(chunk_tile, sums):
                some, number = pl.ds(chunk_tile * TILE, TILE), chunk_tile * TILE + iota(1)
                value = plgpu.load(counts.at[group, some], layout=plgpu.Layout.WGMMA, optimized=False)
                return sums[0] + jnp.where(number < chunk, value, 0), sums[1] + jnp.where(number < chunks, value, 0)

            before, in_all = lax.fori_loop(0, chunk_tiles, add, (zeros(), zeros()))
            number = tile * TILE + vector_iota()
            in_all = jnp.where(number < num_groups, jnp.sum(in_all, axis=1), 0)
            earlier[group] = jnp.sum(before, axis=1)
            sizes[group] = in_all

            @pl.when(chunk == 0)
            def _():
                values[...] = in_all
                places[...] = jnp.where(number < num_groups, number, -1)
                scatter(group_sizes, places, values)

            return total_before + jnp.sum(in_all)

        num_rows = lax.fori_loop(0, group_tiles, sum_of_groups, jnp.int32(0))
        plgpu.commit_smem()
        plgpu.barrier_wait(copied)

        def place_tile(tile, _carry):
            begin = chunk * _CHUNK + tile * TILE
            number = begin + vector_iota()
            mine = plgpu.load(my_keys.at[tile], layout=ROWS)
            key = along_rows(mine)

            def add_groups(group_tile, total):
                group = pl.ds(group_tile * TILE, TILE)
                column = group_tile * TILE + iota(1)
                before = along_columns(plgpu.load(earlier.at[group], layout=COLUMNS))
                in_all = along_columns(plgpu.load(sizes.at[group], layout=COLUMNS))
                return total + jnp.where(column < key, in_all, jnp.where(column == key, before, 0))

            def is_equal(other):
                return along_columns(plgpu.load(my_keys.at[other], layout=COLUMNS)) == key

            total = (is_equal(tile) & (iota(1) < iota(0))).astype(jnp.int32)
            total = lax.fori_loop(0, tile, lambda other, total: total + is_equal(other).astype(jnp.int32), total)
            total = lax.fori_loop(0, group_tiles, add_groups, total)
            row = jnp.where((mine >= 0) & (mine < num_groups), jnp.sum(total, axis=1), -1)
            rows[pl.ds(begin, TILE)] = row
            places[...] = row
            values[...] = number
            scatter(order, places, values)

            @pl.when(begin + TILE > num_rows)
            def _():
                places[...] = jnp.where(number >= num_rows, number, -1)
                values[...] = jnp.where(number >= 0, -1, 0)
                scatter(order, places, values)

            return None

        lax.fori_loop(0, tiles, place_tile, None)

    return launch(
        body,
        [ints(keys.size), ints(keys.size), ints(num_groups)],
        keys,
        counts,
        name="counting_sort",
        blocks=chunks,
        scratch=[
            smem.ints(tiles, TILE),
            smem.ints(group_tiles * TILE),
            smem.ints(group_tiles * TILE),
            smem.ints(TILE),
            smem.ints(TILE),
            plgpu.Barrier(),
        ],
    )


def _count_in_chunks(keys: jax.Array, chunks: int, group_tiles: int) -> jax.Array:
    """How often each key occurs in each chunk: [groups, chunks], both rounded up to whole tiles; past them, garbage."""
    tiles, columns = _CHUNK // TILE, pl.cdiv(chunks, TILE) * TILE

    def body(keys, counts, my_keys, places, values, copied):
        chunk = lax.axis_index("block")
        plgpu.copy_gmem_to_smem(keys.at[pl.ds(chunk * tiles, tiles)], my_keys, copied)
        plgpu.barrier_wait(copied)

        def count_groups(group_tile, _):
            number = group_tile * TILE + iota(0)

            def add(tile, total):
                others = plgpu.load(my_keys.at[tile], layout=COLUMNS)
                return total + (along_columns(others) == number).astype(jnp.int32)

            values[...] = jnp.sum(lax.fori_loop(0, tiles, add, zeros()), axis=1)
            places[...] = (group_tile * TILE + vector_iota()) * columns + chunk
            scatter(counts, places, values)

        lax.fori_loop(0, group_tiles, count_groups, None)

    counts = launch(
        body,
        ints(group_tiles * TILE * columns),
        keys,
        name="counting_sort",
        blocks=chunks,
        scratch=[smem.ints(tiles, TILE), smem.ints(TILE), smem.ints(TILE), plgpu.Barrier()],
    )
    return counts.reshape(-1, columns)
