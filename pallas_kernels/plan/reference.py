"""Counting sort in plain XLA: prefix sums and comparisons, so that no step depends on the order of threads."""

import jax
import jax.numpy as jnp

from pallas_kernels.tracing.running_sums import running_sums

_BLOCK = 128


def counting_sort(keys: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.plan.counting_sort`."""
    num_keys = keys.shape[0]
    is_valid = (keys >= 0) & (keys < num_groups)
    rank, group_sizes = _rank_in_group(jnp.where(is_valid, keys, num_groups), num_groups)
    offsets = running_sums(group_sizes) - group_sizes
    rows = jnp.where(is_valid, offsets[jnp.clip(keys, 0, num_groups - 1)] + rank, -1)
    target = jnp.where(rows < 0, num_keys, rows)
    order = jnp.full(num_keys, -1, jnp.int32).at[target].set(jnp.arange(num_keys, dtype=jnp.int32), mode="drop")
    return rows, order, group_sizes


def _rank_in_group(ids: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """For each of [N] ids, how many equal ids come before it; and how often each of the `num_groups` ids occurs.

    Works in blocks of `_BLOCK` ids: a histogram per block, a prefix sum over blocks, and pairwise comparison inside a
    block.
    """
    num_ids = ids.shape[0]
    if num_ids == 0:
        return ids, jnp.zeros(num_groups, jnp.int32)
    num_blocks = -(-num_ids // _BLOCK)
    blocks = jnp.pad(ids, (0, num_blocks * _BLOCK - num_ids), constant_values=num_groups).reshape(num_blocks, _BLOCK)
    histogram = (blocks[:, :, None] == jnp.arange(num_groups + 1)).sum(1, dtype=jnp.int32)
    before_block = running_sums(histogram) - histogram
    earlier = jnp.tril(jnp.ones((_BLOCK, _BLOCK), bool), -1)
    in_block = ((blocks[:, :, None] == blocks[:, None, :]) & earlier).sum(2, dtype=jnp.int32)
    rank = jnp.take_along_axis(before_block, blocks, axis=1) + in_block
    return rank.reshape(-1)[:num_ids], histogram.sum(0, dtype=jnp.int32)[:num_groups]
