"""Few keys, all compared with one another.

The row of a key is the number of keys that come before it: those that are less, and the equal ones at earlier places. A
key and its place are one number here, so that it is the number of numbers that are less.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu import smem
from pallas_kernels.on_gpu.strips import launch
from pallas_kernels.on_gpu.wgmma import COLUMNS, ROWS, along_columns, along_rows, vector_iota, zeros
from pallas_kernels.plan.gpu.tiles import TILE, in_tiles, ints, scatter


def sort_few(keys: jax.Array, num_groups: int) -> list[jax.Array]:
    """Rows and order, of N keys rounded up to a multiple of 64, and sizes: a block for 64 keys or groups."""
    keys = in_tiles(keys)

    def body(keys, rows, order, group_sizes, memory):
        few = FewKeys(keys, memory, num_groups)
        few.copy()
        few.sort(lax.axis_index("block"), rows, order, group_sizes)

    return launch(
        body,
        results(keys, num_groups),
        keys,
        name="counting_sort",
        blocks=blocks_to_sort(keys, num_groups),
        scratch=[Memory.describe(keys)],
    )


def blocks_to_sort(keys: Any, num_groups: int) -> int:
    """How many blocks `FewKeys.sort` takes."""
    return keys.shape[0] + pl.cdiv(num_groups, TILE)


def results(keys: jax.Array, num_groups: int) -> list[jax.ShapeDtypeStruct]:
    """The shapes of rows, order and sizes."""
    return [ints(keys.size), ints(keys.size), ints(num_groups)]


class Memory(NamedTuple):
    """Shared memory of a block.

    Attributes:
      keys: all of them.
      places: where 64 numbers go.
      values: these.
      copied: barrier, complete when the keys have landed.
    """

    keys: Any
    places: Any
    values: Any
    copied: Any

    @classmethod
    def describe(cls, keys: jax.Array) -> "Memory":
        """The types to allocate."""
        return cls(smem.ints(*keys.shape), smem.ints(TILE), smem.ints(TILE), plgpu.Barrier())


class FewKeys:
    """The keys [tiles, 64], on the device."""

    def __init__(self, keys: Any, memory: Memory, num_groups: int):
        self._source, self._memory, self._num_groups = keys, memory, num_groups
        self._tiles, self._count = keys.shape[0], keys.shape[0] * TILE

    def copy(self):
        """Starts the copy of the keys, for which all else waits."""
        plgpu.copy_gmem_to_smem(self._source, self._memory.keys, self._memory.copied)

    def sort(self, block, rows, order, group_sizes):
        """What a block of the sort does: the first place 64 keys each, the others count those of 64 groups each."""
        memory, count, num_groups = self._memory, self._count, self._num_groups
        plgpu.barrier_wait(memory.copied)

        @pl.when(block < self._tiles)
        def _():
            mine, number = self._load(block, ROWS), block * TILE + vector_iota()
            row, has_row = self._count_less(mine), mine < num_groups * count
            rows[pl.ds(block * TILE, TILE)] = jnp.where(has_row, row, -1)
            memory.places[...] = row
            memory.values[...] = jnp.where(has_row, number, -1)
            scatter(order, memory.places, memory.values)

        @pl.when(block >= self._tiles)
        def _():
            group = (block - self._tiles) * TILE + vector_iota()
            memory.values[...] = self._count_less((group + 1) * count) - self._count_less(group * count)
            memory.places[...] = jnp.where(group < num_groups, group, -1)
            scatter(group_sizes, memory.places, memory.values)

    def place(self, first, number: int) -> list[tuple[Any, Any]]:
        """For each of `number` keys from that at `first` on: its row, and whether it is of a group.

        Keys of no group have the rows behind all others. To be called once: what it returns lies in shared memory.
        """
        memory, count = self._memory, self._count
        plgpu.barrier_wait(memory.copied)
        keys, numbers = [], jnp.zeros_like(vector_iota())
        for i in range(number):
            place = first + i
            key = self._of_group(memory.keys[lax.div(place, jnp.int32(TILE)), lax.rem(place, jnp.int32(TILE))])
            numbers = jnp.where(vector_iota() == i, key * count + place, numbers)
            keys.append(key)
        memory.places[...] = self._count_less(numbers)
        plgpu.commit_smem()
        return [(memory.places[i], key < self._num_groups) for i, key in enumerate(keys)]

    def _of_group(self, key):
        """A key as it is compared; those of no group come last."""
        return jnp.where((key >= 0) & (key < self._num_groups), key, self._num_groups)

    def _load(self, tile, layout):
        """Keys with their places, in the order of the sort."""
        key = self._of_group(plgpu.load(self._memory.keys.at[tile], layout=layout))
        return key * self._count + (tile * TILE + vector_iota(layout))

    def _count_less(self, bound):
        """For each of 64 rows, how many keys with their places are less than its bound."""
        bound = along_rows(bound)

        def one_tile(tile, counts):
            return counts + (along_columns(self._load(tile, COLUMNS)) < bound).astype(jnp.int32)

        return jnp.sum(lax.fori_loop(0, self._tiles, one_tile, zeros()), axis=1)
