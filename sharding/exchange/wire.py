"""Rows in 8 bits while they travel between chips, where nobody has rounded them before."""

import dataclasses

import jax

from pallas_kernels.quantize import QDtype, Rounded, Scaling
from pallas_kernels.quantize_rows import rounded


@dataclasses.dataclass(frozen=True)
class Wire:
    """How rows are rounded to travel.

    Attributes:
      dtype: of 8 bits.
      scaling: of a row on its own, "1x128" or "per_row"; scales travel beside the rows in float32.
    """

    dtype: QDtype = "float8_e4m3fn"
    scaling: Scaling = "1x128"

    def rounded(self, rows: jax.Array, *, backend: str = "auto") -> Rounded:
        """`rows` [T, H] with what travels of them."""
        return rounded(rows, self.dtype, scaling=self.scaling, backend=backend)
