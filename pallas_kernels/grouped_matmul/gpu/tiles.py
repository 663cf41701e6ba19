"""Which output tile a block works on next: the walk of a persistent grid over ragged groups.

Every group is cut into its own tiles, so that no tile holds rows of two groups: a group of s rows has
ceil(s / block_m) row tiles, each as many column tiles as the output has. Tiles are numbered group by group, and block
b takes the tiles b, b + blocks, b + 2·blocks, … The sizes of the groups are known on the device alone, so each
warpgroup finds its tiles there, walking over the groups in chunks: no sort on the host, no metadata, and no code that
grows with the number of groups.

Rows that no group owns (past the sum of the sizes) form one more group at the end, index `num_groups`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_CHUNK = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tile:
    """One tile of the output (scalars on the device).

    Attributes:
      group: index into the group sizes; `num_groups` for the rows that no group owns.
      row: first row.
      rows: how many of the tile's rows belong to the group, at least 1.
      column: index of the column tile.
    """

    group: jax.Array
    row: jax.Array
    rows: jax.Array
    column: jax.Array


@dataclasses.dataclass(frozen=True)
class Walk:
    """The tiles of an output [num_rows, column_tiles · block_n].

    Attributes:
      num_groups: how many group sizes there are.
      num_rows: rows of the output.
      block_m: rows of a tile.
      column_tiles: tiles side by side.
      strip: how many column tiles are visited for one row tile before the next row tile; blocks that run at the same
        time then share both operands in the cache.
    """

    num_groups: int
    num_rows: int
    block_m: int
    column_tiles: int
    strip: int

    @property
    def expected_tiles(self) -> int:
        """How many tiles there are if the rows are spread evenly over the groups."""
        groups = min(self.num_groups, self.num_rows)
        rows = -(-self.num_rows // groups)
        return groups * -(-rows // self.block_m) * self.column_tiles

    def for_each(self, sizes_ref, first: jax.Array, step: jax.Array | int, body: Callable[[Tile, Any], Any], carry):
        """Calls `carry = body(tile, carry)` for the tiles first, first + step, …; returns the last carry."""

        def more(state):
            index, cursor, _ = state
            return index < cursor.tile_end

        def next_tile(state):
            index, cursor, carry = state
            carry = body(self._tile(index, cursor), carry)
            index = index + step
            return index, self._advance(sizes_ref, index, cursor), carry

        zero = jnp.int32(0)
        first = jnp.asarray(first, jnp.int32)
        cursor = self._advance(sizes_ref, first, self._chunk(sizes_ref, zero, zero, zero))
        return lax.while_loop(more, next_tile, (first, cursor, carry))[2]

    def _advance(self, sizes_ref, index, cursor: "_Cursor") -> "_Cursor":
        """Moves the cursor to the chunk that holds the tile `index`, or to the last chunk."""

        def is_before(cursor):
            return (cursor.tile_end <= index) & (cursor.group + _CHUNK <= self.num_groups)

        def next_chunk(cursor):
            return self._chunk(sizes_ref, cursor.group + _CHUNK, cursor.row_end, cursor.tile_end)

        return lax.while_loop(is_before, next_chunk, cursor)

    def _chunk(self, sizes_ref, group, row, tile) -> "_Cursor":
        loaded = [sizes_ref[jnp.minimum(group + i, self.num_groups - 1)] for i in range(_CHUNK)]
        row_end, tile_end, sizes = row, tile, []
        for i, size in enumerate(loaded):
            left = self.num_rows - row_end
            unowned = jnp.where(group + i == self.num_groups, left, 0)
            sizes.append(jnp.where(group + i < self.num_groups, jnp.clip(size, 0, left), unowned))
            row_end, tile_end = row_end + sizes[-1], tile_end + self._row_tiles(sizes[-1]) * self.column_tiles
        return _Cursor(group, row, tile, row_end, tile_end, tuple(sizes))

    def _row_tiles(self, size):
        return lax.div(size + (self.block_m - 1), jnp.int32(self.block_m))

    def _tile(self, index, cursor: "_Cursor") -> Tile:
        row, tile = cursor.row, cursor.tile
        group, begin, first, mine = cursor.group, row, tile, cursor.sizes[0]
        for i, size in enumerate(cursor.sizes):
            is_past = tile <= index
            group = jnp.where(is_past, cursor.group + i, group)
            begin, first = jnp.where(is_past, row, begin), jnp.where(is_past, tile, first)
            mine = jnp.where(is_past, size, mine)
            row, tile = row + size, tile + self._row_tiles(size) * self.column_tiles
        row_tile, column = place_in_strips(index - first, self._row_tiles(mine), self.column_tiles, self.strip)
        row = begin + row_tile * self.block_m
        return Tile(group, row, jnp.minimum(self.block_m, begin + mine - row), column)


def place_in_strips(local, row_tiles, column_tiles: int, strip: int):
    """Row tile and column tile of the tile number `local` of a group of `row_tiles` by `column_tiles`.

    Goes down a strip of `strip` column tiles, row by row, before the next strip.
    """
    if strip >= column_tiles:
        return lax.div(local, jnp.int32(column_tiles)), lax.rem(local, jnp.int32(column_tiles))
    index = lax.div(local, row_tiles * strip)
    local = local - index * row_tiles * strip
    width = jnp.minimum(strip, column_tiles - index * strip)
    return lax.div(local, width), index * strip + lax.rem(local, width)


class _Cursor(NamedTuple):
    """A chunk of groups: its first group, row and tile, the row and tile after it, and its sizes."""

    group: jax.Array
    row: jax.Array
    tile: jax.Array
    row_end: jax.Array
    tile_end: jax.Array
    sizes: tuple[jax.Array, ...]
