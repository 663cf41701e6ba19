"""Rows in 8 bits while they travel between chips, with scales of their own."""

import dataclasses

import jax

from pallas_kernels.quantize import QDtype, Rounded, Scaling, quantize


@dataclasses.dataclass(frozen=True)
class Wire:
    """Rows in 8 bits.

    Attributes:
      dtype: that of the products which the rows are for.
      scaling: of a row on its own, "1x128" or "per_row"; scales travel beside the rows in float32.
    """

    dtype: QDtype = "float8_e4m3fn"
    scaling: Scaling = "1x128"

    def rounded(self, rows: jax.Array) -> Rounded:
        """`rows` [T, H] with what travels of them."""
        return Rounded(rows, quantize(jax.lax.stop_gradient(rows), self.dtype, scaling=self.scaling))
