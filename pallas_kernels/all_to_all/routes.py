"""Which rows go from which chip to which, row by row: what one kernel of GPUs tells the next."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routes:
    """The routes of the rows that one chip of `ep` sends and receives.

    The chips agree: row n of chip s has the target d · R + q if and only if row q of chip d has the address s · N + n.

    Attributes:
      targets: int32 [N], for each row of x: chip · R + its row in the result of that chip; negative for none.
      addresses: int32 [R], for each row of the result: chip · N + the row of x on that chip from which it comes;
        negative for none.
      num_targets: int32 []; entries of `targets` from this one on are undefined, and mean none.
      num_addresses: int32 []; the same of `addresses`.
    """

    targets: jax.Array
    addresses: jax.Array
    num_targets: jax.Array
    num_addresses: jax.Array

    @property
    def back(self) -> "Routes":
        """The routes that bring every row back to where it came from."""
        return Routes(self.addresses, self.targets, self.num_addresses, self.num_targets)
