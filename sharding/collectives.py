"""Collectives in a form that XLA compiles well: gathers whose gradient is a reduce-scatter, moves of 8-bit elements."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tracing.target import target_platform

_COLUMNS = 256
"""XLA for TPUs scatters a sum along the last dimension only if each chip gets a multiple of so many columns.

Of any other share it makes an all-reduce and a slice.
"""


def gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """The parts of all chips along the mesh axes `axes`, in their order, one after the other in dimension `axis`.

    Its gradient is a reduce-scatter, on TPUs too.
    """
    if axis % x.ndim < x.ndim - 1 or x.shape[-1] % _COLUMNS == 0:
        return as_bytes(lambda x: lax.all_gather(x, axes, axis=axis, tiled=True), x)
    parts = as_bytes(lambda x: lax.all_gather(x, axes), x)
    return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)


def as_bytes(collective: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """collective(x), which only moves elements, for elements of any dtype.

    Not every collective library knows FP8, so elements of one byte travel as uint8. TPUs know it, and there the bitcast
    would cost a pass over the array.
    """
    if x.dtype.itemsize > 1 or x.dtype == jnp.uint8 or target_platform() == "tpu":
        return collective(x)
    moved = collective(jax.lax.bitcast_convert_type(x, jnp.uint8))
    return jax.lax.bitcast_convert_type(moved, x.dtype)
