"""Telling the GPUs along mesh axes apart inside a kernel, and waiting for all of them."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl


def device(peer: jax.Array, axes: tuple[str, ...]) -> dict[str, jax.Array]:
    """Where the chip of a number along `axes`, the last of which counts fastest, is on them."""
    place = {}
    for axis in reversed(axes):
        size = jnp.int32(lax.axis_size(axis))
        place[axis] = lax.rem(peer, size)
        peer = lax.div(peer, size)
    return place


def leave(done, block: jax.Array, num_blocks: int, axes: tuple[str, ...]) -> None:
    """Tells all chips that this block has written to them what it had; the first block waits for all blocks of all."""
    chips = lax.axis_size(axes)
    for peer in range(chips):
        pl.semaphore_signal(done, 1, device_id=device(jnp.int32(peer), axes))

    @pl.when(block == 0)
    def _():
        pl.semaphore_wait(done, chips * num_blocks, decrement=False)
