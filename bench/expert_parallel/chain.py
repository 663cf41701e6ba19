"""Layers on end in one program, whose launch then hardly counts."""

from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import Mesh

from moejax import MoEConfig, MoEParams, moe

_SHARE = 1e-3
"""How much of a layer's result is added to the next call's tokens, which therefore has to wait for it."""


def chain_of_layers(config: MoEConfig, mesh: Mesh, length: int) -> Callable[[jax.Array, MoEParams], jax.Array]:
    """`length` layers on end, each of which has to wait for the one before."""

    def chain(x: jax.Array, params: MoEParams) -> jax.Array:
        def next_layer(_: jax.Array, x: jax.Array) -> jax.Array:
            return (x + _SHARE * moe(x, params, config, mesh=mesh)[0]).astype(x.dtype)

        return lax.fori_loop(0, length, next_layer, x)

    return jax.jit(chain)
