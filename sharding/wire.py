"""What rows are while they travel between chips: as they are, or in 8 bits with scales of their own."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import Operand, QDtype, Scaling, quantize
from pallas_kernels.tracing.target import target_platform


@dataclasses.dataclass(frozen=True)
class Wire:
    """Rows in 8 bits.

    Attributes:
      dtype: that of the products which the rows are for.
      scaling: of a row on its own, "1x128" or "per_row"; scales travel beside the rows in float32.
    """

    dtype: QDtype = "float8_e4m3fn"
    scaling: Scaling = "1x128"

    def load(self, rows: jax.Array) -> Operand:
        """`rows` [T, H] as they travel."""
        return quantize(rows, self.dtype, scaling=self.scaling)


def as_bytes(collective: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """collective(x), which only moves elements, for elements of any dtype.

    Not every collective library knows FP8, and bytes are bytes. TPUs do, and looking at them as others costs a pass.
    """
    if x.dtype.itemsize > 1 or x.dtype == jnp.uint8 or target_platform() == "tpu":
        return collective(x)
    moved = collective(jax.lax.bitcast_convert_type(x, jnp.uint8))
    return jax.lax.bitcast_convert_type(moved, x.dtype)
