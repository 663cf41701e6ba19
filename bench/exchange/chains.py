"""Several calls of one function in one program, each of which has to wait for the one before.

A single exchange of a few tokens takes as long as the launch of its program. In a chain the launch counts once:

    program = on_every_chip(chained(step, 16), mesh)
    wall_times(program, never(mesh), moving, fixed, calls=16)

A compiler would do the work of equal calls once, or all of them side by side. So each call gets operands that depend on
the result of the call before: 1 is added to their first element if a first element of that result exceeds a limit. The
limit is infinite, which only the caller knows; the operands stay as they are, and the last result is that of one call.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from bench.measure.every_chip import over_chips
from sharding.mesh import EXPERT_AXIS


def never(mesh: Mesh) -> jax.Array:
    """The limit that nothing exceeds, for each chip."""
    return over_chips(np.full(mesh.shape[EXPERT_AXIS], np.inf, np.float32), mesh)[:, 0]


def chained(step: Callable[[Any, Any], Any], length: int) -> Callable[..., Any]:
    """step(moving, fixed), `length` times on end, as a function of (limit, moving, fixed); gives the last result."""

    def chain(limit: jax.Array, moving: Any, fixed: Any) -> Any:
        def next_call(_: Any, state: tuple[Any, Any]) -> tuple[Any, Any]:
            moving, made = state
            firsts = [leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(made)]
            shift = (jnp.stack(firsts) > limit).any()
            moving = jax.tree.map(lambda leaf: _shifted(leaf, shift), moving)
            return moving, step(moving, fixed)

        shapes = jax.eval_shape(step, moving, fixed)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return lax.fori_loop(0, length, next_call, (moving, nothing))[1]

    return chain


def _shifted(x: jax.Array, shift: jax.Array) -> jax.Array:
    """`x` with 1 added to its first element where `shift`; in place, as the rest of it is not touched."""
    place = (0,) * x.ndim
    first = x[place].astype(jnp.float32) if x.dtype.itemsize == 1 else x[place]
    return lax.dynamic_update_slice(x, (first + shift).astype(x.dtype).reshape((1,) * x.ndim), place)
