"""The mesh axes that values vary over inside `jax.shard_map`, which checks that they fit together.

A kernel's result says nothing of them, and a gradient rule has to return what varies as the operand does. So operands
are made to vary alike before an operator begins, and the results of its kernels after.
"""

from typing import Any

import jax


def varying_axes(tree: Any) -> frozenset[str]:
    """The axes that any leaf varies over; none outside `jax.shard_map`, or where it does not check."""
    axes: frozenset[str] = frozenset()
    return axes.union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def vary_over[Tree](tree: Tree, axes: frozenset[str]) -> Tree:
    """`tree`, every leaf of which varies over `axes` at least."""

    def cast(leaf: jax.Array) -> jax.Array:
        missing = axes - varying_axes(leaf)
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def vary_alike[Tree](tree: Tree) -> Tree:
    """`tree`, every leaf of which varies over the axes that any of them varies over."""
    return vary_over(tree, varying_axes(tree))


def result_varying_as(operand: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
    """A kernel's result that varies over the axes that `operand` varies over, as `pallas_call` wants to know."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)
