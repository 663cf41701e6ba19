"""How Pallas names a chip of a mesh."""

import jax
import jax.numpy as jnp
from jax import lax


def device_id(peer: jax.Array, axes: tuple[str, ...]) -> dict[str, jax.Array]:
    """Pallas's `device_id` of chip `peer` along `axes`, the last of which counts fastest."""
    place = {}
    for axis in reversed(axes):
        size = jnp.int32(lax.axis_size(axis))
        place[axis] = lax.rem(peer, size)
        peer = lax.div(peer, size)
    return place
