"""One function where no gradient is asked for, another one where one is; and likewise for `jax.vmap`."""

import functools
from collections.abc import Callable
from typing import Any

import jax


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def unless_differentiated(fast: Callable[..., Any], differentiable: Callable[..., Any], *args: Any) -> Any:
    """fast(*args), but differentiable(*args) inside `jax.grad` and its kin: for what works in serving only.

    Args:
      fast: needs no gradient. Like `differentiable`, it must not close over traced values.
      differentiable: gives the same result up to rounding.
      *args: pytrees of arrays.
    """
    del differentiable
    return fast(*args)


@functools.partial(unless_differentiated.defjvp, symbolic_zeros=True)
def _jvp(fast, differentiable, primals, tangents):
    del fast
    return jvp_of_moving(differentiable, primals, tangents)


def jvp_of_moving(function: Callable[..., Any], primals: Any, tangents: Any) -> tuple[Any, Any]:
    """`jax.jvp(function, primals, tangents)` of tangents some of which are no arrays, but zeros by their type.

    JAX would take these for ordinary zeros and compute the derivatives for them.
    """
    leaves = jax.tree.leaves(primals)
    structure: Any = jax.tree.structure(primals)
    directions = structure.flatten_up_to(tangents)
    moving = [i for i, direction in enumerate(directions) if isinstance(direction, jax.Array)]

    def of_moving(*values: jax.Array) -> Any:
        merged = list(leaves)
        for i, value in zip(moving, values, strict=True):
            merged[i] = value
        return function(*jax.tree.unflatten(structure, merged))

    return jax.jvp(of_moving, [leaves[i] for i in moving], [directions[i] for i in moving])


def unless_transformed(fast: Callable[..., Any], general: Callable[..., Any], *args: Any) -> Any:
    """fast(*args), but general(*args) inside `jax.grad`, `jax.vmap` and their kin: for what is fast as it stands only.

    Args:
      fast: needs neither a gradient nor a batch. Like `general`, it must not close over traced values.
      general: gives the same result up to rounding.
      *args: pytrees of arrays.
    """
    return unless_differentiated(functools.partial(_unless_batched, fast, general), general, *args)


def _unless_batched(fast: Callable[..., Any], general: Callable[..., Any], *args: Any) -> Any:
    @jax.custom_batching.custom_vmap
    def run(*args: Any) -> Any:
        return fast(*args)

    @run.def_vmap
    def _(axis_size: int, in_batched: Any, *args: Any) -> tuple[Any, Any]:
        in_axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, tuple(in_batched))
        result = jax.vmap(general, in_axes, axis_size=axis_size)(*args)
        return result, jax.tree.map(lambda _: True, result)

    return run(*args)
