"""How a block's warpgroups know its tiles: the loading one finds them, and tells the others through shared memory.

To find a tile takes a walk over the sizes of the groups, which can be longer than a tile's arithmetic. The loader walks
while the others multiply, some tiles ahead of them:

    told[slot]    the tile in this slot can be read
    heard[slot]   every math warpgroup has read it

Tile n uses slot n mod `_MOST_AHEAD`. After the last tile comes one of a negative number of rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.gpu.tiles import Tile

_MOST_AHEAD = 8
_FIELDS = 4
_END = -1


class Announcements(NamedTuple):
    """Shared memory and barriers of a block for its tiles.

    Attributes:
      tiles: int32 [slots, fields].
      told: [slots] barriers, of the loading warpgroup.
      heard: [slots] barriers, of every math warpgroup.
    """

    tiles: Any
    told: Any
    heard: Any

    @classmethod
    def describe(cls, warpgroups: int) -> "Announcements":
        """The types to allocate for so many math warpgroups."""
        return cls(
            tiles=plgpu.SMEM((_MOST_AHEAD, _FIELDS), jnp.int32),
            told=plgpu.Barrier(num_barriers=_MOST_AHEAD),
            heard=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=_MOST_AHEAD),
        )

    def tell(self, number: jax.Array, tile: Tile) -> None:
        """Announces a block's tile of that number."""
        slot = lax.rem(number, jnp.int32(_MOST_AHEAD))
        pl.when(number >= _MOST_AHEAD)(lambda: plgpu.barrier_wait(self.heard.at[slot]))
        for i, value in enumerate((tile.group, tile.row, tile.rows, tile.column)):
            self.tiles[slot, i] = value
        plgpu.barrier_arrive(self.told.at[slot])

    def end(self, number: jax.Array) -> None:
        """Announces that there were so many tiles, and waits until all of that has been heard."""
        zero = jnp.int32(0)
        self.tell(number, Tile(zero, zero, jnp.int32(_END), zero))

        def wait(i, _):
            plgpu.barrier_wait(self.heard.at[lax.rem(i, jnp.int32(_MOST_AHEAD))])

        lax.fori_loop(jnp.maximum(number + 1 - _MOST_AHEAD, 0), number + 1, wait, None)

    def for_each(self, body: Callable[[Tile, Any], Any], carry: Any) -> Any:
        """Calls `carry = body(tile, carry)` for each tile that is announced; returns the last carry."""

        def hear(number: jax.Array) -> Tile:
            slot = lax.rem(number, jnp.int32(_MOST_AHEAD))
            plgpu.barrier_wait(self.told.at[slot])
            tile = Tile(*(self.tiles[slot, i] for i in range(_FIELDS)))
            plgpu.commit_smem()  # all threads have read it
            plgpu.barrier_arrive(self.heard.at[slot])
            return tile

        def next_tile(state):
            tile, number, carry = state
            carry = body(tile, carry)
            return hear(number + 1), number + 1, carry

        first = hear(jnp.int32(0)), jnp.int32(0), carry
        return lax.while_loop(lambda state: state[0].rows != _END, next_tile, first)[2]
