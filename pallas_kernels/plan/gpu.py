"""Counting sort on NVIDIA GPUs, by comparing 64 keys with 64 others at a time in a warpgroup's registers.

The row of a key is the number of keys that come before it: those that are less, and the equal ones at earlier places.
Few keys are all compared with one another, in one kernel. Many are cut into chunks: a first kernel counts each chunk's
keys, a second one adds up the counts of the chunks before its own and compares within its chunk only.

    floor in time = (4·N bytes read + 8·N bytes written) / HBM bandwidth; few keys take as long as a kernel starts
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.backend import Unsupported
from pallas_kernels.on_gpu.device import require_hopper
from pallas_kernels.plan import reference

_TILE = 64
_CHUNK = 512
_FEW_KEYS = 4096  # that are compared with one another
_MOST_GROUPS = 4096  # whose counts fit into shared memory
_STORES_AT_ONCE = 8
_TILE_ROWS, _TILE_COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def counting_sort(keys: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.plan.counting_sort`."""
    require_hopper("counting_sort")
    num_keys = keys.shape[0]
    if num_keys == 0:
        return reference.counting_sort(keys, num_groups)
    if num_groups > _MOST_GROUPS:
        raise Unsupported(f"counting_sort: the kernel takes up to {_MOST_GROUPS} groups, got {num_groups}")
    few = num_keys <= _FEW_KEYS
    keys = jnp.pad(keys, (0, -num_keys % (_TILE if few else _CHUNK)), constant_values=-1)
    rows, order, group_sizes = (_sort_few if few else _sort_many)(keys.reshape(-1, _TILE), num_groups)
    return rows[:num_keys], order[:num_keys], group_sizes


