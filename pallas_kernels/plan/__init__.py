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

from pallas_kernels.plan.counting_sort import Sorted, counting_sort
from pallas_kernels.plan.ids import as_ids, in_int32
from pallas_kernels.tracing.concrete import is_less
from pallas_kernels.tracing.running_sums import running_sums


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


def make_plan(topk_ids: jax.Array, num_groups: int, *, capacity: int | None = None, backend: str = "auto") -> Plan:
    """Sorts assignments by group with a stable counting sort.

    Args:
      topk_ids: integer [T, K], the group of each assignment. An id outside [0, num_groups) means "no group": the
        assignment gets no row and is not counted as dropped.
      num_groups: G.
      capacity: None packs the groups tightly (R = T·K rows, token order within a group). A number gives every group
        that many rows (R = G·capacity), and what does not fit is dropped: rows go to all first choices in token
        order, then to all second choices, and so on.
      backend: of the sort: "auto", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The Plan. Equal inputs give equal plans, bit for bit.

    Raises:
      ValueError: `topk_ids` is not an integer matrix, or `num_groups` or `capacity` is not positive.
    """
    check_choices(topk_ids, num_groups)
    if capacity is not None and is_less(capacity, 1):
        raise ValueError(f"capacity must be at least 1 row a group, got {capacity}; use None for no limit")
    num_tokens, top_k = topk_ids.shape
    ids = in_int32(topk_ids, num_groups)
    if capacity is None:
        return tight_plan(counting_sort(ids.reshape(-1), num_groups, backend=backend), (num_tokens, top_k))
    # First choices first.
    rows, order, group_sizes = counting_sort(ids.T.reshape(-1), num_groups, backend=backend)
    stride = jnp.asarray(jax.core.max_dim(num_tokens, 1), jnp.int32)
    order = jnp.where(order < 0, -1, order % stride * top_k + order // stride)
    plan = tight_plan(Sorted(rows.reshape(top_k, num_tokens).T, order, group_sizes), (num_tokens, top_k))
    padded = take_slots(plan, ids, capacity)
    dropped = group_sizes.sum(dtype=jnp.int32) - padded.group_sizes.sum(dtype=jnp.int32)
    return dataclasses.replace(padded, dropped=dropped)


def check_choices(topk_ids: jax.Array, num_groups: int) -> None:
    """Raises ValueError unless `topk_ids` is an integer matrix and `num_groups` positive."""
    if topk_ids.ndim != 2 or not jnp.issubdtype(topk_ids.dtype, jnp.integer):
        raise ValueError(f"topk_ids must be an integer array [T, K], got {topk_ids.dtype}{list(topk_ids.shape)}")
    if num_groups < 1:
        raise ValueError(f"num_groups must be at least 1, got {num_groups}")


def tight_plan(by_group: Sorted, shape: tuple[int, ...]) -> Plan:
    """The plan in which the T·K assignments of `shape` [T, K] lie as they are sorted."""
    rows, order, group_sizes = by_group
    offsets = running_sums(group_sizes) - group_sizes
    return Plan(order, rows.reshape(shape), group_sizes, offsets, jnp.zeros((), jnp.int32))


def take_slots(plan: Plan, topk_ids: jax.Array, slots: int, begin: jax.Array | int = 0) -> Plan:
    """The rows [begin, begin + slots) of every group of a tight plan, each group laid out with `slots` rows.

    Args:
      plan: a tight plan (capacity None) of `topk_ids`.
      topk_ids: integer [T, K], those of the plan.
      slots: rows that the result has for each group (R = G·slots).
      begin: the first row of each group to take; may be traced.

    Returns:
      A Plan in which assignments outside the range have no row; they are not counted as dropped.
    """
    num_groups, num_rows = plan.group_sizes.shape[0], plan.order.shape[0]
    begin = jnp.asarray(begin).astype(jnp.int32)
    group_sizes = jnp.clip(plan.group_sizes - begin, 0, slots)
    offsets = slots * jnp.arange(num_groups, dtype=jnp.int32)
    if num_rows == 0:
        return Plan(jnp.full(num_groups * slots, -1, jnp.int32), plan.inverse, group_sizes, offsets, plan.dropped)
    slot = jnp.arange(slots, dtype=jnp.int32)
    row = jnp.minimum(plan.offsets[:, None] + begin + slot, num_rows - 1)
    order = jnp.where(slot < group_sizes[:, None], plan.order[row], -1).reshape(-1)
    group = jnp.clip(in_int32(topk_ids, num_groups), 0, num_groups - 1)
    rank = plan.inverse - plan.offsets[group] - begin
    is_taken = (plan.inverse >= 0) & (rank >= 0) & (rank < slots)
    inverse = jnp.where(is_taken, offsets[group] + rank, -1)
    return Plan(order, inverse, group_sizes, offsets, plan.dropped)


def each_choice(plan: Plan) -> Plan:
    """The same plan with every assignment as a token of its own with one choice: inverse [T·K, 1]."""
    return dataclasses.replace(plan, inverse=plan.inverse.reshape(-1, 1))


def unsorted_plan(topk_ids: jax.Array) -> Plan:
    """The plan in which every assignment is a group of its own, with one row, or none where its id is negative.

    Args:
      topk_ids: int32 [T, K].
    """
    is_made = topk_ids.reshape(-1) >= 0
    numbers = jnp.arange(topk_ids.size, dtype=jnp.int32)
    order = jnp.where(is_made, numbers, -1)
    return Plan(order, order.reshape(topk_ids.shape), is_made.astype(jnp.int32), numbers, jnp.zeros((), jnp.int32))


__all__ = [
    "Plan",
    "as_ids",
    "check_choices",
    "each_choice",
    "in_int32",
    "make_plan",
    "take_slots",
    "tight_plan",
    "unsorted_plan",
]
