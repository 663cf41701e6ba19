"""The plan: where each token–expert assignment goes, and where it comes from. The only contract between stages.

A token t that picks K groups makes K assignments; assignment (t, k) has the flat number a = t·K + k. A plan gives
every assignment a row, so that the rows of a group lie together:

    topk_ids     [[2, 0], [0, 2], [2, 1]]          T = 3 tokens, K = 2, three groups
    group_sizes  [2, 1, 3]
    offsets      [0, 2, 3]
    order        [1, 2, 5, 0, 3, 4]                row -> assignment
    inverse      [[3, 0], [1, 4], [5, 2]]          (t, k) -> row

Both directions are kept, so that packing rows and summing them back are gathers (deterministic, no atomics) and each
is the other's gradient. A row without an assignment has order −1; an assignment without a row has inverse −1.
"""

import dataclasses

import jax
import jax.numpy as jnp

_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Two-way map between T·K assignments and R rows in G groups (all int32).

    Attributes:
      order: [R] the assignment of each row, −1 for a row that has none.
      inverse: [T, K] the row of each assignment, −1 for one that has none.
      group_sizes: [G] rows in use per group.
      offsets: [G] first row of each group.
      dropped: [] assignments to a valid group for which the group's capacity left no row.
    """

    order: jax.Array
    inverse: jax.Array
    group_sizes: jax.Array
    offsets: jax.Array
    dropped: jax.Array


def make_plan(topk_ids: jax.Array, num_groups: int, *, capacity: int | None = None) -> Plan:
    """Sorts assignments by group with a stable counting sort.

    Args:
      topk_ids: integer [T, K], the group of each assignment. An id outside [0, num_groups) means "no group": the
        assignment gets no row and is not counted as dropped.
      num_groups: G.
      capacity: None packs the groups tightly (R = T·K rows, token order within a group). A number gives every group
        that many rows (R = G·capacity), and what does not fit is dropped: rows go to all first choices in token
        order, then to all second choices, and so on.

    Returns:
      The Plan. Equal inputs give equal plans, bit for bit.

    Raises:
      ValueError: `topk_ids` is not an integer matrix, or `num_groups` or `capacity` is not positive.
    """
    if topk_ids.ndim != 2 or not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        raise ValueError(f"topk_ids must be an integer array [T, K], got {topk_ids.dtype}{list(topk_ids.shape)}")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1 row a group, got {capacity}; use None for no limit")
    num_tokens, top_k = topk_ids.shape
    ids = jnp.where((topk_ids >= 0) & (topk_ids < num_groups), topk_ids, num_groups).astype(jnp.int32)
    if capacity is None:
        rank, counts = _rank_in_group(ids.reshape(-1), num_groups)
        rank = rank.reshape(num_tokens, top_k)
        group_sizes = counts
        offsets = jnp.cumsum(counts, dtype=jnp.int32) - counts
        num_rows = num_tokens * top_k
        has_row = ids < num_groups
    else:
        rank, counts = _rank_in_group(ids.T.reshape(-1), num_groups)
        rank = rank.reshape(top_k, num_tokens).T
        group_sizes = jnp.minimum(counts, capacity)
        offsets = capacity * jnp.arange(num_groups, dtype=jnp.int32)
        num_rows = num_groups * capacity
        has_row = (ids < num_groups) & (rank < capacity)
    inverse = jnp.where(has_row, offsets[jnp.minimum(ids, num_groups - 1)] + rank, -1)
    assignments = jnp.arange(num_tokens * top_k, dtype=jnp.int32)
    target = jnp.where(has_row, inverse, num_rows).reshape(-1)
    order = jnp.full(num_rows, -1, jnp.int32).at[target].set(assignments, mode="drop")
    return Plan(order, inverse, group_sizes, offsets, counts.sum(dtype=jnp.int32) - group_sizes.sum(dtype=jnp.int32))


def _rank_in_group(ids: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array]:
    """For each of [N] ids, how many equal ids come before it; and how often each of the `num_groups` ids occurs.

    Works in blocks of `_BLOCK` ids: a histogram per block, a prefix sum over blocks, and pairwise comparison inside a
    block. No step depends on the order in which threads run.
    """
    num_ids = ids.shape[0]
    if num_ids == 0:
        return ids, jnp.zeros(num_groups, jnp.int32)
    blocks = jnp.pad(ids, (0, -num_ids % _BLOCK), constant_values=num_groups).reshape(-1, _BLOCK)
    histogram = (blocks[:, :, None] == jnp.arange(num_groups + 1)).sum(1, dtype=jnp.int32)
    before_block = jnp.cumsum(histogram, axis=0, dtype=jnp.int32) - histogram
    earlier = jnp.tril(jnp.ones((_BLOCK, _BLOCK), bool), -1)
    in_block = ((blocks[:, :, None] == blocks[:, None, :]) & earlier).sum(2, dtype=jnp.int32)
    rank = jnp.take_along_axis(before_block, blocks, axis=1) + in_block
    return rank.reshape(-1)[:num_ids], histogram.sum(0, dtype=jnp.int32)[:num_groups]
