"""Rounding to FP8 in kernels, with the results of `quantize`."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backend import Unsupported
from pallas_kernels.dtypes import FLOATS, is_float
from pallas_kernels.on_gpu.strips import spread
from pallas_kernels.quantize import scale_of

FP8 = ("float8_e4m3fn", "float8_e5m2")
"""What `FLOATS` are rounded to."""


def is_rounded(of: jnp.dtype, to: jnp.dtype) -> bool:
    """Whether the dtypes are of these."""
    return is_float(of) and to.name in FP8


def require_fp8(operator: str, of: jnp.dtype, to: jnp.dtype) -> None:
    """Raises Unsupported, naming the operator, for dtypes that are not of these."""
    if not is_rounded(of, to):
        raise Unsupported(
            f"{operator}: the kernel rounds {', '.join(FLOATS)} to {' or '.join(FP8)}, got {of.name} and {to.name}"
        )


def rounded_in_blocks(tile: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """A tile float32 [rows, width] that has the layout `strips.in_blocks`, in 8 bits, and a scale of each row."""
    # As integers, in the order of which NaN comes last: a float maximum over rows skips it in interpret mode.
    bits = lax.bitcast_convert_type(jnp.abs(tile), jnp.int32)
    scale = scale_of(lax.bitcast_convert_type(jnp.max(bits, axis=1), jnp.float32), dtype)
    # No value exceeds the largest of the dtype by more than what is rounded away: there is nothing to clip.
    return (tile * spread(1 / scale, tile.shape[1])).astype(dtype), scale
