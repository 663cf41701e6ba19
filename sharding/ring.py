"""Rows from other chips, where nobody has the memory for all of them: every chip's pass by every other chip once."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sharding.collectives import as_bytes
from sharding.mesh import AnyMesh


def take_over_ring(x: jax.Array, rows: jax.Array, sharding: NamedSharding) -> jax.Array:
    """x[rows], split over chips as `x` is.

    XLA would gather all of x on every chip first. Here each chip holds two parts of x beside its part of the result.

    Args:
      x: [N, …].
      rows: int32 [M], in [0, N).
      sharding: of x, and of the result.

    Raises:
      ValueError: the chips that split the rows of x cannot share M evenly.
    """
    spec = PartitionSpec(*sharding.spec, *(None,) * (x.ndim - len(sharding.spec)))
    names = (spec[0],) if isinstance(spec[0], str) else tuple(spec[0] or ())
    chips = math.prod(sharding.mesh.shape[name] for name in names)
    if rows.size % chips:
        raise ValueError(f"the {chips} chips that share the slots cannot share {rows.size} of them evenly")
    return _take(x, rows, sharding.mesh, spec, names)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _take(x: jax.Array, rows: jax.Array, mesh: AnyMesh, spec: PartitionSpec, names: tuple[str, ...]) -> jax.Array:
    # Parts lie in the order of `names`, while a permutation has to number chips in the order of the mesh's axes.
    axes = tuple(name for name in mesh.axis_names if name in names)
    in_mesh = np.arange(math.prod(mesh.shape[name] for name in axes)).reshape([mesh.shape[name] for name in axes])
    number = in_mesh.transpose([axes.index(name) for name in names]).reshape(-1).tolist()
    towards = [(number[place], number[place - 1]) for place in range(len(number))]

    def on_chip(part: jax.Array, rows: jax.Array) -> jax.Array:
        if not names:
            return part[rows]
        here, chips, height = lax.axis_index(names), len(number), part.shape[0]
        count = rows.shape[0] // chips
        own = lax.dynamic_slice_in_dim(rows, here * count, count)

        def step(carry: tuple[jax.Array, jax.Array], distance: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            passing, found = carry
            is_there = own // height == (here + distance) % chips
            found = jnp.where(is_there.reshape(-1, *(1,) * (part.ndim - 1)), passing[own % height], found)
            return (as_bytes(lambda part: lax.ppermute(part, axes, towards), passing), found), None

        start = part, jnp.zeros_like(part[own % height])
        (_, found), _ = lax.scan(step, start, jnp.arange(chips))
        return found

    return jax.shard_map(on_chip, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)(x, rows)
