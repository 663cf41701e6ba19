"""A function on every chip of a mesh, as a program of arrays with a leading dimension for the chips."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.mesh import EXPERT_AXIS

_BY_CHIP = PartitionSpec(EXPERT_AXIS)


def on_every_chip(function: Callable[..., Any], mesh: Mesh, *specs: Any) -> Callable[..., Any]:
    """A program that runs `function` on each chip; what it takes and gives has a leading dimension for the chips.

    Args:
      function: of what one chip has, without that dimension.
      mesh: the chips.
      *specs: how the first arguments lie on the mesh, if they have no such dimension: a chip gets its part.
    """

    def on_chip(*args: Any) -> Any:
        own = jax.tree.map(lambda leaf: leaf[0], args[len(specs) :])
        return jax.tree.map(lambda leaf: leaf[None], function(*args[: len(specs)], *own))

    def program(*args: Any) -> Any:
        in_specs = *specs, *(_BY_CHIP for _ in args[len(specs) :])
        return jax.shard_map(on_chip, mesh=mesh, in_specs=in_specs, out_specs=_BY_CHIP, check_vma=False)(*args)

    return jax.jit(program)


def over_chips(values: Any, mesh: Mesh) -> jax.Array:
    """`values` [ep · n, …], the same in every process, as an array [ep, n, …] of which each chip has its part."""
    values = np.asarray(values)
    values = values.reshape(mesh.shape[EXPERT_AXIS], -1, *values.shape[1:])
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, _BY_CHIP), lambda index: values[index])
