"""An all-gather whose gradient is a reduce-scatter, on TPUs too."""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.wire import as_bytes

_COLUMNS = 256
"""XLA for TPUs scatters a sum along the last dimension only if each chip gets a multiple of so many columns.

Of any other share it makes an all-reduce and a slice.
"""


def gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """The parts of all chips along the mesh axes `axes`, in their order, one after the other in dimension `axis`."""
    if axis % x.ndim < x.ndim - 1 or x.shape[-1] % _COLUMNS == 0:
        return as_bytes(lambda x: lax.all_gather(x, axes, axis=axis, tiled=True), x)
    parts = as_bytes(lambda x: lax.all_gather(x, axes), x)
    return jnp.moveaxis(parts, 0, -2).reshape(*x.shape[:-1], -1)
