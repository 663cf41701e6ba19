"""A shard_map inside another one that checks what varies, which JAX cannot differentiate by itself."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.quantize import takes_gradient


def in_one_piece(on_chip: Any, sharded: Any, by_token: PartitionSpec, specs: Any) -> Any:
    """shard_map of `on_chip` inside another shard_map that checks what varies: its backward pass is one as well.

    JAX cannot carry what a forward pass keeps out of such a shard_map and into another, so that the backward pass runs
    the forward one again.

    Args:
      on_chip: (arrays, params) of a chip -> a tree of arrays of its tokens, and a tree of arrays equal on all chips.
      sharded: `jax.shard_map` with all but its function and specs.
      by_token: how arrays of tokens are split.
      specs: how params are split.

    Returns:
      The function of whole arrays and params.
    """
    in_specs, out_specs = (by_token, specs), (by_token, PartitionSpec())

    @jax.custom_vjp
    def run(arrays, params):
        return sharded(on_chip, in_specs=in_specs, out_specs=out_specs)(arrays, params)

    def forward(arrays, params):
        return run(arrays, params), (arrays, params)

    def backward(operands, cotangents):
        leaves, structure = jax.tree.flatten(operands)
        trained = [i for i, leaf in enumerate(leaves) if takes_gradient(leaf)]
        specs_of = jax.tree.leaves(_prefix(in_specs, operands), is_leaf=_is_spec)

        def both(leaves, cotangents):
            def again(values):
                merged = list(leaves)
                for i, value in zip(trained, values, strict=True):
                    merged[i] = value
                return _floating(on_chip(*jax.tree.unflatten(structure, merged)))

            _, pull = jax.vjp(again, [leaves[i] for i in trained])
            return pull(cotangents)[0]

        kept = _floating(cotangents)
        cotangent_specs = jax.tree.leaves(_prefix(out_specs, cotangents), is_leaf=_is_spec)
        kept_specs = [
            s for s, leaf in zip(cotangent_specs, jax.tree.leaves(cotangents), strict=True) if _has_tangent(leaf)
        ]
        pulled = sharded(both, in_specs=(specs_of, kept_specs), out_specs=[specs_of[i] for i in trained])(leaves, kept)
        gradients: list[Any] = [None] * len(leaves)
        for i, gradient in zip(trained, pulled, strict=True):
            gradients[i] = gradient
        return jax.tree.unflatten(structure, gradients)

    run.defvjp(forward, backward)
    return run


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _prefix(specs: Any, tree: Any) -> Any:
    """`specs`, a prefix of `tree`, with a spec for every leaf."""
    return jax.tree.map(lambda spec, part: jax.tree.map(lambda _: spec, part), specs, tree, is_leaf=_is_spec)


def _floating(tree: Any) -> list[Any]:
    """The leaves of `tree` that have a tangent."""
    return [leaf for leaf in jax.tree.leaves(tree) if _has_tangent(leaf)]


def _has_tangent(leaf: Any) -> bool:
    return leaf.dtype != jax.dtypes.float0 and jnp.issubdtype(leaf.dtype, jnp.floating)
