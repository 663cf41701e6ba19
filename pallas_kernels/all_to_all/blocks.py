"""Which rows go from which chip to which: blocks of rows that lie together where they start and where they land."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks that one chip of `ep` sends and receives: int32 [ep, n] each, n for every peer, itself among them.

    The chips agree: what chip s has in row d of the first three, chip d has in row s of the last three.

    Attributes:
      send_sizes: rows of each block that this chip sends to chip d, 0 for none.
      send_offsets: its first row in x of this chip.
      put_offsets: its first row in the result of chip d.
      recv_sizes: rows of each block that chip s sends to this chip.
      take_offsets: its first row in x of chip s.
      recv_offsets: its first row in the result of this chip. No two blocks of a result share a row.
    """

    send_sizes: jax.Array
    send_offsets: jax.Array
    put_offsets: jax.Array
    recv_sizes: jax.Array
    take_offsets: jax.Array
    recv_offsets: jax.Array

    @property
    def back(self) -> "Blocks":
        """The blocks that bring every row back to where it came from."""
        return Blocks(
            self.recv_sizes,
            self.recv_offsets,
            self.take_offsets,
            self.send_sizes,
            self.put_offsets,
            self.send_offsets,
        )
