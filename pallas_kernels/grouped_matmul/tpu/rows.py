"""Which rows a TPU kernel visits: the groups of the window that have rows, each cut into tiles.

Memory is addressed in strips of `sublanes` rows. A tile begins at the strip that holds its group's first row and ends
with its group, so two groups may share a strip, and then the tiles of both hold it:

    group_sizes = [5, 0, 14], sublanes = 8, block_m = 16
    group 0: rows  0 to  4, strip 0           one tile, strip 0
    group 2: rows  5 to 18, strips 0, 1, 2    two tiles, strips 0 and 1, strip 2
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups that have rows, in order. Refs in scalar memory; the first `count` entries are valid.

    Attributes:
      index: int32 [G], the group's matrix.
      begin: int32 [G], its first row.
      end: int32 [G], one past its last row.
    """

    index: Any
    begin: Any
    end: Any

    def fill(
        self, group_sizes: Any, group_offset: Any, num_rows: int, block_m: int, sublanes: int
    ) -> tuple[jax.Array, jax.Array]:
        """Lists the groups with rows among the G from `group_offset` on; returns how many they and their tiles are.

        Sizes that are negative count as zero, and what exceeds `num_rows` is cut off.
        """
        first, num_groups = group_offset[0], self.index.shape[0]

        def visit(group, state):
            row, count, tiles = state
            end = row + jnp.clip(group_sizes[group], 0, num_rows - row)
            mine = (group >= first) & (end > row)

            @pl.when(mine)
            def _():
                self.index[count] = group - first
                self.begin[count] = row
                self.end[count] = end

            more = pl.cdiv(end - row // sublanes * sublanes, block_m)
            return end, count + mine.astype(jnp.int32), tiles + jnp.where(mine, more, 0)

        zero = jnp.int32(0)
        _, count, tiles = lax.fori_loop(0, first + num_groups, visit, (zero, zero, zero))
        return count, tiles


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of one group, at most `block_m` with those before it in its first strip.

    Attributes:
      strip: the first strip.
      begin: the group's first row, counted from the first strip; negative in all but its first tile.
      end: one past the group's last row, likewise; more than `block_m` in all but its last tile.
      rows: block_m.
      sublanes: rows of a strip.
    """

    strip: jax.Array
    begin: jax.Array
    end: jax.Array
    rows: int
    sublanes: int

    @classmethod
    def of(cls, groups: Groups, group: jax.Array, tile: jax.Array, block_m: int, sublanes: int) -> "Tile":
        """Tile number `tile` of the listed group number `group`."""
        begin, end = groups.begin[group], groups.end[group]
        strip = begin // sublanes + tile * (block_m // sublanes)
        return cls(strip, begin - strip * sublanes, end - strip * sublanes, block_m, sublanes)

    @staticmethod
    def count(groups: Groups, group: jax.Array, block_m: int, sublanes: int) -> jax.Array:
        """Tiles of a listed group."""
        first = groups.begin[group] // sublanes * sublanes
        return pl.cdiv(groups.end[group] - first, block_m)

    @property
    def strips(self) -> jax.Array:
        """Strips that hold rows of the tile."""
        return pl.cdiv(jnp.minimum(self.end, self.rows), self.sublanes)

    @property
    def whole_strips(self) -> jax.Array:
        """The same without a last strip in which the next group goes on."""
        return jnp.minimum(self.end, self.rows) // self.sublanes

    def owned(self, shape: tuple[int, ...], first: Any) -> jax.Array:
        """Which elements lie in rows of the group, in a part of the tile of `shape` from row `first` on."""
        row = lax.broadcasted_iota(jnp.int32, shape, 0) + first
        return (row >= self.begin) & (row < self.end)
