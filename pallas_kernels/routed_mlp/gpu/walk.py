"""Whose tiles are whose: those of a block, and in it those of its two teams.

A team is a warpgroup that multiplies and its half of the ring. The loading warpgroup fills the halves in turns.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.routed_mlp.gpu.sizes import Sizes


class Phases(NamedTuple):
    """What of the work a launch does. One does all of it; interpret mode, which has no semaphores, takes three."""

    up: bool = True
    rounding: bool = True
    down: bool = True


def turns_of(worker: jax.Array, count, workers: int) -> jax.Array:
    """How many of `count` pieces of work are a worker's, which are its number and every `workers`-th after it."""
    return lax.div(jnp.maximum(count - worker, 0) + (workers - 1), jnp.int32(workers))


def share_of(block: jax.Array, count, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """The first of the pieces of work that are a block's, of `count` that lie in a row, and how many they are."""
    begin, end = (lax.div((block + i) * count, jnp.int32(sizes.config.blocks)) for i in range(2))
    return begin, end - begin


def up_tile(index, sizes: Sizes) -> tuple[jax.Array, jax.Array]:
    """The place in the list of experts, and the tile of h, of a piece of work."""
    return lax.div(index, jnp.int32(sizes.up_tiles)), lax.rem(index, jnp.int32(sizes.up_tiles))


def down_hit(block: jax.Array, index, num_hits) -> jax.Array:
    """The place in the list of experts that a block comes to after `index` others: blocks begin at different ones."""
    return lax.rem(block + index, jnp.maximum(num_hits, 1))


def slot_of(team, step, sizes: Sizes):
    """The buffer of the ring that a step of a team uses."""
    own = sizes.config.slots_of_team
    return team * own + lax.rem(step, jnp.int32(own))
