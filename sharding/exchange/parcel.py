"""Rows with what travels beside them, for exchanges that are made of exchanges."""

import dataclasses
from typing import final

import jax

from pallas_kernels.quantize import Operand, QTensor


@final
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parcel:
    """What `BetweenChips` takes in place of rows, and then gives in place of them.

    Attributes:
      rows: [T, H], BF16, FP16 or float32, whose gradients these are; or a QTensor, which takes none.
      rounded: the same rows in 8 bits, if an earlier exchange rounded them: they travel then, not rounded again.
      beside: [T, B], travels as it is; None for nothing.
    """

    rows: Operand
    rounded: QTensor | None = None
    beside: jax.Array | None = None

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """That of the rows."""
        return self.rows.dtype