def _sort_few(keys: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    key_tiles, group_tiles = keys.shape[0], pl.cdiv(num_groups, _TILE)

    def body(keys, rows, order, group_sizes, all_keys, places, values, copied):
        plgpu.copy_gmem_to_smem(keys, all_keys, copied)
        plgpu.barrier_wait(copied)
        block = lax.axis_index("block")

        def load(tile, layout):
            """Keys and their places as one number, in the order of the sort; keys without a row come last."""
            key = plgpu.load(all_keys.at[tile], layout=layout)
            key = jnp.where((key >= 0) & (key < num_groups), key, num_groups)
            return key * keys.size + (tile * _TILE + _vector_iota(layout))

        def count_less(bound):
            """For each of 64 rows, how many keys with their places are less than its bound."""
            bound = _along_rows(bound)

            def one_tile(tile, counts):
                return counts + (_along_columns(load(tile, _TILE_COLUMNS)) < bound).astype(jnp.int32)

            return jnp.sum(lax.fori_loop(0, key_tiles, one_tile, _zeros()), axis=1)

        @pl.when(block < key_tiles)
        def _():
            mine, number = load(block, _TILE_ROWS), block * _TILE + _vector_iota()
            row, has_row = count_less(mine), mine < num_groups * keys.size
            rows[pl.ds(block * _TILE, _TILE)] = jnp.where(has_row, row, -1)
            places[...] = row
            values[...] = jnp.where(has_row, number, -1)
            _scatter(order, places, values)

        @pl.when(block >= key_tiles)
        def _():
            group = (block - key_tiles) * _TILE + _vector_iota()
            values[...] = count_less((group + 1) * keys.size) - count_less(group * keys.size)
            places[...] = jnp.where(group < num_groups, group, -1)
            _scatter(group_sizes, places, values)

    return _launch(
        body,
        [_ints(keys.size), _ints(keys.size), _ints(num_groups)],
        [_smem(key_tiles, _TILE), _smem(_TILE), _smem(_TILE), plgpu.Barrier()],
        blocks=key_tiles + group_tiles,
    )(keys)


def _sort_many(keys: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    tiles = _CHUNK // _TILE
    chunks, group_tiles = keys.shape[0] // tiles, pl.cdiv(num_groups, _TILE)
    counts = _count_in_chunks(keys, chunks, group_tiles)
    chunk_tiles = counts.shape[1] // _TILE

    def body(keys, counts, rows, order, group_sizes, my_keys, earlier, sizes, places, values, copied):
        chunk = lax.axis_index("block")
        plgpu.copy_gmem_to_smem(keys.at[pl.ds(chunk * tiles, tiles)], my_keys, copied)

        def sum_of_groups(tile, total_before):
            """Keys of each of 64 groups: in the chunks before this one, and in all."""
            group = pl.ds(tile * _TILE, _TILE)

            def add(chunk_tile, sums):
                some, number = pl.ds(chunk_tile * _TILE, _TILE), chunk_tile * _TILE + _iota(1)
                value = plgpu.load(counts.at[group, some], layout=plgpu.Layout.WGMMA, optimized=False)
                return sums[0] + jnp.where(number < chunk, value, 0), sums[1] + jnp.where(number < chunks, value, 0)

            before, in_all = lax.fori_loop(0, chunk_tiles, add, (_zeros(), _zeros()))
            number = tile * _TILE + _vector_iota()
            in_all = jnp.where(number < num_groups, jnp.sum(in_all, axis=1), 0)
            earlier[group] = jnp.sum(before, axis=1)
            sizes[group] = in_all

            @pl.when(chunk == 0)
            def _():
                values[...] = in_all
                places[...] = jnp.where(number < num_groups, number, -1)
                _scatter(group_sizes, places, values)

            return total_before + jnp.sum(in_all)

        num_rows = lax.fori_loop(0, group_tiles, sum_of_groups, jnp.int32(0))
        plgpu.commit_smem()
        plgpu.barrier_wait(copied)

        def place_tile(tile, _carry):
            begin = chunk * _CHUNK + tile * _TILE
            number = begin + _vector_iota()
            mine = plgpu.load(my_keys.at[tile], layout=_TILE_ROWS)
            key = _along_rows(mine)

            def add_groups(group_tile, total):
                group = pl.ds(group_tile * _TILE, _TILE)
                column = group_tile * _TILE + _iota(1)
                before = _along_columns(plgpu.load(earlier.at[group], layout=_TILE_COLUMNS))
                in_all = _along_columns(plgpu.load(sizes.at[group], layout=_TILE_COLUMNS))
                return total + jnp.where(column < key, in_all, jnp.where(column == key, before, 0))

            def is_equal(other):
                return _along_columns(plgpu.load(my_keys.at[other], layout=_TILE_COLUMNS)) == key

            total = (is_equal(tile) & (_iota(1) < _iota(0))).astype(jnp.int32)
            total = lax.fori_loop(0, tile, lambda other, total: total + is_equal(other).astype(jnp.int32), total)
            total = lax.fori_loop(0, group_tiles, add_groups, total)
            row = jnp.where((mine >= 0) & (mine < num_groups), jnp.sum(total, axis=1), -1)
            rows[pl.ds(begin, _TILE)] = row
            places[...] = row
            values[...] = number
            _scatter(order, places, values)

            @pl.when(begin + _TILE > num_rows)
            def _():
                places[...] = jnp.where(number >= num_rows, number, -1)
                values[...] = jnp.where(number >= 0, -1, 0)
                _scatter(order, places, values)

            return None

        lax.fori_loop(0, tiles, place_tile, None)

    return _launch(
        body,
        [_ints(keys.size), _ints(keys.size), _ints(num_groups)],
        [
            _smem(tiles, _TILE),
            _smem(group_tiles * _TILE),
            _smem(group_tiles * _TILE),
            _smem(_TILE),
            _smem(_TILE),
            plgpu.Barrier(),
        ],
        blocks=chunks,
    )(keys, counts)


def _count_in_chunks(keys: jax.Array, chunks: int, group_tiles: int) -> jax.Array:
    """How often each key occurs in each chunk: [groups, chunks], both rounded up to whole tiles; past them, garbage."""
    tiles, columns = _CHUNK // _TILE, pl.cdiv(chunks, _TILE) * _TILE

    def body(keys, counts, my_keys, places, values, copied):
        chunk = lax.axis_index("block")
        plgpu.copy_gmem_to_smem(keys.at[pl.ds(chunk * tiles, tiles)], my_keys, copied)
        plgpu.barrier_wait(copied)

        def count_groups(group_tile, _):
            number = group_tile * _TILE + _iota(0)

            def add(tile, total):
                others = plgpu.load(my_keys.at[tile], layout=_TILE_COLUMNS)
                return total + (_along_columns(others) == number).astype(jnp.int32)

            values[...] = jnp.sum(lax.fori_loop(0, tiles, add, _zeros()), axis=1)
            places[...] = (group_tile * _TILE + _vector_iota()) * columns + chunk
            _scatter(counts, places, values)

        lax.fori_loop(0, group_tiles, count_groups, None)

    counts = _launch(
        body,
        _ints(group_tiles * _TILE * columns),
        [_smem(tiles, _TILE), _smem(_TILE), _smem(_TILE), plgpu.Barrier()],
        blocks=chunks,
    )(keys)
    return counts.reshape(-1, columns)


def _scatter(out: Any, places: Any, values: Any) -> None:
    """out[places[i]] = values[i] for the 64 places that are not negative; both lie in shared memory."""
    plgpu.commit_smem()

    def store(i, _):
        some = [i * _STORES_AT_ONCE + j for j in range(_STORES_AT_ONCE)]
        for place, value in [(places[j], values[j]) for j in some]:  # all loaded before the first is stored

            @pl.when(place >= 0)
            def _(place=place, value=value):
                out[place] = value

    lax.fori_loop(0, _TILE // _STORES_AT_ONCE, store, None)
    plgpu.commit_smem()


def _zeros() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((_TILE, _TILE), jnp.int32), plgpu.Layout.WGMMA)


def _iota(axis: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (_TILE, _TILE), axis, layout=plgpu.Layout.WGMMA)


def _vector_iota(layout: Any = _TILE_ROWS) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (_TILE,), 0, layout=layout)


def _along_rows(vector: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(vector, (_TILE, _TILE), (0,))


def _along_columns(vector: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(vector, (_TILE, _TILE), (1,))


def _ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _smem(*shape: int) -> Any:
    return plgpu.SMEM(shape, jnp.int32)


def _launch(body: Any, out_type: Any, scratch: list[Any], *, blocks: int) -> Any:
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        kernel_name="counting_sort",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
