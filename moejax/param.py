"""A row of the table of parameters: all that there is to know about one of them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from sharding.partition import LogicalAxis

Kind = Literal["kernel", "router kernel", "bias", "state", "scalar"]
"""What initialises it, and what reads it: matrices of experts are rounded to 8 bits, state takes no gradient."""


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter.

    Attributes:
      shape: of the array.
      axes: the logical axis of each dimension, None for one that no mesh axis splits.
      kind: see `Kind`.
      init: (key, shape, dtype) -> array, of the whole array; None for what its kind says.
      stacked: leading dimensions that number matrices of their own; what is left is [in, out…].
    """

    shape: tuple[int, ...]
    axes: tuple[LogicalAxis | None, ...]
    kind: Kind
    init: Callable[..., Any] | None = None
    stacked: int = 0

    @property
    def has_halves(self) -> bool:
        """Whether these are gate and up, [..., H, 2, I]."""
        return self.axes[-2:] == (None, "mlp")

    def k_major(self, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        """A tuple with an entry for each dimension, in the order of 8-bit weights: the summed dimension comes last.

        [..., H, 2, I] -> [..., 2, I, H] for gate and up, [..., I, H] -> [..., H, I] for down.
        """
        if self.has_halves:
            *batch, hidden, halves, width = entries
            return (*batch, halves, width, hidden)
        *batch, rows, columns = entries
        return (*batch, columns, rows)
