"""What the sorts of keys are made of."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.on_gpu.wgmma import WGMMA_ROWS

TILE = WGMMA_ROWS
"""Keys along each side of a tile, in which all are compared with all."""

_STORES_AT_ONCE = 8


def in_tiles(keys: jax.Array, multiple: int = TILE) -> jax.Array:
    """Keys [N] as [tiles, 64], with −1 up to a multiple of `multiple` keys."""
    return jnp.pad(keys, (0, -keys.shape[0] % multiple), constant_values=-1).reshape(-1, TILE)


def scatter(out: Any, places: Any, values: Any) -> None:
    """out[places[i]] = values[i] for the 64 places that are not negative; both lie in shared memory."""
    plgpu.commit_smem()

    def store(i, _):
        some = [i * _STORES_AT_ONCE + j for j in range(_STORES_AT_ONCE)]
        for place, value in [(places[j], values[j]) for j in some]:  # all loaded before the first is stored

            @pl.when(place >= 0)
            def _(place=place, value=value):
                out[place] = value

    lax.fori_loop(0, TILE // _STORES_AT_ONCE, store, None)
    plgpu.commit_smem()


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """The shape of a result."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
